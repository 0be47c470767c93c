# Copyright (c) ClinicalFMamba contributors
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#     http://www.apache.org/licenses/LICENSE-2.0
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from monai.data import CacheDataset, PersistentDataset
from monai.transforms import Compose, RandFlipd
from PIL import Image

from scripts.caching import cached_dataset
from scripts.transforms import LoadPaird


@pytest.fixture
def pairs(tmp_path: Path) -> list[dict]:
    files = [tmp_path / name for name in ("a.png", "b.png")]
    for seed, file in enumerate(files):
        Image.fromarray(np.random.RandomState(seed).randint(0, 255, (12, 10)).astype(np.uint8)).save(file)
    return [{"image": [str(file) for file in files], "case": "1"}]


def transform(colour_space: str = "ycbcr") -> Compose:
    return Compose([LoadPaird("image", chroma_key=None, colour_space=colour_space), RandFlipd("image", prob=0.0)])


def test_in_memory_or_in_a_folder(pairs: list[dict], tmp_path: Path) -> None:
    memory = cached_dataset(pairs, transform(), 1.0, 1)
    folder = cached_dataset(pairs, transform(), cache_dir=tmp_path / "cache")
    assert isinstance(memory, CacheDataset) and isinstance(folder, PersistentDataset)
    for _ in range(2):
        assert torch.equal(torch.as_tensor(memory[0]["image"]), torch.as_tensor(folder[0]["image"]))


def test_a_folder_serves_later_runs(pairs: list[dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = []
    call = LoadPaird.__call__

    def counted(self: LoadPaird, data: dict) -> dict:
        decoded.append(data["case"])
        return call(self, data)

    monkeypatch.setattr(LoadPaird, "__call__", counted)

    def load(*settings: str) -> torch.Tensor:
        dataset = cached_dataset(pairs, transform(*settings), cache_dir=tmp_path / "cache")
        return torch.as_tensor(dataset[0]["image"])

    first = load()
    assert torch.equal(load(), first) and len(decoded) == 1
    load("cielab")
    assert len(decoded) == 2, "other settings"
    Image.fromarray(np.zeros((12, 10), np.uint8)).save(pairs[0]["image"][0])
    assert not torch.equal(load(), first) and len(decoded) == 3, "other images under the same names"

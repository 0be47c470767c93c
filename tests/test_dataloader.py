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

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from monai.data import Dataset
from monai.transforms import Transform

from scripts.dataloader import EarlyDataLoader


class Touch(Transform):
    """Leaves a file that tells that an item was loaded, and by which process."""

    def __init__(self, folder: Path, fails: int | None = None) -> None:
        self.folder = folder
        self.fails = fails

    def __call__(self, number: int) -> torch.Tensor:
        if number == self.fails:
            os._exit(1)
        (self.folder / f"{number}").write_text(f"{os.getpid()}")
        return torch.full((2, 3), number)


def loader(folder: Path, num_workers: int, fails: int | None = None) -> EarlyDataLoader:
    data = Dataset(list(range(7)), Touch(folder, fails))
    return EarlyDataLoader(data, batch_size=1, num_workers=num_workers, prefetch_factor=1 if num_workers else None)


def wait_for(condition: Callable[[], bool], seconds: float = 30) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_all_come_in_order_and_again(tmp_path: Path, num_workers: int) -> None:
    batches = loader(tmp_path, num_workers)
    batches.start()
    for _ in range(2):
        assert [int(batch[0, 0, 0]) for batch in batches] == list(range(7))
    assert ({path.read_text() for path in tmp_path.iterdir()} == {f"{os.getpid()}"}) == (num_workers == 0)


def test_the_first_are_loaded_before_they_are_asked_for(tmp_path: Path) -> None:
    batches = loader(tmp_path, 2)
    assert not any(tmp_path.iterdir())
    batches.start()
    assert wait_for(lambda: len(list(tmp_path.iterdir())) == 2)
    # the pass that was begun is the one that is made
    loaded_by = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert len(list(batches)) == 7
    assert loaded_by.items() <= {path.name: path.read_text() for path in tmp_path.iterdir()}.items()


def test_one_more_is_received_while_one_is_used(tmp_path: Path) -> None:
    batches = iter(loader(tmp_path, 1))
    next(batches)
    # the one used, the one received, and the one that the process may be ahead
    assert wait_for(lambda: len(list(tmp_path.iterdir())) == 3)
    time.sleep(0.2)
    assert len(list(tmp_path.iterdir())) == 3
    batches.close()


def test_a_process_that_ends_is_an_error(tmp_path: Path) -> None:
    batches = loader(tmp_path, 1, fails=3)
    with pytest.raises(RuntimeError, match="worker"):
        list(batches)

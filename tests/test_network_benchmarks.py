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

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

from custom_nets.ops import BACKEND_VARIABLE

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def process(monkeypatch):
    """As a script of the folder finds it; the bundle's folder is on the path of tests anyway."""
    monkeypatch.setattr(sys, "path", [str(FOLDER), *sys.path])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setenv(BACKEND_VARIABLE, "")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def results(folder: Path, name: str):
    assert sorted(path.name for path in folder.iterdir()) == [f"{name}.json", f"{name}.md"]
    return (folder / f"{name}.md").read_text(), json.loads((folder / f"{name}.json").read_text())


class TestCost:
    @pytest.fixture
    def benchmark(self):
        return importlib.import_module("network_cost")

    @pytest.mark.parametrize("size", [(64, 64), (32, 32, 32)])
    def test_convolutions(self, benchmark, size):
        costs, voxels = benchmark.count(1, size), torch.Size(size).numel()
        taps = 3 ** len(size)
        # two multiply-adds for two images, 1 to 32 channels; image and weights in, features out
        assert costs["stem"] == [2 * 2 * voxels * 32 * taps, 2 * (2 * voxels * (1 + 32) + 32 * taps + 32)]
        # of the images, in the residual units, and to three shares and a correction
        convs = [(2, 32), *[(32, 32)] * {2: 8, 3: 2}[len(size)], (32, 4)]
        moved = sum(voxels * (n + m) + n * m * taps + m for n, m in convs)
        assert costs["refinement"] == [2 * voxels * taps * sum(n * m for n, m in convs), 2 * moved]
        # two products of 32 x 32 for each image
        assert costs["channel attention (CMCA)"][0] == 2 * 4 * voxels * 32 * 32
        assert "other" not in costs

    def test_what_grows_with_the_image_and_what_with_the_batch(self, benchmark):
        one, four, batch = (benchmark.count(*case) for case in ((1, (64, 64)), (1, (128, 128)), (4, (64, 64))))
        for stage in one:
            assert four[stage][0] == batch[stage][0] == 4 * one[stage][0]
            # but for the weights
            assert one[stage][1] < four[stage][1] <= batch[stage][1] <= 4 * one[stage][1]

    def test_scan(self, benchmark):
        u, A = torch.empty(2, 4, 10, 8), torch.empty(4, 8, 16)
        assert benchmark.scan_operations(u, u, A) == 2 * 4 * 10 * 8 * (7 * 16 + 5)
        assert benchmark.conv_operations(u[:, 0], torch.empty(4, 3, 8)) == 4 * 2 * 3 * 2 * 10 * 8

    def test_table(self, benchmark, tmp_path, monkeypatch):
        monkeypatch.setattr(benchmark, "CASES", [(1, (32, 32)), (1, (16, 16, 16))])
        monkeypatch.setattr(benchmark, "cpu_speed", lambda: (1e9, 1e9))
        benchmark.main(str(tmp_path))
        text, records = results(tmp_path, "network_cost")
        assert text.count("| **all** |") == 2 and text.count("| stem |") == 2
        for record in records:
            assert record["total"] == [sum(s[i] for s in record["stages"].values()) for i in (0, 1)]
            assert record["cpu_s"] > 0.999 * record["total"][0] / 1e9


class TestScaling:
    @pytest.fixture
    def benchmark(self):
        return importlib.import_module("scaling")

    def test_line(self, benchmark):
        line = benchmark.fit([1, 2, 5], [3, 5, 11])
        assert line == pytest.approx({"slope": 2, "intercept": 1, "r2": 1, "largest_deviation": 0}, abs=1e-9)
        assert benchmark.fit([1, 2, 4, 8], [1, 4, 16, 64])["largest_deviation"] > 0.3

    def test_table(self, benchmark, tmp_path):
        benchmark.main(str(tmp_path), device="cpu", sides=[16, 24])
        text, found = results(tmp_path, "scaling")
        assert "| 16^3 | 4,096 |" in text and set(found["fits"]) == {"ms", "peak MiB"}


def test_networks(tmp_path):
    importlib.import_module("networks").main(
        str(tmp_path), device="cpu", cases=[[1, [32, 32]]], training=[[1, [32, 32]]], loading=None, steps=2
    )
    text, found = results(tmp_path, "networks")
    forward = [r for r in found["results"] if r["measured"] == "forward"]
    assert [r["setting"] for r in forward] == ["plain, float32", "prepared, float32", "prepared, bfloat16"]
    assert forward[0]["difference"] == 0 and forward[1]["difference"] < 1e-4
    assert all(0 < r["difference"] < 5e-3 for r in forward[2:])
    assert all(r["seconds"] > 0 for r in found["results"])
    assert "| forward 32x32, batch 1 | plain, float32 |" in text
    assert "Loss) 32x32, batch 1 | plain, float32 |" in text


def test_inference_overlap(tmp_path):
    importlib.import_module("inference_overlap").main(
        str(tmp_path), device="cpu", cases=3, size=(24, 24, 16), report=False
    )
    text, found = results(tmp_path, "inference_overlap")
    assert "3 cases of 24x24x16; report False" in text
    assert min(found["seconds"].values()) >= 0 and found["seconds"]["network"] > 0

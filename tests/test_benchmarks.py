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

import csv
import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest
import torch

from custom_nets.nets import build_network
from scripts.phantom import write

pytestmark = pytest.mark.usefixtures("one_thread")

PATH = Path(__file__).resolve().parents[1] / "benchmarks" / "fusion_optimum.py"
SHARES = ("network / optimum", "share of the range")
RULES = ("copy MRI", "copy partner", "average", "maximum")
COLUMNS = ("loss", "ssim", "ssim_worse", "ms_ssim", "qabf", "scd", "fmi", "fsim", "vif", "psnr")


@pytest.fixture(scope="module")
def benchmark():
    path = list(sys.path)
    spec = importlib.util.spec_from_file_location("fusion_optimum", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path[:] = path
    return module


@pytest.fixture(scope="module")
def slices(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slices")
    write(str(folder), kind="slices", subjects=1, shape=(48, 48))
    return str(folder)


def table(folder):
    assert sorted(path.name for path in folder.iterdir()) == ["optimum.csv", "optimum.json", "optimum.md"]
    records = json.loads((folder / "optimum.json").read_text())["table"]
    with open(folder / "optimum.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    lines = (folder / "optimum.md").read_text().splitlines()
    assert len(rows) == len(records) == len(lines) - 2
    for record, row, line in zip(records, rows, lines[2:]):
        assert [row["task"], row["row"]] == [record["task"], record["row"]]
        assert f"| {record['task']} | {record['row']} | {record['n']} | {record['loss']:.3f} |" in line
        assert float(row["loss"]) == record["loss"]
    return {(record["task"], record["row"]): record for record in records}


def test_no_rule_beats_the_optimum(benchmark, slices, tmp_path, capsys):
    # small batches: a case must not depend on what it is optimised with
    benchmark.main(slices, output_dir=str(tmp_path), steps=60, batch_size=2)
    found = table(tmp_path)
    assert list(found) == [(task, row) for task in ("MRI-CT", "MRI-PET") for row in (*RULES, "optimum")]
    for task in ("MRI-CT", "MRI-PET"):
        for rule in RULES:
            assert found[task, "optimum"]["loss"] < 0.95 * found[task, rule]["loss"]
            assert found[task, rule]["n"] == 3
        assert found[task, "copy MRI"]["psnr"] is None, "infinite, which JSON does not know"
    assert "| MRI-CT | optimum | 3 |" in capsys.readouterr().out


def test_more_steps_come_closer(benchmark, slices, tmp_path):
    losses = []
    for steps in (5, 20, 80):
        benchmark.main(slices, output_dir=str(tmp_path / str(steps)), steps=steps, limit=1)
        losses.append(table(tmp_path / str(steps))["MRI-CT", "optimum"]["loss"])
    assert losses[0] > losses[1] > losses[2]


@pytest.mark.parametrize(
    "loss, of_metrics",
    [
        ("ssim", lambda row: 1 - row["ssim"]),
        ("joint", lambda row: 20 * (1 - row["ssim"]) - row["scd"] - 5 * row["qabf"]),
        ({"_target_": "scripts.losses.EdgePreservationLoss"}, lambda row: -row["qabf"]),
    ],
)
def test_another_loss_is_what_is_minimised(benchmark, slices, tmp_path, loss, of_metrics):
    benchmark.main(slices, output_dir=str(tmp_path), steps=60, limit=1, loss=loss, modalities=("MRI", "CT"))
    found = table(tmp_path)
    maximum, optimum = found["MRI-CT", "maximum"], found["MRI-CT", "optimum"]
    # the metrics are those of 8-bit images
    assert maximum["loss"] == pytest.approx(of_metrics(maximum), abs=0.2)
    assert optimum["loss"] < min(found["MRI-CT", rule]["loss"] for rule in RULES)
    assert of_metrics(optimum) < of_metrics(maximum)


def test_unknown_loss(benchmark, slices, tmp_path):
    with pytest.raises(
        ValueError, match="loss must be one of \\('paper', 'joint', 'ssim'\\) or a MONAI config, got 'l1'"
    ):
        benchmark.main(slices, output_dir=str(tmp_path / "out"), loss="l1")
    assert not (tmp_path / "out").exists()


def test_attainable_share(benchmark):
    assert benchmark.attainable_share(0.75, floor=0.7, optimum=0.8) == pytest.approx(0.5)
    assert benchmark.attainable_share(-2.9, floor=1.0, optimum=-3.0) == pytest.approx(3.9 / 4)
    assert benchmark.attainable_share(0.6, floor=0.7, optimum=0.8) == pytest.approx(-1)
    assert math.isnan(benchmark.attainable_share(0.7, floor=0.7, optimum=0.7))


def test_a_network_is_set_beside_it(benchmark, slices, tmp_path):
    settings = {"spatial_dims": 2, "channels": [8, 8, 16], "latent_depth": 1}
    torch.save(build_network("clinicalfmamba", **settings).state_dict(), tmp_path / "model.pt")
    network = {"_target_": "custom_nets.nets.build_network", "name": "clinicalfmamba", **settings}
    (tmp_path / "config.json").write_text(json.dumps({"network_def": network}))
    options = {"weights": str(tmp_path / "model.pt"), "config": str(tmp_path / "config.json")}
    # the pairs of one split of a list, the optimum from its file names
    pairs = [{"image": [f"MRI-CT/{name}/100{n}.png" for name in ("MRI", "CT")]} for n in (1, 2, 3)]
    (tmp_path / "list.json").write_text(json.dumps({"training": pairs[:1], "test": pairs[1:]}))
    out = tmp_path / "out"
    benchmark.main(slices, str(tmp_path / "list.json"), output_dir=str(out), steps=20, **options)
    found = table(out)
    assert list(found) == [("MRI-CT", row) for row in (*RULES, "optimum", "network", *SHARES)]
    average, optimum, untrained = (found["MRI-CT", row] for row in ("average", "optimum", "network"))
    ratio, share = (found["MRI-CT", row] for row in SHARES)
    assert optimum["n"] == 2
    for column in COLUMNS:
        assert ratio[column] == pytest.approx(untrained[column] / optimum[column])
        attained, attainable = untrained[column] - average[column], optimum[column] - average[column]
        assert share[column] == pytest.approx(attained / attainable)
    assert ratio["loss"] > 1, "nothing was trained"

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
import json
import math
import socket

import ignite.distributed as idist
import pytest
import torch
from monai.data import DataLoader, Dataset, MetaTensor
from monai.engines import SupervisedEvaluator
from monai.handlers import IgniteMetricHandler, from_engine

from scripts.handlers import CaseMetricsSaver, write_case_metrics
from scripts.metrics import EntropyMetric, FusionPSNRMetric

# fused = mean of the sources (0, v): the PSNR against both is -20 log10(v / 2)
CASES = {"c": 0.2, "a": 0.4, "b": 0.8, "d": 0.1, "e": 1.0}
PSNR = {case: -20 * math.log10(value / 2) for case, value in CASES.items()}


class Mean(torch.nn.Module):
    def forward(self, x):
        return x.mean(dim=1, keepdim=True)


def items(names):
    for name in names:
        image = MetaTensor(torch.stack([torch.zeros(16, 16), torch.full((16, 16), CASES[name])]))
        image.meta.update({"case": name, "filename_or_obj": f"/data/{name}/mri.png"})
        yield {"image": image, "label": image.clone()}


def evaluate(folder, names, epochs=1, **kwargs):
    evaluator = SupervisedEvaluator(
        device=torch.device("cpu"),
        val_data_loader=DataLoader(Dataset(list(items(names))), batch_size=2),
        network=Mean(),
        key_val_metric={
            "psnr": IgniteMetricHandler(FusionPSNRMetric(), output_transform=from_engine(["pred", "label"]))
        },
        additional_metrics={
            "entropy": IgniteMetricHandler(EntropyMetric(), output_transform=from_engine(["pred", "label"]))
        },
        val_handlers=[CaseMetricsSaver(str(folder))],
        **kwargs,
    )
    for _ in range(epochs):
        evaluator.run()


def read(folder):
    with open(folder / "metrics.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    return rows, json.loads((folder / "metrics.json").read_text())


def check(folder):
    rows, report = read(folder)
    assert [row["case"] for row in rows] == [*sorted(CASES), "mean", "std"]
    for row in rows[:-2]:
        assert float(row["psnr"]) == pytest.approx(PSNR[row["case"]], rel=1e-4)
        assert float(row["entropy"]) == 0
    values = torch.tensor(list(PSNR.values()))
    assert float(rows[-2]["psnr"]) == pytest.approx(values.mean().item(), rel=1e-4)
    assert float(rows[-1]["psnr"]) == pytest.approx(values.std().item(), rel=1e-4)
    assert report["metrics"]["psnr"]["mean"] == pytest.approx(values.mean().item(), rel=1e-4)
    assert report["metrics"]["psnr"]["n"] == len(CASES)
    assert {r["case"]: r["psnr"] for r in report["cases"]} == pytest.approx(PSNR, rel=1e-4)
    assert sorted(p.name for p in folder.iterdir()) == ["metrics.csv", "metrics.json"], "temporary files are left"


@pytest.mark.parametrize("decollate", [True, False])
def test_after_a_monai_evaluator(tmp_path, decollate):
    evaluate(tmp_path / "new", CASES, decollate=decollate)
    check(tmp_path / "new")


def test_a_second_run_replaces_the_first(tmp_path):
    evaluate(tmp_path, CASES, epochs=2)
    check(tmp_path)


def _evaluate_rank(rank, folder, port):
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    # an uneven share: three cases and two
    evaluate(folder, list(CASES)[rank::2])
    idist.finalize()


def test_two_processes_write_one_table(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    torch.multiprocessing.spawn(_evaluate_rank, args=(tmp_path, port), nprocs=2)
    check(tmp_path)


@pytest.mark.parametrize("path, name", [("/x/16003.png", "16003"), ("/x/a.b_t2.nii.gz", "a.b_t2")])
def test_cases_without_a_name_are_called_by_their_file(tmp_path, path, name):
    (item,) = items(["a"])
    item["image"].meta.update({"case": "", "filename_or_obj": path})
    evaluator = SupervisedEvaluator(
        device=torch.device("cpu"),
        val_data_loader=DataLoader(Dataset([item])),
        network=Mean(),
        key_val_metric={
            "psnr": IgniteMetricHandler(FusionPSNRMetric(), output_transform=from_engine(["pred", "label"]))
        },
        val_handlers=[CaseMetricsSaver(str(tmp_path))],
    )
    evaluator.run()
    assert read(tmp_path)[0][0]["case"] == name


def test_what_is_not_finite(tmp_path):
    write_case_metrics(
        tmp_path, ["a", "b"], {"psnr": torch.tensor([[math.inf], [20.0]]), "scd": torch.tensor([math.nan, 1.0])}
    )
    rows, report = read(tmp_path)
    assert rows[0] == {"case": "a", "psnr": "inf", "scd": "nan"}
    assert report["cases"][0] == {"case": "a", "psnr": None, "scd": None}
    assert report["metrics"]["scd"] == {"mean": 1.0, "std": None, "n": 1}


def test_channels_are_averaged(tmp_path):
    write_case_metrics(tmp_path, ["a"], {"m": torch.tensor([[1.0, 3.0]])})
    assert read(tmp_path)[1]["cases"] == [{"case": "a", "m": 2.0}]


def test_values_must_match_the_cases(tmp_path):
    with pytest.raises(ValueError, match="'psnr' has 3 values for 2 cases"):
        write_case_metrics(tmp_path, ["a", "b"], {"psnr": torch.zeros(3, 1)})

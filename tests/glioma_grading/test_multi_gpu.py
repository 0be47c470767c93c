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
"""What runs on several GPUs, on two CPU processes."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from grading import BUNDLE, COMMON, CONFIGS, ENVIRONMENT, TRAIN, names, run

from scripts.predictions import read_predictions

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"]


def run_two(*configs, **settings):
    """The device and who tells what are for the configs to choose."""
    words = [*TORCHRUN, "monai.bundle", "run", "--bundle_root", str(BUNDLE)]
    words += ["--config_file", str([f"{CONFIGS / name}.json" for name in configs])]
    for key, value in settings.items():
        words += [f"--{key}", str(value)] if key not in ("device", "progress", "tensorboard") else []
    # a machine with GPUs is made to look like one without
    environment = ENVIRONMENT | {"CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, "\n".join(line for line in result.stderr.splitlines() if "Error" in line)[-4000:]
    return result.stdout


@pytest.mark.slow
def test_train_and_evaluate(few_patients, tiny_fusion, tmp_path):
    """From fused images, which the processes make together."""
    shared = {"dataset_dir": few_patients, "cache_dir": tmp_path / "cache", "source": "fused", **tiny_fusion[3]}
    told = run_two("train", "multi_gpu_train", output_dir=tmp_path / "run", num_folds=2, **shared, **TRAIN)
    assert told.count("Epoch[1] Metrics -- val_auc") == 1, "one process tells"
    files = [name for name in names(tmp_path / "run") if not name.startswith("events")]
    assert files == ["checkpoint_last.pt", "folds.json", "model.pt", "operating_point.json"]
    last = torch.load(tmp_path / "run" / "checkpoint_last.pt", weights_only=True)
    # 7 patients to train on: each process has 4 of them, in one batch
    assert last["trainer"]["iteration"] == 1 and not any(key.startswith("module.") for key in last["model"])
    assert len(list((tmp_path / "cache").glob("*.npz"))) == 9, "the patients of training and validation, once"

    # nine patients for two
    shared |= {**COMMON, "folds_file": tmp_path / "run" / "folds.json", "checkpoint": tmp_path / "run" / "model.pt"}
    run_two("train", "evaluate", "multi_gpu_evaluate", output_dir=tmp_path / "two", **shared)
    shared = {key: str(value) if key.endswith(("dir", "file", "point")) else value for key, value in shared.items()}
    run("train", "evaluate", output_dir=str(tmp_path / "one"), progress=False, **shared)
    one, two = (read_predictions(tmp_path / name / "predictions.csv") for name in ("one", "two"))
    assert len(one) == 9 and [record["case"] for record in two] == [record["case"] for record in one]
    for record, other in zip(one, two):
        assert other["probability"] == pytest.approx(record["probability"], abs=1e-4)
    assert (tmp_path / "two" / "metrics.json").is_file()

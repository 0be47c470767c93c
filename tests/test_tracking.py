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
"""What a training run tells MLflow."""

from __future__ import annotations

import sys
from pathlib import Path

import monai
import pytest
import torch
from monai.bundle import ConfigWorkflow

from scripts.phantom import write

BUNDLE = Path(__file__).resolve().parents[1] / "bundles" / "clinicalfmamba_fusion"
SETTINGS = {"network_def#channels": [8, 8, 16], "network_def#latent_depth": 1, "device": "cpu", "num_workers": 0}
SETTINGS |= {"max_epochs": 2, "val_interval": 1, "crop_size": [32, 32]}


@pytest.fixture(autouse=True)
def untouched_process(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    yield
    monai.utils.set_determinism(seed=None)


def test_mlflow(tmp_path):
    """As `--tracking mlflow`; the database is where MONAI's default settings have it."""
    mlflow = pytest.importorskip("mlflow", reason="MLflow brings some 60 packages: pip install mlflow")
    write(str(tmp_path / "data"), kind="slices", subjects=4, shape=(48, 48))
    out = tmp_path / "run"
    flow = ConfigWorkflow(
        str(BUNDLE / "configs" / "train.json"),
        workflow_type="train",
        logging_file=False,
        tracking="mlflow",
        bundle_root=str(BUNDLE),
        dataset_dir=str(tmp_path / "data"),
        output_dir=str(out),
        **SETTINGS,
    )
    flow.initialize()
    assert flow.check_properties() == []
    flow.run()
    flow.finalize()

    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{out / 'mlruns.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("monai_experiment").experiment_id])
    assert run.info.status == "FINISHED"

    def history(name):
        return {metric.step: metric.value for metric in client.get_metric_history(run.info.run_id, name)}

    ssim = history("val_ssim")
    assert list(ssim) == [1, 2] and len(history("train_loss")) == 2 * 3 and len(history("val_psnr")) == 2
    best = torch.load(out / "checkpoint_last.pt", weights_only=True)["best_model"]["best_metric"]
    assert max(ssim.values()) == pytest.approx(best)
    assert len(list(out.glob("config_*.json"))) == 1, "what was run"

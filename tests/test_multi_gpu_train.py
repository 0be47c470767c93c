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
"""Two processes train as one process with twice the batch does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from scripts.phantom import write

BUNDLE = Path(__file__).resolve().parents[1] / "bundles" / "clinicalfmamba_fusion"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
ENVIRONMENT |= {"CUDA_VISIBLE_DEVICES": ""}

# cases in their order, whole: what is left is what the processes do to each other
FIXED = {
    **{"network_def#channels": [8, 8, 16], "network_def#latent_depth": 1, "num_workers": 0},
    **{"max_epochs": 3, "val_interval": 1, "refinement": 0},
    "train#random_transforms": [{"_target_": "EnsureTyped", "keys": "image", "track_meta": False}],
}
ONE = {"train#sampler": {"_target_": "torch.utils.data.SequentialSampler", "data_source": "@train#dataset"}}
TWO = {"train#sampler": {"_target_": "DistributedSampler", "dataset": "@train#dataset", "shuffle": False}}

# Trains, and writes every step's loss and every validation's metrics, as this process has them. Batch norms keep their
# first statistics: several GPUs share those of a batch by SyncBatchNorm, which PyTorch does not have for CPUs.
CURVE = """
import json
import os
import sys
from ignite.engine import Events
from monai.bundle import ConfigWorkflow
from monai.handlers import from_engine
from torch.nn.modules.batchnorm import _BatchNorm

files, overrides = json.loads(sys.argv[1])
flow = ConfigWorkflow(files, workflow_type="train", **overrides)
flow.initialize()
for module in flow.network_def.modules():
    if isinstance(module, _BatchNorm):
        module.eval().train = lambda mode: None
steps, validations = [], []
get_loss = from_engine(["loss"], first=True)
trainer, evaluator = (flow.parser.get_parsed_content(name) for name in ("train#trainer", "validate#evaluator"))
trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: steps.append(float(get_loss(engine.state.output))))
evaluator.add_event_handler(Events.COMPLETED, lambda engine: validations.append(dict(engine.state.metrics)))
flow.run()
flow.finalize()
with open(overrides["output_dir"] + f"/curve{os.environ.get('RANK', 0)}.json", "w") as stream:
    json.dump([steps, validations], stream)
"""


def train(launch, configs, folder, **overrides):
    files = [str(BUNDLE / "configs" / f"{name}.json") for name in configs]
    settings = {**FIXED, "bundle_root": str(BUNDLE), "output_dir": str(folder), **overrides}
    script = folder.parent / "curve.py"
    script.write_text(CURVE)
    command = [sys.executable, *launch, str(script), json.dumps([files, settings])]
    result = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-4000:]
    curves = [json.loads(path.read_text()) for path in sorted(folder.glob("curve*.json"))]
    return [steps for steps, _ in curves], [validations for _, validations in curves]


@pytest.mark.slow
def test_same_curve_as_one_process_with_twice_the_batch(tmp_path):
    write(str(tmp_path / "data"), kind="slices", subjects=4, shape=(32, 32))
    data = {"dataset_dir": str(tmp_path / "data")}
    (expected,), (validated,) = train([], ["train"], tmp_path / "one", **data, **ONE, batch_size=4)
    steps, validations = train(TORCHRUN, ["train", "multi_gpu_train"], tmp_path / "two", **data, **TWO, batch_size=2)

    assert len(expected) == 3 * 3 and len(steps) == 2
    assert all(last < 0.99 * first for first, last in zip(expected[:3], expected[-3:])), "it learns from every batch"
    # what is equal is so within 1e-3, as below
    assert not np.allclose(*steps, rtol=1e-3), "each process has cases of its own"
    np.testing.assert_allclose(np.mean(steps, axis=0), expected, rtol=1e-3)
    for ranks in validations:
        assert ranks == [pytest.approx(metrics, rel=1e-3) for metrics in validated]
    one, two = (torch.load(tmp_path / name / "model.pt", weights_only=True) for name in ("one", "two"))
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, atol=2e-4, rtol=1e-2)

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
"""What the tests of the grading bundle share: where it is, and runs of it with small networks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from monai.bundle import ConfigWorkflow

ROOT = Path(__file__).resolve().parents[2]
BUNDLE = ROOT / "bundles" / "glioma_grading"
FUSION = ROOT / "bundles" / "clinicalfmamba_fusion"
CONFIGS = BUNDLE / "configs"

TINY_FUSION = {"network_def#channels": [8, 8, 16], "network_def#latent_depth": 1, "network_def#refinement": 1}
NETWORK = {"network_def#block_inplanes": [8, 16, 32, 64], "network_def#conv1_t_size": 3}
COMMON = {**NETWORK, "device": "cpu", "num_workers": 0, "image_size": [48, 56], "num_slices": 4}
QUIET = {"tensorboard": False, "progress": False}
# brains of 48 pixels, not 240, are moved and turned less
TRAIN = {**COMMON, **QUIET, "batch_size": 4, "slices_per_case": 2, "learning_rate": 2e-3, "scale_range": [0.0, 0.0]}
TRAIN |= {"translate_range": [2, 2], "max_epochs": 1}
TRAIN_3D = {**TRAIN, "scale_range": [0.0, 0.0, 0.0], "translate_range": [2, 2, 0]}

ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}


def workflow(*configs, kind="train", run_id="run", **overrides):
    files = [str(CONFIGS / f"{name}.json") for name in configs]
    settings = {"bundle_root": str(BUNDLE), **overrides}
    flow = ConfigWorkflow(files, logging_file=False, workflow_type=kind, run_id=run_id, **settings)
    flow.initialize()
    return flow


def run(*configs, **overrides):
    flow = workflow(*configs, **overrides)
    flow.run()
    flow.finalize()
    return flow


def run_command(*configs, cwd, bundle=BUNDLE, run_id=None, **overrides):
    """What users type: ``python -m monai.bundle run [ID] --config_file ... --key value``."""
    files = [str(bundle / "configs" / f"{name}.json") for name in configs]
    words = [sys.executable, "-m", "monai.bundle", "run", *([run_id] if run_id else []), "--bundle_root", str(bundle)]
    words += ["--config_file", files[0] if len(files) == 1 else str(files)]
    for key, value in overrides.items():
        words += [f"--{key}", str(value)]
    return subprocess.run(words, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=600)


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())

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
"""The unit test of the bundle in the Model Zoo's own style: train one epoch, evaluate, infer."""

from __future__ import annotations

import sys
import tempfile
import unittest
from pathlib import Path

import monai
import torch
from monai.bundle import ConfigWorkflow
from parameterized import parameterized

from scripts.phantom import write

BUNDLE = Path(__file__).resolve().parents[1] / "bundles" / "clinicalfmamba_fusion"
SMALL = {"network_def#channels": [8, 8, 16], "network_def#latent_depth": 1, "device": "cpu", "num_workers": 0}

CASES = [
    ("slices", [], (48, 48), {"crop_size": [32, 32]}),
    ("volumes", ["volume"], (24, 20, 22), {"crop_size": [16, 16, 8], "batch_size": 2}),
]


class TestClinicalFMambaFusion(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        # workflows change these
        self.addCleanup(setattr, sys, "path", list(sys.path))
        self.addCleanup(setattr, sys, "excepthook", sys.excepthook)
        self.addCleanup(torch.set_num_threads, torch.get_num_threads())
        self.addCleanup(monai.utils.set_determinism, seed=None)
        torch.set_num_threads(1)

    def check_workflow(self, configs, workflow_type, **overrides):
        files = [str(BUNDLE / "configs" / f"{name}.json") for name in configs]
        settings = SMALL | {"bundle_root": str(BUNDLE), "dataset_dir": str(self.folder / "data")} | overrides
        workflow = ConfigWorkflow(
            config_file=files,
            meta_file=str(BUNDLE / "configs" / "metadata.json"),
            logging_file=False,
            workflow_type=workflow_type,
            **settings,
        )
        workflow.initialize()
        self.assertEqual(workflow.check_properties(), [])
        workflow.run()
        workflow.finalize()

    @parameterized.expand(CASES)
    def test_train_evaluate_infer(self, kind, added, shape, train):
        write(str(self.folder / "data"), kind=kind, subjects=4, shape=shape)
        runs = {name: str(self.folder / name) for name in ("train", "evaluate", "infer")}
        train = {"max_epochs": 1, "val_interval": 1, "output_dir": runs["train"], **train}
        self.check_workflow(["train", *added], "train", **train)
        weights = {"checkpoint": str(self.folder / "train" / "model.pt")}
        evaluate = {"datalist": str(self.folder / "train" / "datalist.json"), "output_dir": runs["evaluate"]}
        self.check_workflow(["train", "evaluate", *added], "train", **evaluate, **weights)
        self.assertTrue((self.folder / "evaluate" / "metrics.csv").is_file())
        self.check_workflow(["inference", *added], "infer", output_dir=runs["infer"], **weights)
        fused = list((self.folder / "infer").glob("*/*_fused.*"))
        self.assertEqual(len(fused), 4 if added else 24)


if __name__ == "__main__":
    unittest.main()

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

import json
import sys
import tempfile
import unittest
from pathlib import Path

import monai
import torch
from monai.bundle import ConfigWorkflow
from parameterized import parameterized

from scripts.phantom import write

BUNDLE = Path(__file__).resolve().parents[2] / "bundles" / "glioma_grading"
SMALL = {
    **{"network_def#block_inplanes": [8, 16, 32, 64], "network_def#conv1_t_size": 3, "source": "t2_flair"},
    **{"image_size": [48, 56], "num_slices": 4, "device": "cpu", "num_workers": 0},
}

CASES = [
    ("slices", [], {"scale_range": [0.0, 0.0], "translate_range": [2, 2]}),
    ("volumes", ["volume"], {"scale_range": [0.0, 0.0, 0.0], "translate_range": [2, 2, 0]}),
]


class TestGliomaGrading(unittest.TestCase):
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
        write(str(self.folder / "data"), num_patients=18, seed=100)

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
    def test_train_evaluate_infer(self, _, added, train):
        runs = {name: str(self.folder / name) for name in ("train", "evaluate", "infer")}
        train = {"max_epochs": 1, "num_folds": 2, "batch_size": 4, "output_dir": runs["train"], **train}
        self.check_workflow(["train", *added], "train", **train)
        weights = {"checkpoint": str(self.folder / "train" / "model.pt")}
        evaluate = {"folds_file": str(self.folder / "train" / "folds.json"), "output_dir": runs["evaluate"]}
        self.check_workflow(["train", "evaluate", *added], "train", **evaluate, **weights)
        report = json.loads((self.folder / "evaluate" / "metrics.json").read_text())
        self.assertEqual(sum(report["patients"].values()), 9)
        self.check_workflow(["inference", *added], "infer", output_dir=runs["infer"], **weights)
        self.assertEqual(len(json.loads((self.folder / "infer" / "grades.json").read_text())), 18)


if __name__ == "__main__":
    unittest.main()

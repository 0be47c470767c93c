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

import json

import pytest
import torch
from grading import COMMON, FUSION, TINY_FUSION, TRAIN, TRAIN_3D, run, workflow

from custom_nets.nets import ClinicalFMambaClassifier, build_network
from scripts.fusion import FusionBundle
from scripts.joint import JointLoss, JointNetwork, load_encoder, load_parts

TINY = {key.split("#")[1]: value for key, value in TINY_FUSION.items()}
ENCODER = {"channels": [8, 8, 16], "latent_depth": 1}
JOINT = {f"network_def#fusion#{key}": value for key, value in TINY.items()}
JOINT |= {
    f"network_def#grader#{key}": value for key, value in {"block_inplanes": [8, 8, 8, 8], "conv1_t_size": 3}.items()
}
MAMBA = {f"network_def#{key}": value for key, value in ENCODER.items()}


def without_network(settings):
    return {key: value for key, value in settings.items() if not key.startswith("network_def")}


@pytest.fixture
def fusion(tiny_fusion):
    weights, configs = tiny_fusion[2]["fusion_weights"], ("configs/train.json", "configs/inference.json")
    return FusionBundle(FUSION, configs, weights, TINY_FUSION)


def small_joint():
    fusion = build_network("clinicalfmamba", spatial_dims=2, **TINY)
    return JointNetwork(fusion, ClinicalFMambaClassifier(2, **ENCODER))


class TestJointNetwork:
    def test_both_losses_reach_the_fusion(self, fusion):
        network = small_joint()
        images, labels = torch.rand(2, 2, 24, 20), torch.tensor([0, 1])
        found = {}
        for weight in (0.0, 0.5):
            network.zero_grad()
            loss = JointLoss(fusion.part("loss"), torch.nn.CrossEntropyLoss(), weight)(network(images), labels)
            loss.backward()
            found[weight] = loss.item(), network.fusion.refinement.head.weight.grad.clone()
            assert all(p.grad is not None for p in network.grader.parameters())
        assert found[0.0][1].abs().sum() > 0, "the grade alone trains the fusion network"
        assert found[0.5][0] > found[0.0][0] and not torch.allclose(found[0.0][1], found[0.5][1])

    def test_logits_alone_in_evaluation(self):
        network = small_joint().eval()
        images = torch.rand(2, 2, 24, 20)
        with torch.inference_mode():
            torch.testing.assert_close(network(images), network.grader(network.fusion(images)))

    def test_starts_where_its_parts_ended(self, fusion, tmp_path):
        grader = ClinicalFMambaClassifier(2, **ENCODER)
        torch.save(grader.state_dict(), tmp_path / "grader.pt")
        network = small_joint()
        load_parts(network, fusion, tmp_path / "grader.pt")
        expected = fusion.load_network().state_dict()
        assert all(torch.equal(value, expected[name]) for name, value in network.fusion.state_dict().items())
        assert torch.equal(network.grader.head.weight, grader.head.weight)


def test_the_fusion_encoder_is_taken_over(fusion, tiny_fusion):
    network = ClinicalFMambaClassifier(2, **ENCODER)
    load_encoder(network, fusion)
    expected = fusion.load_network()
    assert torch.equal(network.stem.weight, expected.stem.weight)
    with pytest.raises(ValueError, match="fusion2d.pt: the weights are not of a ClinicalFMamba with the same encoder"):
        load_encoder(ClinicalFMambaClassifier(2, channels=(8, 16, 16)), fusion)


@pytest.mark.parametrize("volume", [False, True], ids=["2d", "3d"])
def test_joint_training_and_chain(few_patients, tiny_fusion, tmp_path, volume):
    added = ["joint", "volume"] if volume else ["joint"]
    settings = without_network(TRAIN_3D if volume else TRAIN) | JOINT | tiny_fusion[3 if volume else 2]
    settings |= {"slices_per_case": 1, "num_folds": 2, "dataset_dir": str(few_patients), "describe_training": False}
    run("train", *added, output_dir=str(tmp_path / "run"), **settings)
    point = json.loads((tmp_path / "run" / "operating_point.json").read_text())
    assert point["source"] == "t2_flair" and point["fusion"] is None
    case = few_patients / "HGG" / "glioma_100"
    files = {f"input_{k}": str(case / f"glioma_100_{m}.nii.gz") for k, m in (("a", "t2"), ("b", "flair"))}
    shared = without_network(COMMON) | JOINT | {"checkpoint": str(tmp_path / "run" / "model.pt")}
    run("inference", *added, kind="infer", output_dir=str(tmp_path / "out"), **shared, **files)
    (record,) = json.loads((tmp_path / "out" / "grades.json").read_text())
    assert 0 < record["probability"] < 1
    assert (tmp_path / "out" / "glioma_100" / "glioma_100_saliency.png").is_file()


@pytest.mark.parametrize("encoder", ["scratch", "frozen", "fine_tuned"])
def test_encoder_in_training(few_patients, tiny_fusion, tmp_path, encoder):
    settings = without_network(TRAIN) | MAMBA | {"num_folds": 2, "slices_per_case": 1, "encoder": encoder}
    settings |= {"source": "average", "dataset_dir": str(few_patients), "describe_training": False, **tiny_fusion[2]}
    run("train", "mamba", output_dir=str(tmp_path), **settings)
    trained = torch.load(tmp_path / "model.pt", weights_only=True)["stem.weight"]
    start = torch.load(tiny_fusion[2]["fusion_weights"], weights_only=True)["stem.weight"]
    distance = float((trained - start).abs().max())
    # a few steps of at most the learning rate each away from where it started
    low, high = {"scratch": (0.05, 9), "frozen": (-1, 1e-9), "fine_tuned": (1e-5, 0.05)}[encoder]
    assert low < distance < high


def test_nothing_is_missing(few_patients, tiny_fusion, tmp_path):
    settings = without_network(COMMON) | tiny_fusion[2] | {"num_folds": 2, "output_dir": str(tmp_path)}
    flow = workflow("train", "joint", dataset_dir=str(few_patients), **settings, **JOINT)
    assert flow.check_properties() == []

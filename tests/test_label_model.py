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
"""The bundle as a model of MONAI Label, without its server: a file in, what its `BundleInferTask` does, a file out."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser, ConfigWorkflow
from monai.transforms import SaveImaged

from scripts.label_model import label_model
from scripts.phantom import digital_brain
from scripts.stack_pair import stack_pair

ROOT = Path(__file__).resolve().parents[1]
BUNDLE = ROOT / "bundles" / "clinicalfmamba_fusion"
SHAPE = (28, 24, 10)
AFFINE = np.array([[0, -1.5, 0, 30], [0.1, 0, 1, -20], [2, 0, 0, 5], [0, 0, 0, 1]])
NETWORK = {"network_def#channels": [8, 8, 16], "network_def#latent_depth": 1}
VOLUME = ["configs/inference.json", "configs/volume.json"]


@pytest.fixture(autouse=True)
def untouched_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)


@pytest.fixture
def app(tmp_path: Path) -> Path:
    """Stands for what `monailabel apps --download --name monaibundle` makes."""
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "main.py").touch()
    return tmp_path / "app"


@pytest.fixture
def pair(tmp_path: Path) -> list[str]:
    brain = digital_brain(SHAPE, seed=2)
    for modality in ("t2", "flair"):
        nib.save(nib.Nifti1Image((brain[modality] * 1000).astype(np.int16), AFFINE), tmp_path / f"c_{modality}.nii.gz")
    return [str(tmp_path / f"c_{modality}.nii.gz") for modality in ("t2", "flair")]


def save_weights(path: Path, *configs: str) -> Path:
    parser = ConfigParser()
    parser.read_config([BUNDLE / config for config in configs])
    parser.update(NETWORK)
    torch.manual_seed(0)
    torch.save(parser.get_parsed_content("network_def").state_dict(), path)
    return path


def answer(model: Path, file: Path) -> tuple[np.ndarray, np.ndarray]:
    """Voxels and affine that Label's writer gets."""
    parser = ConfigParser()
    parser.read_config(model / "configs" / "inference.json")
    parser.config["bundle_root"] = str(model)
    network = parser.get_parsed_content("network_def")
    network.load_state_dict(torch.load(model / "models" / "model.pt", weights_only=True))
    item = {"image": str(file), "image_path": str(file), "model": model.name, "device": "cpu", "description": ""}

    def run(*names: str) -> None:
        # Label takes the last of these ids that a config has, and writes files itself
        *_, found = (parser.get_parsed_content(name) for name in names if name in parser)
        for transform in found.transforms:
            if not isinstance(transform, SaveImaged):
                item.update(transform(item))

    run("preprocessing", "pre_transforms")
    with torch.no_grad():
        item["pred"] = parser.get_parsed_content("inferer")(item["image"][None], network.eval())[0]
    run("postprocessing", "post_transforms")
    # it resizes what differs from the image's last axes in size
    assert item["pred"].shape[1:] == tuple(item["image"].meta["spatial_shape"])
    return item["pred"][0].numpy(), np.asarray(item["image"].meta["original_affine"])


def test_a_volume_as_inference_fuses_it(app: Path, pair: list[str], tmp_path: Path) -> None:
    """From the stacked pair the same voxels, up to rounding, and no other files."""
    weights = save_weights(tmp_path / "weights.pt", *VOLUME)
    label_model(str(app), VOLUME, str(BUNDLE), "fusion_volume", str(weights), device="cpu", amp=False, **NETWORK)
    stack_pair(*pair, str(tmp_path / "stacked.nii.gz"))
    values, affine = answer(app / "model" / "fusion_volume", tmp_path / "stacked.nii.gz")
    settings = {"device": "cpu", "amp": False, "num_workers": 0, "report": False, "checkpoint": str(weights), **NETWORK}
    settings |= {"input_a": pair[0], "input_b": pair[1], "output_dir": str(tmp_path / "fused")}
    configs = [str(BUNDLE / config) for config in VOLUME]
    flow = ConfigWorkflow(configs, workflow_type="infer", bundle_root=str(BUNDLE), **settings)
    flow.initialize()
    flow.run()
    expected = nib.load(tmp_path / "fused" / "c" / "c_fused.nii.gz")
    np.testing.assert_allclose(values.astype(float), expected.get_fdata(), atol=1)
    assert values.dtype == np.uint8 and values.any()
    np.testing.assert_allclose(affine, expected.affine, atol=1e-5)
    assert not (app / "model" / "fusion_volume" / "runs").exists()


def test_slice_by_slice(app: Path, pair: list[str], tmp_path: Path) -> None:
    weights = save_weights(tmp_path / "weights.pt", "configs/inference.json")
    label_model(str(app), bundle_root=str(BUNDLE), checkpoint=str(weights), device="cpu", amp=False, **NETWORK)
    stack_pair(*pair, str(tmp_path / "stacked.nii.gz"))
    model = app / "model" / "clinicalfmamba_fusion"
    values, _ = answer(model, tmp_path / "stacked.nii.gz")
    parser = ConfigParser()
    parser.read_config(model / "configs" / "inference.json")
    network = parser.get_parsed_content("network_def").eval()
    network.load_state_dict(torch.load(weights, weights_only=True))
    images = torch.stack([torch.from_numpy(nib.load(file).get_fdata(dtype=np.float32)) for file in pair])
    lowest, highest = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
    scaled = ((images - lowest) / (highest - lowest))[..., 4]
    with torch.no_grad():
        fourth = network(scaled[None])[0, 0] * (scaled > 0).any(0)
    assert values.shape == SHAPE and values[..., 4].any()
    np.testing.assert_allclose(values[..., 4], fourth.clamp(0, 1) * 255, atol=0.51)


def test_what_label_reads(app: Path, tmp_path: Path) -> None:
    """One config, one file of weights, the data format of the volumes; an older model is replaced."""
    old = app / "model" / "fusion_volume" / "models" / "old.pt"
    old.parent.mkdir(parents=True)
    old.touch()
    label_model(str(app), VOLUME, str(BUNDLE), "fusion_volume")
    model = app / "model" / "fusion_volume"
    shipped = BUNDLE / "models" / "volume" / "model.pt"
    assert (model / "models" / "model.pt").read_bytes() == shipped.read_bytes() and not old.exists()
    metadata = json.loads((model / "configs" / "metadata.json").read_text())
    assert len(metadata["network_data_format"]["inputs"]["image"]["spatial_shape"]) == 3
    parser = ConfigParser()
    parser.read_config(model / "configs" / "inference.json")
    parser["bundle_root"] = "here"
    assert parser.get_parsed_content("checkpoint") == "here/models/model.pt" and parser["spatial_dims"] == 3
    assert not any(path.is_symlink() for path in model.rglob("*")), "the model stands alone"
    assert [path.name for path in model.parent.iterdir()] == ["fusion_volume"]


def test_what_is_refused(app: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is not an app of MONAI Label"):
        label_model(str(tmp_path), bundle_root=str(BUNDLE))
    with pytest.raises(FileNotFoundError, match="Checkpoint absent.pt does not exist"):
        label_model(str(app), bundle_root=str(BUNDLE), checkpoint="absent.pt")
    assert not (app / "model").exists()


def test_label_gets_the_tested_versions() -> None:
    pins = re.findall(r"(?m)^([\w-]+)==([\w.]+)", (ROOT / "constraints.txt").read_text())
    section = (BUNDLE / "docs" / "README.md").read_text().split("## MONAI Label\n")[1].split("\n## ")[0]
    named = re.findall(r'"([\w-]+)==([\w.]+)"', section)
    pinned = {name for name, _ in pins}
    assert {"monai", "torch"} <= {name for name, _ in named}
    assert all(pin in pins for pin in named if pin[0] in pinned)

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

import os
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from dicom_samples import IDENTITY, affine_lps, write_series
from monai.transforms import Compose
from PIL import Image

from scripts.intensity import ScaleByUnitd
from scripts.load_case import LoadCased
from scripts.phantom import digital_brain
from scripts.stack_pair import stack_pair

BUNDLE = Path(__file__).resolve().parents[1] / "bundles" / "clinicalfmamba_fusion"
SHAPE = (24, 28, 12)


@pytest.fixture(scope="module")
def brain() -> dict[str, np.ndarray]:
    return {name: (image * 1000).astype(np.float32) for name, image in digital_brain(SHAPE, seed=1).items()}


@pytest.fixture
def niftis(tmp_path: Path, brain: dict[str, np.ndarray]) -> list[str]:
    """T2, and FLAIR on a grid of every second slice."""
    affine = np.array([[0, 2.0, 0, -20], [2.0, 0, 0, -30], [0, 0, 3.0, 5], [0, 0, 0, 1]])
    coarse = affine.copy()
    coarse[:3, 2] *= 2
    nib.save(nib.Nifti1Image(brain["t2"], affine), tmp_path / "c_t2.nii.gz")
    nib.save(nib.Nifti1Image(brain["flair"][..., ::2], coarse), tmp_path / "c_flair.nii.gz")
    return [str(tmp_path / "c_t2.nii.gz"), str(tmp_path / "c_flair.nii.gz")]


@pytest.fixture
def series(tmp_path: Path, brain: dict[str, np.ndarray]) -> list[str]:
    """MR, and CT of which the window cuts off most."""
    affine = affine_lps((4.8, 4.8, 4.8), (-90, -90, -30), np.diag([1, 1, 1]))
    write_series(tmp_path / "mr", brain["mri"].astype(np.uint16), affine=affine)
    hounsfield = (brain["ct"] * 2).astype(np.uint16)
    write_series(tmp_path / "ct", hounsfield, "CT", 401, affine, rescale=(1, -1000))
    return [str(tmp_path / "mr"), str(tmp_path / "ct")]


@pytest.mark.parametrize("kind", ["niftis", "series"])
def test_gives_what_the_pair_gives(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """Orientation, resampling, raw values and their units, in one file that nothing of the patient is in."""
    inputs, stacked = request.getfixturevalue(kind), tmp_path / "new" / "c.nii.gz"
    stack_pair(*inputs, str(stacked))
    load = Compose([LoadCased(spatial_dims=3), ScaleByUnitd(ct_window=(40, 80))])
    one, two = load({"image": str(stacked)}), load({"image": inputs})
    torch.testing.assert_close(one["image"].as_tensor(), two["image"].as_tensor())
    torch.testing.assert_close(one["image"].affine, two["image"].affine, atol=1e-4, rtol=0)
    assert nib.load(stacked).shape == (*SHAPE, 2)
    units = [[source["units"] for source in item["fusion_info"]["inputs"]] for item in (one, two)]
    assert units[0] == units[1] == (["", "HU"] if kind == "series" else ["", ""])
    header = bytes(nib.load(stacked).header.binaryblock)
    assert not any(value.encode() in header for value in IDENTITY.values() if len(value) > 2)
    assert [path.name for path in stacked.parent.iterdir()] == ["c.nii.gz"], "no temporary file is left"


def test_pictures_become_a_volume_of_one_slice(tmp_path: Path) -> None:
    """Colour of the second as its luma."""
    grey = np.random.default_rng(0).integers(0, 255, (20, 30), dtype=np.uint8)
    for name, array in (("mri", grey), ("pet", np.stack([grey, grey // 2, grey // 4], axis=-1))):
        Image.fromarray(array).save(tmp_path / f"{name}.png")
    inputs = [str(tmp_path / f"{name}.png") for name in ("mri", "pet")]
    stack_pair(*inputs, str(tmp_path / "c.nii"))
    found = nib.load(tmp_path / "c.nii").get_fdata()
    assert found.shape == (30, 20, 1, 2)
    np.testing.assert_allclose(found[:, :, 0].transpose(2, 0, 1), LoadCased(spatial_dims=2)({"image": inputs})["image"])


def test_what_is_refused(niftis: list[str], tmp_path: Path) -> None:
    """In a sentence that says what to do, and with an older file left as it was."""
    older = tmp_path / "older.nii.gz"
    older.write_bytes(b"older")
    with pytest.raises(ValueError, match="out.mha must end in .nii.gz or .nii"):
        stack_pair("absent.nii.gz", "absent.nii.gz", str(tmp_path / "out.mha"))
    with pytest.raises(FileNotFoundError, match="absent.nii.gz does not exist"):
        stack_pair(niftis[0], str(tmp_path / "absent.nii.gz"), str(older))
    with pytest.raises(ValueError, match="not on one grid: set resample to auto"):
        stack_pair(*niftis, str(older), resample="none")
    Image.fromarray(np.zeros((24, 28), np.uint8)).save(tmp_path / "slice.png")
    with pytest.raises(ValueError, match="One image of a pair is a slice, the other a volume"):
        stack_pair(niftis[0], str(tmp_path / "slice.png"), str(older))
    assert older.read_bytes() == b"older"


def test_command(niftis: list[str], tmp_path: Path) -> None:
    words = ["--input_a", niftis[0], "--input_b", niftis[1], "--output_file", str(tmp_path / "c.nii.gz")]
    command = [sys.executable, "-m", "scripts.stack_pair", *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=BUNDLE, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0 and "24 x 28 x 12 voxels, two channels" in result.stderr, result.stderr
    assert (tmp_path / "c.nii.gz").is_file()

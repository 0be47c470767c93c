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
from pathlib import Path

import itk
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import LoadImage
from scipy.ndimage import gaussian_filter
from scipy.spatial.transform import Rotation

from scripts.phantom import digital_brain
from scripts.registration import (
    VISIBLE_MISFIT,
    Alignment,
    misfit,
    normalised_mutual_information,
    register,
    save_transform,
)

pytestmark = pytest.mark.usefixtures("one_thread")

DATA = Path(os.environ.get("SHARED_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
# 20 mm and 15 degrees altogether, neither along an axis
SHIFT, TURN = np.array([-9.0, 14.0, 11.1]), np.array([8.0, -9.0, 9.0])


def brain(contrast: str, shape: tuple[int, ...], spacing: float) -> MetaTensor:
    affine = torch.diag(torch.tensor([*[spacing] * len(shape), *[1.0] * (4 - len(shape))])).double()
    affine[:2, 3] = -spacing * shape[0] / 2
    return MetaTensor(torch.as_tensor(digital_brain(shape, seed=1)[contrast])[None], affine=affine)


def centre_of(image: MetaTensor) -> np.ndarray:
    middle = np.array([*((np.array(image.shape[1:]) - 1) / 2), *[0.0] * (4 - image.ndim), 1.0])
    return image.affine.numpy() @ middle


def move(image: MetaTensor, shift: np.ndarray, degrees: np.ndarray) -> MetaTensor:
    """As if the patient had been turned about the image's centre and shifted, in mm and degrees."""
    centre, moved = centre_of(image)[:3], np.eye(4)
    moved[:3, :3] = Rotation.from_euler("xyz", degrees, degrees=True).as_matrix()
    moved[:3, 3] = centre - moved[:3, :3] @ centre + shift
    return MetaTensor(image.as_tensor(), affine=torch.as_tensor(moved) @ image.affine)


def error(found: torch.Tensor, true: torch.Tensor, image: MetaTensor) -> tuple[float, float]:
    """How far, in mm, the centre of an image lies from where it should, and the angle to what it should be."""
    difference = found.numpy() @ np.linalg.inv(true.numpy())
    centre = centre_of(MetaTensor(image.as_tensor(), affine=true))
    turn = Rotation.from_matrix(np.matmul(*np.linalg.svd(difference[:3, :3])[::2]))
    return float(np.linalg.norm((difference @ centre - centre)[:3])), float(np.degrees(turn.magnitude()))


@pytest.mark.parametrize(("fixed", "moving"), [("t2", "flair"), ("mri", "ct")])
def test_rigid_in_3d(fixed: str, moving: str) -> None:
    a, b = brain(fixed, (40, 40, 40), 4.8), brain(moving, (40, 40, 40), 4.8)
    alignment = register(a, move(b, SHIFT, TURN))
    shift, angle = error(alignment.affine, b.affine, b)
    assert shift < 1 and angle < 1
    assert alignment.translation == pytest.approx(20, abs=2) and alignment.rotation == pytest.approx(15, abs=1)
    assert alignment.mutual_information[1] > alignment.mutual_information[0] > 1
    assert alignment.overlap[1] > 0.9 > alignment.overlap[0]


@pytest.mark.parametrize("moving", ["ct", "flair"])
def test_rigid_in_2d(moving: str) -> None:
    fixed = "mri" if moving == "ct" else "t2"
    a, b = brain(fixed, (160, 160), 1.0), brain(moving, (160, 160), 1.0)
    alignment = register(a, move(b, SHIFT * [1, 1, 0], TURN * [0, 0, 1.6]))
    shift, angle = error(alignment.affine, b.affine, b)
    assert shift < 1 and angle < 1


def test_affine_finds_a_stretch() -> None:
    a, b = brain("mri", (160, 160), 1.0), brain("ct", (160, 160), 1.0)
    stretched = move(b, SHIFT * [1, 1, 0], TURN * [0, 0, 1])
    stretched.affine = torch.diag(torch.tensor([1.08, 0.95, 1, 1])).double() @ stretched.affine
    alignment = register(a, stretched, "affine")
    np.testing.assert_allclose(alignment.affine[:2, :2], b.affine[:2, :2], atol=0.02)
    assert error(alignment.affine, b.affine, b)[0] < 1


def test_the_same_seed_gives_the_same() -> None:
    a, b = brain("t2", (256, 256), 0.75), brain("flair", (256, 256), 0.75)
    first, second = (register(a, move(b, SHIFT * [1, 1, 0], TURN * [0, 0, 1]), seed=3).affine for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=1e-9)


def test_what_is_registered_stays(tmp_path: Path) -> None:
    a, b = brain("t2", (160, 160), 1.0), brain("flair", (160, 160), 1.0)
    alignment = register(a, b)
    assert alignment.translation < 0.5 and alignment.rotation < 0.5
    assert misfit(a, b) < 1


def test_the_saved_transform_maps_points(tmp_path: Path) -> None:
    a, b = brain("t2", (40, 40, 16), 4.8), brain("flair", (40, 40, 16), 4.8)
    moved = move(b, SHIFT / 3, TURN / 3)
    alignment = register(a, moved)
    save_transform(alignment, tmp_path / "x.tfm")
    assert [file.name for file in tmp_path.iterdir()] == ["x.tfm"]
    (transform,) = itk.transformread(str(tmp_path / "x.tfm"))
    point = np.array([3.0, -8, 5, 1])
    # from the fixed to the moving image: the voxel that now lies at the point, where it lay before
    voxel = np.linalg.inv(alignment.affine.numpy()) @ point
    expected = (moved.affine.numpy() @ voxel)[:3] * [-1, -1, 1]
    np.testing.assert_allclose(transform.TransformPoint((point[:3] * [-1, -1, 1]).tolist()), expected, atol=1e-6)


def test_refusals() -> None:
    a = brain("t2", (96, 96), 2.0)
    noise = gaussian_filter(np.random.RandomState(0).randn(96, 96), 3)[None].astype(np.float32)
    with pytest.raises(ValueError, match="registration failed, .* no more in common than noise"):
        register(a, MetaTensor(torch.as_tensor(noise), affine=a.affine))
    with pytest.raises(ValueError, match="registration failed, only .* lies in the second"):
        register(a, a[:, 40:56, 40:56])
    with pytest.raises(ValueError, match="must be one of rigid, affine, got 'elastic'"):
        register(a, a, "elastic")


@pytest.mark.parametrize("shape", [(160, 160), (40, 40, 40)])
def test_misfit_is_seen(shape: tuple[int, ...]) -> None:
    spacing = 192 / shape[0]
    a, b = brain("mri", shape, spacing), brain("ct", shape, spacing)
    assert misfit(a, b) < 1
    flat = [1, 1, 0] if len(shape) == 2 else [1, 1, 1]
    assert misfit(a, move(b, SHIFT * flat, TURN * [0, 0, 1])) > VISIBLE_MISFIT


def test_thin_slabs_that_are_registered() -> None:
    """Whatever little of a slab is left when it is moved across its slices, may fit better by chance."""
    for start in range(8, 28, 4):
        a, b = (brain(contrast, (40, 40, 40), 4.8)[..., start : start + 3] for contrast in ("t2", "flair"))
        assert misfit(a, b) < 1


def test_mutual_information() -> None:
    x = np.random.RandomState(0).rand(40_000)
    assert normalised_mutual_information(x, x) == pytest.approx(2)
    assert normalised_mutual_information(x, 1 - x) == pytest.approx(2, abs=0.01)
    assert normalised_mutual_information(x, np.random.RandomState(1).rand(40_000)) == pytest.approx(1, abs=0.01)
    assert normalised_mutual_information(np.ones(9), np.ones(9)) == 2


def real_pair(name: str) -> list[MetaTensor]:
    patterns = {
        "brainix": ("brainix-dicom/T2", "brainix-dicom/FLAIR"),
        "glioma": ("volumes/TCGA*/*t2_bet*", "volumes/TCGA*/*fla_bet*"),
        "template": ("volumes/ct-flair*/gg-flair*", "volumes/ct-flair*/scct*"),
    }
    files = [next(iter(DATA.glob(pattern)), None) for pattern in patterns[name]]
    if None in files:
        pytest.skip(f"{DATA} is not there: set SHARED_DATA to the folder that holds volumes and brainix-dicom")
    return [LoadImage(ensure_channel_first=True)(file) for file in files]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["brainix", "glioma", "template"])
def test_offsets_of_real_volumes(name: str) -> None:
    """Relative to where the pair lies by itself: the two of the template are of different people."""
    a, b = real_pair(name)
    assert misfit(a, b) < 1.05
    at_rest: Alignment = register(a, b)
    shift, angle = error(at_rest.affine, b.affine, b)
    assert name == "template" or (shift < 1 and angle < 1)
    for sign in (-1, 1):
        found = register(a, move(b, sign * SHIFT, -sign * TURN))
        shift, angle = error(found.affine, at_rest.affine, b)
        assert shift < 1 and angle < 1

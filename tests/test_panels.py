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

from pathlib import Path

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from PIL import Image

from scripts.panels import SavePaneld
from scripts.views import CaseImages, Cut, checkerboard, upright


def item(*shape: int, affine: np.ndarray | None = None, case: str = "case1") -> dict:
    image = torch.zeros(2, *shape)
    inner = (slice(None), *(slice(n // 4, 3 * n // 4) for n in shape))
    image[inner] = 0.6
    meta = {"case": case, "filename_or_obj": "/secret/patient.nii.gz"}
    sources = MetaTensor(image, affine=torch.eye(4) if affine is None else torch.as_tensor(affine), meta=meta)
    return {"image": sources, "pred": sources[:1] * 0.5}


def cuts(*volumes: torch.Tensor, affine: torch.Tensor | None = None) -> list[Cut]:
    return CaseImages(*volumes, affine=torch.eye(4) if affine is None else affine).cuts()


def panel(output_dir: Path, data: dict, **kwargs) -> np.ndarray:
    returned = SavePaneld(output_dir=output_dir, **kwargs)(data)
    assert returned.keys() == data.keys() and returned["pred"] is data["pred"]
    (file,) = (f for f in output_dir.rglob("*") if f.is_file())
    assert file == output_dir / "case1" / "case1_panel.png"
    return np.asarray(Image.open(file).convert("RGB")).astype(int)


def test_slice_is_one_upright_row(tmp_path: Path) -> None:
    data = item(40, 32)
    # the corner that a picture has at its upper right
    data["image"][0, 30:, :10] = 1
    picture = panel(tmp_path, data)
    height, width = picture.shape[:2]
    assert width > 4 * height
    # below the titles, which are as dark as the picture, and left of the second column
    first = picture[100:, : int(0.19 * width)].max(-1)
    (top, left), (bottom, right) = (np.argwhere(first < 30).min(0), np.argwhere(first < 30).max(0))
    margin = (bottom - top) // 20
    assert first[top + margin, right - margin] > 200
    assert max(first[top + margin, left + margin], first[bottom - margin, right - margin]) < 30
    (cut,) = CaseImages.of_item(data).cuts()
    assert cut.mri.shape == (32, 40) and cut.mri[2, 35] == 1 and cut.mri[30, 2] == 0
    assert (cut.height, cut.width) == (32, 40)


def test_colours(tmp_path: Path) -> None:
    data = item(32, 32)
    grey = panel(tmp_path / "grey", data)
    data["chroma"] = torch.full((2, 32, 32), 0.5)
    data["chroma"][1] = 0.9
    colour = panel(tmp_path / "colour", data)
    column = grey.shape[1] // 5
    saturation = [(p.max(-1) - p.min(-1))[:, column : 2 * column - 60].max() for p in (grey, colour)]
    assert saturation[0] < 10 and saturation[1] > 100
    # the fused image is darker than the MRI everywhere: the difference is blue
    last = grey[:, 4 * column - 60 : 5 * column - 120]
    assert (last[..., 2] - last[..., 0]).max() > 60 and (last[..., 0] - last[..., 2]).max() < 10


@pytest.mark.parametrize(
    "affine", [np.diag([1.0, 1.0, 2.0, 1.0]), np.diag([-1.0, -1.0, 2.0, 1.0]), np.diag([-1.0, 1.0, -2.0, 1.0])]
)
def test_planes_as_a_radiologist_sees_them(affine: np.ndarray) -> None:
    # one marker each at the patient's right, front and top, wherever the file's axes run
    ras = torch.zeros(1, 20, 24, 15)
    ras[:, 5:15, 6:18, 4:11] = 0.5
    right, front, top = ras.clone(), ras.clone(), ras.clone()
    right[:, 16:] = 1
    front[:, :, 20:] = 1
    top[..., 12:] = 1
    flips = [axis + 1 for axis in range(3) if affine[axis, axis] < 0]
    volumes = [volume.flip(flips) for volume in (ras, right, front, top)]
    rows = {cut.plane: cut for cut in cuts(*volumes, affine=torch.as_tensor(affine))}
    assert list(rows) == ["axial", "coronal", "sagittal"]
    assert [(row.height, row.width) for row in rows.values()] == [(24, 20), (30, 20), (30, 24)]
    assert rows["axial"].partner[:, :4].min() == 1 and rows["axial"].partner[:, 4:].max() < 1
    assert rows["coronal"].partner[:, :4].min() == 1
    assert rows["axial"].fused[:4].min() == 1 and rows["axial"].fused[4:].max() < 1
    assert rows["sagittal"].fused[:, :4].min() == 1
    assert rows["coronal"].grey[:3].min() == 1 and rows["sagittal"].grey[:3].min() == 1


def test_planes_go_through_the_content() -> None:
    volume = torch.zeros(1, 30, 30, 30)
    volume[:, 20:25, 3:8, 10:15] = 1
    assert all(cut.mri.sum() == 25 for cut in cuts(*[volume] * 4))
    assert len(cuts(*[volume * 0] * 4)) == 3


def test_cropping_keeps_the_content_and_its_place() -> None:
    volume = torch.zeros(1, 30, 30, 30)
    volume[:, 20:25, 3:8, 0:15] = 1
    images = CaseImages(*[volume] * 4, affine=torch.diag(torch.tensor([2.0, 2, 2, 1])))
    cropped, start = images.cropped(margin=2)
    assert start == [18, 1, 0] and cropped.mri.shape == (1, 9, 9, 17) and cropped.grey.sum() == volume.sum()
    assert cropped.affine[:3, 3].tolist() == [36, 2, 0] and cropped.size == [18, 18, 34]
    # nothing to see: nothing to crop
    assert CaseImages(*[volume * 0] * 4, affine=torch.eye(4)).cropped()[0].mri.shape == volume.shape


def test_checkerboard_of_grey_and_colour() -> None:
    board = checkerboard(np.zeros((16, 32)), np.ones((16, 32, 3)), (16, 32))
    assert board.shape == (16, 32, 3) and board[0, 0, 0] == 0 and board[0, 4, 0] == 1 and board[4, 4, 0] == 0
    # squares are square on the page, whatever the pixels are
    assert checkerboard(np.zeros((8, 32)), np.ones((8, 32)), (32, 32))[1].tolist() == ([1] * 4 + [0] * 4) * 4


def test_the_colour_of_a_map_is_shown() -> None:
    data = item(8, 6)
    data |= {"pred_colour": torch.rand(3, 8, 6), "partner_colour": torch.rand(3, 8, 6)}
    images = CaseImages.of_item(data)
    assert torch.equal(images.fused, data["pred_colour"]) and torch.equal(images.partner, data["partner_colour"])
    assert torch.equal(images.grey, data["pred"].as_tensor())
    assert np.array_equal(images.cuts()[0].difference, upright(images.grey - images.mri))


def test_thin_slab_is_axial_only(tmp_path: Path) -> None:
    data = item(48, 48, 5)
    assert [cut.plane for cut in CaseImages.of_item(data).cuts()] == ["axial"]
    slab = panel(tmp_path / "slab", data)
    volume = panel(tmp_path / "volume", item(48, 48, 30))
    assert volume.shape[1] == slab.shape[1] and volume.shape[0] > 1.8 * slab.shape[0]


def test_restored_colour_volume_and_case_name(tmp_path: Path) -> None:
    data = item(24, 24)
    data["pred"] = MetaTensor(torch.rand(3, 24, 24), meta=data["pred"].meta)
    panel(tmp_path, data, titles=("MRI", "PET"))
    SavePaneld(output_dir=tmp_path)(item(24, 24, case="a.b"))
    assert (tmp_path / "a.b" / "a.b_panel.png").is_file()
    with pytest.raises(KeyError):
        SavePaneld(output_dir=tmp_path)({"image": data["image"]})

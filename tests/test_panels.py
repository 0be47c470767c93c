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

from scripts.panels import SavePaneld, _planes, _slice


def item(*shape: int, affine: np.ndarray | None = None, case: str = "case1") -> dict:
    image = torch.zeros(2, *shape)
    inner = (slice(None), *(slice(n // 4, 3 * n // 4) for n in shape))
    image[inner] = 0.6
    meta = {"case": case, "filename_or_obj": "/secret/patient.nii.gz"}
    sources = MetaTensor(image, affine=torch.eye(4) if affine is None else torch.as_tensor(affine), meta=meta)
    return {"image": sources, "pred": sources[:1] * 0.5}


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
    assert width > 3 * height
    # below the titles, which are as dark as the picture, and left of the second column
    first = picture[100:, : int(0.235 * width)].max(-1)
    (top, left), (bottom, right) = (np.argwhere(first < 30).min(0), np.argwhere(first < 30).max(0))
    margin = (bottom - top) // 20
    assert first[top + margin, right - margin] > 200
    assert max(first[top + margin, left + margin], first[bottom - margin, right - margin]) < 30
    row = _slice([data["image"].as_tensor()[:1]], torch.eye(4))
    assert row.pictures[0].shape == (32, 40) and row.pictures[0][2, 35] == 1 and row.pictures[0][30, 2] == 0
    assert (row.height, row.width) == (32, 40)


def test_colours(tmp_path: Path) -> None:
    data = item(32, 32)
    grey = panel(tmp_path / "grey", data)
    data["chroma"] = torch.full((2, 32, 32), 0.5)
    data["chroma"][1] = 0.9
    colour = panel(tmp_path / "colour", data)
    quarter = grey.shape[1] // 4
    saturation = [(p.max(-1) - p.min(-1))[:, quarter : 2 * quarter - 60].max() for p in (grey, colour)]
    assert saturation[0] < 10 and saturation[1] > 100
    # the fused image is darker than the MRI everywhere: the difference is blue
    last = grey[:, 3 * quarter - 60 : 4 * quarter - 120]
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
    columns = [volume.flip(flips) for volume in (ras, right, front, top)]
    rows = {row.plane: row for row in _planes([*columns], torch.as_tensor(affine))}
    assert list(rows) == ["axial", "coronal", "sagittal"]
    assert [(row.height, row.width) for row in rows.values()] == [(24, 20), (30, 20), (30, 24)]
    assert rows["axial"].pictures[1][:, :4].min() == 1 and rows["axial"].pictures[1][:, 4:].max() < 1
    assert rows["coronal"].pictures[1][:, :4].min() == 1
    assert rows["axial"].pictures[2][:4].min() == 1 and rows["axial"].pictures[2][4:].max() < 1
    assert rows["sagittal"].pictures[2][:, :4].min() == 1
    assert rows["coronal"].pictures[3][:3].min() == 1 and rows["sagittal"].pictures[3][:3].min() == 1


def test_planes_go_through_the_content() -> None:
    volume = torch.zeros(1, 30, 30, 30)
    volume[:, 20:25, 3:8, 10:15] = 1
    assert all(row.pictures[0].sum() == 25 for row in _planes([volume, volume], torch.eye(4)))
    assert len(_planes([volume * 0, volume * 0], torch.eye(4))) == 3


def test_thin_slab_is_axial_only(tmp_path: Path) -> None:
    data = item(48, 48, 5)
    assert [row.plane for row in _planes([data["image"][:1].as_tensor()] * 2, torch.eye(4))] == ["axial"]
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

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

import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from scripts import grid
from scripts.grid import covered_share, resample_onto, same_grid, shrink

OBLIQUE = torch.tensor(
    [[0, -0.9, 0.1, 7.0], [1.1, 0, 0, -20.0], [0, 0.1, 2.9, 5.0], [0, 0, 0, 1.0]], dtype=torch.float64
)


def ramp(shape: tuple[int, ...], affine: torch.Tensor) -> MetaTensor:
    """An image whose values are a linear function of where the voxels lie."""
    voxels = torch.stack(torch.meshgrid(*[torch.arange(n).double() for n in shape], indexing="ij"), -1)
    world = voxels @ affine[:3, : len(shape)].T + affine[:3, 3]
    return MetaTensor((world @ torch.tensor([1.0, 2, 3]).double())[None].float(), affine=affine)


def inside(affine: torch.Tensor) -> torch.Tensor:
    """Finer, turned by 6 degrees, and within the field of view of 40 x 50 x 20 voxels at `affine`."""
    angle = torch.tensor(0.1)
    turn = torch.tensor([[angle.cos(), -angle.sin(), 0], [angle.sin(), angle.cos(), 0], [0, 0, 1]]).double()
    result = affine.clone()
    result[:3, :3] = turn @ affine[:3, :3] @ torch.diag(torch.tensor([0.7, 0.8, 0.6])).double()
    result[:3, 3] += torch.tensor([-5.0, 9, 20])
    return result


@pytest.mark.parametrize("chunk", [400, 2**22])
def test_values_come_from_where_voxels_lie(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(grid, "CHUNK", chunk)
    fixed = ramp((12, 13, 9), inside(OBLIQUE))
    fixed.meta["case"] = "x"
    resampled = resample_onto(ramp((40, 50, 20), OBLIQUE), fixed)
    torch.testing.assert_close(resampled.as_tensor(), fixed.as_tensor(), atol=1e-3, rtol=0)
    assert same_grid(resampled, fixed) and resampled.meta["case"] == "x"


def test_slices_and_channels() -> None:
    fixed = ramp((20, 16), torch.diag(torch.tensor([0.5, 0.75, 1, 1])).double())
    moving = ramp((12, 14), torch.diag(torch.tensor([1.0, 1, 1, 1])).double())
    plain = moving.as_tensor()
    resampled = resample_onto(MetaTensor(torch.cat([plain, -plain]), affine=moving.affine), fixed)
    torch.testing.assert_close(resampled[:1].as_tensor(), fixed.as_tensor(), atol=1e-3, rtol=0)
    torch.testing.assert_close(resampled[0].as_tensor(), -resampled[1].as_tensor(), atol=1e-3, rtol=0)


def test_outside_is_the_lowest_value() -> None:
    moving = MetaTensor(torch.full((1, 6, 6, 6), 500.0), affine=torch.eye(4).double())
    moving[0, 0, 0, 0] = -1000
    far = torch.eye(4).double()
    far[0, 3] = 3
    resampled = resample_onto(moving, MetaTensor(torch.zeros(1, 6, 6, 6), affine=far))
    assert (resampled[0, :3] - 500).abs().max() < 0.01 and (resampled[0, 3:] + 1000).abs().max() < 0.01
    assert covered_share(moving, resampled) == pytest.approx(0.5)


def test_a_coarser_grid_does_not_alias() -> None:
    stripes = MetaTensor(torch.arange(64).remainder(2).float().expand(1, 64, 64).clone(), affine=torch.eye(4).double())
    coarse = MetaTensor(torch.zeros(1, 16, 16), affine=torch.diag(torch.tensor([4.0, 4, 1, 1])).double())
    resampled = resample_onto(stripes, coarse)[:, 2:-2, 2:-2]
    assert (resampled - 0.5).abs().max() < 0.1


def test_shrink_keeps_the_place() -> None:
    image = ramp((24, 30, 7), OBLIQUE)
    small = shrink(image, 2.7)
    assert small.shape == (1, 10, 10, 7)
    difference = small - ramp(tuple(small.shape[1:]), small.affine)
    # a voxel is the mean of two or three, the third axis is coarser already
    assert difference.abs().max() < 1.5 and difference.mean().abs() < 0.01
    assert shrink(image, 0.1).shape == image.shape


def test_same_grid() -> None:
    image = ramp((6, 7, 8), OBLIQUE)
    near, far = OBLIQUE.clone(), OBLIQUE.clone()
    near[0, 3] += 1e-4
    far[:3, 0] *= 1.01
    assert same_grid(image, ramp((6, 7, 8), near)) and not same_grid(image, ramp((6, 7, 8), far))
    assert not same_grid(image, ramp((6, 7, 9), OBLIQUE))
    np.testing.assert_allclose(covered_share(image, image), 1)

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
"""One grid for two images: compare grids, and resample one image onto that of another by world coordinates."""

from __future__ import annotations

import torch
from monai.data import MetaTensor, to_affine_nd
from monai.transforms import GaussianSmooth, SpatialResample
from monai.utils import convert_to_tensor
from torch.nn.functional import interpolate

__all__ = ["covered_share", "resample_onto", "same_grid", "shrink"]

# how far the same voxel may lie apart in two images on one grid, as a share of a voxel
TOLERANCE = 1e-3
# voxels that are resampled at once: MONAI's sampling grid takes about 30 times the memory of what it samples
CHUNK = 2**22


def same_grid(image: MetaTensor, other: MetaTensor) -> bool:
    """Whether two images ``(C, H, W[, D])`` have one shape, and their corners lie within 1/1000 voxel of each other."""
    if image.shape[1:] != other.shape[1:]:
        return False
    corners = torch.cartesian_prod(*[torch.tensor([0.0, n - 1.0], dtype=torch.float64) for n in image.shape[1:]])
    relative = _relative(other.affine, image.affine, image.ndim - 1)
    moved = corners @ relative[:-1, :-1].T + relative[:-1, -1]
    return bool((moved - corners).abs().max() < TOLERANCE)


def covered_share(moving: MetaTensor, fixed: MetaTensor) -> float:
    """Share in [0, 1] of the field of view of ``fixed`` that ``moving`` covers; both ``(C, H, W[, D])``."""
    axes = [torch.linspace(0, n - 1, min(n, 32), dtype=torch.float64) for n in fixed.shape[1:]]
    points = torch.cartesian_prod(*axes)
    back = torch.linalg.inv(_relative(moving.affine, fixed.affine, fixed.ndim - 1))
    points = points @ back[:-1, :-1].T + back[:-1, -1]
    size = torch.tensor(moving.shape[1:], dtype=torch.float64)
    return ((points > -0.5 - TOLERANCE) & (points < size - 0.5 + TOLERANCE)).all(1).double().mean().item()


def resample_onto(moving: MetaTensor, fixed: MetaTensor) -> MetaTensor:
    """
    Linear interpolation of ``moving`` ``(C, H', W'[, D'])`` on the grid of ``fixed``, with the metadata of ``fixed``.
    What lies outside the field of view of ``moving`` gets its lowest value. Where the grid of ``fixed`` is coarser, a
    Gaussian comes first, so that what is too fine for it does not become noise. The work is done slab by slab.

    Returns:
        ``(C, H, W[, D])`` float32.
    """
    shape = fixed.shape[1:]
    dims = len(shape)
    relative = _relative(moving.affine, fixed.affine, dims)
    # voxels of the moving image that one step on the new grid passes, along each axis of the moving image
    steps = torch.linalg.inv(relative)[:-1, :-1].abs().amax(1)
    # sampling outside of an image gives zero
    low = moving.as_tensor().amin().float()
    plain = moving.as_tensor().float() - low
    if (sigma := torch.clamp((steps - 1) / 2, min=0)).max() > 0:
        plain = convert_to_tensor(GaussianSmooth(sigma.tolist())(plain), track_meta=False)
    source = MetaTensor(plain, affine=relative)
    sampler = SpatialResample(mode="bilinear", padding_mode="zeros", dtype=torch.float32)
    thickness = max(1, CHUNK // max(1, torch.Size(shape[:-1]).numel()))
    slabs = []
    for start in range(0, shape[-1], thickness):
        target = torch.eye(dims + 1, dtype=torch.float64)
        target[dims - 1, dims] = start
        size = (*shape[:-1], min(thickness, shape[-1] - start))
        slabs.append(sampler(source, dst_affine=target, spatial_size=size).as_tensor())
    return MetaTensor(torch.cat(slabs, dim=-1).add_(low)).copy_meta_from(fixed)  # type: ignore[return-value]


def shrink(image: MetaTensor, spacing: float) -> MetaTensor:
    """Average voxels of ``image`` ``(C, H, W[, D])`` to larger ones of about ``spacing`` mm; coarser axes stay."""
    dims = image.ndim - 1
    size = torch.tensor(image.shape[1:], dtype=torch.float64)
    own = torch.linalg.vector_norm(image.affine[:3, :dims].double().cpu(), dim=0)
    shape = torch.minimum(size, torch.clamp((size * own / spacing).round(), min=1))
    to_voxel = torch.eye(4, dtype=torch.float64)
    to_voxel[range(dims), range(dims)] = size / shape
    to_voxel[:dims, 3] = (size / shape - 1) / 2
    averaged = interpolate(image.as_tensor()[None].float(), size=shape.int().tolist(), mode="area")[0]
    return MetaTensor(averaged, affine=image.affine.double().cpu() @ to_voxel)


def _relative(affine: torch.Tensor, onto: torch.Tensor, dims: int) -> torch.Tensor:
    """From voxels of an image to voxels of the grid with the affine ``onto``, ``(dims + 1, dims + 1)``."""
    return to_affine_nd(dims, torch.linalg.solve(onto.double().cpu(), affine.double().cpu()))

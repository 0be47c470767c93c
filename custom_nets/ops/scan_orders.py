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

"""Scan orders: in which sequence the tokens of an image or a volume are read, as data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

__all__ = ["SCANS", "flatten_orders", "scan_orders", "scan_places", "to_sequences", "to_raster"]

# name -> spatial dimensions -> axis orders, outermost axis first; "raster" alone reads in one direction only.
SCANS: dict[str, dict[int, list[list[int]]]] = {
    "raster": {2: [[0, 1]], 3: [[0, 1, 2]]},
    "cross": {2: [[0, 1], [1, 0]]},
    "tri_plane": {3: [[0, 1, 2], [1, 2, 0], [2, 0, 1]]},
}


def scan_orders(scan: str, spatial_dims: int) -> list[tuple[list[int], bool]]:
    """The directions of a scan as (axis order, reversed) pairs.

    Args:
        scan: ``"raster"`` (one direction), ``"cross"`` (2D: rows and columns, each forward and backward) or
            ``"tri_plane"`` (3D: one raster per plane, each forward and backward).
        spatial_dims: 2 or 3.

    Raises:
        ValueError: if there is no such scan in ``spatial_dims`` dimensions.
    """
    axes = SCANS.get(scan, {}).get(spatial_dims)
    if axes is None:
        known = sorted(name for name, by_dims in SCANS.items() if spatial_dims in by_dims)
        raise ValueError(f"no scan named {scan!r} in {spatial_dims} dimensions, choose one of {known}.")
    both_ways = [False] if scan == "raster" else [False, True]
    return [(order, backward) for order in axes for backward in both_ways]


def _permute_tokens(x: Tensor, spatial_shape: list[int], axes: list[int]) -> Tensor:
    """``(B, L, C)`` in raster order of ``spatial_shape`` to raster order of its ``axes``."""
    if axes == list(range(len(axes))):
        return x
    grid = x.unflatten(1, spatial_shape)
    return grid.permute([0] + [axis + 1 for axis in axes] + [len(axes) + 1]).flatten(1, -2)


def to_sequences(x: Tensor, spatial_shape: list[int], orders: list[tuple[list[int], bool]]) -> Tensor:
    """Reads raster tokens in every direction.

    Args:
        x: tokens in raster order (last axis fastest), ``(B, L, C)`` with L the product of ``spatial_shape``.
        spatial_shape: ``[H, W]`` or ``[H, W, D]``.
        orders: directions, see :py:func:`scan_orders`.

    Returns:
        ``(B, K, L, C)`` for K directions.
    """
    sequences = []
    for axes, backward in orders:
        sequence = _permute_tokens(x, spatial_shape, axes)
        sequences.append(sequence.flip(1) if backward else sequence)
    return torch.stack(sequences, dim=1)


def to_raster(sequences: Tensor, spatial_shape: list[int], orders: list[tuple[list[int], bool]]) -> Tensor:
    """Inverse of :py:func:`to_sequences`: brings each direction back to raster order, ``(B, K, L, C)``."""
    rasters = []
    for k, (axes, backward) in enumerate(orders):
        sequence = sequences[:, k].flip(1) if backward else sequences[:, k]
        inverse = [axes.index(axis) for axis in range(len(axes))]
        rasters.append(_permute_tokens(sequence, [spatial_shape[axis] for axis in axes], inverse))
    return torch.stack(rasters, dim=1)


def flatten_orders(orders: Sequence[tuple[Sequence[int], bool]]) -> list[int]:
    """Directions as an operator takes them: the axes of each followed by whether it is reversed."""
    return [number for axes, backward in orders for number in (*axes, int(backward))]


@lru_cache(maxsize=8)
def scan_places(orders: tuple[int, ...], spatial_shape: tuple[int, ...]) -> Tensor:
    """Raster index of each token of each direction, ``(K, L)`` int64 on the CPU, for :py:func:`flatten_orders`'s."""
    rows = zip(*[iter(orders)] * (len(spatial_shape) + 1))
    directions = [(list(row[:-1]), bool(row[-1])) for row in rows]
    raster = torch.arange(math.prod(spatial_shape)).view(1, -1, 1)
    return to_sequences(raster, list(spatial_shape), directions).view(len(directions), -1).contiguous()

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

"""Scan orders as index arithmetic: where in raster order a Triton kernel finds the tokens of a direction."""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["find_path", "paths_of", "place_of"]


def _magic(divisor: int) -> tuple[int, int]:
    """Multiplier and shift for ``t // divisor = umulhi(2 t, multiplier) >> shift``, exact for t below 2^31."""
    shift = (divisor - 1).bit_length()
    multiplier = -(-(1 << (31 + shift)) // divisor)
    return multiplier - (1 << 32 if multiplier >= 1 << 31 else 0), shift


@lru_cache(maxsize=256)
def paths_of(orders: tuple[int, ...], spatial_shape: tuple[int, ...], device: torch.device) -> Tensor:
    """What the kernels have to know of each direction, ``(K, 8)`` int32; see :py:func:`place_of`.

    Args:
        orders: the axes of each direction followed by whether it is reversed, K (dims + 1) numbers.
        spatial_shape: ``(H, W)`` or ``(H, W, D)``.
        device: where the kernels run. Kept, so that nothing is copied there while a CUDA graph is captured.
    """
    dims = len(spatial_shape)
    sizes = [1] * (3 - dims) + list(spatial_shape)
    strides = [sizes[1] * sizes[2], sizes[2], 1]
    rows = []
    for start in range(0, len(orders), dims + 1):
        axes = list(range(3 - dims)) + [axis + 3 - dims for axis in orders[start : start + dims]]
        (_, n1, n2), (s0, s1, s2) = ([x[axis] for axis in axes] for x in (sizes, strides))
        reversed_ = orders[start + dims]
        first, sign = (sizes[0] * strides[0] - 1, -1) if reversed_ else (0, 1)
        steps = [sign * step for step in (s0 - n1 * s1, s1 - n2 * s2, s2)]
        rows.append([*_magic(n2), *_magic(n1), *steps, first])
    return torch.tensor(rows, dtype=torch.int32, device=device)


@triton.jit
def find_path(paths, k):
    """Row ``k`` of :py:func:`paths_of`; nothing if the tokens lie in sequence order."""
    path = ()
    if paths is not None:
        for i in tl.static_range(8):
            path = path + (tl.load(paths + k * 8 + i),)
    return path


@triton.jit
def place_of(t, path):
    """Raster index of token ``t`` of a sequence.

    With ``q = t // n2`` and ``i = q // n1`` for a sequence whose axes have n0, n1, n2 tokens and raster strides s0, s1,
    s2, it is ``i s0 + (q - i n1) s1 + (t - q n2) s2``. Reversed, all of it is subtracted from the last index.
    """
    if len(path) == 0:
        place = t
    else:
        q = _divide(t, path[0], path[1])
        i = _divide(q, path[2], path[3])
        place = path[7] + i * path[4] + q * path[5] + t * path[6]
    return place


@triton.jit
def _divide(t, multiplier, shift):
    double = (2 * t).to(tl.uint32)
    return (tl.umulhi(double, multiplier.to(tl.uint32, bitcast=True)) >> shift.to(tl.uint32)).to(tl.int32)

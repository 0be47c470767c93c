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

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from custom_nets.blocks.recompute import recomputed
from custom_nets.blocks.selective_ssm import DirectionalSSM

__all__ = ["Mamba", "MambaBlock"]


class Mamba(nn.Module):
    """Mamba (Gu and Dao, 2023, arXiv 2312.00752) over the tokens of an image or a volume, in one or more directions.

    The directions share input and output projection, gate and normalisation; in raster order the gate is the same for
    all of them and so is applied once, to their average.

    Args:
        dim: channels of the tokens.
        orders: directions as (axis order, reversed) pairs, see :py:func:`custom_nets.ops.scan_orders`.
        state_dim: states per channel.
        expand: inner channels per channel.
        normalise: whether the merged directions pass a layer norm before the output projection.
    """

    def __init__(
        self,
        dim: int,
        orders: list[tuple[list[int], bool]],
        state_dim: int = 8,
        expand: int = 2,
        normalise: bool = True,
    ) -> None:
        super().__init__()
        inner = expand * dim
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False)
        self.ssm = DirectionalSSM(inner, orders, state_dim, step_rank=math.ceil(dim / 16))
        self.norm = nn.LayerNorm(inner) if normalise else nn.Identity()
        self.out_proj = nn.Linear(inner, dim, bias=False)

    def forward(self, x: torch.Tensor, spatial_shape: list[int]) -> torch.Tensor:
        """``(B, L, dim)`` in raster order of ``spatial_shape`` to the same shape."""
        content, gate = self.in_proj(x).chunk(2, dim=-1)
        return self.out_proj(self.norm(self.ssm(content, spatial_shape) * F.silu(gate)))


class MambaBlock(nn.Module):
    """``x + Mamba(LayerNorm(x))``; arguments as :py:class:`Mamba`, and ``use_checkpoint``: whether the backward
    computes activations again instead of keeping them."""

    def __init__(
        self,
        dim: int,
        orders: list[tuple[list[int], bool]],
        state_dim: int = 8,
        normalise: bool = True,
        use_checkpoint: bool = False,
    ) -> None:
        super().__init__()
        self.use_checkpoint = use_checkpoint
        self.norm = nn.LayerNorm(dim)
        self.mamba = Mamba(dim, orders, state_dim, normalise=normalise)

    def forward(self, x: torch.Tensor, spatial_shape: list[int]) -> torch.Tensor:
        """``(B, L, dim)`` in raster order of ``spatial_shape`` to the same shape."""
        if not torch.jit.is_scripting():
            if self.use_checkpoint:
                return recomputed(self, self._forward, x, spatial_shape)
        return self._forward(x, spatial_shape)

    def _forward(self, x: torch.Tensor, spatial_shape: list[int]) -> torch.Tensor:
        return x + self.mamba(self.norm(x), spatial_shape)

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

import torch
import torch.nn as nn
import torch.nn.functional as F

from custom_nets.blocks.mamba import Mamba
from custom_nets.blocks.recompute import recomputed

__all__ = ["CrossMamba", "CrossMambaBlock"]


class CrossMamba(Mamba):
    """Mamba whose scan is steered by another modality: content, gate and skip are the own modality's, while step, input
    and output matrices are projected from the other one. Arguments as :py:class:`custom_nets.blocks.mamba.Mamba`.
    """

    def __init__(
        self,
        dim: int,
        orders: list[tuple[list[int], bool]],
        state_dim: int = 8,
        expand: int = 2,
        normalise: bool = True,
    ) -> None:
        super().__init__(dim, orders, state_dim, expand, normalise)
        self.condition_proj = nn.Linear(dim, expand * dim, bias=False)

    def forward(  # type: ignore[override]
        self, x: torch.Tensor, other: torch.Tensor, spatial_shape: list[int]
    ) -> torch.Tensor:
        """Own tokens ``x`` and the ``other`` modality's, both ``(B, L, dim)``, to ``(B, L, dim)``."""
        content, gate = self.in_proj(x).chunk(2, dim=-1)
        y = self.ssm(content, spatial_shape, condition=self.condition_proj(other))
        return self.out_proj(self.norm(y * F.silu(gate)))


class CrossMambaBlock(nn.Module):
    """``x + CrossMamba(LayerNorm(x), LayerNorm(other))``; arguments as
    :py:class:`custom_nets.blocks.mamba.MambaBlock`."""

    def __init__(
        self, dim: int, orders: list[tuple[list[int], bool]], state_dim: int = 8, use_checkpoint: bool = False
    ) -> None:
        super().__init__()
        self.use_checkpoint = use_checkpoint
        self.norm = nn.LayerNorm(dim)
        self.other_norm = nn.LayerNorm(dim)
        self.mamba = CrossMamba(dim, orders, state_dim)

    def forward(self, x: torch.Tensor, other: torch.Tensor, spatial_shape: list[int]) -> torch.Tensor:
        """Own tokens ``x`` and the ``other`` modality's, both ``(B, L, dim)``, to ``(B, L, dim)``."""
        if not torch.jit.is_scripting():
            if self.use_checkpoint:
                return recomputed(self, self._forward, x, other, spatial_shape)
        return self._forward(x, other, spatial_shape)

    def _forward(self, x: torch.Tensor, other: torch.Tensor, spatial_shape: list[int]) -> torch.Tensor:
        return x + self.mamba(self.norm(x), self.other_norm(other), spatial_shape)

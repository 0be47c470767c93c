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
from collections.abc import Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F

from custom_nets.blocks.selective_ssm import DirectionalSSM

__all__ = ["MultiSourceMamba"]


class MultiSourceMamba(nn.Module):
    """Mamba over several sources of tokens at once: every source has its own projection, scan and gate, and what they
    give is added before one output projection.

    Args:
        dim: channels of the tokens.
        sources: number of sources.
        orders: directions as (axis order, reversed) pairs, see :py:func:`custom_nets.ops.scan_orders`.
        state_dim: states per channel.
        expand: inner channels per channel.
    """

    def __init__(
        self, dim: int, sources: int, orders: list[tuple[list[int], bool]], state_dim: int = 16, expand: int = 2
    ) -> None:
        super().__init__()
        inner = expand * dim
        self.in_projs = nn.ModuleList(nn.Linear(dim, 2 * inner, bias=False) for _ in range(sources))
        self.ssms = nn.ModuleList(
            DirectionalSSM(inner, orders, state_dim, step_rank=math.ceil(dim / 16)) for _ in range(sources)
        )
        self.out_proj = nn.Linear(inner, dim, bias=False)

    def forward(self, sources: Sequence[torch.Tensor], spatial_shape: list[int]) -> torch.Tensor:
        """Tokens of every source, each ``(B, L, dim)`` in raster order of ``spatial_shape``, to ``(B, L, dim)``."""
        merged = torch.zeros((), device=sources[0].device)
        for tokens, in_proj, ssm in zip(sources, self.in_projs, self.ssms):
            content, gate = in_proj(tokens).chunk(2, dim=-1)
            merged = merged + ssm(content, spatial_shape) * F.silu(gate)
        return self.out_proj(merged)

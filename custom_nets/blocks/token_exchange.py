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

from custom_nets.blocks.mamba import Mamba

__all__ = ["TokenExchange", "swap_channels"]


def swap_channels(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Swaps every second channel (the odd ones of the last dimension) of two tensors of equal shape."""
    odd = torch.arange(x.shape[-1], device=x.device) % 2 == 1
    return torch.where(odd, y, x), torch.where(odd, x, y)


class TokenExchange(nn.Module):
    """Shallow exchange between the tokens of two modalities: every second channel is swapped before a plain Mamba.

    The residual stream of each modality starts as the encoder's tokens; every round, with the same weights, adds the
    last round's output (at first, the tokens to exchange) to it, normalises, swaps and scans.

    Args:
        dim: channels of the tokens.
        orders: direction of the plain Mamba, see :py:func:`custom_nets.ops.scan_orders`.
        state_dim: states per channel.
        rounds: how often to exchange.
    """

    def __init__(self, dim: int, orders: list[tuple[list[int], bool]], state_dim: int = 16, rounds: int = 2) -> None:
        super().__init__()
        self.rounds = rounds
        self.norm_x, self.norm_y = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.mamba_x = Mamba(dim, orders, state_dim, normalise=False)
        self.mamba_y = Mamba(dim, orders, state_dim, normalise=False)

    def forward(
        self,
        x: torch.Tensor,
        y: torch.Tensor,
        residual_x: torch.Tensor,
        residual_y: torch.Tensor,
        spatial_shape: list[int],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens of the two modalities, and what their residual streams start as, each ``(B, L, dim)``, to the
        exchanged tokens of the same shapes."""
        for _ in range(self.rounds):
            residual_x, residual_y = residual_x + x, residual_y + y
            swapped_x, swapped_y = swap_channels(self.norm_x(residual_x), self.norm_y(residual_y))
            x, y = self.mamba_x(swapped_x, spatial_shape), self.mamba_y(swapped_y, spatial_shape)
        return x, y

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

from custom_nets.blocks import CrossWindowBlock, ResidualSwinBlock, SwinLayer, leaky_convs
from custom_nets.nets.pair_network import PairNetwork
from custom_nets.nets.registry import register_network

__all__ = ["SwinFusion"]


class FusionStage(nn.Module):
    """Attention within each of two images, a plain and a shifted Swin block, then from each to the other.

    Args:
        spatial_dims: 2 or 3.
        dim: channels of the tokens.
        num_heads: attention heads.
        window_size: tokens along each side of an attention window.
    """

    def __init__(self, spatial_dims: int, dim: int, num_heads: int, window_size: int) -> None:
        super().__init__()

        def within() -> nn.Module:
            return SwinLayer(spatial_dims, dim, 2, num_heads, window_size, mlp_ratio=2.0)

        def cross() -> nn.Module:
            return CrossWindowBlock(spatial_dims, dim, num_heads, window_size, mlp_ratio=2.0)

        self.within_x, self.within_y = within(), within()
        self.cross_x, self.cross_y = cross(), cross()

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Features of two images, each ``(B, H, W[, D], dim)``, to the same shapes."""
        x, y = self.within_x(x), self.within_y(y)
        return self.cross_x(x, y), self.cross_y(y, x)


@register_network("swinfusion")
class SwinFusion(PairNetwork):
    """SwinFusion: convolutions and Swin transformers extract, attention within and between the images fuses, Swin
    transformers and convolutions reconstruct, all at full resolution. From: Ma et al., "SwinFusion: Cross-domain
    Long-range Learning for General Image Fusion via Swin Transformer", IEEE/CAA Journal of Automatica Sinica 9(7),
    2022. The output is linear.

    955,471 parameters in 2D; the release has 973,681, 1.9 % more, which no reading of the published architecture that
    we tried accounts for.

    Args:
        spatial_dims: 2 or 3.
        dim: channels of the tokens, an even number.
        num_heads: attention heads, a divisor of ``dim``.
        window_size: tokens along each side of an attention window; by default the paper's 8 in 2D, and 4 in 3D, where
            a window then holds as many tokens.
    """

    def __init__(
        self, spatial_dims: int = 2, dim: int = 60, num_heads: int = 6, window_size: int | None = None
    ) -> None:
        window_size = window_size or (8 if spatial_dims == 2 else 4)
        super().__init__(spatial_dims, multiple=window_size)

        def swin() -> nn.Module:
            return ResidualSwinBlock(spatial_dims, dim, 4, num_heads, window_size, mlp_ratio=2.0)

        def extractor() -> nn.Module:
            return nn.Sequential(leaky_convs(spatial_dims, [1, dim // 2, dim]), swin())

        self.extract_x, self.extract_y = extractor(), extractor()
        self.stages = nn.ModuleList(FusionStage(spatial_dims, dim, num_heads, window_size) for _ in range(2))
        self.norm_x, self.norm_y = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.reconstruct = nn.Sequential(
            leaky_convs(spatial_dims, [2 * dim, dim]),
            swin(),
            leaky_convs(spatial_dims, [dim, dim // 2, dim // 4, 1], linear_end=True),
        )

    def fuse(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """Two images, each ``(B, 1, H, W[, D])``, to the fused one of the same shape."""
        x, y = self.extract_x(first).movedim(1, -1), self.extract_y(second).movedim(1, -1)
        for stage in self.stages:
            x, y = stage(x, y)
        features = torch.cat([self.norm_x(x), self.norm_y(y)], dim=-1)
        return self.reconstruct(features.movedim(-1, 1))

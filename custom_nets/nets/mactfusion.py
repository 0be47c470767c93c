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
from monai.networks.layers.factories import Conv, Norm

from custom_nets.blocks import GradientResidualDenseBlock, MaxViTBlock, leaky_convs
from custom_nets.nets.pair_network import PairNetwork
from custom_nets.nets.registry import register_network

__all__ = ["MACTFusion"]


class LargeKernelPyramid(nn.Module):
    """A chain of four convolutions with large depthwise kernels, each as wide as a quarter of the output, which is all
    of them side by side.

    Args:
        spatial_dims: 2 or 3.
        channels: channels of the output, a multiple of 4.
        kernel_size: side of the depthwise kernels, an odd number.
    """

    def __init__(self, spatial_dims: int, channels: int, kernel_size: int) -> None:
        super().__init__()
        conv = Conv[Conv.CONV, spatial_dims]
        width = channels // 4
        self.chain = nn.ModuleList(
            nn.Sequential(
                conv(incoming, width, 3, padding=1),
                conv(width, width, kernel_size, padding=kernel_size // 2, groups=width),
                nn.GroupNorm(1, width),
                nn.LeakyReLU(0.2),
            )
            for incoming in (1, width, width, width)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(B, 1, H, W[, D])`` to ``(B, channels, H, W[, D])``."""
        levels = []
        for link in self.chain:
            x = link(x)
            levels.append(x)
        return torch.cat(levels, dim=1)


class CrossGate(nn.Module):
    """Adds to one image's features what attention finds in the other's: the features are normalised, scaled and
    shifted by the other image's, attend to it, and pass a gate.

    Args:
        spatial_dims: 2 or 3.
        channels: channels of both.
        num_heads: attention heads.
        window_size: tokens along each side of an attention window, and of a grid.
    """

    def __init__(self, spatial_dims: int, channels: int, num_heads: int, window_size: int) -> None:
        super().__init__()
        conv = Conv[Conv.CONV, spatial_dims]
        self.norm = Norm[Norm.INSTANCE, spatial_dims](channels)
        self.modulation = conv(channels, 2 * channels, 3, padding=1)
        self.attention = MaxViTBlock(spatial_dims, channels, num_heads, window_size)
        self.gate = conv(2 * channels, channels, 3, padding=1)

    def forward(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """Features of two images, each ``(B, channels, H, W[, D])``, to the first one's enhanced."""
        scale, shift = self.modulation(other).chunk(2, dim=1)
        attended = self.attention(self.norm(x) * (1 + scale) + shift, context=other)
        gate = torch.sigmoid(self.gate(torch.cat([x, attended], dim=1)))
        return x + gate * attended


@register_network("mactfusion")
class MACTFusion(PairNetwork):
    """MACTFusion: large kernels, gradient residual dense blocks and MaxViT blocks extract, gated cross attention fuses.
    From: Xie et al., "MACTFusion: Lightweight Cross Transformer for Adaptive Multimodal Medical Image Fusion", IEEE
    Journal of Biomedical and Health Informatics, 2024. The output is linear.

    631,337 parameters in 2D; the release has 623,355, 1.3 % fewer. The facts at hand do not fix the form of the
    modulation and the gate (here 3x3 convolutions) and of the MaxViT blocks' convolution (here MONAI's, of
    EfficientNet).

    Args:
        spatial_dims: 2 or 3.
        num_heads: attention heads, a divisor of 48.
        window_size: tokens along each side of an attention window, and of a grid; by default 8 in 2D, and 4 in 3D,
            where a window then holds as many tokens.
        kernel_size: side of the large depthwise kernels, an odd number; by default the paper's 31 in 2D and 11 in 3D,
            where a kernel has about as many weights, and costs as much a voxel.
    """

    def __init__(
        self, spatial_dims: int = 2, num_heads: int = 4, window_size: int | None = None, kernel_size: int | None = None
    ) -> None:
        window_size = window_size or (8 if spatial_dims == 2 else 4)
        kernel_size = kernel_size or (31 if spatial_dims == 2 else 11)
        super().__init__(spatial_dims, multiple=window_size)
        conv = Conv[Conv.CONV, spatial_dims]

        def extractor() -> nn.Sequential:
            return nn.Sequential(
                LargeKernelPyramid(spatial_dims, 16, kernel_size),
                GradientResidualDenseBlock(spatial_dims, 16, 32),
                GradientResidualDenseBlock(spatial_dims, 32, 48),
                MaxViTBlock(spatial_dims, 48, num_heads, window_size),
            )

        self.extract_x, self.extract_y = extractor(), extractor()
        self.gate_x, self.gate_y = (CrossGate(spatial_dims, 48, num_heads, window_size) for _ in range(2))
        self.reconstruct = nn.Sequential(
            conv(96, 48, 1), nn.LeakyReLU(0.2), leaky_convs(spatial_dims, [48, 32, 1], linear_end=True)
        )

    def fuse(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """Two images, each ``(B, 1, H, W[, D])``, to the fused one of the same shape."""
        x, y = self.extract_x(first), self.extract_y(second)
        return self.reconstruct(torch.cat([self.gate_x(x, y), self.gate_y(y, x)], dim=1))

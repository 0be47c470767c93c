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
from monai.networks.layers.factories import Conv

__all__ = ["GradientResidualDenseBlock", "SobelEdges"]


class SobelEdges(nn.Module):
    """Sum of the absolute Sobel derivatives of every channel, ``(B, C, H, W[, D])`` to the same shape.

    Classic and unnormalised in 2D; in 3D the second smoothing is an average, so that both have the same range.

    Args:
        spatial_dims: 2 or 3.
    """

    kernels: torch.Tensor

    def __init__(self, spatial_dims: int) -> None:
        super().__init__()
        self.convolve = {2: F.conv2d, 3: F.conv3d}[spatial_dims]
        derivative, smoothing = torch.tensor([-1.0, 0.0, 1.0]), torch.tensor([1.0, 2.0, 1.0])
        kernels = []
        for axis in range(spatial_dims):
            kernel = torch.ones(())
            for other in range(spatial_dims):
                kernel = kernel.unsqueeze(-1) * (derivative if other == axis else smoothing)
            kernels.append(kernel / 4 ** (spatial_dims - 2))
        self.register_buffer("kernels", torch.stack(kernels).unsqueeze(1), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        channels = x.shape[1]
        weight = self.kernels.repeat(channels, *[1] * (self.kernels.dim() - 1))
        derivatives = self.convolve(x, weight, padding=1, groups=channels)
        return derivatives.unflatten(1, (channels, -1)).abs().sum(dim=2)


class GradientResidualDenseBlock(nn.Module):
    """Gradient residual dense block (Tang et al., "SeAFusion", Information Fusion 82, 2022): two densely connected
    convolutions, and the Sobel edges of the input as a residual.

    ``LR(C1(LR(C3(cat(x, LR(C3(x)))))) + C1(|Sx| + |Sy|))``.

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of the input and of both dense convolutions.
        out_channels: channels of the output.
        negative_slope: slope of the leaky ReLUs.
    """

    def __init__(self, spatial_dims: int, in_channels: int, out_channels: int, negative_slope: float = 0.2) -> None:
        super().__init__()
        conv = Conv[Conv.CONV, spatial_dims]
        self.first = conv(in_channels, in_channels, 3, padding=1)
        self.second = conv(2 * in_channels, in_channels, 3, padding=1)
        self.project = conv(in_channels, out_channels, 1)
        self.edges = SobelEdges(spatial_dims)
        self.project_edges = conv(in_channels, out_channels, 1)
        self.activation = nn.LeakyReLU(negative_slope)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(B, in_channels, H, W[, D])`` to ``(B, out_channels, H, W[, D])``."""
        dense = torch.cat([x, self.activation(self.first(x))], dim=1)
        dense = self.activation(self.second(dense))
        return self.activation(self.project(dense) + self.project_edges(self.edges(x)))

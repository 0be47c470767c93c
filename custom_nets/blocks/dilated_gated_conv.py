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

from custom_nets.blocks.recompute import recomputed

__all__ = ["DilatedGatedConvBlock"]


class DilatedGatedConvBlock(nn.Module):
    """Dilated gated convolution block (DGCB): a convolutional and a pointwise branch gate each other, then dilate.

    With ``pyramid`` the result passes a shared convolution once, twice and three times, and the sum is added to the
    input; without it the gated features are added as they are. From: Zhou and Khalvati, "ClinicalFMamba" (2025).

    Args:
        spatial_dims: 2 or 3.
        channels: channels of input and output.
        dilation: dilation of the convolution behind the gate.
        pyramid: whether to use the shared convolution pyramid (the 2D network does, the 3D one does not).
        negative_slope: slope of the leaky ReLUs.
        use_checkpoint: whether the backward computes activations again instead of keeping them.
    """

    def __init__(
        self,
        spatial_dims: int,
        channels: int,
        dilation: int,
        pyramid: bool,
        negative_slope: float = 0.2,
        use_checkpoint: bool = False,
    ) -> None:
        super().__init__()
        self.use_checkpoint = use_checkpoint
        conv, norm = Conv[Conv.CONV, spatial_dims], Norm[Norm.BATCH, spatial_dims]

        def activated(kernel_size: int, dilation: int = 1) -> nn.Sequential:
            return nn.Sequential(
                norm(channels),
                conv(channels, channels, kernel_size, padding=dilation * (kernel_size // 2), dilation=dilation),
                nn.LeakyReLU(negative_slope),
            )

        self.content = activated(kernel_size=3)
        self.gate = activated(kernel_size=1)
        self.dilated = activated(kernel_size=3, dilation=dilation)
        self.norm = nn.Sequential(norm(channels), nn.LeakyReLU(negative_slope)) if pyramid else nn.Identity()
        self.pyramid = conv(channels, channels, 3, padding=1) if pyramid else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(B, channels, H, W[, D])`` to the same shape."""
        if not torch.jit.is_scripting():
            if self.use_checkpoint:
                return recomputed(self, self._forward, x)
        return self._forward(x)

    def _forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(self.dilated(self.content(x) * self.gate(x)))
        if self.pyramid is None:
            return x + h
        once = self.pyramid(h)
        twice = self.pyramid(once)
        return x + once + twice + self.pyramid(twice)

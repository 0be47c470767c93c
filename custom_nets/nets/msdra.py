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

from custom_nets.blocks import shared_batch_norms
from custom_nets.nets.registry import register_network
from custom_nets.nets.two_stage import TwoStageNetwork

__all__ = ["MSDRA"]


class DoubleBranchBlock(nn.Module):
    """Residual attention over two branches: convolutions of falling size one after the other, and three residual steps
    of one shared convolution. One batch norm serves all of them, with statistics of their own.

    Args:
        spatial_dims: 2 or 3.
        channels: channels of input and output.
    """

    def __init__(self, spatial_dims: int, channels: int) -> None:
        super().__init__()
        conv = Conv[Conv.CONV, spatial_dims]
        # A batch norm would cancel the biases of the largest and the smallest, and no gradient would reach them.
        self.conv5 = conv(channels, channels, 5, padding=2, bias=False)
        self.conv3 = conv(channels, channels, 3, padding=1)
        self.conv1 = conv(channels, channels, 1, bias=False)
        self.norms = shared_batch_norms(spatial_dims, channels, uses=7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(B, channels, H, W[, D])`` to the same shape."""
        total, cascade, residual = torch.zeros_like(x), x, x
        for conv, norm in zip((self.conv5, self.conv3, self.conv1), self.norms[:3]):
            cascade = F.relu(norm(conv(cascade)))
            total = total + cascade
        for norm in self.norms[3:6]:
            residual = F.relu(norm(self.conv3(self.conv3(residual)) + residual))
        return self.norms[6](F.relu(x) * (total + residual) + x)


@register_network("msdra")
class MSDRA(TwoStageNetwork):
    """MSDRA: an autoencoder with one multiscale double-branch residual attention block. From: Li et al., "A multiscale
    double-branch residual attention network for anatomical-functional medical image fusion", Computers in Biology and
    Medicine 141, 2022. The decoder is linear.

    In 2D 199,361 parameters: the 199,489 of the release without two biases that its batch norm cancels.

    Args:
        spatial_dims: 2 or 3.
        rule: name of the fusion rule, see :py:func:`custom_nets.ops.fusion_rule`; by default weighted L1 (absolute
            ratios).
        channels: channels of the features.
    """

    def __init__(self, spatial_dims: int = 2, rule: str = "abs_ratio", channels: int = 64) -> None:
        super().__init__(spatial_dims, rule)
        conv = Conv[Conv.CONV, spatial_dims]
        self.encoder = nn.Sequential(conv(1, channels, 1), DoubleBranchBlock(spatial_dims, channels))
        self.decoder = nn.Sequential(
            conv(channels, channels, 3, padding=1),
            conv(channels, channels // 2, 3, padding=1),
            conv(channels // 2, 1, 3, padding=1),
        )

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Images ``(B, 1, H, W[, D])`` to features ``(B, channels, H, W[, D])``."""
        return self.encoder(images)

    def decode(self, features: torch.Tensor) -> torch.Tensor:
        """Features ``(B, channels, H, W[, D])`` to images ``(B, 1, H, W[, D])``."""
        return self.decoder(features)

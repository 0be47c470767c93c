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
from monai.networks.layers.factories import Conv

from custom_nets.blocks import ResidualPyramidAttention, double, halve, pooled_gate, shared_batch_norms
from custom_nets.nets.registry import register_network
from custom_nets.nets.two_stage import TwoStageNetwork

__all__ = ["MSRPAN"]


class MultiscalePyramidBlock(nn.Module):
    """Residual attention over three halved resolutions: at each a :py:class:`ResidualPyramidAttention` with the same
    weights, summed on the way back up, mixed by a pointwise convolution, and weighed by the input.

    Args:
        spatial_dims: 2 or 3.
        channels: channels of input and output.
    """

    LEVELS = 3

    def __init__(self, spatial_dims: int, channels: int) -> None:
        super().__init__()
        self.attention = ResidualPyramidAttention(spatial_dims, channels)
        self.mix = Conv[Conv.CONV, spatial_dims](channels, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(B, channels, H, W[, D])`` to the same shape."""
        levels = [x]
        for _ in range(self.LEVELS):
            levels.append(halve(levels[-1]))
        pyramid = self.attention(levels[-1])
        for finer in levels[-2:0:-1]:
            pyramid = self.attention(finer) + double(pyramid, finer)
        return pooled_gate(x, self.mix(double(pyramid, x)))


@register_network("msrpan")
class MSRPAN(TwoStageNetwork):
    """MSRPAN: an autoencoder whose features pass one multiscale residual pyramid attention block and batch norm three
    times. From: Fu et al., "A multiscale residual pyramid attention network for medical image fusion", Biomedical
    Signal Processing and Control 66, 2021. The decoder is linear.

    In 2D 96,769 parameters, as the release has. What is known of its layers leaves 4,160 of them without a place, just
    a pointwise convolution from 64 to 64 channels; it mixes the pyramid's sum here.

    Args:
        spatial_dims: 2 or 3.
        rule: name of the fusion rule, see :py:func:`custom_nets.ops.fusion_rule`; by default the feature energy ratio.
        channels: channels of the features.
    """

    def __init__(self, spatial_dims: int = 2, rule: str = "fer", channels: int = 64) -> None:
        super().__init__(spatial_dims, rule)
        conv = Conv[Conv.CONV, spatial_dims]
        self.stem = conv(1, channels, 1)
        self.block = MultiscalePyramidBlock(spatial_dims, channels)
        self.norms = shared_batch_norms(spatial_dims, channels, uses=3)
        self.decoder = nn.Sequential(
            conv(channels, channels, 3, padding=1),
            conv(channels, channels // 2, 3, padding=1),
            conv(channels // 2, 1, 1),
        )

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Images ``(B, 1, H, W[, D])`` to features ``(B, channels, H, W[, D])``."""
        features = pooled_gate(images, self.stem(images))
        attended = features
        for norm in self.norms:
            attended = norm(self.block(attended))
        return pooled_gate(features, attended)

    def decode(self, features: torch.Tensor) -> torch.Tensor:
        """Features ``(B, channels, H, W[, D])`` to images ``(B, 1, H, W[, D])``."""
        return self.decoder(features)

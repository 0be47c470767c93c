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

from custom_nets.blocks import ResidualPyramidAttention, pooled_gate
from custom_nets.nets.registry import register_network
from custom_nets.nets.two_stage import TwoStageNetwork

__all__ = ["EHDRAN"]

DILATIONS = (1, 3, 5)
NEGATIVE_SLOPE = 0.2


class EdgeEnhancement(nn.Module):
    """Edges of 2D features by a trainable Sobel operator, added to what a densely connected pair of convolutions makes
    of the features.

    Args:
        channels: channels of input and output.
        dropout: share of the dense branch's features that are dropped in training.
    """

    def __init__(self, channels: int, dropout: float = 0.2) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(2 * channels, 2 * channels, 3, padding=1)
        self.dense = nn.Sequential(nn.Dropout(dropout), nn.Conv2d(2 * channels, channels, 1))
        derivative = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]])
        self.sobel_x, self.sobel_y = self._depthwise(derivative, channels), self._depthwise(derivative.T, channels)
        self.edges = nn.Conv2d(channels, channels, 1)

    @staticmethod
    def _depthwise(kernel: torch.Tensor, channels: int) -> nn.Conv2d:
        conv = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        conv.weight.data.copy_(kernel.expand_as(conv.weight))
        return conv

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(B, channels, H, W)`` to the same shape."""
        dense = torch.cat([x, F.leaky_relu(self.first(x), NEGATIVE_SLOPE)], dim=1)
        dense = F.leaky_relu(self.second(dense), NEGATIVE_SLOPE)
        return self.dense(dense) + self.edges(self.sobel_x(x).abs() + self.sobel_y(x).abs())


class EdgeEncoder(nn.Module):
    """Encoder for slices: dilated convolutions and residual pyramid attention, weighed by their input; an edge branch.

    Args:
        channels: channels of the features.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, channels, 1)
        # The batch norm behind would cancel the biases of these and of the pointwise convolution.
        self.dilated = _dilated_convs(2, channels, bias=False)
        self.attention = nn.Sequential(
            nn.Conv2d(len(DILATIONS) * channels, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
            ResidualPyramidAttention(2, channels),
            nn.BatchNorm2d(channels),
        )
        self.edge = EdgeEnhancement(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(B, 1, H, W)`` to ``(B, channels, H, W)``."""
        stem = self.stem(x)
        features = pooled_gate(x, stem)
        attended = self.attention(torch.cat([conv(features) for conv in self.dilated], dim=1))
        return pooled_gate(features, attended) + self.edge(stem)


class VolumeEncoder(nn.Module):
    """Encoder for volumes: dilated convolutions, each followed by the same residual pyramid attention, and a skip.

    Args:
        channels: channels of the features.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        joined = len(DILATIONS) * channels
        self.stem = self._activated(1, channels)
        self.dilated = _dilated_convs(3, channels, bias=True)
        self.attention = ResidualPyramidAttention(3, channels, gated=False)
        self.norms = nn.ModuleList(nn.BatchNorm3d(channels) for _ in DILATIONS)
        self.skip = nn.Conv3d(channels, joined, 1)
        self.merge = nn.Sequential(self._activated(joined, 2 * channels), self._activated(2 * channels, channels))

    @staticmethod
    def _activated(in_channels: int, out_channels: int) -> nn.Sequential:
        # The batch norm would cancel a bias, and no gradient would reach it.
        conv = nn.Conv3d(in_channels, out_channels, 3, padding=1, bias=False)
        return nn.Sequential(conv, nn.BatchNorm3d(out_channels), nn.ReLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(B, 1, H, W, D)`` to ``(B, channels, H, W, D)``."""
        stem = self.stem(x)
        scales = [norm(self.attention(conv(stem))) for conv, norm in zip(self.dilated, self.norms)]
        return self.merge(torch.cat(scales, dim=1) + self.skip(stem))


def _dilated_convs(spatial_dims: int, channels: int, bias: bool) -> nn.ModuleList:
    conv = Conv[Conv.CONV, spatial_dims]
    return nn.ModuleList(
        conv(channels, channels, 3, padding=dilation, dilation=dilation, bias=bias) for dilation in DILATIONS
    )


@register_network("ehdran")
class EHDRAN(TwoStageNetwork):
    """EH-DRAN: an autoencoder with dilated convolutions and residual pyramid attention, in 2D with an edge branch; the
    3D one has neither that branch nor gates. From: Zhou et al., "Edge-Enhanced Dilated Residual Attention Network for
    Multimodal Medical Image Fusion", BIBM 2024 (arXiv 2411.11799).

    In 2D 413,953 parameters: the 414,209 of the release without four biases that a batch norm cancels. In 3D 1,522,721,
    where the paper's has about 1.52 M.

    Args:
        spatial_dims: 2 or 3.
        rule: name of the fusion rule, see :py:func:`custom_nets.ops.fusion_rule`; by default the softmax feature
            weighted nuclear norm.
        channels: channels of the features.
    """

    def __init__(self, spatial_dims: int = 2, rule: str = "sfnn", channels: int = 64) -> None:
        super().__init__(spatial_dims, rule)
        conv = Conv[Conv.CONV, spatial_dims]
        self.encoder = EdgeEncoder(channels) if spatial_dims == 2 else VolumeEncoder(channels)
        widths = [channels, channels, channels // 2, *([] if spatial_dims == 2 else [channels // 4])]
        self.decoder = nn.Sequential()
        for incoming, outgoing in zip(widths, widths[1:]):
            self.decoder.extend([conv(incoming, outgoing, 3, padding=1), nn.LeakyReLU(NEGATIVE_SLOPE)])
        self.decoder.append(conv(widths[-1], 1, 3, padding=1))

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Images ``(B, 1, H, W[, D])`` to features ``(B, channels, H, W[, D])``."""
        return self.encoder(images)

    def decode(self, features: torch.Tensor) -> torch.Tensor:
        """Features ``(B, channels, H, W[, D])`` to images ``(B, 1, H, W[, D])``."""
        return self.decoder(features)

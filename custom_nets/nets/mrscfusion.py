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

from collections.abc import Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from monai.networks.layers.factories import Conv, Pool

from custom_nets.blocks import GradientResidualDenseBlock, ResidualSwinBlock, crop_to_size, leaky_convs
from custom_nets.nets.pair_network import PairNetwork
from custom_nets.nets.registry import register_network

__all__ = ["MRSCFusion", "NestDecoder", "NestEncoder"]


class BottleneckConv(nn.Sequential):
    """``ReLU(C1(ReLU(C3(x))))``, half as wide between the two as the input."""

    def __init__(self, spatial_dims: int, in_channels: int, out_channels: int) -> None:
        conv = Conv[Conv.CONV, spatial_dims]
        super().__init__(
            conv(in_channels, in_channels // 2, 3, padding=1),
            nn.ReLU(),
            conv(in_channels // 2, out_channels, 1),
            nn.ReLU(),
        )


class NestEncoder(nn.Module):
    """Convolutions at several scales with max pooling between them.

    Args:
        spatial_dims: 2 or 3.
        channels: channels at each scale, the finest first.
    """

    STEM = 16

    def __init__(self, spatial_dims: int, channels: Sequence[int]) -> None:
        super().__init__()
        self.stem = nn.Sequential(Conv[Conv.CONV, spatial_dims](1, self.STEM, 1), nn.ReLU())
        self.pool = Pool[Pool.MAX, spatial_dims](2)
        self.levels = nn.ModuleList(
            BottleneckConv(spatial_dims, incoming, outgoing)
            for incoming, outgoing in zip([self.STEM, *channels], channels)
        )

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Images ``(B, 1, H, W[, D])``, their sides multiples of the coarsest scale's stride, to the features of each
        scale."""
        x = self.stem(x)
        features: list[torch.Tensor] = []
        for level in self.levels:
            x = level(self.pool(x) if features else x)
            features.append(x)
        return features


class NestRound(nn.Module):
    """One round of the nested decoder: every scale but the coarsest joins all that it has so far with what the last
    round gave at the next coarser scale.

    Args:
        spatial_dims: 2 or 3.
        channels: channels at each scale of the last round, the finest first.
        number: which round it is, from 1: so many features of each scale there are.
    """

    def __init__(self, spatial_dims: int, channels: Sequence[int], number: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            BottleneckConv(spatial_dims, number * channels[i] + channels[i + 1], channels[i])
            for i in range(len(channels) - 1)
        )

    def forward(self, joined: Sequence[torch.Tensor], latest: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """All features so far, and the last round's, of each scale, to this round's of each scale but the coarsest."""
        coarser = [F.interpolate(i, scale_factor=2.0, mode="nearest") for i in latest[1:]]
        return [block(torch.cat([x, y], dim=1)) for block, x, y in zip(self.blocks, joined, coarser)]


class NestDecoder(nn.Module):
    """Nested decoder: rounds that leave one scale behind each, until only the finest is left.

    Args:
        spatial_dims: 2 or 3.
        channels: channels at each scale, the finest first.
    """

    def __init__(self, spatial_dims: int, channels: Sequence[int]) -> None:
        super().__init__()
        self.rounds = nn.ModuleList(
            NestRound(spatial_dims, channels[: len(channels) + 1 - number], number)
            for number in range(1, len(channels))
        )
        self.head = Conv[Conv.CONV, spatial_dims](channels[0], 1, 1)

    def forward(self, features: Sequence[torch.Tensor]) -> torch.Tensor:
        """Features of each scale to images ``(B, 1, H, W[, D])``."""
        joined, latest = list(features), list(features)
        for nest_round in self.rounds:
            latest = nest_round(joined, latest)
            joined = [torch.cat(pair, dim=1) for pair in zip(joined, latest)]
        return self.head(latest[0])


class TransformerCNNFusion(nn.Module):
    """Fuses the features of two images at one scale on two paths: residual Swin transformers, and gradient residual
    dense blocks; the paths are added.

    Args:
        spatial_dims: 2 or 3.
        channels: channels of both images' features and of the fused ones.
        num_heads: attention heads, a divisor of ``channels``.
        window_size: tokens along each side of an attention window.
    """

    def __init__(self, spatial_dims: int, channels: int, num_heads: int, window_size: int) -> None:
        super().__init__()

        def conv(factor: int = 1) -> nn.Module:
            return Conv[Conv.CONV, spatial_dims](factor * channels, channels, 3, padding=1)

        def swin() -> nn.Sequential:
            return nn.Sequential(conv(), ResidualSwinBlock(spatial_dims, channels, 3, num_heads, window_size, 4.0))

        def dense() -> nn.Sequential:
            convs = leaky_convs(spatial_dims, [channels, channels])
            return nn.Sequential(convs, GradientResidualDenseBlock(spatial_dims, channels, channels))

        self.swin_x, self.swin_y = swin(), swin()
        self.swin_merge = conv(2)
        self.dense_x, self.dense_y = dense(), dense()
        self.dense_merge = leaky_convs(spatial_dims, [2 * channels, *[channels] * 3], linear_end=True)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Features of two images, each ``(B, channels, H, W[, D])``, to the same shape."""
        transformer = self.swin_merge(torch.cat([self.swin_x(x), self.swin_y(y)], dim=1))
        convolution = self.dense_merge(torch.cat([self.dense_x(x), self.dense_y(y)], dim=1))
        return transformer + convolution


@register_network("mrscfusion")
class MRSCFusion(PairNetwork):
    """MRSCFusion: a nested autoencoder, and at each of its scales a fusion block of residual Swin transformers and
    convolutions. From: Xie et al., "MRSCFusion: Joint Residual Swin Transformer and Multiscale CNN for Unsupervised
    Multimodal Medical Image Fusion", IEEE Transactions on Instrumentation and Measurement 72, 2023. The output is
    linear.

    It is trained in two stages: the autoencoder on single images, then the fusion blocks with the autoencoder frozen.
    In 2D the autoencoder has 2,732,761 parameters and the fusion blocks 20,423,776 (2.73 M and 20.4 M in the release).

    Args:
        spatial_dims: 2 or 3.
        stage: the part that is trained, ``"autoencoder"`` or ``"fusion"``; the other one is frozen.
        channels: channels at each scale, the finest first.
        num_heads: attention heads, a divisor of each of ``channels``.
        window_size: tokens along each side of an attention window; by default the paper's 8 in 2D, and 4 in 3D, where
            a window then holds as many tokens.

    Raises:
        ValueError: if ``stage`` is neither of the two.
    """

    STAGES = ("autoencoder", "fusion")

    def __init__(
        self,
        spatial_dims: int = 2,
        stage: str = "fusion",
        channels: Sequence[int] = (64, 112, 160, 208),
        num_heads: int = 4,
        window_size: int | None = None,
    ) -> None:
        super().__init__(spatial_dims, multiple=2 ** (len(channels) - 1))
        if stage not in self.STAGES:
            raise ValueError(f"stage should be one of {self.STAGES}, got {stage!r}.")
        size = window_size or (8 if spatial_dims == 2 else 4)
        self.encoder = NestEncoder(spatial_dims, channels)
        self.fusion = nn.ModuleList(TransformerCNNFusion(spatial_dims, c, num_heads, size) for c in channels)
        self.decoder = NestDecoder(spatial_dims, channels)
        for part in (self.encoder, self.decoder):
            part.requires_grad_(stage == "autoencoder")
        self.fusion.requires_grad_(stage == "fusion")

    def forward(self, x: torch.Tensor, reconstruct: bool = False) -> torch.Tensor:
        """
        Args:
            x: the two images, ``(B, 2, H, W[, D])`` with values in [0, 1], of any spatial size.
            reconstruct: whether to encode and decode each image alone instead of fusing them, for the first stage.

        Returns:
            the fused image, ``(B, 1, H, W[, D])``, or both images again, ``(B, 2, H, W[, D])``, in the dtype of ``x``
            and not limited to [0, 1].

        Raises:
            ValueError: if ``x`` has another number of dimensions or channels.
        """
        if not reconstruct:
            return super().forward(x)
        decoded = self.decoder(self.encoder(torch.cat(self.split(x)))).chunk(2)
        return crop_to_size(torch.cat(decoded, dim=1).to(x.dtype), x.shape[2:])

    def fuse(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """Two images, each ``(B, 1, H, W[, D])``, to the fused one of the same shape."""
        features = self.encoder(torch.cat([first, second]))
        return self.decoder([fusion(*feature.chunk(2)) for fusion, feature in zip(self.fusion, features)])

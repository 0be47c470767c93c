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
from monai.networks.blocks.convolutions import ResidualUnit
from monai.networks.layers.factories import Conv

__all__ = ["SourceRefinement"]


class SourceRefinement(nn.Module):
    """Full-resolution head that fuses two images by choosing between them at every pixel, and correcting the choice.

    The features take up both images through a convolution and pass residual units. From them, a convolution gives each
    pixel the logits ``a`` of three candidates, the first image, the second and the larger of both, and a correction
    ``r``: the fused image is ``sigmoid(logit(softmax(a) . (x, y, max(x, y))) + r)``. Texture that is copied need not be
    drawn again, and the network starts near the maximum. Not in the paper.

    Args:
        spatial_dims: 2 or 3.
        channels: channels of the features.
        image_channels: channels of each image and of the fused one.
        depth: residual units, each of two convolutions with a leaky ReLU between them.
    """

    # The softmax starts with 0.79 for the maximum. From equal shares, MRI-CT pairs do not leave the average.
    MAXIMUM_LOGIT = 2.0

    def __init__(self, spatial_dims: int, channels: int, image_channels: int = 1, depth: int = 2) -> None:
        super().__init__()
        # half a grey level of 8 bits: black and white have no finite logit
        self.eps = 1 / 512
        conv = Conv[Conv.CONV, spatial_dims]
        self.images = conv(2 * image_channels, channels, 3, padding=1)
        self.units = nn.Sequential()
        for _ in range(depth):
            self.units.append(
                ResidualUnit(
                    spatial_dims,
                    channels,
                    channels,
                    adn_ordering="A",
                    act=("leakyrelu", {"negative_slope": 0.2}),
                    last_conv_only=True,
                )
            )
        self.head = conv(channels, 3 + image_channels, 3, padding=1)
        with torch.no_grad():
            assert self.head.bias is not None
            self.head.bias.copy_(torch.tensor([0.0, 0.0, self.MAXIMUM_LOGIT] + [0.0] * image_channels))

    def forward(self, features: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        """
        Args:
            features: ``(B, channels, H, W[, D])``.
            images: both images, ``(B, 2 * image_channels, H, W[, D])`` with values in [0, 1].

        Returns:
            the fused image, ``(B, image_channels, H, W[, D])``, in the dtype of ``images``.
        """
        features = self.units(features + self.images(images))
        # In half precision a sigmoid would leave fewer than 256 grey values.
        logits = self.head(features).to(images.dtype)
        weight_x, weight_y, weight_maximum = logits[:, :3].softmax(dim=1).chunk(3, dim=1)
        x, y = images.chunk(2, dim=1)
        chosen = weight_x * x + weight_y * y + weight_maximum * torch.maximum(x, y)
        return torch.sigmoid(torch.logit(chosen, self.eps) + logits[:, 3:])

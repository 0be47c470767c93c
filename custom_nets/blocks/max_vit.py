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
from monai.networks.nets.efficientnet import MBConvBlock

from custom_nets.blocks.cross_window_attention import CrossWindowBlock

__all__ = ["MaxViTBlock"]


class MaxViTBlock(nn.Module):
    """MaxViT block (Tu et al., ECCV 2022, arXiv 2204.01697): inverted bottleneck convolution, attention within windows,
    then attention within a grid over the whole image. With a context, both attend to the other image.

    A grid is a window of the image whose tokens are sorted differently, see :py:func:`_exchange_digits`.

    Args:
        spatial_dims: 2 or 3.
        channels: channels of input and output.
        num_heads: attention heads, a divisor of ``channels``.
        window_size: tokens along each side of a window, and of a grid.
        mlp_ratio: hidden channels of the perceptrons, and of the bottleneck, per channel.
    """

    def __init__(self, spatial_dims: int, channels: int, num_heads: int, window_size: int, mlp_ratio: int = 4) -> None:
        super().__init__()
        self.window_size = window_size
        self.convolution = MBConvBlock(
            spatial_dims,
            channels,
            channels,
            kernel_size=3,
            stride=1,
            image_size=[window_size] * spatial_dims,  # no matter which at stride 1
            expand_ratio=mlp_ratio,
            se_ratio=0.25,
            norm="batch",
            drop_connect_rate=None,
        )
        self.window = CrossWindowBlock(spatial_dims, channels, num_heads, window_size, mlp_ratio)
        self.grid = CrossWindowBlock(spatial_dims, channels, num_heads, window_size, mlp_ratio)

    def forward(self, x: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        """
        Args:
            x: features ``(B, channels, H, W[, D])``, their sides multiples of the window.
            context: features of another image, of the same shape; ``x`` itself by default.

        Returns:
            ``(B, channels, H, W[, D])``.
        """
        x = self.convolution(x).movedim(1, -1)
        other = None if context is None else context.movedim(1, -1)
        x = self.window(x, x if other is None else other)
        sizes = x.shape[1:-1]
        x = _exchange_digits(x, [self.window_size] * len(sizes))
        other = None if other is None else _exchange_digits(other, [self.window_size] * len(sizes))
        x = self.grid(x, x if other is None else other)
        return _exchange_digits(x, [size // self.window_size for size in sizes]).movedim(-1, 1)


def _exchange_digits(x: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """Sorts the tokens of ``(B, H, W[, D], C)`` along every axis such that what was ``length / count`` apart becomes
    adjacent: position ``i * (length / count) + j`` becomes ``j * count + i``. Undone by ``length / count``."""
    for axis, count in enumerate(counts, start=1):
        x = x.unflatten(axis, (count, -1)).transpose(axis, axis + 1).flatten(axis, axis + 1)
    return x

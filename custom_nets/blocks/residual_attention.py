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

__all__ = ["ResidualPyramidAttention", "double", "halve", "pooled_gate"]


def halve(x: torch.Tensor) -> torch.Tensor:
    """Means over cells of two pixels a side, ``(B, C, H, W[, D])`` to half of every side, rounded up: the last cell of
    an odd side holds what is there, so that any size is kept without padding."""
    pool = F.avg_pool2d if x.dim() == 4 else F.avg_pool3d
    # a cell of two would be larger than a side of one, which the 3D pool refuses
    return pool(x, [min(2, length) for length in x.shape[2:]], ceil_mode=True)


def double(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Repeats every pixel of what :py:func:`halve` made, up to the size of ``like``."""
    return F.interpolate(x, size=like.shape[2:], mode="nearest")


def pooled_gate(x: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """Residual attention without parameters: an input, averaged over small cells, weighs the features that were made
    from it, and is added to them: ``ReLU(up(down(x))) * features + x``.

    Args:
        x: ``(B, C, H, W[, D])``, or with one channel that weighs all features.
        features: ``(B, C, H, W[, D])``.

    Returns:
        a tensor of the shape of ``features``.
    """
    return F.relu(double(halve(x), x)) * features + x


class ResidualPyramidAttention(nn.Module):
    """Residual attention over a pyramid of one shared convolution C: ``ReLU(up(down(x))) * P(x) + x`` with
    ``P(x) = C(x) + C(C(x)) + C(C(C(x)))``, whose terms see three scales.

    The attention of MSRPAN (Fu et al. 2021) at each of its levels, and of EH-DRAN (Zhou et al. 2024).

    Args:
        spatial_dims: 2 or 3.
        channels: channels of input and output.
        gated: whether :py:func:`pooled_gate` weighs the pyramid; without it, it is added as it is.
    """

    def __init__(self, spatial_dims: int, channels: int, gated: bool = True) -> None:
        super().__init__()
        self.conv = Conv[Conv.CONV, spatial_dims](channels, channels, 3, padding=1)
        self.gated = gated

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(B, channels, H, W[, D])`` to the same shape."""
        once = self.conv(x)
        twice = self.conv(once)
        pyramid = once + twice + self.conv(twice)
        return pooled_gate(x, pyramid) if self.gated else pyramid + x

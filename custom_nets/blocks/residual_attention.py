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
from monai.networks.layers.factories import Conv, Pool

__all__ = ["PooledGate", "ResidualPyramidAttention"]


class PooledGate(nn.Module):
    """Residual attention without parameters: an input, averaged over cells of two pixels a side, weighs the features
    that were made from it, and is added to them: ``ReLU(up(down(x))) * features + x``.

    Cells at the end of an odd side hold what is there, so that any size is kept without padding.

    Args:
        spatial_dims: 2 or 3.
    """

    def __init__(self, spatial_dims: int) -> None:
        super().__init__()
        self.down = Pool[Pool.AVG, spatial_dims](2, ceil_mode=True)

    def forward(self, x: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """
        Args:
            x: ``(B, C, H, W[, D])``, or with one channel that weighs all features.
            features: ``(B, C, H, W[, D])``.

        Returns:
            a tensor of the shape of ``features``.
        """
        return F.relu(self.up(self.down(x), x)) * features + x

    def up(self, x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Inverse of ``down`` by repetition, to the size of ``like``."""
        return F.interpolate(x, size=like.shape[2:], mode="nearest")


class ResidualPyramidAttention(nn.Module):
    """Residual attention over a pyramid of one shared convolution C: ``gate(x) * P(x) + x`` with
    ``P(x) = C(x) + C(C(x)) + C(C(C(x)))``, whose terms see three scales.

    The attention of MSRPAN (Fu et al. 2021) at each of its levels, and of EH-DRAN (Zhou et al. 2024).

    Args:
        spatial_dims: 2 or 3.
        channels: channels of input and output.
        gated: whether :py:class:`PooledGate` weighs the pyramid; without it, it is added as it is.
    """

    def __init__(self, spatial_dims: int, channels: int, gated: bool = True) -> None:
        super().__init__()
        self.conv = Conv[Conv.CONV, spatial_dims](channels, channels, 3, padding=1)
        self.gate = PooledGate(spatial_dims) if gated else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(B, channels, H, W[, D])`` to the same shape."""
        once = self.conv(x)
        twice = self.conv(once)
        pyramid = once + twice + self.conv(twice)
        return pyramid + x if self.gate is None else self.gate(x, pyramid)

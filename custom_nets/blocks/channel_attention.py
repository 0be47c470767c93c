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

__all__ = ["CrossModalChannelAttention"]


class CrossModalChannelAttention(nn.Module):
    """Cross-modal channel attention (CMCA): one modality's global statistics weigh the other one's channels.

    ``g(x, y) = C1b(y) * sigmoid(maxpool(C1a(x)) + avgpool(C1a(x)))`` with global pools; the fused image's skip is
    ``g(x, y) + g(y, x)``. From: Zhou and Khalvati, "ClinicalFMamba" (2025).

    Args:
        spatial_dims: 2 or 3.
        channels: channels of both inputs and of the output.
    """

    def __init__(self, spatial_dims: int, channels: int) -> None:
        super().__init__()
        conv = Conv[Conv.CONV, spatial_dims]
        self.attention = conv(channels, channels, 1)
        self.value = conv(channels, channels, 1)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Features of two modalities, each ``(B, channels, H, W[, D])``, to the same shape."""
        return self.value(y) * self._weights(x) + self.value(x) * self._weights(y)

    def _weights(self, x: torch.Tensor) -> torch.Tensor:
        features = self.attention(x)
        axes = list(range(2, x.dim()))
        return torch.sigmoid(features.amax(axes, keepdim=True) + features.mean(axes, keepdim=True))

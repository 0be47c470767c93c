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

from typing import Optional

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

    def forward(self, x: torch.Tensor, y: torch.Tensor, residual: Optional[torch.Tensor] = None) -> torch.Tensor:
        """Features of two modalities, and what they are added to, each ``(B, channels, H, W[, D])``, to that shape."""
        spatial_shape = list(x.shape[2:])
        x, y = x.flatten(2), y.flatten(2)
        of_x, of_y = self._weights(x), self._weights(y)
        # Weights of a convolution's outputs are weights of its matrix's rows. At full resolution there is then one
        # tensor, to which both products are added in place, instead of five. Voxels are its rows: a CPU has no fast
        # product in half precision otherwise.
        weight, bias = self.value.weight.flatten(1), self.value.bias
        assert bias is not None
        shift = (bias.unsqueeze(1) * (of_x + of_y)).to(x.dtype).transpose(1, 2)
        rows = shift.expand(-1, x.shape[2], -1) if residual is None else residual.flatten(2).transpose(1, 2) + shift
        rows = rows.to(x.dtype).contiguous()
        rows.baddbmm_(y.transpose(1, 2), (weight * of_x).to(x.dtype).transpose(1, 2))
        rows.baddbmm_(x.transpose(1, 2), (weight * of_y).to(x.dtype).transpose(1, 2))
        return rows.unflatten(1, spatial_shape).movedim(-1, 1)

    def _weights(self, x: torch.Tensor) -> torch.Tensor:
        """Features ``(B, channels, L)`` to the weights of the other modality's channels, ``(B, channels, 1)``."""
        features = torch.matmul(x.transpose(1, 2), self.attention.weight.flatten(1).t())
        pooled, bias = features.amax(1) + features.mean(1), self.attention.bias
        assert bias is not None
        return torch.sigmoid(pooled + 2 * bias).unsqueeze(2)

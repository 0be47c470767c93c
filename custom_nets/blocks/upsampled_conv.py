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

__all__ = ["UpsampledConv"]


class UpsampledConv(nn.Module):
    """Nearest upsampling by 2 and a convolution with 3 taps along each axis, zeros around the upsampled image, no bias.

    Computed as the transposed convolution that it is: each output depends on 2 inputs along an axis, so that 4 of 9
    products are left in 2D, 8 of 27 in 3D, and the upsampled image, the largest tensor of a decoder's stage, is never
    there.

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of the input.
        out_channels: channels of the output.
    """

    def __init__(self, spatial_dims: int, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.spatial_dims = spatial_dims
        # as of the convolution, so that it is initialised and saved as one
        self.weight = Conv[Conv.CONV, spatial_dims](in_channels, out_channels, 3, bias=False).weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(B, in_channels, H, W[, D])`` to ``(B, out_channels, 2H, 2W[, 2D])``."""
        if self.spatial_dims == 2:
            return F.conv_transpose2d(x, self.kernel(), stride=2, padding=1)
        return F.conv_transpose3d(x, self.kernel(), stride=2, padding=1)

    def kernel(self) -> torch.Tensor:
        """Taps of the transposed convolution, ``(in_channels, out_channels, 4, 4[, 4])``: two neighbouring taps of the
        convolution that meet the same input are added."""
        # Channels last, which the convolution then computes in, whatever its input is: far faster on a CPU in 3D.
        if self.spatial_dims == 2:
            sums = 4.0 * F.avg_pool2d(self.weight, 2, stride=1, padding=1)
            return sums.flip([2, 3]).transpose(0, 1).contiguous(memory_format=torch.channels_last)
        sums = 8.0 * F.avg_pool3d(self.weight, 2, stride=1, padding=1)
        return sums.flip([2, 3, 4]).transpose(0, 1).contiguous(memory_format=torch.channels_last_3d)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]}, {self.weight.shape[0]}"

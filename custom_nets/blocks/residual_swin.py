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
from monai.networks.nets.swin_unetr import SwinTransformerBlock, compute_mask, get_window_size

from custom_nets.blocks.padding import crop_to_size, pad_to_multiple

__all__ = ["ResidualSwinBlock", "SwinLayer"]


class SwinLayer(nn.Module):
    """Swin transformer blocks (Liu et al., ICCV 2021, arXiv 2103.14030), every second one with shifted windows.

    This is :py:class:`monai.networks.nets.swin_unetr.BasicLayer` on channels-last features, for which it does not need
    the package einops.

    Args:
        spatial_dims: 2 or 3.
        dim: channels of the tokens.
        depth: number of blocks.
        num_heads: attention heads, a divisor of ``dim``.
        window_size: tokens along each side of a window.
        mlp_ratio: hidden channels of the perceptrons per channel.
    """

    def __init__(
        self, spatial_dims: int, dim: int, depth: int, num_heads: int, window_size: int, mlp_ratio: float
    ) -> None:
        super().__init__()
        self.window_size = [window_size] * spatial_dims
        self.shift_size = [window_size // 2] * spatial_dims
        self.blocks = nn.ModuleList(
            SwinTransformerBlock(
                dim=dim,
                num_heads=num_heads,
                window_size=self.window_size,
                shift_size=self.shift_size if i % 2 else [0] * spatial_dims,
                mlp_ratio=mlp_ratio,
            )
            for i in range(depth)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(B, H, W[, D], dim)``, its sides multiples of the window, to the same shape."""
        size = x.shape[1:-1]
        window_size, shift_size = get_window_size(size, self.window_size, self.shift_size)
        mask = compute_mask(list(size), window_size, shift_size, x.device)
        for block in self.blocks:
            x = block(x, mask)
        return x


class ResidualSwinBlock(nn.Module):
    """Residual Swin transformer block (Liang et al., "SwinIR", ICCVW 2021): ``x + C3(SwinLayer(x))``.

    Arguments as :py:class:`SwinLayer`.
    """

    def __init__(
        self, spatial_dims: int, dim: int, depth: int, num_heads: int, window_size: int, mlp_ratio: float
    ) -> None:
        super().__init__()
        self.window_size = window_size
        self.layer = SwinLayer(spatial_dims, dim, depth, num_heads, window_size, mlp_ratio)
        self.conv = Conv[Conv.CONV, spatial_dims](dim, dim, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(B, dim, H, W[, D])`` of any size to the same shape."""
        tokens = pad_to_multiple(x, self.window_size).movedim(1, -1)
        features = crop_to_size(self.layer(tokens).movedim(-1, 1), x.shape[2:])
        return x + self.conv(features)

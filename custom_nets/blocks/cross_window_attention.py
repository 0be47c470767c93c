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
from monai.networks.blocks import MLPBlock
from monai.networks.nets.swin_unetr import WindowAttention, window_partition, window_reverse

__all__ = ["CrossWindowAttention", "CrossWindowBlock"]


class CrossWindowAttention(WindowAttention):
    """:py:class:`monai.networks.nets.swin_unetr.WindowAttention` with queries from one image, keys and values from
    another; given the same image twice, it is that class. Arguments as there."""

    relative_position_index: torch.Tensor

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """Windows ``(B, N, dim)`` of the image, and of the context at the same places, to ``(B, N, dim)``."""
        length, dim = x.shape[1:]
        weights = self.qkv.weight.split([dim, 2 * dim])
        biases = [None, None] if self.qkv.bias is None else self.qkv.bias.split([dim, 2 * dim])
        query = F.linear(x, weights[0], biases[0])
        key, value = F.linear(context, weights[1], biases[1]).chunk(2, dim=-1)
        query, key, value = (
            i.unflatten(-1, (self.num_heads, dim // self.num_heads)).transpose(1, 2) for i in (query, key, value)
        )
        position = self.relative_position_bias_table[self.relative_position_index.flatten()]
        position = position.unflatten(0, (length, length)).movedim(-1, 0).to(query.dtype)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=position.unsqueeze(0))
        return self.proj_drop(self.proj(attended.transpose(1, 2).flatten(2)))


class CrossWindowBlock(nn.Module):
    """Transformer block over windows that attends from one image to another: ``y = x + attention(norm(x),
    norm(context))``, then ``y + MLP(norm(y))``. With the image as its own context it is a plain Swin block.

    Args:
        spatial_dims: 2 or 3.
        dim: channels of the tokens.
        num_heads: attention heads, a divisor of ``dim``.
        window_size: tokens along each side of a window.
        mlp_ratio: hidden channels of the perceptron per channel.
    """

    def __init__(self, spatial_dims: int, dim: int, num_heads: int, window_size: int, mlp_ratio: float) -> None:
        super().__init__()
        self.window_size = (window_size,) * spatial_dims
        # One for both: the projections behind it could undo a second scale and shift.
        self.norm1 = nn.LayerNorm(dim)
        self.attention = CrossWindowAttention(dim, num_heads, self.window_size, qkv_bias=True)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = MLPBlock(dim, int(mlp_ratio * dim), dropout_mode="swin")

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """Two images, each ``(B, H, W[, D], dim)``, their sides multiples of the window, to the same shape."""
        windows = [window_partition(self.norm1(i), self.window_size) for i in (x, context)]
        attended = self.attention(*windows).unflatten(1, self.window_size)
        x = x + window_reverse(attended, self.window_size, x.shape[:-1])
        return x + self.mlp(self.norm2(x))

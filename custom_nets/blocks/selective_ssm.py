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

import math
from typing import Optional

import torch
import torch.nn as nn
import torch.nn.functional as F

from custom_nets.ops import (
    directional_conv,
    directional_scan,
    selective_scan_channels_last,
    to_raster,
    to_sequences,
    walks_in_place,
)

__all__ = ["DirectionalSSM"]

# Elements of the content of several directions above which they are walked in groups where there are no gradients: that
# takes less memory, and on a CPU what a group needs stays in the cache from kernel to kernel.
AT_ONCE = 3 * 2**23


class DirectionalSSM(nn.Module):
    """Selective state space model over the tokens of an image or a volume, in several directions at once.

    Every direction has its own causal depthwise convolution, projections and state matrix, initialised as in Mamba
    (Gu and Dao, 2023); their outputs are brought back to raster order and averaged.

    Args:
        channels: channels of the tokens.
        orders: directions as (axis order, reversed) pairs, see :py:func:`custom_nets.ops.scan_orders`.
        state_dim: states per channel.
        conv_width: taps of the causal convolution.
        step_rank: rank of the projection to the step.
    """

    def __init__(
        self,
        channels: int,
        orders: list[tuple[list[int], bool]],
        state_dim: int = 8,
        conv_width: int = 4,
        step_rank: int = 8,
        step_range: tuple[float, float] = (1e-3, 1e-1),
        step_floor: float = 1e-4,
    ) -> None:
        super().__init__()
        self.orders = orders
        self.split = [step_rank, state_dim, state_dim]
        directions = len(orders)

        def uniform(*shape: int, bound: float) -> nn.Parameter:
            return nn.Parameter(torch.empty(directions, *shape).uniform_(-bound, bound))

        self.conv_weight = uniform(conv_width, channels, bound=conv_width**-0.5)
        self.conv_bias = uniform(channels, bound=conv_width**-0.5)
        self.projection = uniform(channels, sum(self.split), bound=channels**-0.5)
        self.step_weight = uniform(step_rank, channels, bound=step_rank**-0.5)
        low, high = (math.log(bound) for bound in step_range)
        step = torch.exp(torch.empty(directions, channels).uniform_(low, high)).clamp(min=step_floor)
        self.step_bias = nn.Parameter(step + torch.log(-torch.expm1(-step)))  # softplus of it is the step
        states = torch.arange(1, state_dim + 1, dtype=torch.float32)
        self.A_log = nn.Parameter(torch.log(states).repeat(directions, channels, 1))
        self.D = nn.Parameter(torch.ones(directions, channels))

    def forward(
        self, x: torch.Tensor, spatial_shape: list[int], condition: Optional[torch.Tensor] = None
    ) -> torch.Tensor:
        """
        Args:
            x: content of the tokens in raster order, ``(B, L, channels)``.
            spatial_shape: ``[H, W]`` or ``[H, W, D]`` with product L.
            condition: tokens ``(B, L, channels)`` that step, input and output matrices are projected from; the
                convolved content by default.

        Returns:
            ``(B, L, channels)``.
        """
        if not torch.jit.is_scripting():
            if walks_in_place(x):
                return self._walk(x, spatial_shape, condition)
        content = to_sequences(x, spatial_shape, self.orders)
        content = F.silu(self._causal_conv(content))
        source = content if condition is None else to_sequences(condition, spatial_shape, self.orders)
        delta, A, B, C = self._matrices(source, self.projection, self.step_weight, self.A_log)
        y = selective_scan_channels_last(
            content, delta, A, B, C, D=self.D, delta_bias=self.step_bias, delta_softplus=True
        )
        return to_raster(y, spatial_shape, self.orders).mean(dim=1)

    @torch.jit.unused
    def _walk(self, x: torch.Tensor, spatial_shape: list[int], condition: Optional[torch.Tensor]) -> torch.Tensor:
        """The same by kernels that walk raster tokens in the order of each direction: no copies in that order."""
        directions = len(self.orders)
        group = directions
        # with gradients, groups take a quarter (bfloat16) to four fifths (float32) longer
        while group > 1 and group * x.numel() > AT_ONCE and not torch.is_grad_enabled():
            group = (group + 1) // 2
        total = self._walk_group(x, spatial_shape, condition, slice(0, group))
        for first in range(group, directions, group):
            total += self._walk_group(x, spatial_shape, condition, slice(first, first + group))
        return total.div_(directions)

    @torch.jit.unused
    def _walk_group(
        self, x: torch.Tensor, spatial_shape: list[int], condition: Optional[torch.Tensor], group: slice
    ) -> torch.Tensor:
        """The sum over some of the directions, ``(B, L, channels)``."""
        orders = self.orders[group]
        content = directional_conv(x, self.conv_weight[group], self.conv_bias[group], orders, spatial_shape)
        source = content if condition is None else condition.unsqueeze(1)
        delta, A, B, C = self._matrices(source, self.projection[group], self.step_weight[group], self.A_log[group])
        y = directional_scan(content, delta, A, B, C, self.D[group], self.step_bias[group], orders, spatial_shape)
        # Autocast would sum copies in float32. Not a mean: only a sum hands one gradient to all directions as is.
        with torch.autocast(x.device.type, enabled=False):
            return y.sum(dim=1)

    def _matrices(
        self, source: torch.Tensor, projection: torch.Tensor, step_weight: torch.Tensor, A_log: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Step before its bias ``(B, K, L, channels)``, A, and B and C ``(B, K, L, state_dim)``."""
        step, B, C = torch.matmul(source, projection).split(self.split, dim=-1)
        # with strides, a program that is exported with a batch of several images would refuse a single one
        return torch.matmul(step.contiguous(), step_weight), -torch.exp(A_log.float()), B, C

    def _causal_conv(self, x: torch.Tensor) -> torch.Tensor:
        """Depthwise over ``(B, K, L, C)``; as shifted products, since a convolution would want channels first."""
        length = x.shape[2]
        taps = self.conv_weight.to(x.dtype).unbind(1)
        x = F.pad(x, [0, 0, len(taps) - 1, 0])
        y = self.conv_bias.to(x.dtype).unsqueeze(1)
        for i, tap in enumerate(taps):
            y = torch.addcmul(y, x[:, :, i : i + length], tap.unsqueeze(1))
        return y

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

from custom_nets.nets.pair_network import PairNetwork
from custom_nets.nets.registry import register_network
from custom_nets.ops import fusion_rule

__all__ = ["Average", "Maximum"]


class PixelRule(PairNetwork):
    """A fusion rule applied to the images themselves, as a network without weights. What every network should beat.

    Args:
        spatial_dims: 2 or 3.
        rule: name of the rule, see :py:func:`custom_nets.ops.fusion_rule`.
    """

    def __init__(self, spatial_dims: int, rule: str) -> None:
        super().__init__(spatial_dims)
        self.rule = fusion_rule(rule)

    def fuse(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """Two images, each ``(B, 1, H, W[, D])``, to the fused one of the same shape."""
        return self.rule(first, second)


@register_network("average")
class Average(PixelRule):
    """Mean of both images, ``(B, 2, H, W[, D])`` to ``(B, 1, H, W[, D])``.

    Args:
        spatial_dims: 2 or 3.
    """

    def __init__(self, spatial_dims: int = 2) -> None:
        super().__init__(spatial_dims, "average")


@register_network("maximum")
class Maximum(PixelRule):
    """Larger value of both images at every pixel, ``(B, 2, H, W[, D])`` to ``(B, 1, H, W[, D])``.

    Args:
        spatial_dims: 2 or 3.
    """

    def __init__(self, spatial_dims: int = 2) -> None:
        super().__init__(spatial_dims, "maximum")

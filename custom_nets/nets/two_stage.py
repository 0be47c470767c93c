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

from custom_nets.blocks import crop_to_size
from custom_nets.nets.pair_network import PairNetwork
from custom_nets.ops import fusion_rule

__all__ = ["TwoStageNetwork"]


class TwoStageNetwork(PairNetwork):
    """Base of the networks that are trained as autoencoders of single images, of both modalities together, and fuse two
    images by a rule without parameters between encoder and decoder. A subclass defines :py:meth:`encode` and
    :py:meth:`decode`.

    Args:
        spatial_dims: 2 or 3.
        rule: name of the fusion rule, see :py:func:`custom_nets.ops.fusion_rule`.
        multiple: what every side that :py:meth:`encode` sees is a multiple of.

    Raises:
        ValueError: if ``spatial_dims`` is neither 2 nor 3, or there is no such rule.
    """

    def __init__(self, spatial_dims: int, rule: str, multiple: int = 1) -> None:
        super().__init__(spatial_dims, multiple)
        self.rule = fusion_rule(rule)

    def forward(self, x: torch.Tensor, reconstruct: bool = False) -> torch.Tensor:
        """
        Args:
            x: the two images, ``(B, 2, H, W[, D])`` with values in [0, 1], of any spatial size.
            reconstruct: whether to encode and decode each image alone instead of fusing them, which is how the network
                is trained.

        Returns:
            the fused image, ``(B, 1, H, W[, D])``, or both images again, ``(B, 2, H, W[, D])``, in the dtype of ``x``
            and not limited to [0, 1].

        Raises:
            ValueError: if ``x`` has another number of dimensions or channels.
        """
        if not reconstruct:
            return super().forward(x)
        images = self.decode(self.encode(torch.cat(self.split(x)))).chunk(2)
        return crop_to_size(torch.cat(images, dim=1).to(x.dtype), x.shape[2:])

    def fuse(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """Two images, each ``(B, 1, H, W[, D])``, to the fused one of the same shape."""
        return self.decode(self.rule(*self.encode(torch.cat([first, second])).chunk(2)))

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Images ``(B, 1, H, W[, D])`` to features ``(B, C, H', W'[, D'])``."""
        raise NotImplementedError(f"Subclass {self.__class__.__name__} must implement this method.")

    def decode(self, features: torch.Tensor) -> torch.Tensor:
        """Inverse of :py:meth:`encode`."""
        raise NotImplementedError(f"Subclass {self.__class__.__name__} must implement this method.")

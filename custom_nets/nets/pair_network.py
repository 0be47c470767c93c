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

from custom_nets.blocks import crop_to_size, pad_to_multiple

__all__ = ["PairNetwork"]


class PairNetwork(nn.Module):
    """Base of the networks that fuse two co-registered images in one stage: takes any size, by padding to a multiple
    and cropping back, and hands the images to :py:meth:`fuse` one by one.

    Args:
        spatial_dims: 2 or 3.
        multiple: what every side that :py:meth:`fuse` sees is a multiple of.

    Raises:
        ValueError: if ``spatial_dims`` is neither 2 nor 3.
    """

    def __init__(self, spatial_dims: int, multiple: int = 1) -> None:
        super().__init__()
        if spatial_dims not in (2, 3):
            raise ValueError(f"spatial_dims should be 2 or 3, got {spatial_dims}.")
        self.spatial_dims = spatial_dims
        self.multiple = multiple

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """
        Args:
            x: the two images, ``(B, 2, H, W[, D])`` with values in [0, 1], of any spatial size.

        Returns:
            the fused image, ``(B, 1, H, W[, D])`` in the dtype of ``x``, not limited to [0, 1].

        Raises:
            ValueError: if ``x`` has another number of dimensions or channels.
        """
        first, second = self.split(x)
        return crop_to_size(self.fuse(first, second).to(x.dtype), x.shape[2:])

    def split(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Checks ``(B, 2, H, W[, D])``, pads it, and gives both images, each ``(B, 1, H', W'[, D'])``."""
        if x.dim() != self.spatial_dims + 2 or x.shape[1] != 2:
            wanted = f"a batch of {self.spatial_dims}D images with 2 channels"
            raise ValueError(f"expected {wanted}, got a tensor of shape {list(x.shape)}.")
        first, second = pad_to_multiple(x, self.multiple).split(1, dim=1)
        return first, second

    def fuse(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """Two padded images, each ``(B, 1, H, W[, D])``, to the fused one of the same shape."""
        raise NotImplementedError(f"Subclass {self.__class__.__name__} must implement this method.")

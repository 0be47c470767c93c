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
"""From the slices of a patient to one score."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from monai.inferers import Inferer
from monai.utils import convert_to_tensor

__all__ = ["GradingInferer"]


class GradingInferer(Inferer):
    """
    Grade patients. A network for slices grades each slice of ``(B, C, H, W, K)`` by itself, and the patient's
    probabilities are pooled from the slices'; one for volumes takes them together.

    Args:
        spatial_dims: of the network, 2 or 3.
        pooling: ``"mean"`` of the slices' probabilities, or those of the slice with the ``"max"`` probability of HGG.
        flip: average over the image and its mirror image (left and right).
        slice_batch: number of slices that the network takes at once.

    Raises:
        ValueError: when ``pooling`` is neither.
    """

    def __init__(self, spatial_dims: int, pooling: str = "mean", flip: bool = True, slice_batch: int = 256) -> None:
        super().__init__()
        if pooling not in ("mean", "max"):
            raise ValueError(f"pooling must be 'mean' or 'max', not '{pooling}'.")
        self.spatial_dims = spatial_dims
        self.pooling = pooling
        self.flip = flip
        self.slice_batch = slice_batch

    def __call__(
        self, inputs: torch.Tensor, network: Callable[..., torch.Tensor], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """
        Args:
            inputs: ``(B, C, H, W, K)``; or ``(B, C, H, W)`` for a network for slices.
            network: gives logits ``(N, 2)``; called with ``args`` and ``kwargs``, too.

        Returns:
            logarithms of the patients' probabilities ``(B, 2)``, float32: their softmax gives the probabilities.
        """
        images = convert_to_tensor(inputs, track_meta=False)
        probabilities = self._probabilities(images, network, *args, **kwargs)
        if self.flip:
            mirrored = self._probabilities(images.flip(2), network, *args, **kwargs)
            probabilities = (probabilities + mirrored) / 2
        return probabilities.clamp_min(torch.finfo(torch.float32).tiny).log()

    def _probabilities(
        self, images: torch.Tensor, network: Callable[..., torch.Tensor], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        if images.ndim == self.spatial_dims + 2:
            return network(images, *args, **kwargs).float().softmax(dim=1)
        slices = images.movedim(-1, 1).flatten(0, 1)
        logits = torch.cat([network(batch, *args, **kwargs) for batch in slices.split(self.slice_batch)])
        probabilities = logits.float().softmax(dim=1).unflatten(0, (images.shape[0], -1))
        if self.pooling == "mean":
            return probabilities.mean(dim=1)
        hgg = probabilities[..., 1].amax(dim=1)
        return torch.stack([1 - hgg, hgg], dim=1)

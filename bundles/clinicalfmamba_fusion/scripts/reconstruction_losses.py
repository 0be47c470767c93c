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
"""Losses between images and their reconstructions, for the autoencoders of two-stage fusion networks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from monai.utils import convert_to_tensor
from torch.nn.modules.loss import _Loss

from scripts.gradients import sobel

__all__ = ["EHDRANLoss"]


class EHDRANLoss(_Loss):
    """
    Training loss of EH-DRAN (Zhou et al., "Edge-Enhanced Dilated Residual Attention Network for Multimodal Medical
    Image Fusion", BIBM 2024): mean squared error of the images, and of the Euclidean lengths of their Sobel gradients.

    The paper adds 0.2 times the squared error of the features of a pretrained VGG. That term is left out, since its
    weights would have to be downloaded, and know natural images in 2D only.

    Args:
        gradient_weight: weight of the second term.
    """

    def __init__(self, gradient_weight: float = 0.2) -> None:
        super().__init__()
        self.gradient_weight = gradient_weight

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """
        Args:
            input: reconstructed images `(B, C, H, W[, D])`.
            target: the images, of the same shape, in [0, 1].

        Raises:
            ValueError: when the shapes differ.
        """
        if input.shape != target.shape:
            raise ValueError(
                f"expected reconstructions of the images' shape, got {tuple(input.shape)} and {tuple(target.shape)}."
            )
        images = [convert_to_tensor(i, dtype=torch.float32, track_meta=False) for i in (input, target)]
        # unlike a square root of squares, this has a gradient (0) where an image is flat
        edges = [torch.linalg.vector_norm(sobel(image), dim=2) for image in images]
        return F.mse_loss(*images) + self.gradient_weight * F.mse_loss(*edges)

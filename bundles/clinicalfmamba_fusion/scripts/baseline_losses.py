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

"""Training losses of the networks that ClinicalFMamba is compared with, where they are not sums of those in
`scripts.losses`."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from scripts.losses import FusionGradientLoss, FusionLoss
from scripts.ssim import scale_terms

__all__ = ["MACTFusionLoss", "MRSCFusionLoss", "ms_ssim"]


def ms_ssim(fused: torch.Tensor, sources: torch.Tensor) -> torch.Tensor:
    """
    Multi-scale structural similarity of a fused image to each of its sources (Wang et al., Asilomar 2003),
    differentiable, in float32.

    The power of a negative score is not defined; so that a network that begins with inverted contrast learns to turn
    it, the logarithms of the scores, and the exponential of their sum, are continued as straight lines below 0.05.
    Above, it is `scripts.ssim.multi_scale_ssim`.

    Args:
        fused: `(B, 1, H, W[, D])`.
        sources: `(B, S, H, W[, D])`.

    Returns:
        `(B, S)`, at most 1.
    """
    start = 0.05
    logarithm = torch.zeros(sources.shape[:2], device=sources.device)
    for score, exponent in zip(*scale_terms(fused, sources)):
        upper = score.clamp_min(start)
        logarithm = logarithm + exponent * (upper.log() + (score - upper) / start)
    upper = logarithm.clamp_min(math.log(start))
    return upper.exp() + start * (logarithm - upper)


class MACTFusionLoss(FusionLoss):
    """
    Training loss of MACTFusion (Xie et al., IEEE JBHI 2024): 10 (1 - mean MS-SSIM) + 20 MSE to the maximum of the
    sources + 10 L1 of the Sobel magnitudes to the largest one.
    """

    def __init__(self, ssim_weight: float = 10.0, intensity_weight: float = 20.0, gradient_weight: float = 10.0):
        super().__init__()
        self.ssim_weight = ssim_weight
        self.intensity_weight = intensity_weight
        self.gradient_weight = gradient_weight
        self.gradient = FusionGradientLoss("magnitude")

    def compute(self, fused: torch.Tensor, sources: torch.Tensor) -> torch.Tensor:
        return (
            self.ssim_weight * (1 - ms_ssim(fused, sources).mean())
            + self.intensity_weight * F.mse_loss(fused, sources.amax(dim=1, keepdim=True))
            + self.gradient_weight * self.gradient.compute(fused, sources)
        )


class MRSCFusionLoss(FusionLoss):
    """
    Training loss of MRSCFusion's fusion blocks (Xie et al., IEEE TIM 72, 2023): one minus the MS-SSIM to the sources,
    weighted by the softmax of the mean squares of their Laplacians; plus, summed over the encoder's scales, the L1 of
    the fused image's features to the elementwise maximum of the sources'; plus 10 times the L1 of the Sobel magnitudes
    to the largest one.

    The fused image's features are those that the frozen encoder finds in it.

    Args:
        encoder: maps images `(B, 1, H, W[, D])` to features at each scale; no gradient reaches its parameters if they
            are frozen.
        feature_weight: weight of the features.
        gradient_weight: weight of the Sobel magnitudes.
    """

    def __init__(self, encoder: torch.nn.Module, feature_weight: float = 1.0, gradient_weight: float = 10.0) -> None:
        super().__init__()
        self.encoder = encoder
        self.feature_weight = feature_weight
        self.gradient_weight = gradient_weight
        self.gradient = FusionGradientLoss("magnitude")

    def compute(self, fused: torch.Tensor, sources: torch.Tensor) -> torch.Tensor:
        similarity = (self.source_weights(sources) * (1 - ms_ssim(fused, sources))).sum(dim=1).mean()
        return (
            similarity
            + self.feature_weight * self.feature_distance(fused, sources)
            + self.gradient_weight * self.gradient.compute(fused, sources)
        )

    @staticmethod
    def source_weights(sources: torch.Tensor) -> torch.Tensor:
        """Softmax over the sources of their Laplacian energies, `(B, S)`."""
        pool = {4: F.avg_pool2d, 5: F.avg_pool3d}[sources.ndim]
        # The kernel with 8 amid -1, as nine times the difference from the mean: a volume that is constant along an axis
        # then weighs as its slice does.
        laplacian = 9 * (sources - pool(sources, 3, stride=1, padding=1, count_include_pad=False))
        return torch.softmax(laplacian.square().flatten(2).mean(dim=2), dim=1)

    def feature_distance(self, fused: torch.Tensor, sources: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            # one batch: all first sources, all second ones, ...
            of_sources = self.encoder(torch.cat(sources.split(1, dim=1)))
            targets = [torch.stack(i.chunk(sources.shape[1])).amax(dim=0) for i in of_sources]
        distances = [F.l1_loss(i.float(), target.float()) for i, target in zip(self.encoder(fused), targets)]
        return torch.stack(distances).sum()

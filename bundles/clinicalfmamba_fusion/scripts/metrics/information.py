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

import torch

from scripts.metrics.base import FusionMetric, SlicewiseMetric, to_8bit
from scripts.ssim import gaussian_blur

__all__ = [
    "EntropyMetric",
    "FloatEntropyMetric",
    "MutualInformationMetric",
    "NormalizedMutualInformationMetric",
    "VisualInformationFidelityMetric",
]


class EntropyMetric(FusionMetric):
    """Shannon entropy EN of the fused image in bits, 0 to 8, from the histogram of its 256 8-bit values."""

    def scores(self, fused: torch.Tensor, sources: torch.Tensor) -> torch.Tensor:
        return _histogram_entropy(to_8bit(fused).flatten(2), bins=256)


class FloatEntropyMetric(FusionMetric):
    """
    Shannon entropy in bits of the distinct float32 values of the fused image, which Zhou and Khalvati (MICCAI MLMI
    2025) tabulate as EN. At most log2 of the number of pixels, 16 at 256 x 256 and 21 at 128^3, and near it wherever
    few values are exactly equal: it says more about the background than about the fusion.
    """

    def scores(self, fused: torch.Tensor, sources: torch.Tensor) -> torch.Tensor:
        entropies = []
        for case in fused:
            _, counts = torch.unique(case, return_counts=True)
            entropies.append(_entropy(counts / case.numel()))
        return torch.stack(entropies).unsqueeze(1)


class MutualInformationMetric(FusionMetric):
    """
    Mutual information MI = I(F, A) + I(F, B) in bits (Qu, Zhang and Yan, Electronics Letters 38(7), 2002), from the
    joint histograms of the 256 8-bit values. It is the sum over the sources, as published, and at most twice the
    entropy of the fused image; a copy of one source scores high.
    """

    def scores(self, fused: torch.Tensor, sources: torch.Tensor) -> torch.Tensor:
        entropy_f, entropy_s, joint = _entropies(fused, sources)
        return (entropy_f + entropy_s - joint).sum(dim=1, keepdim=True)


class NormalizedMutualInformationMetric(FusionMetric):
    """
    Normalised mutual information 2 I(F, A) / (H(F) + H(A)) + 2 I(F, B) / (H(F) + H(B)) in [0, 2] (Hossny, Nahavandi
    and Creighton, Electronics Letters 44(18), 2008), from the joint histograms of the 256 8-bit values. Two constant
    images share no information.
    """

    def scores(self, fused: torch.Tensor, sources: torch.Tensor) -> torch.Tensor:
        entropy_f, entropy_s, joint = _entropies(fused, sources)
        total = entropy_f + entropy_s
        normalised = 2 * (total - joint) / total
        return normalised.masked_fill(total == 0, 0.0).sum(dim=1, keepdim=True)


class VisualInformationFidelityMetric(SlicewiseMetric):
    """
    Visual information fidelity VIF, mean over both sources, each of them taken as the reference: the pixel-domain,
    multi-scale form with visual noise of variance 2 on grey levels of 0..255 (Sheikh and Bovik, IEEE TIP 15(2), 2006,
    `vifp_mscale`). Not the VIFF of Han et al. (Information Fusion 14(2), 2013), which merges the sources by window.

    1 for equal images, towards 0 as information is lost, above 1 where contrast was added. Volumes are scored slice
    by slice, see `SlicewiseMetric`. Along a side that is shorter than a window (17, 9, 5, 3), the window is the
    largest odd size that fits.
    """

    NOISE = 2.0
    SCALES = 4
    EPSILON = 1e-10
    # a variance below this share of the mean square is its rounding in float32
    ROUNDING = 1e-6

    def sums(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        images = 255 * images
        numerator = images.new_zeros(len(images), 2)
        denominator = numerator.clone()
        for scale in range(self.SCALES):
            size = 2 ** (self.SCALES - scale) + 1
            if scale > 0:
                images = self._blur(images, size)[:, :, ::2, ::2]
            kept, present = self._information(images, size)
            numerator += kept
            denominator += present
        return numerator, denominator

    def _information(self, images: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What of the sources' information is in the fused image, and what there is, at one scale; `(N, 2)` each."""
        fused, sources = images[:, :1], images[:, 1:]
        means, squares = self._blur(images, size), self._blur(images**2, size)
        variances = squares - means**2
        variances = variances.masked_fill(variances <= self.ROUNDING * squares, 0)
        variance_f, variance_s = variances[:, :1], variances[:, 1:]
        covariance = self._blur(fused * sources, size) - means[:, :1] * means[:, 1:]

        # the fused image as gain * source + noise
        gain = (covariance / (variance_s + self.EPSILON)).masked_fill((variance_s == 0) | (variance_f == 0), 0)
        gain = gain.clamp_min(0)
        noise = (variance_f - gain * covariance).clamp_min(self.EPSILON)
        kept = torch.log1p(gain**2 * variance_s / (noise + self.NOISE))
        present = torch.log1p(variance_s / self.NOISE)
        return kept.flatten(2).sum(dim=2), present.flatten(2).sum(dim=2)

    @staticmethod
    def _blur(images: torch.Tensor, size: int) -> torch.Tensor:
        return gaussian_blur(images, window_size=size, sigma=size / 5)


def _entropies(fused: torch.Tensor, sources: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Entropies in bits of the 8-bit fused image `(B, 1)`, the sources `(B, 2)`, and jointly `(B, 2)`."""
    fused, sources = (to_8bit(i).flatten(2) for i in (fused, sources))
    joint = _histogram_entropy(256 * fused + sources, bins=256**2)
    return _histogram_entropy(fused, bins=256), _histogram_entropy(sources, bins=256), joint


def _histogram_entropy(values: torch.Tensor, bins: int) -> torch.Tensor:
    """Entropy in bits, `(B, C)`, of integers `(B, C, N)` in [0, bins)."""
    rows = values.flatten(0, 1)
    # one histogram a row, in a single pass
    offsets = bins * torch.arange(len(rows), device=rows.device).unsqueeze(1)
    counts = torch.bincount((rows + offsets).flatten(), minlength=bins * len(rows))
    return _entropy(counts.view(*values.shape[:2], bins) / values.shape[2])


def _entropy(p: torch.Tensor) -> torch.Tensor:
    """Entropy in bits over the last axis."""
    return torch.special.entr(p).sum(dim=-1) / math.log(2)

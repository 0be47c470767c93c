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
from abc import abstractmethod

import torch
from monai.metrics.regression import RegressionMetric
from monai.utils import convert_to_tensor

from scripts.gradients import sobel
from scripts.ssim import ssim

__all__ = [
    "FusionMetric",
    "FusionPSNRMetric",
    "FusionSSIMMetric",
    "EdgePreservationMetric",
    "SumOfCorrelationDifferencesMetric",
    "EntropyMetric",
]


class FusionMetric(RegressionMetric):
    """
    Base of the metrics of a fused image `y_pred` `(B, 1, H, W[, D])` against its sources `y` `(B, 2, H, W[, D])`, both
    in [0, 1], 2D or 3D. Gives one value a case, `(B, 1)`; see `monai.metrics.RegressionMetric` for ``reduction`` and
    ``get_not_nans``. Subclasses define `scores`.
    """

    def _check_shape(self, y_pred: torch.Tensor, y: torch.Tensor) -> None:
        if y_pred.ndim not in (4, 5) or y.shape != (y_pred.shape[0], 2, *y_pred.shape[2:]) or y_pred.shape[1] != 1:
            raise ValueError(
                "expected fused images (B, 1, H, W[, D]) and their two sources (B, 2, H, W[, D]), "
                f"got {tuple(y_pred.shape)} and {tuple(y.shape)}."
            )

    def _compute_metric(self, y_pred: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        fused, sources = (convert_to_tensor(i, dtype=torch.float32, track_meta=False) for i in (y_pred, y))
        return self.scores(fused, sources).mean(dim=1, keepdim=True)

    @abstractmethod
    def scores(self, fused: torch.Tensor, sources: torch.Tensor) -> torch.Tensor:
        """
        Args:
            fused: `(B, 1, H, W[, D])`, float32.
            sources: `(B, 2, H, W[, D])`, float32.

        Returns:
            `(B, 2)`, a score against each source, which are then averaged; or `(B, 1)`.
        """
        raise NotImplementedError(f"Subclass {self.__class__.__name__} must implement this method.")


class FusionPSNRMetric(FusionMetric):
    """Peak signal-to-noise ratio in dB at range 1, mean over both sources; infinite for a copy of one of them."""

    def scores(self, fused: torch.Tensor, sources: torch.Tensor) -> torch.Tensor:
        return -10 * (fused - sources).square().flatten(2).mean(dim=2).log10()


class FusionSSIMMetric(FusionMetric):
    """Structural similarity with an 11-wide Gaussian window (`scripts.ssim.ssim`), mean over both sources."""

    def scores(self, fused: torch.Tensor, sources: torch.Tensor) -> torch.Tensor:
        return ssim(fused, sources)


class EdgePreservationMetric(FusionMetric):
    """
    Edge preservation Q^AB/F in [0, 1] (Xydeas and Petrovic, Electronics Letters 36(4), 2000): how well the strength g
    and the orientation of the sources' Sobel edges survive, through the paper's sigmoids and weighted by g.

    The paper's orientation atan(s_y / s_x) has no sign, so two orientations are compared as lines: their angle is
    between 0 and pi / 2. Said like this it holds for gradients in 3D, too. Where no source has an edge, there is
    nothing to preserve and the value is 0.
    """

    GAMMA_G, KAPPA_G, SIGMA_G = 0.9994, -15.0, 0.5
    GAMMA_A, KAPPA_A, SIGMA_A = 0.9879, -22.0, 0.8

    def scores(self, fused: torch.Tensor, sources: torch.Tensor) -> torch.Tensor:
        tiny = torch.finfo(torch.float32).tiny
        grad_f, grad_s = sobel(fused), sobel(sources)
        g_f, g_s = (torch.linalg.vector_norm(i, dim=2) for i in (grad_f, grad_s))
        strength = torch.minimum(g_f, g_s) / torch.maximum(g_f, g_s).clamp_min(tiny)

        # Kahan's angle of two unit vectors: exact at small angles, where the arc cosine is not
        unit_f, unit_s = (i / g.clamp_min(tiny).unsqueeze(2) for i, g in ((grad_f, g_f), (grad_s, g_s)))
        plus, minus = (torch.linalg.vector_norm(i, dim=2) for i in (unit_f + unit_s, unit_f - unit_s))
        angle = 2 * torch.atan2(torch.minimum(plus, minus), torch.maximum(plus, minus))
        orientation = 1 - angle / (math.pi / 2)

        quality = self.GAMMA_G * torch.sigmoid(-self.KAPPA_G * (strength - self.SIGMA_G))
        quality = quality * self.GAMMA_A * torch.sigmoid(-self.KAPPA_A * (orientation - self.SIGMA_A))
        total = g_s.flatten(1).sum(dim=1, keepdim=True)
        return (quality * g_s).flatten(1).sum(dim=1, keepdim=True) / total.clamp_min(tiny)


class SumOfCorrelationDifferencesMetric(FusionMetric):
    """
    Sum of the correlations of differences, SCD, in [-2, 2] (Aslantas and Bendes, AEU 69(12), 2015):
    r(F - B, A) + r(F - A, B), that is, how much each source gave to what the fused image has beyond the other one.
    The correlation with a constant is 0.
    """

    def scores(self, fused: torch.Tensor, sources: torch.Tensor) -> torch.Tensor:
        given = (fused - sources.flip(1)).flatten(2)
        return self._correlation(given, sources.flatten(2)).sum(dim=1, keepdim=True)

    @staticmethod
    def _correlation(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Pearson correlation over the last axis."""
        a, b = (i - i.mean(dim=-1, keepdim=True) for i in (a, b))
        norm_a, norm_b = (i.square().mean(dim=-1).sqrt() for i in (a, b))
        # below this a standard deviation is the rounding of a constant in [0, 1]
        constant = torch.minimum(norm_a, norm_b) < 1e-6
        return torch.where(constant, 0.0, (a * b).mean(dim=-1) / (norm_a * norm_b))


class EntropyMetric(FusionMetric):
    """Shannon entropy of the fused image in bits, from the histogram of its 256 8-bit values."""

    def scores(self, fused: torch.Tensor, sources: torch.Tensor) -> torch.Tensor:
        batch = fused.shape[0]
        values = (fused.clamp(0, 1) * 255).round().long().flatten(1)
        # one histogram a case, in a single pass
        values = values + 256 * torch.arange(batch, device=fused.device).unsqueeze(1)
        p = torch.bincount(values.flatten(), minlength=256 * batch).view(batch, 256) / values.shape[1]
        return torch.special.entr(p).sum(dim=1, keepdim=True) / math.log(2)

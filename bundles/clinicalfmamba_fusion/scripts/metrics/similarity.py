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

from scripts.correlation import correlation, sum_of_correlation_differences
from scripts.gradients import edge_preservation
from scripts.metrics.base import FusionMetric
from scripts.ssim import multi_scale_ssim, ssim

__all__ = [
    "FusionPSNRMetric",
    "FusionSSIMMetric",
    "WorseSourceSSIMMetric",
    "FusionMultiScaleSSIMMetric",
    "EdgePreservationMetric",
    "CorrelationCoefficientMetric",
    "SumOfCorrelationDifferencesMetric",
]


class FusionPSNRMetric(FusionMetric):
    """Peak signal-to-noise ratio in dB at range 1, mean over both sources; infinite for a copy of one of them."""

    def scores(self, fused: torch.Tensor, sources: torch.Tensor) -> torch.Tensor:
        return -10 * (fused - sources).square().flatten(2).mean(dim=2).log10()


class FusionSSIMMetric(FusionMetric):
    """Structural similarity with an 11-wide Gaussian window (`scripts.ssim.ssim`), mean over both sources."""

    def scores(self, fused: torch.Tensor, sources: torch.Tensor) -> torch.Tensor:
        return ssim(fused, sources)


class WorseSourceSSIMMetric(FusionMetric):
    """
    Structural similarity to that source which the fused image resembles less. Unlike the mean, it does not reward a
    copy of one source.
    """

    def scores(self, fused: torch.Tensor, sources: torch.Tensor) -> torch.Tensor:
        return ssim(fused, sources).amin(dim=1, keepdim=True)


class FusionMultiScaleSSIMMetric(FusionMetric):
    """Multi-scale structural similarity in [0, 1] (`scripts.ssim.multi_scale_ssim`), mean over both sources."""

    def scores(self, fused: torch.Tensor, sources: torch.Tensor) -> torch.Tensor:
        return multi_scale_ssim(fused, sources)


class EdgePreservationMetric(FusionMetric):
    """Edge preservation Q^AB/F in [0, 1], see `scripts.gradients.edge_preservation`."""

    def scores(self, fused: torch.Tensor, sources: torch.Tensor) -> torch.Tensor:
        return edge_preservation(fused, sources).unsqueeze(1)


class CorrelationCoefficientMetric(FusionMetric):
    """Pearson's correlation CC in [-1, 1], mean over both sources; 0 with a constant."""

    def scores(self, fused: torch.Tensor, sources: torch.Tensor) -> torch.Tensor:
        return correlation(fused.flatten(2), sources.flatten(2))


class SumOfCorrelationDifferencesMetric(FusionMetric):
    """
    Sum of the correlations of differences, SCD, in [-2, 2], see `scripts.correlation.sum_of_correlation_differences`.
    """

    def scores(self, fused: torch.Tensor, sources: torch.Tensor) -> torch.Tensor:
        return sum_of_correlation_differences(fused, sources).unsqueeze(1)

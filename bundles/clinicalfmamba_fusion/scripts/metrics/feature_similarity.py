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
import torch.nn.functional as F

from scripts.gradients import scharr
from scripts.metrics.base import SlicewiseMetric
from scripts.metrics.phase_congruency import phase_congruency

__all__ = ["FeatureSimilarityMetric"]


class FeatureSimilarityMetric(SlicewiseMetric):
    """
    Feature similarity FSIM in [0, 1], mean over both sources (Zhang et al., IEEE TIP 20(8), 2011): the similarity of
    phase congruency and of Scharr gradients, weighted by the larger phase congruency. Volumes are scored slice by
    slice, see `SlicewiseMetric`. Two images without any feature score 1.

    Args:
        variant: scale and details.

            - ``"standard"``: that of the paper and of its authors' code, on grey levels of 0..255; slices whose
              shorter side is 384 pixels and more are averaged down towards 256 first.
            - ``"published"``: what Zhou and Khalvati (MICCAI MLMI 2025) tabulate: on intensities of 0..1, where the
              constant of the gradients' similarity (160) hides nearly all differences of gradients; at full size, and
              with Kovesi's later phase congruency summed over six orientations, as in the evaluation code that its
              first author published with an earlier network.
        kwargs: ``reduction`` and ``get_not_nans``, see `FusionMetric`.

    Raises:
        ValueError: when ``variant`` is none of these.
    """

    VARIANTS = ("standard", "published")
    # Zhang et al., for phase congruency and for gradients
    T1, T2 = 0.85, 160.0

    def __init__(self, variant: str = "standard", **kwargs) -> None:
        super().__init__(**kwargs)
        if variant not in self.VARIANTS:
            raise ValueError(f"variant must be one of {self.VARIANTS}, got {variant!r}.")
        self.variant = variant

    def sums(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.variant == "standard":
            images = F.avg_pool2d(255 * images, max(1, round(min(images.shape[2:]) / 256)))
        congruency = phase_congruency(images, form=self.variant)
        # the authors' kernel sums to 1 on either side, that of OpenCV does not
        gradient = torch.linalg.vector_norm(scharr(images), dim=2) / (16 if self.variant == "standard" else 1)
        similarity = _similarity(congruency, self.T1) * _similarity(gradient, self.T2)
        weight = torch.maximum(congruency[:, :1], congruency[:, 1:])
        return (similarity * weight).flatten(2).sum(dim=2), weight.flatten(2).sum(dim=2)


def _similarity(x: torch.Tensor, constant: float) -> torch.Tensor:
    """Similarity in [0, 1] of the first channel of `(N, 3, H, W)` to each of the others."""
    first, others = x[:, :1], x[:, 1:]
    return (2 * first * others + constant) / (first.square() + others.square() + constant)

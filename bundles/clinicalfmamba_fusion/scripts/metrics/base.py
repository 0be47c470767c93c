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

from abc import abstractmethod

import torch
from monai.metrics.regression import RegressionMetric
from monai.utils import convert_to_tensor

__all__ = ["FusionMetric", "SlicewiseMetric", "to_8bit"]


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
        with torch.autocast(fused.device.type, enabled=False):
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


class SlicewiseMetric(FusionMetric):
    """
    Base of metrics that are defined on planes and are the ratio of two sums over their pixels. On volumes, both sums
    run over all slices along the last axis: empty slices have no weight, and a volume that is constant along that axis
    scores as its slice. Subclasses define `sums`.
    """

    # bounds the memory: so many slices are looked at together
    SLICES = 8

    def scores(self, fused: torch.Tensor, sources: torch.Tensor) -> torch.Tensor:
        images = torch.cat([fused, sources], dim=1)
        slices = images.movedim(-1, 1).flatten(0, 1) if images.ndim == 5 else images
        sums = torch.cat([torch.stack(self.sums(i), dim=1) for i in slices.split(self.SLICES)])
        numerator, denominator = sums.unflatten(0, (len(images), -1)).sum(dim=1).unbind(dim=1)
        # where there is nothing to lose, nothing is lost
        return torch.where(denominator > 0, numerator / denominator, 1.0)

    @abstractmethod
    def sums(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            images: `(N, 3, H, W)`, slices of the fused image and of its two sources.

        Returns:
            numerator and denominator of the score against each source, `(N, 2)` each.
        """
        raise NotImplementedError(f"Subclass {self.__class__.__name__} must implement this method.")


def to_8bit(images: torch.Tensor) -> torch.Tensor:
    """Grey levels 0..255, int64, of images in [0, 1]; what lies outside is clipped."""
    return (images.clamp(0, 1) * 255).round().long()

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

from collections.abc import Iterator

import torch

from scripts.metrics.base import FusionMetric

__all__ = ["SpatialFrequencyMetric", "AverageGradientMetric", "StandardDeviationMetric"]

# papers give these numbers in grey levels
GREY_LEVELS = 255.0


class SpatialFrequencyMetric(FusionMetric):
    """
    Spatial frequency SF of the fused image in grey levels of 0..255 (Eskicioglu and Fisher, IEEE Trans. Commun.
    43(12), 1995): the root of the sum, over the axes, of the mean squared difference of neighbours. It needs no
    source; noise scores high.
    """

    def scores(self, fused: torch.Tensor, sources: torch.Tensor) -> torch.Tensor:
        frequencies = [fused.diff(dim=axis).square().flatten(1).mean(dim=1) for axis in _axes(fused)]
        return GREY_LEVELS * torch.stack(frequencies, dim=1).sum(dim=1, keepdim=True).sqrt()


class AverageGradientMetric(FusionMetric):
    """
    Average gradient AG of the fused image in grey levels of 0..255 per pixel (Cui et al., Optics Communications 341,
    2015): the mean of sqrt((f_x^2 + f_y^2) / 2), by central differences, one-sided at the border. In 3D f_z^2 is
    added and the 2 stays, so that a volume that is constant along an axis scores as its slice. It needs no source;
    noise scores high.
    """

    def scores(self, fused: torch.Tensor, sources: torch.Tensor) -> torch.Tensor:
        squares = sum(torch.gradient(fused, dim=axis)[0].square() for axis in _axes(fused))
        return GREY_LEVELS * (squares / 2).sqrt().flatten(1).mean(dim=1, keepdim=True)


class StandardDeviationMetric(FusionMetric):
    """Standard deviation SD of the fused image in grey levels of 0..255, with the divisor N. It needs no source."""

    def scores(self, fused: torch.Tensor, sources: torch.Tensor) -> torch.Tensor:
        return GREY_LEVELS * fused.flatten(1).std(dim=1, correction=0, keepdim=True)


def _axes(images: torch.Tensor) -> Iterator[int]:
    """The spatial axes that have neighbours."""
    return (axis for axis in range(2, images.ndim) if images.shape[axis] > 1)

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

from scripts.gradients import sobel
from scripts.metrics.base import SlicewiseMetric

__all__ = ["FeatureMutualInformationMetric"]


class FeatureMutualInformationMetric(SlicewiseMetric):
    """
    Feature mutual information FMI, mean over both sources (Haghighat, Aghagolzadeh and Seyedarabi, Computers and
    Electrical Engineering 37(5), 2011), in the form of its authors' code, Fast-FMI (Haghighat and Razian, AICT 2014).

    In every window, the features of two images, scaled from their minimum to their maximum and to the sum 1, are taken
    as the distributions of two variables whose values are the positions of the window's pixels, column by column.
    Their joint distribution is the mixture of independence and of the Frechet bound that has the correlation of the
    features. The score of a window is 2 I / (H + H), or 1 where the features are equal; the metric is the mean over
    all windows that lie wholly inside the image. Windows of an empty background are equal and score 1.

    Volumes are scored slice by slice, see `SlicewiseMetric`. At most 1; about 0 for noise, and it can be negative.

    Args:
        feature: what is compared.

            - ``"pixel"``: the intensities ("none" in the authors' code).
            - ``"gradient"``: the magnitude of the central differences, as the paper has it (the authors' code takes
              the horizontal difference alone).
            - ``"edge"``: the binary Sobel edges of MATLAB's `edge`: squared gradients above four times their mean,
              thinned to local maxima across the edge. With a window of 3 this is what Zhou and Khalvati (MICCAI MLMI
              2025) tabulate.
        window_size: odd width of the window in pixels.
        kwargs: ``reduction`` and ``get_not_nans``, see `FusionMetric`.

    Raises:
        ValueError: when ``feature`` is none of these, ``window_size`` is not an odd number from 3, or an image is
            smaller than the window.
    """

    FEATURES = ("pixel", "gradient", "edge")
    # windows whose joint distributions are looked at together: they fit into a processor's cache
    WINDOWS = 4096

    def __init__(self, feature: str = "edge", window_size: int = 3, **kwargs) -> None:
        super().__init__(**kwargs)
        if feature not in self.FEATURES:
            raise ValueError(f"feature must be one of {self.FEATURES}, got {feature!r}.")
        if window_size < 3 or window_size % 2 == 0:
            raise ValueError(f"window_size must be an odd number from 3, got {window_size}.")
        self.feature = feature
        self.window_size = window_size

    def sums(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if min(images.shape[2:]) < self.window_size:
            raise ValueError(f"window_size {self.window_size} is larger than a slice of {tuple(images.shape[2:])}.")
        features = {"pixel": lambda i: i, "gradient": gradient_magnitude, "edge": sobel_edges}[self.feature](images)
        windows = features
        for axis in (2, 3):
            windows = windows.unfold(axis, self.window_size, 1)
        # (N, 3, windows, pixels), the pixels column by column
        windows = windows.transpose(-1, -2).flatten(4).flatten(2, 3)
        fused, sources = windows[:, :1].expand(-1, 2, -1, -1), windows[:, 1:]
        differ = (fused != sources).any(dim=-1)
        scores = torch.ones_like(differ, dtype=torch.float32)
        fused, sources = fused[differ], sources[differ]
        pairs = zip(fused.split(self.WINDOWS), sources.split(self.WINDOWS))
        scores[differ] = torch.cat([_window_scores(f, s) for f, s in pairs])
        return scores.sum(dim=2), torch.full_like(scores[..., 0], scores.shape[2])


def gradient_magnitude(images: torch.Tensor) -> torch.Tensor:
    """Magnitude of the central differences of `(N, C, H, W)`, one-sided at the border."""
    return torch.hypot(*torch.gradient(images, dim=(2, 3)))


def sobel_edges(images: torch.Tensor) -> torch.Tensor:
    """Thinned Sobel edges of `(N, C, H, W)` by the rule of MATLAB's `edge`, as 0 and 1."""
    gradients = sobel(images)
    strength = gradients.square().sum(dim=2)
    down, right = gradients.abs().unbind(dim=2)
    edges = torch.zeros_like(strength, dtype=torch.bool)
    for axis, across, along in ((2, down, right), (3, right, down)):
        # beyond the border there is nothing stronger
        side = strength.shape[axis]
        padding = torch.zeros_like(strength.narrow(axis, 0, 1))
        padded = torch.cat([padding, strength, padding], dim=axis)
        before, after = padded.narrow(axis, 0, side), padded.narrow(axis, 2, side)
        edges |= (across >= along) & (before <= strength) & (strength > after)
    return (edges & (strength > 4 * strength.mean(dim=(2, 3), keepdim=True))).to(images.dtype)


def _window_scores(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Normalised mutual information of windows of features `(N, L)`, `(N,)`."""
    p, q = _distribution(a), _distribution(b)
    cdf_p, cdf_q = p.cumsum(dim=1), q.cumsum(dim=1)
    centred_p, centred_q = (i - i.mean(dim=1, keepdim=True) for i in (p, q))
    norm = (centred_p.square().sum(dim=1) * centred_q.square().sum(dim=1)).sqrt()
    correlation = (centred_p * centred_q).sum(dim=1) / norm.clamp_min(torch.finfo(p.dtype).tiny)

    # cumulative Frechet bounds of the joint distribution: the upper one if the features go together
    x, y = cdf_p.unsqueeze(2), cdf_q.unsqueeze(1)
    upper = (correlation >= 0).view(-1, 1, 1)
    bound = torch.where(upper, torch.minimum(x, y), (x + y - 1).clamp_min(0))
    # Hoeffding's covariance of the bound; the share of the bound gives the mixture the features' correlation
    covariance = (bound - x * y).sum(dim=(1, 2))
    spread = _spread(p) * _spread(q)
    defined = (spread > 1e-6) & (covariance.abs() > 1e-6)
    share = torch.where(defined, correlation * spread / covariance.masked_fill(~defined, 1), 0.0).view(-1, 1, 1)

    bound = bound.diff(dim=1, prepend=bound.new_zeros(1, 1, 1).expand(len(p), 1, bound.shape[2]))
    bound = bound.diff(dim=2, prepend=bound.new_zeros(1, 1, 1).expand(len(p), bound.shape[1], 1))
    joint = share * bound + (1 - share) * p.unsqueeze(2) * q.unsqueeze(1)
    # a share above 1 makes probabilities negative: as the authors do, with the real part of their logarithm
    joint_entropy = -torch.xlogy(joint, joint.abs()).sum(dim=(1, 2))
    total = torch.special.entr(p).sum(dim=1) + torch.special.entr(q).sum(dim=1)
    return torch.where(total > 0, 2 * (total - joint_entropy) / total, 0.0)


def _distribution(windows: torch.Tensor) -> torch.Tensor:
    """Scale each window `(N, L)` from its minimum to its maximum and to the sum 1; a constant one is uniform."""
    low, high = windows.aminmax(dim=1, keepdim=True)
    scaled = torch.where(high > low, windows - low, 1.0)
    return scaled / scaled.sum(dim=1, keepdim=True)


def _spread(p: torch.Tensor) -> torch.Tensor:
    """Standard deviation of the position under each distribution `(N, L)`."""
    positions = torch.arange(p.shape[1], device=p.device, dtype=p.dtype)
    centred = positions - (p * positions).sum(dim=1, keepdim=True)
    return (p * centred.square()).sum(dim=1).sqrt()

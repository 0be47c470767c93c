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
from functools import lru_cache

import torch

__all__ = ["phase_congruency"]

# of all log-Gabor filters here: wavelengths of 6, 12, 24 and 48 pixels
SCALES, SHORTEST, FACTOR = 4, 6, 2
# amplitudes below it count as nothing, also in units of 0..255
EPSILON = 1e-4
# so many standard deviations above its mean the energy of noise is cut
NOISE_DEVIATIONS = 2.0


def phase_congruency(images: torch.Tensor, form: str = "standard") -> torch.Tensor:
    """
    Phase congruency, which is high where the waves that make up an image are in step: at edges and lines, whatever
    their contrast.

    Args:
        images: planes `(N, C, H, W)`.
        form:

            - ``"standard"``: energy over amplitude, both summed over four orientations, the angular filters Gaussian,
              as in the code of FSIM (Zhang et al., IEEE TIP 20(8), 2011), after Kovesi (Videre 1(3), 1999).
            - ``"published"``: Kovesi's later form (`phasecong3`, DICTA 2003) with raised cosines in six orientations,
              and a weight that is low where few scales respond; summed over the orientations.

    Returns:
        `(N, C, H, W)`, in [0, 1]; at most 6 in the ``"published"`` form.
    """
    filters = _log_gabor_filters(tuple(images.shape[2:]), form).to(images.device)
    spectrum = torch.fft.fft2(images).unsqueeze(2)
    energies, amplitudes = [], []
    for bank in filters:
        responses = torch.fft.ifft2(spectrum * bank)
        amplitude = responses.abs()
        total = responses.sum(dim=2, keepdim=True)
        # the responses along and across their common phase
        turned = responses * (total / (total.abs() + EPSILON)).conj()
        energy = (turned.real - turned.imag.abs()).sum(dim=2)
        # the finest scale hears little but noise, and the median ignores what else it hears
        median = amplitude[:, :, 0].flatten(2).median(dim=2).values.view(*images.shape[:2], 1, 1)
        threshold = {"standard": _power_threshold, "published": _rayleigh_threshold}[form](median, bank)
        energies.append((energy - threshold).clamp_min(0))
        amplitudes.append(amplitude)

    tiny = torch.finfo(images.dtype).tiny
    if form == "standard":
        return sum(energies) / sum(i.sum(dim=2) for i in amplitudes).clamp_min(tiny)
    return sum(_spread_weight(a) * e / a.sum(dim=2).clamp_min(tiny) for e, a in zip(energies, amplitudes))


@lru_cache(maxsize=4)
def _log_gabor_filters(shape: tuple[int, int], form: str) -> torch.Tensor:
    """Transfer functions `(orientations, SCALES, H, W)`, float32, zero frequency first."""
    orientations, bandwidth = {"standard": (4, 0.55), "published": (6, 0.5978)}[form]
    # Kovesi's grid: odd sides reach both 0.5 and -0.5
    axes = [torch.arange(-(n // 2), (n + 1) // 2, dtype=torch.float64) / max(n - n % 2, 1) for n in shape]
    y, x = torch.meshgrid(*(torch.fft.ifftshift(axis) for axis in axes), indexing="ij")
    radius, theta = torch.hypot(x, y), torch.atan2(-y, x)
    low_pass = 1 / (1 + (radius / 0.45) ** 30)
    radius[0, 0] = 1
    wavelengths = [SHORTEST * FACTOR**scale for scale in range(SCALES)]
    radial = torch.stack([torch.exp(-((radius * w).log() ** 2) / (2 * math.log(bandwidth) ** 2)) for w in wavelengths])
    radial = radial * low_pass
    radial[:, 0, 0] = 0

    angular = []
    for orientation in range(orientations):
        angle = theta - orientation * math.pi / orientations
        angle = torch.atan2(angle.sin(), angle.cos()).abs()
        if form == "standard":
            sigma = math.pi / orientations / 1.2
            angular.append(torch.exp(-(angle**2) / (2 * sigma**2)))
        else:
            angular.append((1 + (angle * orientations / 2).clamp_max(math.pi).cos()) / 2)
    return (torch.stack(angular).unsqueeze(1) * radial).float()


def _power_threshold(median: torch.Tensor, bank: torch.Tensor) -> torch.Tensor:
    """What noise adds to the energy of an orientation, from the power that the finest filter lets through."""
    power = median**2 / math.log(2) / bank[0].square().sum()
    even = torch.fft.ifft2(bank).real.sum(dim=0) * math.sqrt(bank[0].numel())
    tau = (power * even.square().sum()).sqrt()
    # 1.7 as in the code of FSIM: the estimate is that of another measure of congruency, and too high for this one
    return tau * (math.sqrt(math.pi / 2) + NOISE_DEVIATIONS * math.sqrt(2 - math.pi / 2)) / 1.7


def _rayleigh_threshold(median: torch.Tensor, bank: torch.Tensor) -> torch.Tensor:
    """What noise adds to the energy of an orientation, its share falling with the bandwidth of the scales."""
    tau = median / math.sqrt(math.log(4)) * (1 - FACTOR**-SCALES) / (1 - 1 / FACTOR)
    threshold = tau * (math.sqrt(math.pi / 2) + NOISE_DEVIATIONS * math.sqrt((4 - math.pi) / 2))
    return threshold.clamp_min(EPSILON)


def _spread_weight(amplitude: torch.Tensor) -> torch.Tensor:
    """Near 1 where all scales respond alike, near 0 where one stands alone."""
    width = (amplitude.sum(dim=2) / (amplitude.amax(dim=2) + EPSILON) - 1) / (SCALES - 1)
    return torch.sigmoid(10 * (width - 0.5))

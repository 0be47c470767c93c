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
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from monai.transforms.utils import generate_spatial_bounding_box

__all__ = ["gaussian_blur", "multi_scale_ssim", "scale_terms", "ssim"]

# A CPU computes a volume several times as fast in blocks: the memory of one is still there for the next. Elsewhere
# blocks bound the memory, and are larger, as each is many small kernels.
BLOCK_VOXELS, LARGE_BLOCK_VOXELS = 2**19, 2**22
# of the five scales, the finest first (Wang et al., 2003)
SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)


def gaussian_blur(x: torch.Tensor, window_size: int, sigma: float) -> torch.Tensor:
    """
    Gaussian means over those windows that lie wholly inside the image, differentiable. Along a side that is shorter
    than the window, the window is the largest odd size that fits.

    Args:
        x: `(B, C, H, W[, D])`.
        window_size: odd width of the window in pixels.
        sigma: standard deviation of the Gaussian in pixels.

    Returns:
        Means of the same type; each side is shorter by the width of its window less one.
    """
    for axis in range(2, x.ndim):
        size = min(window_size, x.shape[axis] - (x.shape[axis] + 1) % 2)
        offsets = torch.arange(size, dtype=torch.float64) - size // 2
        weights = torch.softmax(-(offsets**2) / (2 * sigma**2), dim=0).tolist()
        length = x.shape[axis] - size + 1
        # The window is symmetric: half the products. Shifted sums stay in float32 under autocast and TF32, where
        # a convolution would round the small differences of large moments that SSIM is made of.
        blurred = weights[size // 2] * x.narrow(axis, size // 2, length)
        for i in range(size // 2):
            blurred.add_(x.narrow(axis, i, length) + x.narrow(axis, size - 1 - i, length), alpha=weights[i])
        x = blurred
    return x


def ssim(
    fused: torch.Tensor,
    sources: torch.Tensor,
    window_size: int = 11,
    sigma: float = 1.5,
    data_range: float = 1.0,
    k1: float = 0.01,
    k2: float = 0.03,
) -> torch.Tensor:
    """
    Mean structural similarity of a fused image to each of its sources (Wang et al., IEEE TIP 13(4), 2004, eq. 13),
    differentiable, in float32.

    The value is that of `monai.metrics.SSIMMetric`. MONAI convolves with a dense window; here it is separable, which
    is about fifty times as fast on volumes. Along a side that is shorter than the window, the window is the largest
    odd size that fits.

    Args:
        fused: `(B, 1, H, W[, D])`.
        sources: `(B, S, H, W[, D])`.
        window_size: odd width of the Gaussian window in pixels.
        sigma: its standard deviation in pixels.
        data_range: difference between the largest and the smallest possible value.
        k1: stabilises the luminance term.
        k2: stabilises the contrast term.

    Returns:
        `(B, S)`, at most 1.
    """
    return _mean_similarity(fused, sources, window_size, sigma, data_range, k1, k2)[0]


def multi_scale_ssim(
    fused: torch.Tensor,
    sources: torch.Tensor,
    weights: Sequence[float] = SCALE_WEIGHTS,
    window_size: int = 11,
    sigma: float = 1.5,
    data_range: float = 1.0,
    k1: float = 0.01,
    k2: float = 0.03,
) -> torch.Tensor:
    """
    Multi-scale structural similarity of a fused image to each of its sources (Wang, Simoncelli and Bovik, Asilomar
    2003, eq. 7) of images and volumes of any size, in float32.

    From one scale to the next every side is halved that keeps at least the width of the window; it ends with
    ``weights``, or where no side can be halved, and the weights used are scaled to sum to 1. So it is
    `monai.metrics.MultiScaleSSIMMetric` where all sides have at least 176 pixels; 128 x 128 x 128 voxels have four
    scales, and a slab of 240 x 240 x 10 voxels has five, halved in its plane only. Negative means count as 0.

    Args:
        fused: `(B, 1, H, W[, D])`.
        sources: `(B, S, H, W[, D])`.
        weights: exponents of the scales, finest first.
        window_size: see `ssim`, as the arguments below.

    Returns:
        `(B, S)`, in [0, 1].
    """
    terms, exponents = scale_terms(fused, sources, weights, window_size, sigma, data_range, k1, k2)
    return torch.stack([term.clamp_min(0) ** exponent for term, exponent in zip(terms, exponents)]).prod(dim=0)


def scale_terms(
    fused: torch.Tensor,
    sources: torch.Tensor,
    weights: Sequence[float] = SCALE_WEIGHTS,
    window_size: int = 11,
    sigma: float = 1.5,
    data_range: float = 1.0,
    k1: float = 0.01,
    k2: float = 0.03,
) -> tuple[list[torch.Tensor], list[float]]:
    """Terms of the scales that `multi_scale_ssim` multiplies, `(B, S)` each, in [-1, 1], and their exponents."""
    pool = {4: F.avg_pool2d, 5: F.avg_pool3d}[fused.ndim]
    terms = []
    while True:
        similarity, contrast = _mean_similarity(fused, sources, window_size, sigma, data_range, k1, k2)
        terms.append(contrast)
        halving = [2 if side // 2 >= window_size else 1 for side in fused.shape[2:]]
        if len(terms) == len(weights) or max(halving) == 1:
            break
        fused, sources = pool(fused.float(), halving), pool(sources.float(), halving)
    terms[-1] = similarity
    used = weights[: len(terms)]
    return terms, [weight / sum(used) for weight in used]


def _mean_similarity(
    fused: torch.Tensor, sources: torch.Tensor, window_size: int, sigma: float, data_range: float, k1: float, k2: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Means over all positions of the window, `(B, S)`: of the similarity, and of its contrast and structure term."""
    fused, sources = fused.float(), sources.float()
    constants = (k1 * data_range) ** 2, (k2 * data_range) ** 2
    window = [min(window_size, side - (side + 1) % 2) for side in sources.shape[2:]]
    count = math.prod(side - size + 1 for side, size in zip(sources.shape[2:], window))
    in_blocks = not (torch.is_grad_enabled() and fused.requires_grad)
    if in_blocks:
        box = _content(fused, sources, window)
        fused, sources = fused[box], sources[box]
    positions = [side - size + 1 for side, size in zip(sources.shape[2:], window)]
    rows = positions[0]
    if in_blocks:
        voxels = BLOCK_VOXELS if fused.device.type == "cpu" else LARGE_BLOCK_VOXELS
        rows = max(voxels // sources[0, 0, 0].numel(), window[0])
    # windows that were left out see nothing in either image
    totals = [torch.full(sources.shape[:2], float(count - math.prod(positions)), device=sources.device)] * 2
    for first in range(0, positions[0], rows):
        length = min(rows, positions[0] - first) + window[0] - 1
        block = (i.narrow(2, first, length) for i in (fused, sources))
        luminance, contrast = _similarity(*block, window_size, sigma, *constants)
        totals = [total + x.flatten(2).sum(dim=2) for total, x in zip(totals, (luminance * contrast, contrast))]
    return totals[0] / count, totals[1] / count


def _content(fused: torch.Tensor, sources: torch.Tensor, window: Sequence[int]) -> tuple[slice, ...]:
    """Batch, channels, and the box of all windows that see more than zeros; of none, one window."""
    seen = (fused != 0).any(1) | (sources != 0).any(1)
    starts, ends = generate_spatial_bounding_box(seen, margin=[size - 1 for size in window], allow_smaller=True)
    box = [slice(start, max(end, start + size)) for start, end, size in zip(starts, ends, window)]
    return slice(None), slice(None), *box


def _similarity(
    fused: torch.Tensor, sources: torch.Tensor, window_size: int, sigma: float, c1: float, c2: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Maps of the luminance term, and of the contrast and structure term, `(B, S, ...)` each."""
    # what holds the fused image is blurred apart from what does not: the latter needs no backward pass
    moments = torch.cat([fused, fused**2 + sources**2, fused * sources], dim=1)
    moments = gaussian_blur(moments, window_size, sigma)
    mean_f, mean_squares, mean_product = moments.split([1, sources.shape[1], sources.shape[1]], dim=1)
    mean_s = gaussian_blur(sources, window_size, sigma)

    luminance = (2 * mean_f * mean_s + c1) / (mean_f**2 + mean_s**2 + c1)
    contrast = (2 * (mean_product - mean_f * mean_s) + c2) / (mean_squares - mean_f**2 - mean_s**2 + c2)
    return luminance, contrast

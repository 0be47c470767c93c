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
"""Take a colour image apart into the grey that the network fuses and the chroma that is put back afterwards."""

from __future__ import annotations

from functools import lru_cache

import torch

__all__ = [
    "COLOUR_SPACES",
    "check_colour_space",
    "join_colour",
    "lab_to_rgb",
    "rgb_to_lab",
    "rgb_to_ycbcr",
    "split_colour",
    "ycbcr_to_rgb",
]

COLOUR_SPACES = ("ycbcr", "cielab")

# linear sRGB to XYZ, white D65 (IEC 61966-2-1; CIE 1931 2 degree observer)
RGB_TO_XYZ = ((0.412453, 0.357580, 0.180423), (0.212671, 0.715160, 0.072169), (0.019334, 0.119193, 0.950227))
WHITE = (0.95047, 1.0, 1.08883)
CIE_DELTA = 6 / 29
# rounding in float32 puts colours on the border of the gamut a little outside of it
GAMUT_TOLERANCE = 1e-4
# finds the chroma that can be shown to 1/1024 of what was asked for
BISECTIONS = 10


def check_colour_space(name: str) -> str:
    """
    Raises:
        ValueError: when ``name`` is not one of `COLOUR_SPACES`.
    """
    if name not in COLOUR_SPACES:
        raise ValueError(f"colour_space is {name!r}, but must be one of: {', '.join(COLOUR_SPACES)}.")
    return name


def split_colour(rgb: torch.Tensor, colour_space: str = "ycbcr") -> tuple[torch.Tensor, torch.Tensor]:
    """
    RGB to grey and chroma; of a grey image, the grey is the image itself, in both colour spaces.

    Args:
        rgb: ``(3, ...)`` in [0, 1], sRGB. Of a batch give ``images.transpose(0, 1)``.
        colour_space: ``"ycbcr"``: grey is the luma. ``"cielab"``: grey is what has the same L* as the colour.

    Returns:
        grey ``(1, ...)`` in [0, 1] and chroma ``(2, ...)``: Cb and Cr in [0, 1], 0.5 neutral, or a* and b*, 0 neutral.
    """
    if check_colour_space(colour_space) == "ycbcr":
        return rgb_to_ycbcr(rgb)
    lab = rgb_to_lab(rgb)
    return _lightness_to_grey(lab[:1]), lab[1:]


def join_colour(grey: torch.Tensor, chroma: torch.Tensor, colour_space: str = "ycbcr") -> torch.Tensor:
    """
    Inverse of :func:`split_colour`, for a grey that may have changed in between. A colour that sRGB does not have at
    the new lightness gets as much of its chroma as can be shown: grey and hue of the colour space stay as they are,
    where clipping red, green and blue would change both.

    Args:
        grey: ``(1, ...)``; clipped to [0, 1].
        chroma: ``(2, ...)`` of the same spatial shape.
        colour_space: that of ``chroma``.

    Returns:
        RGB ``(3, ...)`` in [0, 1].
    """
    grey = grey.clamp(0, 1)
    if check_colour_space(colour_space) == "ycbcr":
        return _ycbcr_in_gamut(grey, chroma).clamp(0, 1)
    return _lab_in_gamut(torch.cat([_grey_to_lightness(grey), chroma])).clamp(0, 1)


def rgb_to_ycbcr(rgb: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    ITU-R BT.601, full range: RGB ``(3, ...)`` in [0, 1] to luma ``(1, ...)`` in [0, 1] and chroma ``(2, ...)``, Cb and
    Cr, in [0, 1] with 0.5 as neutral.
    """
    red, green, blue = rgb
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    return luma[None], torch.stack([0.5 + (blue - luma) / 1.772, 0.5 + (red - luma) / 1.402])


def ycbcr_to_rgb(luma: torch.Tensor, chroma: torch.Tensor) -> torch.Tensor:
    """Inverse of :func:`rgb_to_ycbcr`. Colours that sRGB does not have come out below 0 or above 1."""
    return luma + _ycbcr_offsets(chroma)


def rgb_to_lab(rgb: torch.Tensor) -> torch.Tensor:
    """CIELAB (CIE 15, white D65): sRGB ``(3, ...)`` in [0, 1] to L* in [0, 100], a* and b* (about -108 to 98)."""
    light = torch.where(rgb <= 0.04045, rgb / 12.92, ((rgb.clamp_min(0.04045) + 0.055) / 1.055) ** 2.4)
    x, y, z = (_cie_root(i) for i in _mix(_to_xyz(), light))
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def lab_to_rgb(lab: torch.Tensor) -> torch.Tensor:
    """Inverse of :func:`rgb_to_lab`. Colours that sRGB does not have come out below 0 or above 1."""
    y = (lab[0] + 16) / 116
    xyz = torch.stack([_cie_cube(i) for i in (y + lab[1] / 500, y, y - lab[2] / 200)])
    return _encode(_mix(torch.linalg.inv(_to_xyz()), xyz))


def _ycbcr_offsets(chroma: torch.Tensor) -> torch.Tensor:
    """What the chroma adds to the luma in red, green and blue."""
    red, blue = 1.402 * (chroma[1] - 0.5), 1.772 * (chroma[0] - 0.5)
    return torch.stack([red, -(0.299 * red + 0.114 * blue) / 0.587, blue])


def _ycbcr_in_gamut(luma: torch.Tensor, chroma: torch.Tensor) -> torch.Tensor:
    offsets = _ycbcr_offsets(chroma)
    room = torch.where(offsets > 0, 1 - luma, luma)
    tiny = torch.finfo(offsets.dtype).tiny
    share = (room / offsets.abs().clamp_min(tiny)).amin(dim=0, keepdim=True).clamp_max(1)
    return luma + share * offsets


def _lab_in_gamut(lab: torch.Tensor) -> torch.Tensor:
    rgb = lab_to_rgb(lab)
    outside = ~_shown(rgb)
    lightness, chroma = lab[:1, outside], lab[1:, outside]
    low, high = torch.zeros_like(lightness), torch.ones_like(lightness)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        shown = _shown(lab_to_rgb(torch.cat([lightness, middle * chroma])))
        low, high = torch.where(shown, middle, low), torch.where(shown, high, middle)
    rgb[:, outside] = lab_to_rgb(torch.cat([lightness, low * chroma]))
    return rgb


def _shown(rgb: torch.Tensor) -> torch.Tensor:
    return ((rgb >= -GAMUT_TOLERANCE) & (rgb <= 1 + GAMUT_TOLERANCE)).all(dim=0)


def _lightness_to_grey(lightness: torch.Tensor) -> torch.Tensor:
    return _encode(_cie_cube((lightness + 16) / 116)).clamp(0, 1)


def _grey_to_lightness(grey: torch.Tensor) -> torch.Tensor:
    return rgb_to_lab(grey.expand(3, *grey.shape[1:]))[:1]


def _encode(light: torch.Tensor) -> torch.Tensor:
    """Light to sRGB; on the line near 0 it may be negative."""
    return torch.where(light <= 0.0031308, 12.92 * light, 1.055 * light.clamp_min(0.0031308) ** (1 / 2.4) - 0.055)


def _cie_root(t: torch.Tensor) -> torch.Tensor:
    """CIE's f: the cube root, and a line near 0."""
    return torch.where(t > CIE_DELTA**3, t.clamp_min(CIE_DELTA**3) ** (1 / 3), t / (3 * CIE_DELTA**2) + 4 / 29)


def _cie_cube(f: torch.Tensor) -> torch.Tensor:
    return torch.where(f > CIE_DELTA, f**3, 3 * CIE_DELTA**2 * (f - 4 / 29))


@lru_cache(maxsize=1)
def _to_xyz() -> torch.Tensor:
    """Linear sRGB to XYZ relative to the white."""
    return torch.tensor(RGB_TO_XYZ, dtype=torch.float64) / torch.tensor(WHITE, dtype=torch.float64)[:, None]


def _mix(matrix: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    return torch.tensordot(matrix.to(image), image, dims=1)

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
"""Colour maps for grey functional images, and what they make of a fusion."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform, Transform
from monai.utils import convert_to_tensor

try:
    from pydicom.pixels import apply_color_lut
except ImportError:  # pydicom below 3, which MONAI Label needs
    from pydicom.pixel_data_handlers.util import apply_color_lut

from scripts.colour import check_colour_space, join_colour, split_colour

__all__ = ["ColourMap", "ColourMapd"]

# Palettes of DICOM PS3.6, table B.1-1, that matplotlib does not have
DICOM_PALETTES = {
    "hot_iron": "1.2.840.10008.1.5.1",
    "pet": "1.2.840.10008.1.5.2",
    "hot_metal_blue": "1.2.840.10008.1.5.3",
    "pet_20_step": "1.2.840.10008.1.5.4",
}


@lru_cache(maxsize=8)
def _table(name: str) -> torch.Tensor:
    """The 256 colours ``(3, 256)`` of a map, in [0, 1]."""
    steps = np.arange(256, dtype=np.uint8)
    if name in DICOM_PALETTES:
        colours = apply_color_lut(steps, palette=DICOM_PALETTES[name]) / 255
    else:
        colours = colormaps[name](steps)[:, :3]
    return torch.as_tensor(colours.T, dtype=torch.float32).contiguous()


class ColourMap(Transform):
    """
    Grey ``(1, ...)`` in [0, 1] to RGB ``(3, ...)``; values outside are clipped.

    Args:
        name: a colour map of matplotlib, such as ``"hot"`` or ``"inferno"``, or a colour palette of DICOM PS3.6:
            ``"hot_iron"``, ``"hot_metal_blue"``, ``"pet"``, ``"pet_20_step"``.

    Raises:
        ValueError: when there is no such map.
    """

    def __init__(self, name: str) -> None:
        if name not in DICOM_PALETTES and name not in colormaps:
            palettes = ", ".join(DICOM_PALETTES)
            raise ValueError(f"There is no colour map {name!r}: take one of matplotlib's, such as hot, or {palettes}.")
        self.name = name

    def __call__(self, grey: torch.Tensor) -> torch.Tensor:
        plain = grey.as_tensor() if isinstance(grey, MetaTensor) else grey
        return _table(self.name).to(plain.device)[:, (plain[0].clamp(0, 1) * 255).round().long()]


class ColourMapd(MapTransform):
    """
    Give the fusion with a grey functional image (PET, SPECT, perfusion) the colours of a map, as an overlay has them:
    the lightness is the fused image's, the hue that of the partner's value. The fused image itself stays grey. An item
    whose partner has colours of its own (``chroma_key``, see ``LoadPaird``) stays as it is.

    Adds ``<key>_colour``, RGB ``(3, H, W[, D])`` in [0, 1], and ``partner_colour``, the partner in the colours of the
    map, which the pictures show instead of the grey ones.

    Args:
        keys: keys of the fused images ``(1, H, W[, D])`` in [0, 1].
        colormap: see :class:`ColourMap`.
        colour_space: where lightness and hue are taken apart, see :func:`scripts.colour.split_colour`.
        image_key: key of the sources ``(2, H, W[, D])`` in [0, 1], whose second channel the map colours.
        chroma_key: key of the partner's chroma.
        allow_missing_keys: do not raise when a key is missing.
    """

    def __init__(
        self,
        keys: KeysCollection = "pred",
        colormap: str = "hot",
        colour_space: str = "cielab",
        image_key: str = "image",
        chroma_key: str = "chroma",
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.colour_map = ColourMap(colormap)
        self.colour_space = check_colour_space(colour_space)
        self.image_key = image_key
        self.chroma_key = chroma_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        if self.chroma_key in d:
            return d
        for key in self.key_iterator(d):
            fused = convert_to_tensor(d[key], track_meta=False).float()
            partner = self.colour_map(convert_to_tensor(d[self.image_key], track_meta=False)[1:].to(fused))
            colour = join_colour(fused, split_colour(partner, self.colour_space)[1], self.colour_space)
            d[f"{key}_colour"] = MetaTensor(colour).copy_meta_from(d[key]) if isinstance(d[key], MetaTensor) else colour
            d["partner_colour"] = partner
        return d

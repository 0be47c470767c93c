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
"""Intensities of every modality to [0, 1]: windows where the unit means something, percentiles where it does not."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform, ScaleIntensityRange, ScaleIntensityRangePercentiles, Transform

__all__ = ["ScaleByUnit", "ScaleByUnitd"]


class ScaleByUnit(Transform):
    """
    Scale every channel of ``(C, H, W[, D])`` to [0, 1] by its unit: Hounsfield units by a window, standardised uptake
    values by a range, all else (MR, pictures, uptake in other units) from one percentile to another.

    Args:
        ct_window: centre and width in Hounsfield units; the default shows the brain.
        suv_range: the SUV that become 0 and 1.
        lower: percentile that becomes 0.
        upper: percentile that becomes 1.
    """

    def __init__(
        self,
        ct_window: Sequence[float] = (40, 80),
        suv_range: Sequence[float] = (0, 15),
        lower: float = 0,
        upper: float = 100,
    ) -> None:
        centre, width = ct_window
        if width <= 0 or suv_range[1] <= suv_range[0]:
            raise ValueError(f"ct_window {ct_window} is (centre, width), suv_range {suv_range} is (lowest, highest).")
        self.ranges = {
            "HU": ScaleIntensityRange(centre - width / 2, centre + width / 2, 0, 1, clip=True),
            "SUV": ScaleIntensityRange(*suv_range, 0, 1, clip=True),
        }
        self.percentiles = ScaleIntensityRangePercentiles(lower, upper, 0, 1, clip=True)

    def __call__(self, image: torch.Tensor, units: Sequence[str] = ()) -> torch.Tensor:  # type: ignore[override]
        """
        Args:
            units: one for each channel, ``"HU"``, ``"SUV"`` or anything else; channels without one go by percentiles.
        """
        units = [*units, *[""] * (image.shape[0] - len(units))]
        scaled = [self.ranges.get(unit, self.percentiles)(channel[None]) for channel, unit in zip(image, units)]
        result = torch.cat([torch.as_tensor(channel) for channel in scaled])
        return MetaTensor(result).copy_meta_from(image) if isinstance(image, MetaTensor) else result


class ScaleByUnitd(MapTransform):
    """
    Dictionary version of :class:`ScaleByUnit`; the units are those of the inputs that `LoadCased` has noted.

    Args:
        keys: keys of the images.
        ct_window: see :class:`ScaleByUnit`, as the next three.
        suv_range: see there.
        lower: see there.
        upper: see there.
        info_key: key of what `LoadCased` has noted; without it all channels go by percentiles.
        allow_missing_keys: do not raise when a key is missing.
    """

    def __init__(
        self,
        keys: KeysCollection = "image",
        ct_window: Sequence[float] = (40, 80),
        suv_range: Sequence[float] = (0, 15),
        lower: float = 0,
        upper: float = 100,
        info_key: str = "fusion_info",
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.scale = ScaleByUnit(ct_window, suv_range, lower, upper)
        self.info_key = info_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        units = [source.get("units", "") for source in d.get(self.info_key, {}).get("inputs", ())]
        for key in self.key_iterator(d):
            d[key] = self.scale(d[key], units)
        return d

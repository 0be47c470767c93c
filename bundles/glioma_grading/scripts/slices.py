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
"""From an image of any size to what a network takes: slices chosen without a mask, intensities matched."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import HistogramNormalize, LoadImage, MapTransform
from monai.utils import convert_to_tensor

__all__ = ["MATCHING", "LoadMaskd", "MatchIntensityd", "PickSlicesd", "evenly_spaced", "is_brain"]

FOREGROUND = 0.1
MATCHING = ("none", "robust", "histogram")


def is_brain(image: torch.Tensor) -> torch.Tensor:
    """
    Where an image in [0, 1] shows tissue, in a skull-stripped image the brain. A tenth of the range leaves out what a
    fusion network puts into an empty background.
    """
    return image > FOREGROUND


def evenly_spaced(area: np.ndarray, num_slices: int, min_share: float) -> np.ndarray:
    """
    ``num_slices`` indices, evenly spaced from the first to the last slice that shows at least ``min_share`` of the
    largest slice's brain. Where there are fewer such slices, some are taken twice.

    Args:
        area: brain of each slice, ``(D,)``.
    """
    enough = np.flatnonzero(area >= min_share * area.max())
    return np.linspace(enough[0], enough[-1], num_slices).round().astype(int)


class LoadMaskd(MapTransform):
    """
    Load the tumour's segmentation that lies beside a case's images, ``(1, H, W, D)``, for `PickSlicesd`. Does nothing
    without a ``suffix``.

    Args:
        keys: key for the mask.
        image_key: key of the images' file names.
        suffix: what stands in the mask's file name where the first image's has its modality: ``"seg"`` for
            ``CASE_seg.nii.gz`` beside ``CASE_t2.nii.gz``.
    """

    def __init__(self, keys: KeysCollection = "mask", image_key: str = "image", suffix: str | None = None) -> None:
        super().__init__(keys)
        self.image_key = image_key
        self.suffix = suffix
        self.load = LoadImage(ensure_channel_first=True)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """
        Raises:
            FileNotFoundError: when there is no mask.
        """
        d = dict(data)
        if self.suffix is None:
            return d
        first = Path(np.ravel(d[self.image_key])[0])
        name, _, rest = first.name.partition(".")
        mask = first.with_name(f"{name[: name.rfind('_') + 1]}{self.suffix}.{rest}")
        if not mask.is_file():
            raise FileNotFoundError(f"{mask} does not exist: leave mask_suffix out to choose slices without a mask.")
        for key in self.keys:
            d[key] = self.load(mask)
        return d


class PickSlicesd(MapTransform):
    """
    Choose slices along the last axis of ``(C, H, W, D)``, by a rule that needs no mask: evenly spaced among those with
    enough brain (:func:`evenly_spaced`).

    Where the item has a mask, the slices with the largest section of it are taken instead. What is measured so is not
    what a patient without a mask would get; predictions are marked by ``slices``, ``"mask"`` or else ``"brain"``.

    Args:
        keys: keys of the images.
        num_slices: how many slices.
        min_share: share of the largest slice's brain that a slice must show.
        mask_key: key of the mask, which is dropped afterwards.
        allow_missing_keys: do not raise when a key is missing.
    """

    def __init__(
        self,
        keys: KeysCollection = "image",
        num_slices: int = 10,
        min_share: float = 0.5,
        mask_key: str = "mask",
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.num_slices = num_slices
        self.min_share = min_share
        self.mask_key = mask_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        mask = d.pop(self.mask_key, None)
        d["slices"] = "brain" if mask is None else "mask"
        for key in self.key_iterator(d):
            image = d[key]
            if mask is None:
                area = is_brain(image).any(dim=0).flatten(0, 1).sum(dim=0)
                indices = evenly_spaced(np.asarray(area), self.num_slices, self.min_share)
            else:
                area = np.asarray((mask[0] > 0).flatten(0, 1).sum(dim=0))
                largest = np.sort(np.argsort(-area, kind="stable")[: self.num_slices])
                indices = largest[np.linspace(0, len(largest) - 1, self.num_slices).round().astype(int)]
            plain = image.as_tensor()[..., torch.from_numpy(indices)]
            d[key] = MetaTensor(plain).copy_meta_from(image)
        return d


class MatchIntensityd(MapTransform):
    """
    Bring the intensities of images from different scanners together, each channel of each image by itself. What is not
    brain (:func:`is_brain`) becomes 0.

    Args:
        keys: keys of the images ``(C, H, W, D)`` in [0, 1].
        method: ``"none"``; ``"robust"``, a linear map that brings the brain's median to 0.5 and its interquartile range
            to 0.25, clipped to [0, 1]; or ``"histogram"``, equalisation (`monai.transforms.HistogramNormalize`), after
            which every brain has the same, flat histogram, so that nothing can be read from intensities alone.
        allow_missing_keys: do not raise when a key is missing.

    Raises:
        ValueError: when ``method`` is none of these.
    """

    def __init__(self, keys: KeysCollection = "image", method: str = "none", allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        if method not in MATCHING:
            raise ValueError(f"intensity_matching must be one of {', '.join(MATCHING)}, not '{method}'.")
        self.method = method
        self.equalise = HistogramNormalize(num_bins=256, min=0, max=1)  # type: ignore[arg-type]

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d):
            if self.method != "none":
                plain = convert_to_tensor(d[key], track_meta=False)
                matched = torch.stack([self._match(channel) for channel in plain])
                d[key] = MetaTensor(matched).copy_meta_from(d[key]) if isinstance(d[key], MetaTensor) else matched
        return d

    def _match(self, channel: torch.Tensor) -> torch.Tensor:
        brain = is_brain(channel)
        if not brain.any():
            return torch.zeros_like(channel)
        if self.method == "histogram":
            matched = convert_to_tensor(self.equalise(channel, mask=brain), track_meta=False)
        else:
            # torch.quantile refuses more than 16 million values
            low, median, high = np.percentile(channel[brain].numpy(), (25, 50, 75))
            matched = (0.5 + 0.25 * (channel - median) / max(high - low, 1e-6)).clamp(0, 1)
        return torch.where(brain, matched, 0.0)

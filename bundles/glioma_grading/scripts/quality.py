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
"""Is an input like those that a network was trained on? Simple measures of it, and the ranges that they had there."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data.utils import affine_to_spacing
from monai.transforms import MapTransform, ScaleIntensityRangePercentiles
from tqdm import tqdm

from scripts.slices import is_brain
from scripts.sources import LoadImages, load_fused_file

__all__ = ["DescribeInputd", "describe", "find_flags", "training_ranges"]

# a range seen in training counts as left when it is exceeded by this share of its width
MARGIN = 0.25
PAIR, FUSED = ("first", "second"), ("fused",)
SENTENCES = {
    "blank": "an image is empty: a modality is missing",
    "identical": "both images are the same: a modality is missing",
}


def describe(image: torch.Tensor, spacing: Sequence[float], names: Sequence[str] = PAIR) -> dict[str, float]:
    """
    Measures of the raw image ``(C, H, W, D)``: whether it is empty, whether two channels are the same; how large the
    brain's field of view is, in mm along each axis and in cm^2 in the largest slice; and where its intensities lie, as
    percentiles of the brain, on a scale from the 0.1th to the 99.9th percentile of the image.

    Args:
        image: raw intensities.
        spacing: size of a voxel in mm, three numbers.
        names: of the channels, for the names of the measures.
    """
    scaled = ScaleIntensityRangePercentiles(0.1, 99.9, b_min=0, b_max=1, clip=True, channel_wise=True)(image)
    brain = is_brain(torch.as_tensor(np.asarray(scaled)))
    anywhere = brain.any(dim=0)
    blank = any(bool(channel.max() == channel.min()) or not mask.any() for channel, mask in zip(image, brain))
    measures = {
        "blank": float(blank),
        "identical": float(len(image) == 2 and bool(torch.equal(image[0], image[1]))),
        "area": float(anywhere.flatten(0, 1).sum(dim=0).max()) * spacing[0] * spacing[1] / 100,
    }
    for axis, name in enumerate(("width", "length", "height")):
        seen = anywhere.movedim(axis, 0).flatten(1).any(dim=1).nonzero()
        measures[name] = float(seen.max() - seen.min() + 1) * spacing[axis] if len(seen) else 0.0
    for name, channel, mask in zip(names, np.asarray(scaled), brain.numpy()):
        inside = channel[mask] if mask.any() else np.zeros(1)
        for percentile, value in zip((10, 50, 90), np.percentile(inside, (10, 50, 90))):
            measures[f"{name}_p{percentile}"] = float(value)
    return measures


class DescribeInputd(MapTransform):
    """
    Put :func:`describe` of the images whose file names are under a key beside them, as ``quality``.

    Args:
        keys: key of the file names.
        fused_files: whether they are of a fused image, not of a pair.
        quality_key: where to put the measures.
    """

    def __init__(self, keys: KeysCollection = "image", fused_files: bool = False, quality_key: str = "quality") -> None:
        super().__init__(keys)
        self.fused_files = fused_files
        self.quality_key = quality_key
        self.load_pair = LoadImages()

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d):
            image = load_fused_file(Path(d[key])) if self.fused_files else self.load_pair(d[key])[0]
            spacing = affine_to_spacing(image.affine, image.affine.shape[0] - 1).tolist()
            plain = image.as_tensor().float()
            plain = plain if plain.ndim == 4 else plain[..., None]
            names = FUSED if self.fused_files else PAIR
            d[self.quality_key] = describe(plain, [*spacing, 1.0, 1.0][:3], names)
        return d


def training_ranges(cases: Sequence[Mapping], fused_files: bool = False) -> dict[str, list[float]]:
    """Lowest and highest value of every measure over the cases that a network was trained on."""
    describe_case = DescribeInputd(fused_files=fused_files)
    found = [describe_case(case)["quality"] for case in tqdm(cases, desc="ranges of the training images", leave=False)]
    names = [name for name in found[0] if name not in SENTENCES]
    return {name: [min(f[name] for f in found), max(f[name] for f in found)] for name in names}


def find_flags(measures: Mapping[str, float], ranges: Mapping[str, Sequence[float]]) -> list[str]:
    """
    What is unusual about an input, in words: a modality that is missing, and every measure that is outside of the range
    seen in training, widened by a quarter on both sides. Of a fused file, the field of view can be compared with that
    of the pairs that a network was trained on, the intensities can not.
    """
    missing = [sentence for name, sentence in SENTENCES.items() if measures[name]]
    if missing:
        return missing
    flags = []
    for name, (low, high) in ((name, ends) for name, ends in ranges.items() if name in measures):
        slack = MARGIN * (high - low)
        if not low - slack <= measures[name] <= high + slack:
            kind = "intensities" if "_p" in name else "field of view"
            flags.append(f"unusual {kind}: {name} {measures[name]:.3g}, in training {low:.3g} to {high:.3g}")
    return flags

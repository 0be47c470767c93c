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
"""What a grading network sees of a patient: T2, FLAIR, both, a rule's or a network's fused image, or fused files."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import EnsureChannelFirst, LoadImage, MapTransform, ScaleIntensityRangePercentiles

from scripts.data import stem
from scripts.dicom_series import is_dicom, read_header, read_pixels, select_series
from scripts.dicom_writer import PRODUCT
from scripts.fusion import to_eight_bit
from scripts.load_case import LoadCase
from scripts.transforms import LoadPair

__all__ = ["PAIR_SOURCES", "LoadImages", "LoadSourced", "load_fused_file"]

# of a pair (2, H, W[, D]) in [0, 1]
PAIR_SOURCES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "t2": lambda pair: pair[:1],
    "flair": lambda pair: pair[1:],
    "t2_flair": lambda pair: pair,
    "average": lambda pair: pair.mean(dim=0, keepdim=True),
    "maximum": lambda pair: pair.amax(dim=0, keepdim=True),
}


class LoadImages(LoadPair):
    """
    `LoadPair` that also reads pairs of which an image is DICOM, a file or a folder: the second then comes onto the grid
    of the first, and images of different patients are refused (`LoadCase`).
    """

    def __init__(self) -> None:
        super().__init__()
        self._load_dicom = LoadCase(spatial_dims=3)

    def __call__(self, image: str | Path | Sequence[str | Path]) -> tuple[MetaTensor, torch.Tensor | None]:
        files = [image] if isinstance(image, (str, Path)) else image
        return self._load_dicom(image) if any(is_dicom(file) for file in files) else super().__call__(image)


def load_fused_file(file: str | Path) -> MetaTensor:
    """
    A fused image that a fusion run has written, ``(1, H, W[, D])`` float32 in [0, 1] at 256 levels.

    Args:
        file: NIfTI or another file, or the folder of the DICOM series.

    Raises:
        ValueError: when it has several channels (a fused image in colour), or is a DICOM series of something else.
    """
    image, peak = _read_series(file) if is_dicom(file) else _read_file(file)
    if image.shape[0] != 1:
        raise ValueError(f"{file} has {image.shape[0]} channels: a fused image to be graded must be grey.")
    values = to_eight_bit(image.as_tensor().float() / peak)
    return MetaTensor(values).copy_meta_from(image)  # type: ignore[return-value]


def _read_file(file: str | Path) -> tuple[MetaTensor, float]:
    """Image and the value that stands for 1: integers span their non-negative range, floats [0, 1]."""
    image: MetaTensor = LoadImage(ensure_channel_first=True, dtype=None)(file)  # type: ignore[assignment]
    return image, 1.0 if image.dtype.is_floating_point else float(torch.iinfo(image.dtype).max)


def _read_series(folder: str | Path) -> tuple[MetaTensor, float]:
    series = select_series(folder)
    header = read_header(series.files[0], ("Manufacturer", "BitsStored"))
    if header.get("Manufacturer") != PRODUCT:
        raise ValueError(
            f"{folder} is not a series that a fusion has written: name CASE_dicom of its output, or set source to what"
            " the images are."
        )
    array, meta = read_pixels(series)
    image: MetaTensor = EnsureChannelFirst()(MetaTensor(array, meta=meta))  # type: ignore[assignment]
    return image, 2.0**header.BitsStored - 1


class LoadSourced(MapTransform):
    """
    Load the image that is graded, ``(C, H, W, D)`` float32 in [0, 1]; a slice gets D = 1.

    Args:
        keys: keys of the file names: T2 and FLAIR, one file with both as channels, or one fused image.
        source: ``"t2"``, ``"flair"``, ``"t2_flair"`` (two channels), ``"average"`` or ``"maximum"`` of a pair whose
            images are scaled each by itself; ``"fused_files"``, images that a fusion has written; anything else is
            left to ``fuse``.
        fuse: `scripts.fusion.FuseModalitiesd`, or any transform that replaces the file names by an image.
        lower: percentile of an image that becomes 0.
        upper: percentile of an image that becomes 1.
        allow_missing_keys: do not raise when a key is missing.

    Raises:
        ValueError: when ``source`` is unknown and there is no ``fuse``.
    """

    def __init__(
        self,
        keys: KeysCollection = "image",
        source: str = "fused",
        fuse: Callable[[Mapping[Hashable, Any]], dict[Hashable, Any]] | None = None,
        lower: float = 0.1,
        upper: float = 99.9,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        if source not in (*PAIR_SOURCES, "fused_files") and fuse is None:
            raise ValueError(f"source '{source}' is none of {', '.join(PAIR_SOURCES)}, fused_files: it needs `fuse`.")
        self.source = source
        self.fuse = fuse
        self.load_pair = LoadImages()
        self.scale = ScaleIntensityRangePercentiles(lower, upper, b_min=0, b_max=1, clip=True, channel_wise=True)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """
        Raises:
            ValueError: when a file can not be read or is not what ``source`` needs.
        """
        d = dict(data)
        for key in self.key_iterator(d):
            if self.source in PAIR_SOURCES:
                pair, _ = self.load_pair(d[key])
                image = PAIR_SOURCES[self.source](self.scale(pair))
            elif self.source == "fused_files":
                if not isinstance(d[key], (str, Path)):
                    raise ValueError(f"source 'fused_files' needs one image a case, not {len(d[key])}: {d[key][0]} ….")
                image = load_fused_file(d[key])
            else:
                image = self.fuse({**d, key: d[key]})[key]  # type: ignore[misc]
            d[key] = _as_volume(image, str(d.get("case") or stem(np.ravel(d[key])[0])))
        return d


def _as_volume(image: MetaTensor, case: str) -> MetaTensor:
    values = image.as_tensor().float()
    affine = torch.eye(4, dtype=torch.float64)
    n = image.affine.shape[0] - 1
    affine[:n, :n], affine[:n, 3] = image.affine[:n, :n], image.affine[:n, n]
    return MetaTensor(values if values.ndim == 4 else values[..., None], affine=affine, meta={"case": case})

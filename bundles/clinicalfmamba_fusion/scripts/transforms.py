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
"""Transforms between image files and the network: load a pair, put colour back, write in the wanted type and name."""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.config import DtypeLike, KeysCollection
from monai.data import MetaTensor, PILReader
from monai.transforms import LoadImage, MapTransform, Transform
from monai.utils import ImageMetaKey, convert_to_tensor, get_equivalent_dtype
from nibabel import Nifti1Header
from PIL import Image

from scripts.colour import check_colour_space, join_colour, split_colour
from scripts.data import PICTURES, stem

__all__ = [
    "CaseName",
    "LoadPair",
    "LoadPaird",
    "RestoreChroma",
    "RestoreChromad",
    "ScaleToDtype",
    "ScaleToDtyped",
    "refuse_unequal_shapes",
]

AFFINE_TOLERANCE = 1e-3
# Nothing reads these once the affine is known, and each would go from process to process as a tensor of its own.
NIFTI_HEADER = frozenset(Nifti1Header.template_dtype.names)


def _grey_or_rgb(picture: Image.Image) -> Image.Image:
    """Drop alpha, look up palettes: what is left is grey of any depth, or RGB."""
    if picture.mode in ("1", "LA", "La"):
        return picture.convert("L")
    return picture if picture.mode in ("L", "F") or picture.mode.startswith("I") else picture.convert("RGB")


def refuse_unequal_shapes(images: Sequence[torch.Tensor], files: Sequence[Path]) -> None:
    """
    Raises:
        ValueError: when the two images ``(C, H, W[, D])`` differ in spatial shape.
    """
    if images[0].shape[1:] != images[1].shape[1:]:
        found = " and ".join(f"{file} {tuple(i.shape[1:])}" for file, i in zip(files, images))
        raise ValueError(f"The images of a pair differ in shape, {found}: register and resample one to the other.")


class LoadPair(Transform):
    """
    Read two co-registered images, or one file with two channels, as one ``(2, H, W[, D])`` float32 ``MetaTensor`` of
    raw intensities: channel 0 the MRI, channel 1 its partner. The metadata is the MRI's.

    Of a colour image the grey of :func:`scripts.colour.split_colour` is read (luma by default), in the range of the
    file (0..255); the partner's chroma ``(2, H, W[, D])`` is returned beside. An image with three equal channels is
    grey.

    Args:
        colour_space: ``"ycbcr"`` or ``"cielab"``.
    """

    def __init__(self, colour_space: str = "ycbcr") -> None:
        self.colour_space = check_colour_space(colour_space)
        self._load = LoadImage(ensure_channel_first=True)
        self._picture_reader = PILReader(converter=_grey_or_rgb)

    def __call__(self, image: str | Path | Sequence[str | Path]) -> tuple[MetaTensor, torch.Tensor | None]:
        """
        Returns:
            the pair, and the partner's chroma or None.

        Raises:
            FileNotFoundError: when a file does not exist.
            ValueError: when a file can not be read, has an unexpected number of channels, or the two differ in shape.
        """
        files = [Path(image)] if isinstance(image, (str, Path)) else [Path(file) for file in image]
        if len(files) == 1:
            pair = self._read(files[0])
            if pair.shape[0] != 2:
                raise ValueError(
                    f"{files[0]} has {pair.shape[0]} channel(s): give two files, or one with two channels."
                )
            return pair, None
        if len(files) != 2:
            raise ValueError(f"Expected two images, got {len(files)}: {', '.join(map(str, files))}.")
        images = self._read_pair(files)
        (mri, _), (partner, chroma) = (_grey(i, file, self.colour_space) for i, file in zip(images, files))
        return MetaTensor(torch.cat([mri, partner]), meta=images[0].meta), chroma

    def _read_pair(self, files: Sequence[Path]) -> list[MetaTensor]:
        images = [self._read(file) for file in files]
        refuse_unequal_shapes(images, files)
        if not torch.allclose(images[0].affine, images[1].affine, rtol=0, atol=AFFINE_TOLERANCE):
            warnings.warn(
                "The two images of a pair have different affines: they are fused voxel by voxel in the grid of the MRI."
                " Make sure that they are co-registered."
            )
        return images

    def _read(self, file: Path) -> MetaTensor:
        if not file.exists():
            raise FileNotFoundError(f"{file} does not exist.")
        try:
            image = self._load(file, self._picture_reader if file.name.lower().endswith(PICTURES) else None)
        except Exception as error:  # each of MONAI's readers raises its own kind
            raise ValueError(f"{file} can not be read as an image: replace it, or take its pair out.") from error
        for field in NIFTI_HEADER.intersection(image.meta):
            del image.meta[field]
        return image


def _grey(image: MetaTensor, file: Path, colour_space: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    plain = image.as_tensor()
    if plain.shape[0] == 1:
        return plain, None
    if plain.shape[0] != 3:
        raise ValueError(f"{file} has {plain.shape[0]} channels: each of two files must be grey (1) or RGB (3).")
    if torch.equal(plain[0], plain[1]) and torch.equal(plain[0], plain[2]):
        return plain[:1], None
    peak = 255.0 if plain.max() <= 255 else 65535.0
    grey, chroma = split_colour(plain / peak, colour_space)
    return grey * peak, chroma


class LoadPaird(MapTransform):
    """
    Dictionary version of :class:`LoadPair`. The metadata gets the item's ``case``, or the file's name where there is
    none, as ``meta["case"]``, for :class:`CaseName`.

    Args:
        keys: keys of the file names.
        chroma_key: where to put the partner's chroma, if it has any. ``None`` leaves it out, which a loader that
            batches grey and colour pairs needs: their items must have the same keys.
        colour_space: see :class:`LoadPair`.
        allow_missing_keys: do not raise when a key is missing.
    """

    def __init__(
        self,
        keys: KeysCollection = "image",
        chroma_key: str | None = "chroma",
        colour_space: str = "ycbcr",
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.chroma_key = chroma_key
        self.loader = LoadPair(colour_space)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d):
            d[key], chroma = self.loader(d[key])
            d[key].meta["case"] = str(d.get("case") or stem(d[key].meta[ImageMetaKey.FILENAME_OR_OBJ]))
            if chroma is not None and self.chroma_key is not None:
                d[self.chroma_key] = chroma
        return d


class RestoreChroma(Transform):
    """
    Fused grey ``(1, H, W[, D])`` in [0, 1] and its partner's chroma ``(2, H, W[, D])`` to RGB ``(3, H, W[, D])``, as
    :func:`scripts.colour.join_colour` does.

    Args:
        colour_space: that in which the chroma was read, see :class:`LoadPair`.
    """

    def __init__(self, colour_space: str = "ycbcr") -> None:
        self.colour_space = check_colour_space(colour_space)

    def __call__(self, grey: torch.Tensor, chroma: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """
        Raises:
            ValueError: when the two differ in spatial shape.
        """
        if grey.shape[1:] != chroma.shape[1:]:
            raise ValueError(
                f"The fused image {tuple(grey.shape[1:])} and the chroma {tuple(chroma.shape[1:])} differ in shape:"
                " transforms that change the grid must be inverted before colour is put back."
            )
        plain = grey.as_tensor() if isinstance(grey, MetaTensor) else grey
        rgb = join_colour(plain, convert_to_tensor(chroma, track_meta=False).to(plain), self.colour_space)
        return MetaTensor(rgb).copy_meta_from(grey) if isinstance(grey, MetaTensor) else rgb


class RestoreChromad(MapTransform):
    """
    Dictionary version of :class:`RestoreChroma`; items without chroma stay as they are.

    Args:
        keys: keys of the fused images.
        chroma_key: key of the chroma that :class:`LoadPaird` left.
        colour_space: that of :class:`LoadPaird`.
        allow_missing_keys: do not raise when a key is missing.
    """

    def __init__(
        self,
        keys: KeysCollection = "pred",
        chroma_key: str = "chroma",
        colour_space: str = "ycbcr",
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.chroma_key = chroma_key
        self.restore = RestoreChroma(colour_space)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d):
            if self.chroma_key in d:
                d[key] = self.restore(d[key], d[self.chroma_key])
        return d


class ScaleToDtype(Transform):
    """
    Stretch [0, 1] over the non-negative range of an integer type, rounding to the nearest and clipping what lies
    outside; for a floating point type only the type changes. MONAI's ``SaveImage(scale=255)`` truncates, and knows
    255 and 65535 only. Save the result with ``SaveImaged(output_dtype=None)``, which keeps the type: a type given by
    name makes it write a PNG in 8 bits whatever the values.

    Args:
        output_dtype: NumPy or PyTorch type, or its name, such as ``"uint8"`` or ``"int16"``.
    """

    def __init__(self, output_dtype: DtypeLike | torch.dtype = "uint8") -> None:
        self.output_dtype = np.dtype(get_equivalent_dtype(output_dtype, np.ndarray))

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        dtype = get_equivalent_dtype(self.output_dtype, torch.Tensor)
        if not np.issubdtype(self.output_dtype, np.integer):
            return image.to(dtype)
        info = np.iinfo(self.output_dtype)
        # float32 can not hold the largest int32
        wide = torch.float64 if info.bits > 16 else torch.float32
        return image.to(wide).clamp(0, 1).mul_(info.max).round_().to(dtype)


class ScaleToDtyped(MapTransform):
    """Dictionary version of :class:`ScaleToDtype`."""

    def __init__(
        self,
        keys: KeysCollection = "pred",
        output_dtype: DtypeLike | torch.dtype = "uint8",
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.scale = ScaleToDtype(output_dtype)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d):
            d[key] = self.scale(d[key])
        return d


class CaseName:
    """``output_name_formatter`` for ``SaveImaged``: names the file by ``meta["case"]``, else by the image's file."""

    def __call__(self, metadict: Mapping[str, Any] | None, saver: Transform | None) -> dict[str, Any]:
        meta = metadict or {}
        name = meta.get("case") or stem(meta.get(ImageMetaKey.FILENAME_OR_OBJ, getattr(saver, "_data_index", 0)))
        # the folder layout drops an extension: without one, a case named "1.2.3" would lose its end
        return {"subject": f"{name}.case", "idx": meta.get(ImageMetaKey.PATCH_INDEX)}

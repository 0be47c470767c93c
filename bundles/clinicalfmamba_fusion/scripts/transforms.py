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
from PIL import Image

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
    "rgb_to_ycbcr",
    "ycbcr_to_rgb",
]

AFFINE_TOLERANCE = 1e-3


def rgb_to_ycbcr(rgb: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    ITU-R BT.601, full range: RGB ``(3, ...)`` in [0, 1] to luma ``(1, ...)`` in [0, 1] and chroma ``(2, ...)``, Cb and
    Cr, in [0, 1] with 0.5 as neutral.
    """
    red, green, blue = rgb
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    return luma[None], torch.stack([0.5 + (blue - luma) / 1.772, 0.5 + (red - luma) / 1.402])


def ycbcr_to_rgb(luma: torch.Tensor, chroma: torch.Tensor) -> torch.Tensor:
    """Inverse of :func:`rgb_to_ycbcr`; colours that luma and chroma put outside RGB are clipped to [0, 1]."""
    y, cb, cr = luma[0], chroma[0] - 0.5, chroma[1] - 0.5
    red, blue = y + 1.402 * cr, y + 1.772 * cb
    return torch.stack([red, (y - 0.299 * red - 0.114 * blue) / 0.587, blue]).clamp(0, 1)


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

    Of a colour image the luma is read, in the range of the file (0..255); the partner's chroma ``(2, H, W[, D])`` (Cb,
    Cr in [0, 1], 0.5 neutral, see :func:`rgb_to_ycbcr`) is returned beside. An image with three equal channels is grey.
    """

    def __init__(self) -> None:
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
        (mri, _), (partner, chroma) = (_luma(i, file) for i, file in zip(images, files))
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
            return self._load(file, self._picture_reader if file.name.lower().endswith(PICTURES) else None)
        except Exception as error:  # each of MONAI's readers raises its own kind
            raise ValueError(f"{file} can not be read as an image: replace it, or take its pair out.") from error


def _luma(image: MetaTensor, file: Path) -> tuple[torch.Tensor, torch.Tensor | None]:
    plain = image.as_tensor()
    if plain.shape[0] == 1:
        return plain, None
    if plain.shape[0] != 3:
        raise ValueError(f"{file} has {plain.shape[0]} channels: each of two files must be grey (1) or RGB (3).")
    if torch.equal(plain[0], plain[1]) and torch.equal(plain[0], plain[2]):
        return plain[:1], None
    peak = 255.0 if plain.max() <= 255 else 65535.0
    luma, chroma = rgb_to_ycbcr(plain / peak)
    return luma * peak, chroma


class LoadPaird(MapTransform):
    """
    Dictionary version of :class:`LoadPair`. The metadata gets the item's ``case``, or the file's name where there is
    none, as ``meta["case"]``, for :class:`CaseName`.

    Args:
        keys: keys of the file names.
        chroma_key: where to put the partner's chroma, if it has any. ``None`` leaves it out, which a loader that
            batches grey and colour pairs needs: their items must have the same keys.
        allow_missing_keys: do not raise when a key is missing.
    """

    def __init__(
        self, keys: KeysCollection = "image", chroma_key: str | None = "chroma", allow_missing_keys: bool = False
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.chroma_key = chroma_key
        self.loader = LoadPair()

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d):
            d[key], chroma = self.loader(d[key])
            d[key].meta["case"] = str(d.get("case") or stem(d[key].meta[ImageMetaKey.FILENAME_OR_OBJ]))
            if chroma is not None and self.chroma_key is not None:
                d[self.chroma_key] = chroma
        return d


class RestoreChroma(Transform):
    """Fused luma ``(1, H, W[, D])`` in [0, 1] and its partner's chroma ``(2, H, W[, D])`` to RGB ``(3, H, W[, D])``."""

    def __call__(self, luma: torch.Tensor, chroma: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """
        Raises:
            ValueError: when the two differ in spatial shape.
        """
        if luma.shape[1:] != chroma.shape[1:]:
            raise ValueError(
                f"The fused image {tuple(luma.shape[1:])} and the chroma {tuple(chroma.shape[1:])} differ in shape:"
                " transforms that change the grid must be inverted before colour is put back."
            )
        plain = luma.as_tensor() if isinstance(luma, MetaTensor) else luma
        rgb = ycbcr_to_rgb(plain, convert_to_tensor(chroma, track_meta=False).to(plain))
        return MetaTensor(rgb).copy_meta_from(luma) if isinstance(luma, MetaTensor) else rgb


class RestoreChromad(MapTransform):
    """
    Dictionary version of :class:`RestoreChroma`; items without chroma stay as they are.

    Args:
        keys: keys of the fused images.
        chroma_key: key of the chroma that :class:`LoadPaird` left.
        allow_missing_keys: do not raise when a key is missing.
    """

    def __init__(
        self, keys: KeysCollection = "pred", chroma_key: str = "chroma", allow_missing_keys: bool = False
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.chroma_key = chroma_key
        self.restore = RestoreChroma()

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
        # float32 can not hold the largest int32
        peak = np.iinfo(self.output_dtype).max
        return (image.double().clamp(0, 1) * peak).round().to(dtype)


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

    def __call__(self, metadict: Mapping[str, Any] | None, saver: Transform) -> dict[str, Any]:
        meta = metadict or {}
        name = meta.get("case") or stem(meta.get(ImageMetaKey.FILENAME_OR_OBJ, getattr(saver, "_data_index", 0)))
        # the folder layout drops an extension: without one, a case named "1.2.3" would lose its end
        return {"subject": f"{name}.case", "idx": meta.get(ImageMetaKey.PATCH_INDEX)}

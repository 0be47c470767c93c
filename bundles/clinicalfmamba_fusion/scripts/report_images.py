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
"""Pictures that travel inside a page: data URIs, and a volume as mosaics of slices that a script cuts planes out of."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from PIL import Image
from torch.nn.functional import interpolate

from scripts.views import PLANES, SQUARES, CaseImages

__all__ = ["DIFFERENCE_COLOURS", "colour_difference", "picture_uri", "thumbnail_uri", "volume_mosaics"]

DIFFERENCE_COLOURS = "RdBu_r"
# up to this size a picture is stored without loss
LOSSLESS_PIXELS = 512 * 512
QUALITY = 80
THUMBNAIL_PIXELS = 96
# what a telephone shows and holds: longest side and number of voxels
MAX_SIDE = 256
MAX_VOXELS = 2**23
MOSAIC_COLUMNS = 4
MOSAIC_ROWS = 4


def picture_uri(picture: np.ndarray) -> str:
    """``(height, width[, 3])`` in [0, 1] as a data URI: PNG, or WebP if it is large."""
    return _uri(_to_image(picture), lossless=picture.shape[0] * picture.shape[1] <= LOSSLESS_PIXELS)


def thumbnail_uri(picture: np.ndarray, height: float, width: float) -> str:
    """A small picture with the proportions of a field of view of ``height`` and ``width``."""
    scale = THUMBNAIL_PIXELS / max(height, width)
    size = max(round(width * scale), 1), max(round(height * scale), 1)
    return _uri(_to_image(picture).resize(size, Image.Resampling.BOX), lossless=False)


def colour_difference(difference: np.ndarray, limit: float) -> np.ndarray:
    """Differences ``(height, width)`` to RGB: blue from ``-limit`` on, white at 0, red from ``limit`` on."""
    return colormaps[DIFFERENCE_COLOURS](difference / (2 * limit) + 0.5)[..., :3]


def volume_mosaics(images: CaseImages, start: list[int], total: list[int], limit: float) -> dict[str, Any]:
    """
    What ``templates/viewer.js`` needs to show any plane of a volume: its axial slices, side by side in mosaics.

    Args:
        images: a volume as seen (``CaseImages.as_seen``), cropped to its content.
        start: index in the whole volume at which each axis of ``images`` begins.
        total: length of each axis of the whole volume.
        limit: end of the colour scale of the difference.

    Returns:
        a dictionary fit for JSON.
    """
    shape = list(images.mri.shape[1:])
    scale = [min(1.0, MAX_SIDE / n) for n in shape]
    voxels = np.prod([n * s for n, s in zip(shape, scale)])
    shrink = min(1.0, (MAX_VOXELS / voxels) ** (1 / 3))
    size = [max(round(n * s * shrink), 1) for n, s in zip(shape, scale)]
    stacks = {"mri": images.mri, "partner": images.partner, "fused": images.fused}
    if images.fused.shape[0] == 3:
        stacks["grey"] = images.grey
    return {
        "size": size,
        "columns": MOSAIC_COLUMNS,
        "rows": MOSAIC_ROWS,
        "squares": SQUARES,
        "middle": [min(int(m * n / full), n - 1) for m, n, full in zip(images.middle(), size, shape)],
        "axes": {plane: axis for plane, (axis, _, _) in PLANES.items()},
        "fieldOfView": images.size,
        "first": start,
        "step": [full / n for full, n in zip(shape, size)],
        "total": total,
        "limit": limit,
        "differenceColours": _to_bytes(colormaps[DIFFERENCE_COLOURS](np.arange(256))[:, :3]).flatten().tolist(),
        "stacks": {n: {"channels": len(s), "mosaics": _mosaics(s, size)} for n, s in stacks.items()},
    }


def _mosaics(stack: torch.Tensor, size: list[int]) -> list[str]:
    if list(stack.shape[1:]) != size:
        stack = interpolate(stack[None], size=size, mode="area")[0]
    # (C, x, y, z) to slices (z, y, x, C)
    slices = _to_bytes(stack.permute(3, 2, 1, 0).numpy())
    depth, height, width, channels = slices.shape
    count = MOSAIC_COLUMNS * MOSAIC_ROWS
    uris = []
    for first in range(0, depth, count):
        tiles = slices[first : first + count]
        padded = np.zeros((count, height, width, channels), np.uint8)
        padded[: len(tiles)] = tiles
        grid = padded.reshape(MOSAIC_ROWS, MOSAIC_COLUMNS, height, width, channels).swapaxes(1, 2)
        mosaic = grid.reshape(MOSAIC_ROWS * height, MOSAIC_COLUMNS * width, channels)
        uris.append(_uri(Image.fromarray(mosaic.squeeze(-1) if channels == 1 else mosaic), lossless=False))
    return uris


def _to_bytes(values: np.ndarray) -> np.ndarray:
    return np.rint(np.nan_to_num(values).clip(0, 1) * 255).astype(np.uint8)


def _to_image(picture: np.ndarray) -> Image.Image:
    return Image.fromarray(_to_bytes(picture))


def _uri(image: Image.Image, lossless: bool) -> str:
    stream = io.BytesIO()
    if lossless:
        image.save(stream, "PNG")
    else:
        image.save(stream, "WEBP", quality=QUALITY, method=2)
    kind = "png" if lossless else "webp"
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode('ascii')}"

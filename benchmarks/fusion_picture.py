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
"""One picture with all systems side by side on the same cases, and below each case where they differ, enlarged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch.nn.functional import avg_pool2d

from scripts.data import replacing

__all__ = ["draw_systems"]

TILE, GAP, HEADER = 224, 4, 34
# the enlarged window has this share of the image's sides
WINDOW = 0.3


def draw_systems(path: Path, kept: Mapping[str, Mapping[str, torch.Tensor]], names: Sequence[str]) -> None:
    """
    Args:
        path: PNG to write.
        kept: by the label of a system, by case, its two sources and fused image, ``(3, H, W)`` uint8.
        names: of the two sources.
    """
    systems = list(kept)
    cases = list(dict.fromkeys(case for images in kept.values() for case in images))
    width = (TILE + GAP) * (len(systems) + len(names)) - GAP
    canvas = Image.new("L", (width, HEADER + 2 * len(cases) * (TILE + GAP)), 255)
    pen = ImageDraw.Draw(canvas)
    for column, label in enumerate([*names, *systems]):
        pen.multiline_text((column * (TILE + GAP) + 3, 3), label.replace(", ", ",\n"), fill=0, font_size=13, spacing=2)
    for row, case in enumerate(cases):
        images = {label: found[case] for label, found in kept.items() if case in found}
        sources = next(iter(images.values()))[:2]
        columns = {label: image[2] for label, image in images.items()}
        box = window_of_difference(torch.stack(list(columns.values())))
        tiles = [*sources, *(columns.get(label) for label in systems)]
        for column, tile in enumerate(tiles):
            if tile is None:
                continue
            x, y = column * (TILE + GAP), HEADER + 2 * row * (TILE + GAP)
            # arrays are (x, y) or (row, column): MONAI reads pictures and volumes with x first
            picture = Image.fromarray(tile.T.contiguous().numpy())
            canvas.paste(fit(picture, box), (x, y))
            canvas.paste(fit(picture.crop(box)), (x, y + TILE + GAP))
    with replacing(path) as temporary:
        canvas.save(temporary)


def fit(picture: Image.Image, box: tuple[int, int, int, int] | None = None) -> Image.Image:
    """Enlarge or reduce to a tile, with a frame around ``box``; what is enlarged keeps its pixels visible."""
    scale = TILE / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    resized = picture.resize(size, Image.Resampling.NEAREST if scale > 2 else Image.Resampling.BICUBIC)
    if box is not None:
        left, upper, right, lower = (round(edge * scale) for edge in box)
        pen = ImageDraw.Draw(resized)
        # seen on white and on black
        pen.rectangle((left, upper, right, lower), outline=255)
        pen.rectangle((left + 1, upper + 1, right - 1, lower - 1), outline=0)
    tile = Image.new("L", (TILE, TILE), 0)
    tile.paste(resized, ((TILE - size[0]) // 2, (TILE - size[1]) // 2))
    return tile


def window_of_difference(images: torch.Tensor) -> tuple[int, int, int, int]:
    """
    Args:
        images: `(N, W, H)`, the fused images of all systems.

    Returns:
        left, upper, right and lower edge of the window in which they differ most, by their mean standard deviation.
    """
    side = [max(1, round(length * WINDOW)) for length in images.shape[1:]]
    spread = images.float().std(dim=0, correction=0)
    means = avg_pool2d(spread[None, None], kernel_size=side, stride=1)[0, 0]
    x, y = divmod(int(means.argmax()), means.shape[1])
    return x, y, x + side[0], y + side[1]

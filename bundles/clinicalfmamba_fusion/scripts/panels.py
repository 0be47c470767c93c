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
"""One picture per case to look at: the sources, the fused image, their alignment and what the fusion adds."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from monai.config import KeysCollection
from monai.transforms import MapTransform

from scripts.colour import check_colour_space
from scripts.data import replacing
from scripts.views import PLANES, CaseImages, Cut, case_name, view_titles

__all__ = ["SavePaneld"]

COLUMN_INCHES = 2.6
DPI = 140
# of zlib: half of the time of its default, for files that are a few per cent larger
COMPRESSION = 3


class SavePaneld(MapTransform):
    """
    Save ``<output_dir>/<case>/<case>_panel.png``: MRI, partner and fused image (the latter in colour if the item has
    chroma or was given a colour map), a checkerboard of MRI and partner, and the difference of fused image and MRI. A
    slice gives one row, a volume one for each plane, see :meth:`scripts.views.CaseImages.cuts`.

    Args:
        keys: keys of the fused images, ``(1, H, W[, D])`` or RGB ``(3, H, W[, D])``, in [0, 1].
        output_dir: folder for the case folders.
        image_key: key of the sources ``(2, H, W[, D])`` in [0, 1], in the grid of the fused image.
        chroma_key: key of the partner's chroma, which an item may have (see ``LoadPaird``).
        colour_space: that of ``LoadPaird``.
        titles: names of the two sources.
        difference_limit: end of the colour scale of the difference, on both sides.
        allow_missing_keys: do not raise when a key is missing.
    """

    def __init__(
        self,
        keys: KeysCollection = "pred",
        output_dir: str | Path = "./",
        image_key: str = "image",
        chroma_key: str = "chroma",
        colour_space: str = "ycbcr",
        titles: Sequence[str] = ("MRI", "Partner"),
        difference_limit: float = 0.5,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.output_dir = Path(output_dir)
        self.image_key = image_key
        self.chroma_key = chroma_key
        self.colour_space = check_colour_space(colour_space)
        self.titles = view_titles(titles)
        self.difference_limit = difference_limit

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d):
            case = case_name(d[key])
            images = CaseImages.of_item(d, key, self.image_key, self.chroma_key, self.colour_space)
            with replacing(self.output_dir / case / f"{case}_panel.png") as temporary:
                self._draw(case, images.cuts()).savefig(temporary, dpi=DPI, pil_kwargs={"compress_level": COMPRESSION})
        return d

    def _draw(self, case: str, rows: Sequence[Cut]) -> Figure:
        # every millimetre has one size on the page, whatever the plane
        scale = COLUMN_INCHES / max(row.width for row in rows)
        heights = [row.height * scale for row in rows]
        gap, left, right, top, bottom = 0.06, 0.1, 0.85, 0.66, 0.1
        columns = len(self.titles)
        width = left + columns * COLUMN_INCHES + (columns - 1) * gap + right
        height = top + sum(heights) + (len(rows) - 1) * gap + bottom
        figure = Figure(figsize=(width, height), facecolor="white")
        FigureCanvasAgg(figure)
        # one sheet in inches: axes for each picture would take longer than to draw the pictures
        sheet = figure.add_axes((0, 0, 1, 1))
        sheet.set_axis_off()
        sheet.text(left, height - 0.12, case, ha="left", va="top", fontsize=12, fontweight="bold")
        for column, title in enumerate(self.titles):
            x = left + column * (COLUMN_INCHES + gap) + COLUMN_INCHES / 2
            sheet.text(x, height - top + 0.07, title, ha="center", va="baseline", fontsize=11)
        limit, y = self.difference_limit, height - top
        for row, row_height in zip(rows, heights):
            y -= row_height
            for column, picture in enumerate(row.pictures):
                x = left + column * (COLUMN_INCHES + gap)
                colours: dict[str, Any] = {"cmap": "gray", "vmin": 0, "vmax": 1}
                if column == columns - 1:
                    colours = {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit}
                # a plane narrower than the others stands in the middle of its column
                margin = (COLUMN_INCHES - row.width * scale) / 2
                extent = (x + margin, x + COLUMN_INCHES - margin, y, y + row_height)
                shown = sheet.imshow(picture, **colours, aspect="auto", extent=extent)
                ground = shown.to_rgba(0.0)  # type: ignore[arg-type]
                sheet.add_patch(Rectangle((x, y), COLUMN_INCHES, row_height, facecolor=ground, zorder=-1))
            if row.plane:
                _name_edges(sheet, row.plane, left, y, row_height)
            y -= gap
        sheet.set_xlim(0, width)
        sheet.set_ylim(0, height)
        bar_height = min(COLUMN_INCHES, sum(heights)) * 0.9
        middle = bottom + (height - top - bottom) / 2
        bar = figure.add_axes(
            ((width - right + 0.1) / width, (middle - bar_height / 2) / height, 0.12 / width, bar_height / height)
        )
        figure.colorbar(shown, cax=bar, extend="both", ticks=[-limit, -limit / 2, 0, limit / 2, limit])
        bar.tick_params(labelsize=8)
        bar.set_ylabel("share of the display range", fontsize=8)
        return figure


def _name_edges(sheet: Axes, plane: str, x: float, y: float, height: float) -> None:
    _, left, upper = PLANES[plane]
    outline = withStroke(linewidth=2, foreground="black")
    for across, up, text, align in (
        (0.02, 0.5, left, "left"),
        (0.5, 0.94, upper, "center"),
        (0.02, 0.05, plane, "left"),
    ):
        at = x + across * COLUMN_INCHES, y + up * height
        sheet.text(*at, text, ha=align, va="center", color="white", size=9, path_effects=[outline])

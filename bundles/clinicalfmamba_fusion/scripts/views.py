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
"""What there is to see of a case: its sources, the fused image, a checkerboard of the sources, and the difference."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.data.utils import affine_to_spacing
from monai.transforms import Orientation, SpatialCrop
from monai.utils import convert_to_tensor
from nibabel.orientations import io_orientation

from scripts.colour import join_colour, split_colour
from scripts.transforms import CaseName

__all__ = ["PLANES", "CaseImages", "Cut", "case_name", "checkerboard", "upright", "view_titles"]

# which axis of an L-P-I volume a plane cuts, and what its left and upper edges show
PLANES = {"axial": (2, "R", "A"), "coronal": (1, "R", "S"), "sagittal": (0, "A", "S")}
# what counts as content, and what as more than noise of the background
FOREGROUND = 0.1
VISIBLE = 0.02
# a plane whose shorter side is less than this share of the volume's longest is a strip
THIN = 0.25
# of a checkerboard, along its longer side
SQUARES = 8


def view_titles(sources: Sequence[str]) -> tuple[str, ...]:
    """Titles of the pictures of a cut, given the names of its two sources."""
    return (*sources, "Fused", "Checkerboard", f"Fused \N{MINUS SIGN} {sources[0]}")


def case_name(image: torch.Tensor) -> str:
    """Name of the case that an image belongs to, as its files have it."""
    return Path(CaseName()(getattr(image, "meta", None), None)["subject"]).stem


@dataclass
class Cut:
    """
    One slice, or one plane through a volume: pictures ``(height, width[, 3])``, upright, in [0, 1], and the size of
    their field of view in mm. ``grey`` is the fused image without its colour.
    """

    mri: np.ndarray
    partner: np.ndarray
    fused: np.ndarray
    grey: np.ndarray
    height: float
    width: float
    plane: str = ""

    @property
    def pictures(self) -> tuple[np.ndarray, ...]:
        """In the order of :func:`view_titles`."""
        return self.mri, self.partner, self.fused, self.checkerboard, self.difference

    @property
    def difference(self) -> np.ndarray:
        """Fused image minus MRI, in [-1, 1]."""
        return self.grey - self.mri

    @property
    def checkerboard(self) -> np.ndarray:
        """Squares of the MRI and of the partner in turn: edges that go on across them are registered."""
        return checkerboard(self.mri, self.partner, (self.height, self.width))


@dataclass
class CaseImages:
    """
    The images of one case on one grid, channel first, on the CPU, shown from 0 to 1: ``mri`` and ``grey`` (the fused
    image without its colour) ``(1, H, W[, D])``, ``partner`` and ``fused`` the same or RGB ``(3, H, W[, D])``.
    """

    mri: torch.Tensor
    partner: torch.Tensor
    fused: torch.Tensor
    grey: torch.Tensor
    affine: torch.Tensor

    @classmethod
    def of_item(
        cls,
        data: Mapping[Hashable, Any],
        key: Hashable = "pred",
        image_key: str = "image",
        chroma_key: str = "chroma",
        colour_space: str = "ycbcr",
    ) -> CaseImages:
        """
        Args:
            data: an item after inference: the sources ``(2, H, W[, D])`` and the fused image, grey or RGB, in [0, 1];
                the partner's chroma, if it has colour (``LoadPaird``); what ``ColourMapd`` added.
            key: of the fused image.
            image_key: of the sources.
            chroma_key: of the chroma.
            colour_space: of the chroma.
        """
        image, fused = (_plain(data[k]) for k in (image_key, key))
        mri, partner = image[:1], image[1:]
        grey = split_colour(fused, colour_space)[0] if fused.shape[0] == 3 else fused
        if f"{key}_colour" in data:
            fused, partner = _plain(data[f"{key}_colour"]), _plain(data["partner_colour"])
        elif chroma_key in data:
            partner = join_colour(partner, _plain(data[chroma_key]), colour_space)
        affine = getattr(data[key], "affine", torch.eye(4))
        return cls(mri, partner, fused, grey, affine=affine)

    @property
    def images(self) -> dict[str, torch.Tensor]:
        return {name: getattr(self, name) for name in ("mri", "partner", "fused", "grey")}

    @property
    def spacing(self) -> list[float]:
        """Size of a pixel or voxel along each axis, in mm."""
        return [float(s) for s in affine_to_spacing(self.affine, self.mri.ndim - 1)]

    @property
    def size(self) -> list[float]:
        """Field of view along each axis, in mm."""
        return [n * s for n, s in zip(self.mri.shape[1:], self.spacing)]

    def cuts(self) -> list[Cut]:
        """
        The slice itself; of a volume the axial, coronal and sagittal planes through the middle of its content, as a
        radiologist sees them (the patient's right on the left), without the planes of a slab that are thin strips.
        """
        if self.mri.ndim == 3:
            width, height = self.size
            return [Cut(**{n: upright(i.clamp(0, 1)) for n, i in self.images.items()}, height=height, width=width)]
        middle, axes = self.middle(), self.axes()
        cuts = []
        for plane in self.planes():
            axis = axes[PLANES[plane][0]]
            # of a whole volume, turning it takes longer than all else
            thin = {name: i.narrow(axis + 1, middle[axis], 1) for name, i in self.images.items()}
            cuts.append(CaseImages(**thin, affine=self.affine).as_seen().cut(plane, 0))
        return cuts

    def cut(self, plane: str, index: int) -> Cut:
        """One plane of a volume as seen."""
        axis = PLANES[plane][0]
        pictures = {name: upright(i.select(axis + 1, index).clamp(0, 1)) for name, i in self.images.items()}
        width, height = np.delete(self.size, axis).tolist()
        return Cut(**pictures, height=height, width=width, plane=plane)

    def as_seen(self) -> CaseImages:
        """The volume with axes that run to the left, to the back and down: its planes are upright as they lie."""
        orient = Orientation(axcodes="LPI", labels=(("L", "R"), ("P", "A"), ("I", "S")))
        oriented = {n: orient(MetaTensor(i, affine=self.affine)) for n, i in self.images.items()}
        affine = oriented["mri"].affine  # type: ignore[union-attr]
        return CaseImages(**{n: _plain(i) for n, i in oriented.items()}, affine=affine)

    def axes(self) -> list[int]:
        """Of a volume, the axes that run between right and left, front and back, top and bottom."""
        return np.argsort(io_orientation(self.affine.numpy())[:, 0]).tolist()

    def planes(self) -> list[str]:
        """The planes of a volume that are no thin strips; of a rod, the largest one."""
        size = np.take(self.size, self.axes())
        faces = {plane: np.delete(size, axis) for plane, (axis, _, _) in PLANES.items()}
        wide = [plane for plane, face in faces.items() if face.min() >= THIN * max(self.size)]
        return wide or [max(faces, key=lambda plane: faces[plane].prod())]

    def middle(self) -> list[int]:
        """Index of the middle of the content along each axis."""
        return [
            int(torch.searchsorted(counts.cumsum(0) * 2, counts.sum())) if counts.any() else len(counts) // 2
            for counts in self._foreground(FOREGROUND)
        ]

    def cropped(self, margin: int = 2) -> tuple[CaseImages, list[int]]:
        """Without the empty border of a volume; and the index at which each axis begins."""
        spans = [counts.nonzero().flatten() for counts in self._foreground(VISIBLE)]
        if any(len(span) == 0 for span in spans):
            return self, [0] * len(spans)
        start = [max(int(span[0]) - margin, 0) for span in spans]
        crop = SpatialCrop(roi_start=start, roi_end=[int(span[-1]) + 1 + margin for span in spans])
        cropped = {name: crop(MetaTensor(i, affine=self.affine)) for name, i in self.images.items()}
        affine = cropped["mri"].affine  # type: ignore[union-attr]
        return CaseImages(**{n: _plain(i) for n, i in cropped.items()}, affine=affine), start

    def _foreground(self, level: float) -> list[torch.Tensor]:
        """Along each axis, how many voxels show something at each index."""
        # the mean over red, green and blue: the lowest colour of a map need not be black
        partner = self.partner[0] if len(self.partner) == 1 else self.partner.mean(0)
        shown = ((self.mri[0] > level) | (partner > level)).numpy()
        axes = range(shown.ndim)
        # ten times as fast as PyTorch's sums
        counts = [np.count_nonzero(shown, axis=tuple(other for other in axes if other != axis)) for axis in axes]
        return [torch.from_numpy(count) for count in counts]


def _plain(image: torch.Tensor | np.ndarray) -> torch.Tensor:
    plain: torch.Tensor = convert_to_tensor(image, track_meta=False)
    return plain.detach().cpu().float()


def upright(picture: torch.Tensor) -> np.ndarray:
    """``(C, x, y)``, the order of MONAI's readers, to ``(y, x)`` or ``(y, x, 3)``."""
    return picture.permute(2, 1, 0).squeeze(-1).numpy()


def checkerboard(first: np.ndarray, second: np.ndarray, size: tuple[float, float]) -> np.ndarray:
    """
    Args:
        first: ``(height, width[, 3])``, in the upper left square.
        second: of the same height and width.
        size: height and width in any unit.
    """
    side = max(size) / SQUARES
    row, column = (((np.arange(n) + 0.5) * length / n // side).astype(int) for n, length in zip(first.shape[:2], size))
    chosen = (row[:, None] + column) % 2 == 1
    colours = max(first.ndim, second.ndim) == 3
    if colours:
        first, second = (i if i.ndim == 3 else np.repeat(i[..., None], 3, axis=2) for i in (first, second))
    return np.where(chosen[..., None] if colours else chosen, second, first)

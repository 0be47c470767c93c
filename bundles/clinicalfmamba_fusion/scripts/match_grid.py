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
"""The second image of a pair on the grid of the first: as the headers say, or registered."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform, Transform

from scripts.grid import covered_share, resample_onto, same_grid
from scripts.registration import KINDS, VISIBLE_MISFIT, Alignment, misfit, register

__all__ = ["MatchGrid", "MatchGridd", "Matched"]

REGISTRATIONS = ("auto", "none", *KINDS)
RESAMPLES = ("auto", "none")
# below this share of the first image in the second, headers are taken to be wrong
LEAST_COVERED = 0.25


@dataclass
class Matched:
    """What `MatchGrid` returns: the second image on the grid of the first, and how it came there."""

    image: MetaTensor
    alignment: Alignment | None = None
    warnings: list[str] = field(default_factory=list)


class MatchGrid(Transform):
    """
    Bring the second of two images onto the grid of the first.

    Args:
        resample: ``"auto"`` resamples by world coordinates where the grids differ, ``"none"`` refuses that.
        registration: ``"rigid"`` or ``"affine"`` registers first; ``"auto"`` does so (rigid) where the headers tell
            that the images are not registered: another frame of reference, or hardly a common field of view; ``"none"``
            never does.
        seed: of the registration.
    """

    def __init__(self, resample: str = "auto", registration: str = "auto", seed: int = 0) -> None:
        for name, value, allowed in (("resample", resample, RESAMPLES), ("registration", registration, REGISTRATIONS)):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got '{value}'.")
        self.resample = resample
        self.registration = registration
        self.seed = seed

    def __call__(  # type: ignore[override]
        self, moving: MetaTensor, fixed: MetaTensor, same_frame: bool | None = None
    ) -> Matched:
        """
        Args:
            moving: the second image, ``(C, H', W'[, D'])``.
            fixed: the first image, ``(C, H, W[, D])``, with which the result shares grid and metadata.
            same_frame: whether both have one frame of reference, ``None`` where that is not known.

        Raises:
            ValueError: when the registration fails, the grids differ and ``resample`` is ``"none"``, or the images
                have no common field of view.
        """
        warnings = []
        kind = None if self.registration == "none" else self.registration
        if kind == "auto":
            reason = None
            if same_frame is False:
                reason = "they have different frames of reference"
            elif covered_share(moving, fixed) < LEAST_COVERED:
                reason = "their positions hardly overlap"
            kind = "rigid" if reason else None
            if reason:
                warnings.append(f"The images were registered because {reason}.")
        alignment = None
        if kind is not None:
            alignment = register(fixed, moving, kind, self.seed)
            moving = MetaTensor(moving.as_tensor(), affine=alignment.affine)
        if same_grid(moving, fixed):
            matched = MetaTensor(moving.as_tensor()).copy_meta_from(fixed)
        elif self.resample == "none" and alignment is None:
            raise ValueError("The two images are not on one grid: set resample to auto, or resample one of them.")
        else:
            matched = resample_onto(moving, fixed)
        warnings += self._doubts(matched, moving, fixed, alignment)
        return Matched(matched, alignment, warnings)  # type: ignore[arg-type]

    def _doubts(
        self, matched: MetaTensor, moving: MetaTensor, fixed: MetaTensor, alignment: Alignment | None
    ) -> list[str]:
        doubts = []
        covered = covered_share(moving, fixed)
        if covered == 0:
            raise ValueError(
                "The two images have no common field of view: check their positions, or set registration to rigid."
            )
        if covered < 0.99:
            doubts.append(f"The second image covers {covered:.0%} of the first; beyond it, it counts as empty.")
        # a registration that ended where the images visibly do not fit was refused
        if alignment is None and misfit(fixed, matched) > VISIBLE_MISFIT:
            doubts.append(
                "The images visibly do not fit each other as they lie: check them, or set registration to rigid."
            )
        return doubts


class MatchGridd(MapTransform):
    """
    Dictionary version of :class:`MatchGrid`.

    Args:
        keys: keys of the images to move.
        fixed_key: key of the image whose grid they get.
        resample: see :class:`MatchGrid`, as the next two.
        registration: see there.
        seed: see there.
        allow_missing_keys: do not raise when a key is missing.
    """

    def __init__(
        self,
        keys: KeysCollection,
        fixed_key: str,
        resample: str = "auto",
        registration: str = "auto",
        seed: int = 0,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.fixed_key = fixed_key
        self.match = MatchGrid(resample, registration, seed)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d):
            d[key] = self.match(d[key], d[self.fixed_key]).image
        return d

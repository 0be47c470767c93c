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
"""From two inputs of any kind to one pair on one grid, with a note of where it came from."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor, affine_to_spacing
from monai.transforms import EnsureChannelFirst, Transform
from monai.utils import ImageMetaKey

from scripts.data import PICTURES, stem
from scripts.dicom_series import DicomSeries, is_dicom, read_pixels, select_series
from scripts.grid import same_grid
from scripts.identity import check_same_identity
from scripts.match_grid import MatchGrid
from scripts.registration import Alignment, save_transform
from scripts.transforms import LoadPair, LoadPaird, refuse_unequal_shapes

__all__ = ["LoadCase", "LoadCased", "PackNotesd", "UnpackNotesd", "note_units"]

INFO, ALIGNMENT, SOURCES = "fusion_info", "alignment", "sources"
NIFTI = (".nii", ".nii.gz")


class LoadCase(LoadPair):
    """
    `LoadPair` for images that are neither on one grid nor in one kind of file: each may be anything that MONAI reads, a
    DICOM file or a folder of DICOM files. The second comes onto the grid of the first, see `MatchGrid`.

    The metadata also gets ``meta["fusion_info"]``, ``meta["alignment"]`` (an `Alignment` or ``None``) and
    ``meta["sources"]`` (for each input its DICOM files in order, empty for other files).

    Args:
        spatial_dims: dimensions that both must have; a volume of one slice has two. ``None`` takes slices and volumes.
            A file with two channels is taken as it is.
        series: how to choose one series of the first and of the second input, see `select_series`.
        resample: see `MatchGrid`.
        registration: see `MatchGrid`.
        allow_mismatch: fuse DICOM images of different patients or studies.
        colour_space: see `LoadPair`.
    """

    def __init__(
        self,
        spatial_dims: int | None,
        series: Sequence[str | int | None] = (None, None),
        resample: str = "auto",
        registration: str = "auto",
        allow_mismatch: bool = False,
        colour_space: str = "ycbcr",
    ) -> None:
        super().__init__(colour_space)
        self.spatial_dims = spatial_dims
        self.series = series
        self.match = MatchGrid(resample, registration)
        self.allow_mismatch = allow_mismatch

    def __call__(self, image: str | Path | Sequence[str | Path]) -> tuple[MetaTensor, torch.Tensor | None]:
        """
        Raises:
            FileNotFoundError: when an input does not exist.
            ValueError: when an input can not be read, has not ``spatial_dims`` dimensions or is one of several series;
                when the inputs are of different patients; when they do not come onto one grid.
        """
        pair, chroma = super().__call__(image)
        if INFO not in pair.meta:
            units = _noted_units(str(pair.meta[ImageMetaKey.FILENAME_OR_OBJ]))
            channels = [MetaTensor(c[None], meta={**pair.meta, "units": u}) for c, u in zip(pair.as_tensor(), units)]
            pair.meta[INFO] = _info(["channel 1", "channel 2"], channels, [])
            pair.meta[ALIGNMENT], pair.meta[SOURCES] = None, [[], []]
        return pair, chroma

    def _read_pair(self, files: Sequence[Path]) -> list[MetaTensor]:
        for file in files:
            if not file.exists():
                raise FileNotFoundError(f"{file} does not exist.")
        series = [select_series(file, w) if is_dicom(file) else None for file, w in zip(files, self.series)]
        warnings, same_frame = self._compare(series)
        images = [self._in_dimensions(self._read_any(f, s), f) for f, s in zip(files, series)]
        if images[0].ndim != images[1].ndim:
            found = " and ".join(f"{file} {tuple(image.shape[1:])}" for file, image in zip(files, images))
            raise ValueError(f"One image of a pair is a slice, the other a volume: {found}.")
        # beside DICOM, a file is named by its kind alone: its name may be the patient's
        named = [f"{file.name.removeprefix(stem(file))} file" for file in files] if any(series) else _names(files)
        names = [s.label if s else name for s, name in zip(series, named)]
        info = _info(names, images, warnings)
        # a picture does not know where it lies
        if self.match.registration in ("auto", "none") and any(f.name.lower().endswith(PICTURES) for f in files):
            refuse_unequal_shapes(images, files)
        matched = self.match(images[1], images[0], same_frame)
        info["warnings"] += matched.warnings
        info["resampled"] = matched.alignment is not None or not same_grid(images[1], images[0])
        meta = images[0].meta
        meta[INFO], meta[ALIGNMENT] = info, matched.alignment
        meta[SOURCES] = [[str(file) for file in s.files] if s else [] for s in series]
        return [images[0], matched.image]

    def _compare(self, series: Sequence[DicomSeries | None]) -> tuple[list[str], bool | None]:
        a, b = series
        if a is None or b is None:
            known = a is not None or b is not None
            return (["Only one input is DICOM: nothing tells whether both are of one patient."] if known else []), None
        warning = check_same_identity(a, b, self.allow_mismatch)
        frames = [str(s.header.get("FrameOfReferenceUID") or "") for s in (a, b)]
        return ([warning] if warning else []), (frames[0] == frames[1] if all(frames) else None)

    def _read_any(self, file: Path, series: DicomSeries | None) -> MetaTensor:
        if series is None:
            return self._read(file)
        array, meta = read_pixels(series)
        image: MetaTensor = EnsureChannelFirst()(MetaTensor(array, meta=meta))  # type: ignore[assignment]
        image.meta["filename_or_obj"] = str(series.files[0])
        return image

    def _in_dimensions(self, image: MetaTensor, file: Path) -> MetaTensor:
        if image.shape[-1] == 1 and image.ndim == 4:
            image = MetaTensor(image.as_tensor()[..., 0], meta=image.meta)
        shape = tuple(image.shape[1:])
        if self.spatial_dims not in (None, len(shape)):
            kind, remedy = ("a volume", "add configs/volume.json as the last config")
            if len(shape) == 2:
                kind, remedy = "a slice", "leave configs/volume.json out"
            raise ValueError(f"{file} is {kind} of {' x '.join(map(str, shape))}: {remedy}.")
        return image


class LoadCased(LoadPaird):
    """
    Dictionary version of :class:`LoadCase`. Besides what :class:`LoadPaird` does, the item gets, as plain JSON,

    - ``fusion_info``: ``case``, ``inputs`` (for each ``name``, ``modality``, ``shape`` and ``spacing`` in mm, as it
      came, and ``units``), ``registration`` (``None``, or ``kind``, ``translation_mm``, ``rotation_deg``,
      ``mutual_information`` and ``overlap`` before and after, ``transform_file``), ``resampled`` (whether the second
      image had another grid) and ``warnings``. Nothing in it comes from the patient;
    - ``sources``: for each input its DICOM files in order, empty for other files, see `SaveDicomSeriesd`.

    Args:
        keys: keys of the file names.
        spatial_dims: see :class:`LoadCase`, as the next four.
        series: see there.
        resample: see there.
        registration: see there.
        allow_mismatch: see there.
        output_dir: folder for the case folders; a registration leaves ``<case>/<case>_registration.tfm`` in it.
        chroma_key: see :class:`LoadPaird`.
        colour_space: see :class:`LoadPair`.
        allow_missing_keys: do not raise when a key is missing.
    """

    def __init__(
        self,
        keys: KeysCollection = "image",
        spatial_dims: int = 3,
        series: Sequence[str | int | None] = (None, None),
        resample: str = "auto",
        registration: str = "auto",
        allow_mismatch: bool = False,
        output_dir: str | os.PathLike | None = None,
        chroma_key: str | None = "chroma",
        colour_space: str = "ycbcr",
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, chroma_key, colour_space, allow_missing_keys)
        self.loader = LoadCase(spatial_dims, series, resample, registration, allow_mismatch, colour_space)
        self.output_dir = output_dir

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = super().__call__(data)
        for key in self.key_iterator(d):
            meta = d[key].meta
            info, alignment = meta.pop(INFO), meta.pop(ALIGNMENT)
            info["case"] = meta["case"]
            if alignment is not None:
                info["registration"] = self._keep(alignment, meta["case"])
            d[INFO], d[SOURCES] = info, meta.pop(SOURCES)
            for warning in info["warnings"]:
                logging.getLogger(__name__).warning(f"{info['case']}: {warning}")
        return d

    def _keep(self, alignment: Alignment, case: str) -> dict[str, Any]:
        name = f"{case}_registration.tfm"
        if self.output_dir is not None:
            save_transform(alignment, Path(self.output_dir) / case / name)
        return {
            "kind": alignment.kind,
            "translation_mm": alignment.translation,
            "rotation_deg": alignment.rotation,
            "mutual_information": list(alignment.mutual_information),
            "overlap": list(alignment.overlap),
            "transform_file": name if self.output_dir is not None else None,
        }


class PackNotesd(Transform):
    """
    Turn what :class:`LoadCased` has noted into JSON text: collating takes neither ``None`` nor empty lists, and would
    make tensors of numbers. :class:`UnpackNotesd` is the way back, as the first step of postprocessing.
    """

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        return {**data, **{key: json.dumps(data[key]) for key in (INFO, SOURCES) if key in data}}


class UnpackNotesd(Transform):
    """See :class:`PackNotesd`; items without notes stay as they are."""

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        return {**data, **{key: json.loads(data[key]) for key in (INFO, SOURCES) if key in data}}


def note_units(units: Sequence[str]) -> str:
    """The units of both channels as text for a NIfTI's ``descrip`` (80 bytes), where `LoadCase` finds them again."""
    return f"units: {', '.join(units)}" if any(units) else ""


def _noted_units(file: str) -> list[str]:
    # MONAI's metadata leaves out what is text in a header
    if not file.lower().endswith(NIFTI):
        return ["", ""]
    noted = nib.load(file).header["descrip"].item()  # type: ignore[attr-defined]
    found = re.fullmatch(r"units: (\w*), (\w*)", noted.decode("ascii", "replace"))
    return list(found.groups()) if found else ["", ""]


def _info(names: Sequence[str], images: Sequence[MetaTensor], warnings: list[str]) -> dict[str, Any]:
    inputs = [
        {
            "name": name,
            "modality": str(image.meta.get("modality", name)),
            "shape": list(image.shape[1:]),
            "spacing": affine_to_spacing(image.affine, image.ndim - 1).tolist(),
            "units": str(image.meta.get("units", "")),
        }
        for name, image in zip(names, images)
    ]
    return {"case": "", "inputs": inputs, "registration": None, "resampled": False, "warnings": warnings}


def _names(files: Sequence[Path]) -> list[str]:
    """What tells two files apart: ``t2`` and ``flair`` of ``CASE_t2.nii.gz``, or the names of their folders."""
    stems = [stem(file) for file in files]
    if len(set(stems)) == 1:
        return [file.parent.name for file in files]
    common = len(os.path.commonprefix(stems))
    return [name[common:] or name for name in stems]

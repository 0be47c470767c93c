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
"""DICOM series on disk: find them, choose one, put its slices in order and read them."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydicom.config
import pydicom.uid
from monai.data import ImageReader, ITKReader, orientation_ras_lps
from monai.utils import MetaKeys, SpaceKeys, optional_import
from pydicom.dataset import Dataset
from pydicom.errors import InvalidDicomError

from scripts.data import EXTENSIONS
from scripts.suv import SUV_KEYWORDS, suv_factor

# images of other kinds are fused without it
itk, _ = optional_import("itk")

__all__ = [
    "DicomSeries",
    "DicomSeriesReader",
    "dicom_files",
    "find_series",
    "is_dicom",
    "read_header",
    "read_pixels",
    "select_series",
]

# all that is needed to tell series apart, to order and scale their slices, and to compare patients and studies
KEYWORDS = (
    *("SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID", "FrameOfReferenceUID", "PatientID"),
    *("Modality", "SeriesNumber", "SeriesDescription", "InstanceNumber", "ImageType", "EchoTime", "NumberOfFrames"),
    *("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness", "SpacingBetweenSlices"),
    *("Rows", "Columns", "SamplesPerPixel", "RescaleType"),
    *SUV_KEYWORDS,
)
# how far a slice may lie from where even steps put it, as a share of the step
UNEVEN = 0.02


@dataclass
class DicomSeries:
    """
    Images that make one slice or one volume, in the order of their positions along the slice normal.

    Args:
        files: one file per slice, or a single multi-frame file.
        headers: their headers without pixels, reduced to what this module needs.
        echo: echo time in ms where a series has several, each of which is a series of its own here.
    """

    files: list[Path]
    headers: list[Dataset]
    echo: float | None = None

    @property
    def header(self) -> Dataset:
        return self.headers[0]

    @property
    def uid(self) -> str:
        return str(self.header.SeriesInstanceUID)

    @property
    def modality(self) -> str:
        return str(self.header.get("Modality", "OT"))

    @property
    def number(self) -> str:
        return str(self.header.get("SeriesNumber") or "without number")

    @property
    def description(self) -> str:
        echo = "" if self.echo is None else f" TE {self.echo:g}"
        return f"{self.header.get('SeriesDescription', '')}{echo}".strip()

    @property
    def label(self) -> str:
        """Modality and number, which tell nothing of the patient."""
        return f"{self.modality} {self.number}"

    @property
    def slices(self) -> int:
        return max(len(self.files), int(self.header.get("NumberOfFrames") or 1))

    @property
    def affine(self) -> np.ndarray:
        """
        From voxel ``(column, row, slice)`` to millimetres (RAS), as the headers of single-frame files have it: oblique
        angles and the shear of a tilted gantry included. Identity for images without a position.
        """
        if "ImagePositionPatient" not in self.header:
            return np.eye(4)
        origin, step = _steps(self.headers)
        row, column, _ = _axes(self.header)
        down, across = (float(value) for value in self.header.get("PixelSpacing", (1.0, 1.0)))
        affine = np.eye(4)
        affine[:3] = np.stack([row * across, column * down, step, origin], axis=1)
        return orientation_ras_lps(affine)  # type: ignore[return-value]

    def matches(self, wanted: str) -> bool:
        """Whether ``wanted`` is this series' UID, number or modality, or part of its description, in any case."""
        fields = (self.uid, self.number, self.modality)
        return wanted.lower() in (field.lower() for field in fields) or wanted.lower() in self.description.lower()


def is_dicom(path: str | os.PathLike) -> bool:
    """Whether ``path`` is a DICOM file or a folder that has one in it or below it, followed to the first one only."""
    return next(dicom_files(path), None) is not None


def dicom_files(path: str | os.PathLike) -> Iterator[Path]:
    """The DICOM files at ``path`` or below it by name, without hidden ones, DICOMDIR and what has another extension."""
    path = Path(path)
    walk: Any = [(path.parent, [], [path.name])] if path.is_file() else os.walk(path)
    for folder, subfolders, names in walk:
        subfolders.sort()
        for name in sorted(names):
            file = Path(folder) / name
            other = name.startswith(".") or name.upper() == "DICOMDIR" or name.lower().endswith(EXTENSIONS)
            if not other and _has_preamble(file):
                yield file


def _has_preamble(file: Path) -> bool:
    try:
        with open(file, "rb") as stream:
            return stream.read(132)[128:] == b"DICM"
    except OSError:
        return False


def read_header(file: str | os.PathLike, keywords: Sequence[str] | None = KEYWORDS) -> Dataset:
    """
    Header of a DICOM file without its pixels: the given keywords, or with None all. No warning and no log quotes it.

    Raises:
        ValueError: when the file is damaged.
    """
    try:
        header = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=list(keywords) if keywords else None)
    except (InvalidDicomError, OSError, EOFError, ValueError) as error:
        raise ValueError(f"{file} can not be read as DICOM: replace it, or take it out.") from error
    # values are converted when they are first used, and what is not as it should be is quoted in warnings and logs
    with pydicom.config.disable_value_validation():
        for tag in header.keys():
            with suppress(Exception):
                header[tag]
    return header


def find_series(path: str | os.PathLike) -> list[DicomSeries]:
    """
    Sort the images at ``path`` into series. Images of one series UID that do not make one volume, such as another
    orientation, matrix or echo, become series of their own; localisers beside others are left out.

    Args:
        path: a DICOM file, or a folder; folders below it are searched too.

    Raises:
        FileNotFoundError: when there is no DICOM image at ``path``.
        ValueError: when a file is damaged, or the slices of a series overlap or have gaps.
    """
    groups: dict[str, dict[tuple, list[tuple[Path, Dataset]]]] = defaultdict(lambda: defaultdict(list))
    for file in dicom_files(path):
        header = read_header(file)
        if "Rows" in header and "SeriesInstanceUID" in header:
            groups[str(header.SeriesInstanceUID)][_shape_key(header)].append((file, header))
    if not groups:
        raise FileNotFoundError(f"{path} holds no DICOM images: name a DICOM file, or a folder with some.")
    series = []
    for parts in groups.values():
        echoes = {key[-1] for key in parts}
        for key, images in parts.items():
            files, headers = zip(*images)
            series.append(_ordered(list(files), list(headers), key[-1] if len(echoes) > 1 else None))
    images_only = [s for s in series if "LOCALIZER" not in s.header.get("ImageType", ())]
    return sorted(images_only or series, key=lambda s: (int(s.header.get("SeriesNumber") or 0), s.uid, s.echo or 0))


def select_series(path: str | os.PathLike, wanted: str | int | None = None) -> DicomSeries:
    """
    The one series at ``path``.

    Args:
        path: a DICOM file, or a folder; folders below it are searched too.
        wanted: where there are several, the UID, number or modality of one, or a part of its description.

    Raises:
        ValueError: when ``wanted`` is not given or not enough to tell one of several series, or none is like it; the
            message lists the series by number, modality and description. Also as `find_series`.
        FileNotFoundError: as `find_series`.
    """
    series = find_series(path)
    found = series if wanted is None else [s for s in series if s.matches(str(wanted))]
    if wanted is not None and len(found) > 1:
        exact = [s for s in found if str(wanted).lower() in (s.uid, s.number, s.description.lower())]
        found = exact or found
    if len(found) == 1:
        return found[0]
    what = "several series" if wanted is None else f"{len(found) or 'no'} series like '{wanted}'"
    listed = "; ".join(f"{s.number} {s.modality} '{s.description}' ({s.slices} slices)" for s in found or series)
    raise ValueError(f"{path} holds {what}, choose one by its number, modality, description or UID: {listed}.")


def read_pixels(series: DicomSeries) -> tuple[np.ndarray, dict]:
    """
    Read a series with ITK (GDCM), which decodes RLE, deflated, JPEG (baseline and lossless), JPEG-LS and JPEG 2000, and
    inverts MONOCHROME1. Every slice is
    scaled by its own rescale slope and intercept; positron emission tomography becomes SUV where the header allows (see
    `suv_factor`).

    Returns:
        float32 array ``(X, Y[, Z])``, or ``(X, Y[, Z], 3)`` in colour, and metadata as MONAI's readers give it, none of
        it from the patient: ``affine`` (RAS) and what goes with it, ``modality`` and ``units`` (``"HU"``, ``"SUV"`` or
        empty).

    Raises:
        ValueError: when the pixels can not be decoded.
    """
    colour = int(series.header.get("SamplesPerPixel") or 1) > 1
    files = [str(file) for file in series.files]
    try:
        image = itk.imread(files if len(files) > 1 else files[0], pixel_type=None if colour else itk.F)
    except Exception as error:  # ITK raises RuntimeError, and its templates KeyError and others
        syntax = series.header.file_meta.get("TransferSyntaxUID", pydicom.uid.ImplicitVRLittleEndian).name
        raise ValueError(
            f"The pixels of {series.files[0]} ({syntax}) can not be decoded: store them uncompressed."
        ) from error
    array, itk_meta = ITKReader().get_data(image)
    affine = itk_meta[MetaKeys.AFFINE] if "NumberOfFrames" in series.header else series.affine
    array = np.ascontiguousarray(array, dtype=np.float32)
    units = "HU" if series.modality == "CT" and series.header.get("RescaleType", "HU") == "HU" else ""
    factor = suv_factor(series.header)
    if factor is not None:
        array *= np.float32(factor)
        units = "SUV"
    meta = {
        MetaKeys.AFFINE: affine,
        MetaKeys.ORIGINAL_AFFINE: affine.copy(),
        MetaKeys.SPACE: SpaceKeys.RAS,
        MetaKeys.SPATIAL_SHAPE: np.asarray(array.shape[:-1] if colour else array.shape),
        MetaKeys.ORIGINAL_CHANNEL_DIM: -1 if colour else float("nan"),
        "modality": series.modality,
        "units": units,
    }
    return array, meta


class DicomSeriesReader(ImageReader):
    """
    Reader for `monai.transforms.LoadImage`: one DICOM series of a file or folder, see `select_series` and
    `read_pixels`. Unlike MONAI's readers it never takes the first of several series, keeps the shear of a tilted
    gantry, scales every slice by its own slope, and leaves the patient out of the metadata.

    Args:
        wanted: UID, number, modality or part of the description of the series, where there are several.
    """

    def __init__(self, wanted: str | int | None = None) -> None:
        super().__init__()
        self.wanted = wanted

    def verify_suffix(self, filename: Sequence[str | os.PathLike] | str | os.PathLike) -> bool:
        return isinstance(filename, (str, os.PathLike)) and is_dicom(filename)

    def read(self, data: Any, **kwargs: Any) -> DicomSeries:
        return select_series(data, self.wanted)

    def get_data(self, img: DicomSeries) -> tuple[np.ndarray, dict]:
        return read_pixels(img)


def _shape_key(header: Dataset) -> tuple:
    """What all slices of one volume have in common; the echo time comes last."""
    orientation = tuple(np.round([float(v) for v in header.get("ImageOrientationPatient", ())], 3) + 0.0)
    spacing = tuple(np.round([float(v) for v in header.get("PixelSpacing", ())], 4))
    frames = int(header.get("NumberOfFrames") or 1)
    echo = header.get("EchoTime")
    # a multi-frame file is a volume of its own
    own = str(header.SOPInstanceUID) if frames > 1 else ""
    return (orientation, spacing, int(header.Rows), int(header.Columns), own, None if echo is None else float(echo))


def _axes(header: Dataset) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Unit vectors (LPS) along a row, down a column and across the slice."""
    orientation = np.asarray([float(v) for v in header.get("ImageOrientationPatient", (1, 0, 0, 0, 1, 0))])
    row, column = orientation[:3], orientation[3:]
    return row, column, np.cross(row, column)


def _positions(headers: Sequence[Dataset]) -> np.ndarray:
    return np.asarray([[float(v) for v in header.ImagePositionPatient] for header in headers])


def _steps(headers: Sequence[Dataset]) -> tuple[np.ndarray, np.ndarray]:
    """Position of the first slice, and the step from one to the next, in mm (LPS)."""
    positions = _positions(headers)
    if len(headers) > 1:
        return positions[0], (positions[-1] - positions[0]) / (len(headers) - 1)
    thickness = headers[0].get("SpacingBetweenSlices") or headers[0].get("SliceThickness") or 1.0
    return positions[0], _axes(headers[0])[2] * abs(float(thickness))


def _ordered(files: list[Path], headers: list[Dataset], echo: float | None) -> DicomSeries:
    if len(files) == 1:
        return DicomSeries(files, headers, echo)
    folder, number = files[0].parent, headers[0].get("SeriesNumber") or "without number"
    if any("ImagePositionPatient" not in header for header in headers):
        raise ValueError(f"Series {number} in {folder} has slices without a position: name a single file of it.")
    heights = _positions(headers) @ _axes(headers[0])[2]
    order = np.argsort(heights, kind="stable")
    files, headers = [files[i] for i in order], [headers[i] for i in order]
    origin, step = _steps(headers)
    off = _positions(headers) - origin - np.arange(len(headers))[:, None] * step
    if np.abs(off).max() > UNEVEN * np.linalg.norm(step) or not np.diff(heights[order]).min() > 0:
        steps = np.diff(heights[order])
        raise ValueError(
            f"The {len(files)} slices of series {number} in {folder} are {steps.min():.2f} to {steps.max():.2f} mm"
            " apart: add the missing ones, or leave one image for each position."
        )
    return DicomSeries(files, headers, echo)

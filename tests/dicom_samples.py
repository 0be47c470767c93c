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
"""Generated DICOM series, written the way scanners do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import (
    UID,
    CTImageStorage,
    EnhancedMRImageStorage,
    ExplicitVRLittleEndian,
    MRImageStorage,
    SecondaryCaptureImageStorage,
)

PETImageStorage = UID("1.2.840.10008.5.1.4.1.1.128")
CLASSES = {"MR": MRImageStorage, "CT": CTImageStorage, "PT": PETImageStorage, "OT": SecondaryCaptureImageStorage}
# turned about every axis by some degrees
OBLIQUE = np.linalg.qr(np.array([[0.97, 0.10, -0.20], [-0.08, 0.99, 0.12], [0.21, -0.10, 0.97]]))[0] * [-1, -1, 1]
IDENTITY = {
    "PatientName": "Secret^Name",
    "PatientID": "SECRET-ID",
    "PatientBirthDate": "19491231",
    "PatientSex": "O",
    "AccessionNumber": "SECRET-ACC",
    "ReferringPhysicianName": "Secret^Doctor",
    "StudyID": "SECRET-STU",
    "StudyInstanceUID": "1.3.6.1.4.1.99999.1",
    "StudyDate": "20200131",
    "StudyTime": "101112",
}


def affine_lps(spacing: tuple[float, float, float], origin: tuple[float, float, float], axes: np.ndarray) -> np.ndarray:
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = axes * np.asarray(spacing), origin
    return affine


def write_series(
    folder: Path,
    volume: np.ndarray,
    modality: str = "MR",
    number: int = 301,
    affine: np.ndarray | None = None,
    rescale: tuple[float, float] | list[tuple[float, float]] | None = None,
    compress: Any = None,
    **values: Any,
) -> np.ndarray:
    """
    Write ``volume`` ``(X, Y, Z)`` or RGB ``(X, Y, Z, 3)`` of unsigned integers as one file per slice, in an order that
    neither file names nor instance numbers follow.

    Returns:
        the affine (LPS).
    """
    folder.mkdir(parents=True, exist_ok=True)
    affine = affine_lps((0.9, 1.1, 3.0), (-20, 30, 40.5), OBLIQUE) if affine is None else affine
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    names = np.random.RandomState(number).permutation(volume.shape[2])
    for index in range(volume.shape[2]):
        pixels = np.ascontiguousarray(volume[:, :, index].swapaxes(0, 1))
        meta = FileMetaDataset()
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        meta.MediaStorageSOPClassUID = CLASSES[modality]
        meta.MediaStorageSOPInstanceUID = f"1.3.6.1.4.1.99999.{number}.{index + 1}"
        image = FileDataset("", {}, preamble=b"\0" * 128, file_meta=meta, is_implicit_VR=False, is_little_endian=True)
        colour = pixels.ndim == 3
        for keyword, value in {
            **IDENTITY,
            "SOPClassUID": meta.MediaStorageSOPClassUID,
            "SOPInstanceUID": meta.MediaStorageSOPInstanceUID,
            "SeriesInstanceUID": f"1.3.6.1.4.1.99999.{number}",
            "FrameOfReferenceUID": "1.3.6.1.4.1.99999.2",
            "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL" if modality == "CT" else "OTHER"],
            "Modality": modality,
            "SeriesNumber": number,
            "SeriesDescription": f"series {number}",
            "Manufacturer": "Scanner",
            "InstanceNumber": volume.shape[2] - index,
            "ImagePositionPatient": [f"{v:.10f}" for v in affine[:3, 3] + index * affine[:3, 2]],
            "ImageOrientationPatient": [f"{v:.10f}" for v in (affine[:3, :2] / spacing[:2]).T.ravel()],
            "PixelSpacing": [f"{spacing[1]:.8f}", f"{spacing[0]:.8f}"],
            "SliceThickness": f"{spacing[2]:.8f}",
            "Rows": pixels.shape[0],
            "Columns": pixels.shape[1],
            "SamplesPerPixel": 3 if colour else 1,
            "PhotometricInterpretation": "RGB" if colour else "MONOCHROME2",
            "BitsAllocated": 8 * pixels.itemsize,
            "BitsStored": 8 * pixels.itemsize,
            "HighBit": 8 * pixels.itemsize - 1,
            "PixelRepresentation": 0,
            **({"PlanarConfiguration": 0} if colour else {}),
            **values,
        }.items():
            if value is not None:
                setattr(image, keyword, value)
        if rescale is not None:
            slope, intercept = rescale[index] if isinstance(rescale, list) else rescale
            image.RescaleSlope, image.RescaleIntercept = str(slope), str(intercept)
        image.add_new("PixelData", "OB" if pixels.itemsize == 1 else "OW", pixels.tobytes())
        if compress is not None:
            image.compress(compress)
        major = int(pydicom.__version__.split(".")[0])
        form = {"write_like_original": False} if major < 3 else {"enforce_file_format": True}
        pydicom.dcmwrite(folder / f"IM{names[index]:04d}", image, **form)
    return affine


def write_enhanced(file: Path, volume: np.ndarray, affine: np.ndarray) -> None:
    """Write ``volume`` ``(X, Y, Z)`` as one multi-frame MR image at ``affine`` (LPS)."""
    write_series(file.parent, volume[:, :, :1], affine=affine, SliceThickness=None)
    (single,) = file.parent.iterdir()
    image = pydicom.dcmread(single)
    single.unlink()
    image.file_meta.MediaStorageSOPClassUID = image.SOPClassUID = EnhancedMRImageStorage
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    shared, measures, orientation = Dataset(), Dataset(), Dataset()
    measures.PixelSpacing, measures.SliceThickness = image.PixelSpacing, f"{spacing[2]:.8f}"
    measures.SpacingBetweenSlices = measures.SliceThickness
    orientation.ImageOrientationPatient = image.ImageOrientationPatient
    shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = [measures], [orientation]
    image.SharedFunctionalGroupsSequence = [shared]
    frames = []
    for index in range(volume.shape[2]):
        frame, position = Dataset(), Dataset()
        position.ImagePositionPatient = [f"{v:.10f}" for v in affine[:3, 3] + index * affine[:3, 2]]
        frame.PlanePositionSequence = [position]
        frames.append(frame)
    image.PerFrameFunctionalGroupsSequence = frames
    for keyword in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"):
        delattr(image, keyword)
    image.NumberOfFrames = volume.shape[2]
    image.PixelData = np.ascontiguousarray(volume.transpose(2, 1, 0)).tobytes()
    image.save_as(file)

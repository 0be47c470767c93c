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
"""Fused images as a derived DICOM series in the study of the first input."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Hashable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from monai.config import KeysCollection
from monai.data import MetaTensor, orientation_ras_lps
from monai.transforms import MapTransform
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.sequence import Sequence as DicomSequence
from pydicom.uid import (
    CTImageStorage,
    ExplicitVRLittleEndian,
    MRImageStorage,
    SecondaryCaptureImageStorage,
    generate_uid,
)

from scripts.data import replacing_folder
from scripts.dicom_series import read_header

__all__ = ["PRODUCT", "SaveDicomSeriesd", "complete_identity", "derive_series", "describe_fusion", "write_series"]

PRODUCT = "ClinicalFMamba"
GREY_BITS = 12
# added to the number of the first input's series, for the fused image and for the same in the colours of a map
SERIES_NUMBER, COLOUR_SERIES_NUMBER = 9000, 9500
# how far, in mm, the grid of a fused image may lie from where its first input's files put it
TOLERANCE = 1e-2

# who and which study it is, alike in every image of a study; the first ones may be empty, but not missing
IDENTITY = (
    *("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyInstanceUID", "StudyDate", "StudyTime"),
    *("StudyID", "AccessionNumber", "ReferringPhysicianName"),
)
IDENTITY_IF_KNOWN = ("IssuerOfPatientID", "StudyDescription", "PatientAge", "PatientSize", "PatientWeight")
GEOMETRY = (
    *("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness", "SpacingBetweenSlices"),
    *("SliceLocation", "InstanceNumber"),
)
# what images of a kind have to tell of their acquisition, with what stands for unknown
ACQUISITION: dict[str, dict[str, Any]] = {
    MRImageStorage: {
        "ScanningSequence": "RM",
        "SequenceVariant": "NONE",
        "ScanOptions": "",
        "MRAcquisitionType": "",
        "RepetitionTime": None,
        "EchoTime": None,
        "EchoTrainLength": None,
        "PatientPosition": "",
    },
    CTImageStorage: {
        "KVP": None,
        "AcquisitionNumber": None,
        "PatientPosition": "",
        "RescaleIntercept": 0,
        "RescaleSlope": 1,
    },
    SecondaryCaptureImageStorage: {"ConversionType": "WSD", "PatientOrientation": ""},
}
IMAGE_TYPES = {MRImageStorage: ["OTHER"], CTImageStorage: ["AXIAL"], SecondaryCaptureImageStorage: []}


def derive_series(
    fused: np.ndarray,
    affine: np.ndarray,
    sources: Sequence[Sequence[str | os.PathLike]],
    description: str = "",
    version: str = "",
    resampled: bool = False,
    anonymise: bool = False,
    colormap: str | None = None,
) -> list[FileDataset]:
    """
    Make one DICOM image per slice: patient, study, frame of reference and geometry of the first input, a new series,
    and references to the images of both inputs. Grey becomes MR or CT, if the first input is, in 12 bits with a window
    over all of them; colour, and grey on anything else, becomes secondary capture.

    Args:
        fused: ``(1, X, Y[, Z])`` grey or ``(3, X, Y[, Z])`` RGB, in [0, 1], on the grid of the first input.
        affine: of ``fused`` (RAS).
        sources: the files of the first input, one for each slice or one with all of them, and those of the second.
        description: how the images were derived.
        version: of the software.
        resampled: whether the second input was resampled.
        anonymise: leave patient and study out, with new UIDs throughout and no reference to the inputs.
        colormap: name of the map that coloured ``fused``, where one did; the series says so in number and description.

    Raises:
        ValueError: when ``fused`` is not on the grid of the first input.
    """
    volume = fused if fused.ndim == 4 else fused[..., None]
    first, second = ([read_header(file, None) for file in files] for files in sources)
    slices = _geometry(first, volume.shape, affine)
    common = _common(first[0], second, volume.shape[0], version)
    common.DerivationDescription = description[:1024]
    if colormap is not None:
        common.SeriesNumber += COLOUR_SERIES_NUMBER - SERIES_NUMBER
        common.SeriesDescription = f"{common.SeriesDescription} ({colormap})"[:64]
    if resampled:
        common.DerivationCodeSequence = DicomSequence([_code("113085", "Spatial resampling")])
    if anonymise:
        _anonymise(common)
    images = []
    for index, geometry in enumerate(slices):
        image = _as_file(common, geometry)
        if not anonymise:
            # every slice of the second input may have its share in one of the first
            _refer(image, [first[min(index, len(first) - 1)], *second])
        _set_pixels(image, volume[..., index])
        images.append(image)
    return images


def write_series(images: Sequence[FileDataset], folder: str | os.PathLike) -> None:
    """Write ``0001.dcm`` and so on; a series that is in ``folder`` already is replaced, once all is written."""
    valid = {"enforce_file_format": True}
    if int(pydicom.__version__.split(".")[0]) < 3:
        valid = {"write_like_original": False}
    with replacing_folder(folder) as temporary:
        for number, image in enumerate(images, start=1):
            pydicom.dcmwrite(temporary / f"{number:04d}.dcm", image, **valid)


def _geometry(headers: Sequence[Dataset], shape: Sequence[int], affine: np.ndarray) -> list[Dataset]:
    """What tells where each slice lies, as the first input's files have it, or if it is one file by ``affine``."""
    reference = headers[0]
    frames = int(reference.get("NumberOfFrames") or 1)
    lps = orientation_ras_lps(np.asarray(affine, dtype=np.float64))
    position = reference.get("ImagePositionPatient")
    moved = position is not None and np.abs(np.asarray(position, float) - lps[:3, 3]).max() > TOLERANCE
    size = (int(reference.Columns), int(reference.Rows), frames if frames > 1 else len(headers))
    if moved or tuple(shape[1:]) != size:
        raise ValueError(
            f"The fused image {tuple(shape[1:])} is not on the grid of its first input {size}: transforms that change"
            " the grid must be inverted before a DICOM series is written."
        )
    if frames == 1:
        return [_copy(header, GEOMETRY) for header in headers]
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    slices = []
    for index in range(frames):
        geometry = Dataset()
        geometry.InstanceNumber = index + 1
        geometry.ImagePositionPatient = _decimals(lps[:3, 3] + index * lps[:3, 2])
        geometry.ImageOrientationPatient = _decimals((lps[:3, :2] / spacing[:2]).T.ravel())
        geometry.PixelSpacing = _decimals(spacing[[1, 0]])
        geometry.SliceThickness = geometry.SpacingBetweenSlices = _decimals(spacing[2:])[0]
        slices.append(geometry)
    return slices


def complete_identity(header: Dataset) -> None:
    """Leave empty what ``header`` must not lack, and a sex that DICOM does not know: anonymisers write such."""
    for keyword in IDENTITY:
        if keyword not in header:
            setattr(header, keyword, "")
    if header.PatientSex not in ("M", "F", "O"):
        header.PatientSex = ""


def _decimals(values: np.ndarray) -> list[str]:
    """Numbers in the 16 characters of a decimal string."""
    return [f"{value:.10f}"[:16] if abs(value) < 1e4 else f"{value:.8g}" for value in values]


def _common(reference: Dataset, second: Sequence[Dataset], channels: int, version: str) -> Dataset:
    """All that the images of the new series share."""
    known = reference.SOPClassUID in ACQUISITION and channels == 1
    kind = reference.SOPClassUID if known else SecondaryCaptureImageStorage
    moment = datetime.now()
    common = _copy(reference, ("SpecificCharacterSet", *IDENTITY, *IDENTITY_IF_KNOWN, *ACQUISITION[kind]))
    complete_identity(common)
    for keyword, unknown in ACQUISITION[kind].items():
        # the pixels are no longer what the first input's rescaling makes of them
        if keyword not in common or keyword.startswith("Rescale"):
            setattr(common, keyword, unknown)
    if kind == CTImageStorage:
        common.RescaleType = "US"
    common.SOPClassUID = kind
    common.ImageType = ["DERIVED", "SECONDARY", *IMAGE_TYPES[kind]]
    common.Modality = reference.get("Modality", "OT")
    common.Manufacturer, common.ManufacturerModelName = PRODUCT, f"{PRODUCT} fusion"
    common.SoftwareVersions = version or "unknown"
    common.SeriesInstanceUID = generate_uid()
    common.SeriesNumber = int(reference.get("SeriesNumber") or 0) + SERIES_NUMBER
    labels = [f"{h.get('Modality', 'OT')} {h.get('SeriesNumber', '')}".strip() for h in (reference, *second[:1])]
    common.SeriesDescription = f"Fused {' + '.join(labels)}"[:64]
    common.SeriesDate = common.ContentDate = common.InstanceCreationDate = moment.strftime("%Y%m%d")
    common.SeriesTime = common.ContentTime = common.InstanceCreationTime = moment.strftime("%H%M%S")
    if "FrameOfReferenceUID" in reference:
        common.FrameOfReferenceUID = reference.FrameOfReferenceUID
        common.PositionReferenceIndicator = reference.get("PositionReferenceIndicator", "")
    common.update(_copy(reference, ("BodyPartExamined", "Laterality")))
    # what is fused here are heads; without a body part the standard asks for its side
    common.BodyPartExamined = common.get("BodyPartExamined") or "HEAD"
    lossy = next((h for h in (reference, *second) if h.get("LossyImageCompression") == "01"), None)
    common.LossyImageCompression = "00" if lossy is None else "01"
    if lossy is not None:
        common.update(_copy(lossy, ("LossyImageCompressionRatio", "LossyImageCompressionMethod")))
    return common


def _anonymise(common: Dataset) -> None:
    """Images of one study stay together, under UIDs that are a hash of theirs."""
    study = generate_uid(entropy_srcs=[str(common.StudyInstanceUID)])
    name = f"anon_{hashlib.sha256(study.encode()).hexdigest()[:12]}"
    for keyword in IDENTITY_IF_KNOWN:
        if keyword in common:
            delattr(common, keyword)
    for keyword in IDENTITY:
        setattr(common, keyword, "")
    for keyword in ("SeriesDate", "SeriesTime", "InstanceCreationDate", "InstanceCreationTime"):
        delattr(common, keyword)
    common.ContentDate = common.ContentTime = ""
    common.PatientName, common.PatientID = f"{name}^", name
    common.StudyInstanceUID = study
    if "FrameOfReferenceUID" in common:
        common.FrameOfReferenceUID = generate_uid(entropy_srcs=[str(common.FrameOfReferenceUID)])
    common.PatientIdentityRemoved = "YES"
    common.DeidentificationMethod = f"{PRODUCT}: header rebuilt without patient and study"


def _as_file(common: Dataset, geometry: Dataset) -> FileDataset:
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = common.SOPClassUID
    meta.MediaStorageSOPInstanceUID = generate_uid()
    image = FileDataset("", {}, preamble=b"\0" * 128, file_meta=meta, is_implicit_VR=False, is_little_endian=True)
    image.update(common)
    image.update(geometry)
    image.SOPInstanceUID = meta.MediaStorageSOPInstanceUID
    return image


def _set_pixels(image: Dataset, fused: np.ndarray) -> None:
    """``fused`` ``(1 or 3, X, Y)`` in [0, 1]."""
    colour = fused.shape[0] == 3
    bits = 8 if colour else GREY_BITS
    dtype = np.uint8 if colour else np.dtype("<u2")
    # columns run along x, the colours of a pixel lie together
    pixels = (np.clip(fused, 0, 1).transpose(2, 1, 0) * (2**bits - 1)).round().astype(dtype)
    image.Rows, image.Columns, image.SamplesPerPixel = pixels.shape
    image.PhotometricInterpretation = "RGB" if colour else "MONOCHROME2"
    image.BitsAllocated = 8 * pixels.itemsize
    image.BitsStored, image.HighBit, image.PixelRepresentation = bits, bits - 1, 0
    if colour:
        image.PlanarConfiguration = 0
    else:
        image.WindowCenter, image.WindowWidth = 2 ** (bits - 1), 2**bits
    data = pixels.tobytes()
    image.add_new("PixelData", "OB" if colour else "OW", data + b"\0" * (len(data) % 2))


def _copy(source: Dataset, keywords: Sequence[str]) -> Dataset:
    target = Dataset()
    for keyword in keywords:
        if keyword in source:
            target[keyword] = source[keyword]
    return target


def _code(value: str, meaning: str) -> Dataset:
    code = Dataset()
    code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning = value, "DCM", meaning
    return code


def _refer(image: Dataset, sources: Sequence[Dataset]) -> None:
    """Name the images that ``image`` was made of, by themselves and, for who looks for them, by study and series."""
    purpose = _code("121322", "Source image for image processing operation")
    image.SourceImageSequence = DicomSequence()
    series: dict[tuple[str, str], list[Dataset]] = {}
    for header in sources:
        reference, named = Dataset(), Dataset()
        for item in (reference, named):
            item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = header.SOPClassUID, header.SOPInstanceUID
        reference.PurposeOfReferenceCodeSequence = DicomSequence([purpose])
        image.SourceImageSequence.append(reference)
        series.setdefault((header.get("StudyInstanceUID", ""), header.SeriesInstanceUID), []).append(named)
    own: list[Dataset] = []
    others: dict[str, list[Dataset]] = {}
    for (study, uid), instances in series.items():
        item = Dataset()
        item.SeriesInstanceUID, item.ReferencedInstanceSequence = uid, DicomSequence(instances)
        (own if study == image.StudyInstanceUID else others.setdefault(study, [])).append(item)
    image.ReferencedSeriesSequence = DicomSequence(own)
    if others:
        image.StudiesContainingOtherReferencedInstancesSequence = DicomSequence()
        for study, items in others.items():
            other = Dataset()
            other.StudyInstanceUID, other.ReferencedSeriesSequence = study, DicomSequence(items)
            image.StudiesContainingOtherReferencedInstancesSequence.append(other)


def describe_fusion(names: Sequence[str], version: str, weights: str | None = None, registered: str = "") -> str:
    """
    What stands in a derived series as the derivation.

    Args:
        names: of the two inputs, such as modality and series number.
        version: of the software.
        weights: SHA-256 of the network's weights.
        registered: how the second input was registered, if it was.
    """
    description = f"Fusion of {names[0]} and {names[1]} by {PRODUCT} {version}"
    if registered:
        description += f", the second registered ({registered})"
    return description if weights is None else f"{description}, weights SHA-256 {weights}"


class SaveDicomSeriesd(MapTransform):
    """
    Save ``<output_dir>/<case>/<case>_dicom``, see `derive_series`, for items whose first input is DICOM; others stay as
    they are. What `ColourMapd` has coloured goes beside it as ``<case>_dicom_colour``, a series of its own.

    Args:
        keys: keys of the fused images, ``(1, H, W[, D])`` or RGB ``(3, H, W[, D])``, in [0, 1]; those that end in
            ``_colour`` are in the colours of a map.
        output_dir: folder for the case folders.
        checkpoint: file with the network's weights, whose hash goes into the description.
        anonymise: leave patient and study out.
        colormap: name of the map, see `ColourMapd`.
        info_key: what `LoadCased` has noted, as next.
        sources_key: see there.
        allow_missing_keys: do not raise when a key is missing.
    """

    def __init__(
        self,
        keys: KeysCollection = "pred",
        output_dir: str | os.PathLike = "./",
        checkpoint: str | os.PathLike | None = None,
        anonymise: bool = False,
        colormap: str | None = None,
        info_key: str = "fusion_info",
        sources_key: str = "sources",
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.output_dir = Path(output_dir)
        self.checkpoint = checkpoint
        self.anonymise = anonymise
        self.colormap = colormap
        self.info_key = info_key
        self.sources_key = sources_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        sources = d.get(self.sources_key, [[], []])
        if not sources[0]:
            return d
        info = d[self.info_key]
        version = json.loads((Path(__file__).parents[1] / "configs" / "metadata.json").read_text())["version"]
        inputs = info["inputs"]
        weights = None if self.checkpoint is None else hashlib.sha256(Path(self.checkpoint).read_bytes()).hexdigest()
        registered = "" if info["registration"] is None else info["registration"]["kind"]
        description = describe_fusion([i["name"] for i in inputs], version, weights, registered)
        for key in self.key_iterator(d):
            fused: MetaTensor = d[key]
            mapped = str(key).endswith("_colour")
            images = derive_series(
                fused.as_tensor().detach().cpu().float().numpy(),
                fused.affine.cpu().numpy(),
                sources,
                f"{description}, in the colours of {self.colormap}" if mapped else description,
                version,
                info["resampled"],
                self.anonymise,
                self.colormap if mapped else None,
            )
            name = f"{info['case']}_dicom{'_colour' if mapped else ''}"
            write_series(images, self.output_dir / info["case"] / name)
        return d

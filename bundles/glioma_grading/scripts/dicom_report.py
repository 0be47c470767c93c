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
"""Grades of DICOM cases that name the series they are of: JSON, and structured reports for the archive."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ignite.engine import Engine, Events
from monai.data import MetaTensor
from monai.utils import optional_import
from pydicom.config import disable_value_validation
from pydicom.dataset import Dataset
from pydicom.sr.codedict import Code, codes
from pydicom.uid import generate_uid

from scripts.data import replacing, stem
from scripts.dicom_series import DicomSeries, is_dicom, read_header, select_series
from scripts.dicom_writer import PRODUCT, complete_identity, derive_series, describe_fusion, write_series
from scripts.fusion import FuseModalitiesd
from scripts.grades import GradeWriter

# needed for structured reports only
sr, HAS_HIGHDICOM = optional_import("highdicom.sr")

__all__ = ["KINDS", "DicomReporter", "structured_report"]

KINDS = ("json", "sr")
SERIES_NUMBER = 9900
# a scheme of our own, for what no terminology has
SCHEME = "99CFM"
GRADE_CODES = {"LGG": Code("LGG", SCHEME, "Low-grade glioma"), "HGG": Code("HGG", SCHEME, "High-grade glioma")}
PROBABILITY = Code("HGGPROB", SCHEME, "Probability of high-grade glioma")
THRESHOLD = Code("HGGTHRES", SCHEME, "Probability from which on a glioma counts as high-grade")


class DicomReporter:
    """
    Ignite handler that writes, for every case with DICOM images,

    - ``<case>/<case>_grade.json``: the record of `GradeWriter` and under ``references`` the series ``fused`` (or null)
      and ``inputs``, each with the UIDs ``study``, ``series`` and ``instances``;
    - ``<case>/<case>_sr.dcm`` (``kind`` ``"sr"``): the same as a DICOM structured report, see `structured_report`;
    - ``<case>/<case>_dicom/``: the fused series, where it is made in this run (`FuseModalitiesd`). Of fused files it is
      the graded series itself, or the folder ``<case>_dicom`` that the fusion has written beside the file.

    Args:
        output_dir: folder of the case folders.
        grades: the handler that makes the records; it comes before this one.
        cases: the items that are graded, as `inference_cases` gives them.
        kind: ``"json"`` or ``"sr"``.
        weights: file of the grading network's weights.
        fuse: what makes the fused images, if it is done in this run.
        fused_files: whether the cases are fused images.
        anonymise: name nothing but fused series without patient and study; where there is none, ``references`` is empty
            and no structured report is written.

    Raises:
        ValueError: when ``kind`` is neither, or ``"sr"`` without highdicom.
    """

    def __init__(
        self,
        output_dir: str | os.PathLike,
        grades: GradeWriter,
        cases: Sequence[Mapping[str, Any]],
        kind: str,
        weights: str | os.PathLike,
        fuse: FuseModalitiesd | None = None,
        fused_files: bool = False,
        anonymise: bool = False,
    ) -> None:
        if kind not in KINDS:
            raise ValueError(f"dicom_report is '{kind}', but must be one of: {', '.join(KINDS)}; or null for none.")
        if kind == "sr" and not HAS_HIGHDICOM:
            raise ValueError("dicom_report 'sr' needs highdicom: install it, or set dicom_report to 'json'.")
        self.output_dir = Path(output_dir)
        self.grades = grades
        self.images = {case["case"]: case["image"] for case in cases}
        self.kind = kind
        self.weights = Path(weights)
        self.fuse = fuse
        self.fused_files = fused_files
        self.anonymise = anonymise

    def attach(self, engine: Engine) -> None:
        """
        Args:
            engine: an evaluator.
        """
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        records = {record["case"]: record for record in self.grades.records}
        for item in engine.state.batch:
            case = str(item["case"])
            fused, inputs = self._series(case)
            if not fused and not inputs:
                continue
            if self.anonymise:
                fused = [header for header in fused if header.get("PatientIdentityRemoved") == "YES"]
                inputs = []
            self._write(records[case], fused, inputs)

    def _write(self, record: Mapping[str, Any], fused: list[Dataset], inputs: list[list[Dataset]]) -> None:
        folder = self.output_dir / record["case"]
        named = [_reference(headers) for headers in inputs] or ([] if self.anonymise else _sources(fused))
        references = {"fused": _reference(fused) if fused else None, "inputs": named}
        with replacing(folder / f"{record['case']}_grade.json") as temporary:
            text = json.dumps({**record, "references": references}, indent=4)
            temporary.write_text(text + "\n", encoding="utf-8")
        if self.kind == "sr" and (fused or inputs):
            digest = hashlib.sha256(self.weights.read_bytes()).hexdigest()
            report = structured_report(record, fused, inputs, digest, _version(Path(__file__).parents[1]))
            with replacing(folder / f"{record['case']}_sr.dcm") as temporary:
                report.save_as(temporary, enforce_file_format=True)

    def _series(self, case: str) -> tuple[list[Dataset], list[list[Dataset]]]:
        """Headers of the fused series, and of both inputs where they are at hand."""
        image = self.images[case]
        files = [Path(image)] if isinstance(image, (str, os.PathLike)) else [Path(file) for file in image]
        if self.fused_files:
            beside = files[0].with_name(f"{stem(files[0]).removesuffix('_fused')}_dicom")
            folder = files[0] if is_dicom(files[0]) else beside
            return (_headers(select_series(folder)) if is_dicom(folder) else []), []
        found = [select_series(file) if is_dicom(file) else None for file in files]
        inputs = [_headers(series) for series in found if series is not None]
        if self.fuse is None or found[0] is None:
            return [], inputs
        return self._fused(self.fuse, case, files, found), inputs

    def _fused(
        self, fuse: FuseModalitiesd, case: str, files: Sequence[Path], series: Sequence[DicomSeries | None]
    ) -> list[Dataset]:
        """Write the fused series."""
        image: MetaTensor = fuse({"image": [str(file) for file in files], "case": case})["image"]
        version = _version(fuse.fusion.bundle)
        digest = hashlib.sha256(fuse.fusion.weights.read_bytes()).hexdigest()
        names = [s.label if s is not None else "another image" for s in series]
        images = derive_series(
            image.as_tensor().numpy(),
            image.affine.numpy(),
            [s.files if s is not None else [] for s in series],
            describe_fusion(names, version, digest, image.meta["registered"]),
            version,
            image.meta["resampled"],
            self.anonymise,
        )
        write_series(images, self.output_dir / case / f"{case}_dicom")
        return list(images)


def structured_report(
    record: Mapping[str, Any], fused: Sequence[Dataset], inputs: Sequence[Sequence[Dataset]], weights: str, version: str
) -> Dataset:
    """
    A Comprehensive SR after TID 1500, Measurement Report (DICOM PS3.16), in patient and study of the images: grade,
    probability and threshold of one measurement group, whose source images are the fused ones (or, without them, the
    first input's); the algorithm with its weights; flags and notice as comments. It is unverified, and preliminary.

    Args:
        record: of `GradeWriter`.
        fused: headers of the fused series, or none.
        inputs: headers of the inputs' series; at least one where there is no fused series.
        weights: SHA-256 of the grading network's weights.
        version: of the software.
    """
    images = fused or inputs[0]
    name = f"{PRODUCT} glioma grading"
    algorithm = sr.AlgorithmIdentification(
        name=name, version=version, parameters=[f"weights SHA-256 {weights}"], manufacturer=PRODUCT
    )
    grade = record["grade"]
    group = sr.MeasurementsAndQualitativeEvaluations(
        tracking_identifier=sr.TrackingIdentifier(uid=generate_uid(), identifier="glioma"),
        algorithm_id=algorithm,
        measurements=[
            sr.Measurement(name=code, value=record[key], unit=codes.UCUM.NoUnits)
            for code, key in ((PROBABILITY, "probability"), (THRESHOLD, "threshold"))
        ],
        qualitative_evaluations=(
            [sr.QualitativeEvaluation(codes.SCT.HistologicGrade, GRADE_CODES[grade])] if grade is not None else []
        ),
        source_images=[sr.SourceImageForMeasurementGroup(i.SOPClassUID, i.SOPInstanceUID) for i in images],
    )
    for comment in (record["notice"], *record["flags"]):
        group[0].ContentSequence.append(
            sr.TextContentItem(codes.DCM.Comment, comment, sr.RelationshipTypeValues.CONTAINS)
        )
    device = sr.DeviceObserverIdentifyingAttributes(
        uid=generate_uid(entropy_srcs=[name, version]), name=name, manufacturer_name=PRODUCT
    )
    content = sr.MeasurementReport(
        observation_context=sr.ObservationContext(
            observer_device_context=sr.ObserverContext(codes.DCM.Device, observer_identifying_attributes=device)
        ),
        procedure_reported=codes.SCT.ImagingProcedure,
        imaging_measurements=[group],
        title=codes.DCM.ImagingMeasurementReport,
    )
    # highdicom warns of names that it finds unlikely, and quotes them
    with warnings.catch_warnings(), disable_value_validation():
        warnings.simplefilter("ignore")
        return sr.ComprehensiveSR(
            evidence=[*fused, *(header for headers in inputs for header in headers)],
            content=content[0],
            series_instance_uid=generate_uid(),
            series_number=SERIES_NUMBER,
            sop_instance_uid=generate_uid(),
            instance_number=1,
            manufacturer=PRODUCT,
            manufacturer_model_name=name,
            software_versions=version,
            series_description=f"Glioma grade. {record['notice']}",
        )


def _headers(series: DicomSeries) -> list[Dataset]:
    headers = [read_header(file, None) for file in series.files]
    for header in headers:
        complete_identity(header)
    return headers


def _reference(headers: Sequence[Dataset]) -> dict[str, Any]:
    first = headers[0]
    return {
        "study": str(first.StudyInstanceUID),
        "series": str(first.SeriesInstanceUID),
        "instances": [str(header.SOPInstanceUID) for header in headers],
    }


def _sources(fused: Sequence[Dataset]) -> list[dict[str, Any]]:
    """The series that a fused one says it was made of."""
    found: dict[tuple[str, str], dict[str, None]] = {}
    for header in fused:
        others = header.get("StudiesContainingOtherReferencedInstancesSequence", ())
        for study in (header, *others):
            for series in study.get("ReferencedSeriesSequence", ()):
                key = (str(study.StudyInstanceUID), str(series.SeriesInstanceUID))
                instances = (str(i.ReferencedSOPInstanceUID) for i in series.ReferencedInstanceSequence)
                found.setdefault(key, {}).update(dict.fromkeys(instances))
    return [{"study": study, "series": uid, "instances": list(found[study, uid])} for study, uid in found]


def _version(bundle: Path) -> str:
    return json.loads((bundle / "configs" / "metadata.json").read_text(encoding="utf-8"))["version"]

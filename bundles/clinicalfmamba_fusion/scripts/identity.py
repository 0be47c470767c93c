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
"""Whose images they are: refuse to mix patients, and name cases without naming anybody."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from scripts.dicom_series import DicomSeries, dicom_files, read_header

__all__ = ["check_same_identity", "hashed_case"]

COMPARED = {"PatientID": "patients", "StudyInstanceUID": "studies"}


def check_same_identity(a: DicomSeries, b: DicomSeries, allow_mismatch: bool = False) -> str | None:
    """
    Compare patient and study of two series. None of their values is told.

    Returns:
        a warning where they differ and that was allowed.

    Raises:
        ValueError: when they differ, unless ``allow_mismatch``.
    """
    for keyword, what in COMPARED.items():
        if str(a.header.get(keyword) or "") != str(b.header.get(keyword) or ""):
            if not allow_mismatch:
                raise ValueError(
                    f"The two series are of different {what}: choose other inputs, or set allow_mismatch to fuse them"
                    " all the same."
                )
            return f"The two series are of different {what}; that was allowed."
    return None


def hashed_case(a: str | os.PathLike, b: str | os.PathLike, *wanted: str | int | None) -> str:
    """
    A name for a pair of DICOM inputs that is always the same and tells nothing of the patient.

    Args:
        a: folder or file of the first image.
        b: folder or file of the second.
        wanted: how the series were chosen, see `select_series`.

    Raises:
        FileNotFoundError: when neither has a DICOM file.
    """
    parts = [str(choice) for choice in wanted]
    for path in (a, b):
        file = next(dicom_files(path), None)
        # what is not DICOM has no identity but its name, which the hash hides as well
        parts.append(Path(path).name if file is None else str(read_header(file).SeriesInstanceUID))
    return f"case_{hashlib.sha256('|'.join(parts).encode()).hexdigest()[:12]}"

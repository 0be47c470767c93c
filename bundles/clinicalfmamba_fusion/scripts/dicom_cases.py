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
"""Cases whose images are folders of DICOM files, under names that tell nothing of the patient."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from scripts.dicom_series import is_dicom
from scripts.identity import hashed_case

__all__ = ["dicom_case", "find_dicom_cases"]


def dicom_case(a: Path, b: Path, series: Sequence[str | int | None] = (None, None), task: str = "") -> dict:
    """An item as `find_pairs` gives it, of two images of which at least one is DICOM, named by a hash."""
    case = hashed_case(a, b, *series)
    return {"image": [str(a), str(b)], "case": case, "subject": case, "task": task}


def find_dicom_cases(
    root: Path, modalities: Sequence[str | Sequence[str]], series: Sequence[str | int | None] = (None, None)
) -> list[dict]:
    """
    Args:
        root: folder that has ``CASE/T2`` and ``CASE/FLAIR`` below it, named as the modalities in any case; or, if both
            ``series`` are given, one folder of DICOM files for each study.
        modalities: see `find_pairs`.
        series: how to choose one series of the first and of the second image, see `select_series`.

    Returns:
        items of `dicom_case`, none if there are none.
    """
    if None not in series:
        studies = sorted(folder for folder in root.iterdir() if folder.is_dir() and is_dicom(folder))
        return [dicom_case(folder, folder, series, "") for folder in studies]
    firsts, partners = ([names] if isinstance(names, str) else list(names) for names in modalities)
    cases = []
    for parent, subfolders, _ in os.walk(root):
        subfolders.sort()
        named = {name.lower(): Path(parent) / name for name in subfolders}
        first = next((named[name.lower()] for name in firsts if name.lower() in named), None)
        for name in partners if first is not None and is_dicom(first) else ():
            if (partner := named.get(name.lower())) is not None and is_dicom(partner):
                cases.append(dicom_case(first, partner, series, name))  # type: ignore[arg-type]
    return cases

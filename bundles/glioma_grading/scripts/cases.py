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
"""Cases with a glioma grade: images found as the fusion bundle finds them, and the label of each."""

from __future__ import annotations

import csv
import json
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scripts.data import EXTENSIONS, SPLITS, dataset_root, find_pairs, read_datalist, stem
from scripts.dicom_cases import dicom_case, find_dicom_cases
from scripts.dicom_series import is_dicom

__all__ = ["GRADES", "case_lists", "find_cases", "inference_cases", "to_label"]

GRADES = ("LGG", "HGG")
FUSED_SUFFIX = re.compile(r"^(.+)[_.-]fused$", re.IGNORECASE)
# a folder that a fusion has named; other names of DICOM folders may tell who the patient is
FUSED_SERIES = re.compile(r"^(case_[0-9a-f]{12})_dicom$")


def to_label(grade: str | int) -> int:
    """
    Class of a grade: 0 for ``"LGG"`` or ``0``, 1 for ``"HGG"`` or ``1``.

    Raises:
        ValueError: for anything else, such as a WHO grade, which data sets divide differently.
    """
    text = str(grade).strip().upper()
    if text in GRADES:
        return GRADES.index(text)
    if text in ("0", "1"):
        return int(text)
    raise ValueError(f"'{grade}' is not a grade: write LGG or HGG (or 0 or 1).")


def find_cases(
    dataset_dir: str | os.PathLike,
    modalities: Sequence[str | Sequence[str]] = ("t2", "flair"),
    datalist: str | os.PathLike | None = None,
    grades: str | os.PathLike | None = None,
    fused_files: bool = False,
) -> list[dict]:
    """
    All cases of :func:`case_lists` in one list.

    Raises:
        ValueError: as :func:`case_lists`.
    """
    lists = case_lists(dataset_dir, modalities, datalist, grades, fused_files)
    return [case for cases in lists.values() for case in cases]


def case_lists(
    dataset_dir: str | os.PathLike,
    modalities: Sequence[str | Sequence[str]] = ("t2", "flair"),
    datalist: str | os.PathLike | None = None,
    grades: str | os.PathLike | None = None,
    fused_files: bool = False,
    graded: bool = True,
) -> dict[str, list[dict]]:
    """
    Find cases and their grades. The images come from ``datalist`` or, without one, from a search below
    ``dataset_dir`` (:func:`scripts.data.find_pairs`). The grade is, in this order, the item's ``label`` or ``grade`` in
    the data list, the case's row in ``grades``, or a folder named ``LGG`` or ``HGG`` that the images lie in.

    Args:
        dataset_dir: folder of the images; paths in ``datalist`` are relative to it.
        modalities: names of the two images, as `find_pairs` takes them.
        datalist: MONAI data-list JSON with ``{"image": [t2, flair], "label": 0 or 1}`` under ``training``,
            ``validation`` or ``test``; or a CSV with the columns ``grade`` and either ``image`` or one per modality
            (``t2``, ``flair``), and optionally ``case``, ``subject``, ``split``.
        grades: CSV with the columns ``case`` and ``grade``.
        fused_files: look for single images ``CASE_fused.*``, as a run of a fusion bundle writes them, not for pairs.
        graded: whether every case must have a grade.

    Returns:
        items with ``image`` (absolute paths), ``case``, ``subject`` and ``label`` (0 LGG, 1 HGG) by the split that the
        data list puts them in, ``"training"`` when there is none.

    Raises:
        FileNotFoundError: when a file or folder does not exist, or no case is found.
        ValueError: when a case has no grade, or one that is none.
    """
    root = dataset_root(dataset_dir)
    table = _read_grades(Path(grades)) if grades is not None else {}
    if datalist is None:
        lists = {"training": _fused_images(root) if fused_files else find_pairs(root, modalities)}
    elif str(datalist).lower().endswith(".csv"):
        lists = _read_csv(root, Path(datalist), modalities)
    else:
        lists = read_datalist(root, Path(datalist), None)
    return {split: [_graded(case, root, table, graded) for case in cases] for split, cases in lists.items()}


def inference_cases(
    dataset_dir: str | os.PathLike,
    modalities: Sequence[str | Sequence[str]] = ("t2", "flair"),
    input_a: str | None = None,
    input_b: str | None = None,
    datalist: str | os.PathLike | None = None,
    fused_files: bool = False,
) -> list[dict]:
    """
    Cases to grade: the one of the two images ``input_a`` and ``input_b`` (of one fused image ``input_a``, where
    ``fused_files`` is set), or all below ``dataset_dir``. An image is a file or a folder of DICOM files; the latter are
    found as ``CASE/T2`` and ``CASE/FLAIR``, and their cases are named by a hash.

    Raises:
        ValueError: when only one of two images is given.
    """
    if input_a is None and input_b is None:
        plain = fused_files or datalist is not None
        if not plain and (cases := find_dicom_cases(dataset_root(dataset_dir), modalities)):
            return cases
        lists = case_lists(dataset_dir, modalities, datalist, fused_files=fused_files, graded=False)
        return [case for cases in lists.values() for case in cases]
    if (input_b is None) != fused_files or input_a is None:
        wanted = "one fused image as input_a" if fused_files else "both images, input_a (T2) and input_b (FLAIR)"
        raise ValueError(f"Give {wanted}: a grade from anything less is none.")
    files = [os.path.abspath(file) for file in (input_a, input_b) if file is not None]
    if any(is_dicom(file) for file in files):
        return [_dicom_images([Path(file) for file in files])]
    lists = _checked(Path(files[0]).parent, {"test": [{"image": files if len(files) > 1 else files[0]}]})
    return [_without_suffix(case) for case in lists["test"]]


def _dicom_images(files: Sequence[Path]) -> dict:
    item = dicom_case(files[0], files[-1])
    if len(files) > 1:
        return item
    written = FUSED_SERIES.match(files[0].name)
    case = written[1] if written else item["case"]
    return {"image": str(files[0]), "case": case, "subject": case}


def _graded(case: dict, root: Path, table: Mapping[str, int], required: bool) -> dict:
    files = [case["image"]] if isinstance(case["image"], str) else case["image"]
    grade: Any = case.get("label", case.get("grade", table.get(case["case"])))
    if grade is None:
        relative = os.path.relpath(files[0], root)
        grade = next((part for part in reversed(Path(relative).parts[:-1]) if part.upper() in GRADES), None)
    graded = {"image": case["image"], "case": case["case"], "subject": case["subject"]}
    if grade is None:
        if not required:
            return graded
        raise ValueError(
            f"Case {case['case']} ({files[0]}) has no grade: put it below a folder LGG or HGG, give it a 'label' in the"
            " datalist, or a row in the CSV named by grades."
        )
    try:
        return {**graded, "label": to_label(grade)}
    except ValueError as error:
        raise ValueError(f"Case {case['case']} ({files[0]}): {error}") from error


def _fused_images(root: Path) -> list[dict]:
    items = []
    for folder, subfolders, files in os.walk(root):
        subfolders.sort()
        for name in sorted(files):
            match = FUSED_SUFFIX.match(stem(name))
            if match and name.lower().endswith(EXTENSIONS) and not name.startswith("."):
                items.append({"image": os.path.join(folder, name), "case": match[1]})
    if not items:
        raise FileNotFoundError(
            f"No fused images (CASE_fused.nii.gz) below {root}: set dataset_dir to the folder that a fusion wrote."
        )
    return _checked(root, {"training": items})["training"]


def _without_suffix(case: dict) -> dict:
    match = FUSED_SUFFIX.match(case["case"])
    return {**case, "case": match[1]} if match else case


def _checked(root: Path, lists: Mapping[str, list[dict]]) -> dict[str, list[dict]]:
    """Items made here pass the same checks as those of a user's data list: files exist, shapes agree, names differ."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "datalist.json"
        path.write_text(json.dumps(lists), encoding="utf-8")
        return read_datalist(root, path, None)


def _read_rows(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: name a CSV with the columns {', '.join(columns)}.")
    with open(path, newline="", encoding="utf-8-sig") as stream:
        reader = csv.DictReader(stream)
        names = [name.strip().lower() for name in reader.fieldnames or ()]
        rows = [dict(zip(names, (value or "" for value in row.values()))) for row in reader]
    if missing := [column for column in columns if column not in names]:
        raise ValueError(f"{path} has no column {' or '.join(missing)}, only {', '.join(names)}.")
    return rows


def _read_grades(path: Path) -> dict[str, int]:
    table = {}
    for row in _read_rows(path, ("case", "grade")):
        try:
            table[row["case"]] = to_label(row["grade"])
        except ValueError as error:
            raise ValueError(f"{path}, case {row['case']}: {error}") from error
    return table


def _read_csv(root: Path, path: Path, modalities: Sequence[str | Sequence[str]]) -> dict[str, list[dict]]:
    rows = _read_rows(path, ("grade",))
    lists: dict[str, list[dict]] = {}
    for row in rows:
        named = [next((n for n in _names(m) if row.get(n.lower())), None) for m in modalities]
        if row.get("image"):
            image: Any = row["image"]
        elif None not in named:
            image = [row[str(name).lower()] for name in named]
        else:
            wanted = " and ".join(_names(modality)[0] for modality in modalities)
            raise ValueError(f"{path} must name the images, in a column image or in the columns {wanted}.")
        item = {"image": image, **{k: row[k] for k in ("case", "subject", "grade") if row.get(k)}}
        split = row.get("split") or "training"
        if split not in SPLITS:
            raise ValueError(f"{path} has a split '{split}': write one of {', '.join(SPLITS)}, or leave it out.")
        lists.setdefault(split, []).append(item)
    return _checked(root, lists)


def _names(modality: str | Sequence[str]) -> list[str]:
    return [modality] if isinstance(modality, str) else list(modality)

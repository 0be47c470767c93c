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
from __future__ import annotations

import json
import shutil

import pytest

from scripts.cases import case_lists, find_cases, inference_cases, to_label


@pytest.fixture
def flat(few_patients, tmp_path):
    """The cases in one folder, so that no folder tells their grade."""
    for case in ("glioma_100", "glioma_102"):
        shutil.copytree(next(few_patients.glob(f"*/{case}")), tmp_path / "data" / case)
    return tmp_path / "data"


def test_folders_of_grades(few_patients):
    cases = find_cases(few_patients)
    assert len(cases) == 18 and set(cases[0]) == {"image", "case", "subject", "label"}
    assert {case["case"]: case["label"] for case in cases}["glioma_102"] == 0
    assert sum(case["label"] for case in cases) == 12


def test_grades_in_a_table(flat, tmp_path):
    (tmp_path / "grades.csv").write_text("Case,Grade,age\nglioma_100,HGG,50\nglioma_102,lgg,40\nother,HGG,1\n")
    assert [case["label"] for case in find_cases(flat, grades=tmp_path / "grades.csv")] == [1, 0]
    (tmp_path / "grades.csv").write_text("case,grade\nglioma_100,HGG\n")
    with pytest.raises(ValueError, match="Case glioma_102 .* has no grade: put it below a folder LGG or HGG"):
        find_cases(flat, grades=tmp_path / "grades.csv")
    (tmp_path / "grades.csv").write_text("case,grade\nglioma_100,IV\n")
    with pytest.raises(ValueError, match="grades.csv, case glioma_100: 'IV' is not a grade"):
        find_cases(flat, grades=tmp_path / "grades.csv")
    (tmp_path / "grades.csv").write_text("case\nglioma_100\n")
    with pytest.raises(ValueError, match="has no column grade, only case"):
        find_cases(flat, grades=tmp_path / "grades.csv")


def test_images_in_a_table(flat, tmp_path):
    rows = [
        f"{c}/{c}_t2.nii.gz,{c}/{c}_flair.nii.gz,{g},{s}"
        for c, g, s in (("glioma_100", 1, "validation"), ("glioma_102", 0, ""))
    ]
    (tmp_path / "list.csv").write_text("\n".join(["t2,flair,grade,split", *rows]))
    lists = case_lists(flat, datalist=tmp_path / "list.csv")
    assert [(case["case"], case["label"]) for case in lists["validation"]] == [("glioma_100", 1)]
    assert [case["image"][1] for case in lists["training"]] == [str(flat / "glioma_102" / "glioma_102_flair.nii.gz")]
    (tmp_path / "list.csv").write_text("t2,grade\na.nii.gz,HGG\n")
    with pytest.raises(ValueError, match="in a column image or in the columns t2 and flair"):
        case_lists(flat, datalist=tmp_path / "list.csv")
    (tmp_path / "list.csv").write_text("image,grade\nnone.nii.gz,HGG\n")
    with pytest.raises(FileNotFoundError, match="none.nii.gz does not exist"):
        case_lists(flat, datalist=tmp_path / "list.csv")


def test_monai_data_list(flat, tmp_path):
    images = [[f"{c}/{c}_{m}.nii.gz" for m in ("t2", "flair")] for c in ("glioma_100", "glioma_102")]
    items = [{"image": image, "label": label} for image, label in zip(images, (1, "LGG"))]
    (tmp_path / "list.json").write_text(json.dumps({"training": items[:1], "test": items[1:]}))
    lists = case_lists(flat, datalist=tmp_path / "list.json")
    assert [lists[split][0]["label"] for split in ("training", "test")] == [1, 0]


def test_fused_files(flat):
    for case in ("glioma_100", "glioma_102"):
        (flat / case / f"{case}_t2.nii.gz").rename(flat / case / f"{case}_fused.nii.gz")
    cases = inference_cases(flat, fused_files=True)
    assert [case["case"] for case in cases] == ["glioma_100", "glioma_102"] and isinstance(cases[0]["image"], str)
    (flat.parent / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="No fused images"):
        inference_cases(flat.parent / "empty", fused_files=True)


def test_two_files(few_patients):
    files = [few_patients / "HGG" / "glioma_100" / f"glioma_100_{m}.nii.gz" for m in ("t2", "flair")]
    (case,) = inference_cases("unused", input_a=str(files[0]), input_b=str(files[1]))
    assert case["case"] == "glioma_100" and case["image"] == [str(file) for file in files] and "label" not in case
    with pytest.raises(ValueError, match="Give both images"):
        inference_cases("unused", input_a=str(files[0]))
    with pytest.raises(ValueError, match="Give one fused image"):
        inference_cases("unused", input_a=str(files[0]), input_b=str(files[1]), fused_files=True)
    with pytest.raises(FileNotFoundError, match="none.nii.gz does not exist"):
        inference_cases("unused", input_a=str(files[0]), input_b="none.nii.gz")


@pytest.mark.parametrize("grade, label", [("LGG", 0), ("hgg", 1), (0, 0), ("1", 1)])
def test_to_label(grade, label):
    assert to_label(grade) == label

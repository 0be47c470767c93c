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
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from scripts.data import find_pairs, replacing, stem
from scripts.splits import make_splits, pair_splits, task_weights
from scripts.stack_slices import stack_slices

# as in AANLIB: the subjects of three tasks, some in several of them, only two with PET
SUBJECTS = {
    "CT-MRI": ("2", "16", "21", "28", "41"),
    "SPECT-MRI": ("3", "9", "15", "16", "21", "25", "41"),
    "PET-MRI": ("25", "41"),
}
PARTNERS = ["CT", "SPECT", "PET"]


def write_png(path: Path, shape: tuple[int, ...] = (16, 16)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros(shape, np.uint8)).save(path)


def write_nifti(path: Path, shape: tuple[int, ...] = (8, 8, 4)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(np.zeros(shape, np.uint8), np.eye(4)), path)


@pytest.fixture
def atlas(tmp_path: Path) -> Path:
    for task, subjects in SUBJECTS.items():
        for subject in subjects:
            for number in range(1, 5):
                for folder in ("MRI", task.split("-")[0]):
                    write_png(tmp_path / task / folder / f"{subject}{number:03d}.png")
    return tmp_path


@pytest.fixture
def cases(tmp_path: Path) -> Path:
    for grade, names in (("HGG", "abcdef"), ("LGG", "uvw")):
        for name in names:
            for modality in ("t2", "flair", "seg"):
                write_nifti(tmp_path / grade / f"case_{name}" / f"case_{name}_{modality}.nii.gz")
    return tmp_path


def test_sibling_folders_of_three_tasks(atlas: Path) -> None:
    pairs = find_pairs(atlas, ["MRI", PARTNERS])
    assert len(pairs) == 4 * sum(len(subjects) for subjects in SUBJECTS.values())
    assert len({pair["case"] for pair in pairs}) == len(pairs)
    pair = next(p for p in pairs if p["case"] == "SPECT-MRI_16003")
    assert pair["image"] == [str(atlas / "SPECT-MRI" / f / "16003.png") for f in ("MRI", "SPECT")]
    assert (pair["subject"], pair["task"]) == ("16", "SPECT-MRI")
    assert {p["task"]: p for p in find_pairs(atlas, ["mri", "ct"])}.keys() == {"CT-MRI"}
    assert find_pairs(atlas / "CT-MRI", ["MRI", "CT"])[0]["case"] == "16001"


def test_one_folder_with_several_partners(tmp_path: Path) -> None:
    for name, partner in (("1001.png", "CT"), ("1001.png", "PET"), ("1002.png", "PET")):
        write_png(tmp_path / "MRI" / name)
        write_png(tmp_path / partner / name)
    pairs = find_pairs(tmp_path, ["MRI", ["CT", "PET"]])
    assert [pair["case"] for pair in pairs] == ["CT_1001", "PET_1001", "PET_1002"]


def test_case_folders(cases: Path) -> None:
    pairs = find_pairs(cases, ["t2", "flair"])
    assert len(pairs) == 9
    assert pairs[0]["case"] == pairs[0]["subject"] == "case_a" and pairs[0]["task"] == "HGG"
    assert [stem(file) for file in pairs[-1]["image"]] == ["case_w_t2", "case_w_flair"]


def test_same_case_name_in_two_folders(cases: Path) -> None:
    for modality in ("t2", "flair"):
        write_nifti(cases / "LGG" / "case_a" / f"case_a_{modality}.nii.gz")
    pairs = [pair for pair in find_pairs(cases, ["t2", "flair"]) if pair["subject"] == "case_a"]
    assert [pair["case"] for pair in pairs] == ["HGG_case_a", "LGG_case_a"]


@pytest.mark.parametrize(
    ("files", "modalities", "case", "subject"),
    [
        (
            ("BraTS-GLI-00001-001/BraTS-GLI-00001-001-{}.nii.gz"),
            ("t2w", "t2f"),
            "BraTS-GLI-00001-001",
            "BraTS-GLI-00001",
        ),
        (("sub-07/ses-2/anat/sub-07_ses-2_{}.nii"), ("T2w", "FLAIR"), "sub-07_ses-2", "sub-07"),
        (("patient 9/{}.nii.gz"), ("t2", "flair"), "patient_9", "patient 9"),
        (("7003_{}.png"), ("mri", "pet"), "7003", "7"),
    ],
)
def test_names_in_use(tmp_path: Path, files: str, modalities: tuple[str, str], case: str, subject: str) -> None:
    for modality in modalities:
        path = tmp_path / files.format(modality)
        (write_png if path.suffix == ".png" else write_nifti)(path)
    (pair,) = find_pairs(tmp_path, modalities)
    assert (pair["case"], pair["subject"]) == (case, subject)


def test_alternatives_of_both_images(cases: Path) -> None:
    for modality in ("mri", "pet"):
        write_nifti(cases / "PET-MRI" / "25" / f"25_{modality}.nii.gz")
    pairs = find_pairs(cases, [["t2", "mri"], ["flair", "pet"]])
    assert len(pairs) == 10
    assert [stem(file) for pair in pairs if pair["case"] == "25" for file in pair["image"]] == ["25_mri", "25_pet"]


def test_weights_draw_every_task_equally_often() -> None:
    weights = task_weights([{"task": task} for task in "abbbcc"])
    assert weights == pytest.approx([1 / 3, 1 / 9, 1 / 9, 1 / 9, 1 / 6, 1 / 6])


def test_subject_pattern(atlas: Path) -> None:
    pairs = find_pairs(atlas / "CT-MRI", ["MRI", "CT"], subject_pattern=r"^(\d)")
    assert {pair["subject"] for pair in pairs} == {"1", "2", "4"}


def test_linked_folders_are_followed_once(atlas: Path) -> None:
    os.symlink(atlas, atlas / "CT-MRI" / "again")
    assert len(find_pairs(atlas, ["MRI", "CT"])) == 4 * len(SUBJECTS["CT-MRI"])


def test_missing_partner(atlas: Path, cases: Path) -> None:
    (atlas / "CT-MRI" / "CT" / "16002.png").unlink()
    with pytest.raises(ValueError, match=r"MRI/16002\.png has no partner.*CT/16002\.png does not exist"):
        find_pairs(atlas, ["MRI", PARTNERS])
    (cases / "HGG" / "case_b" / "case_b_flair.nii.gz").unlink()
    with pytest.raises(ValueError, match=r"case_b_t2\.nii\.gz has no partner.*case_b_flair\.\*"):
        find_pairs(cases, ["t2", "flair"])


def test_unequal_shapes(cases: Path, atlas: Path) -> None:
    write_nifti(cases / "LGG" / "case_u" / "case_u_flair.nii.gz", (8, 8, 5))
    with pytest.raises(ValueError, match=r"case_u_t2\.nii\.gz \(8, 8, 4\) and .*case_u_flair\.nii\.gz \(8, 8, 5\)"):
        find_pairs(cases, ["t2", "flair"])
    write_png(atlas / "PET-MRI" / "PET" / "25001.png", (16, 20, 3))
    with pytest.raises(ValueError, match=r"25001\.png \(16, 16\) and .*25001\.png \(20, 16\)"):
        find_pairs(atlas, ["MRI", PARTNERS])


def test_unreadable_file(cases: Path, atlas: Path) -> None:
    (cases / "HGG" / "case_c" / "case_c_t2.nii.gz").write_bytes(b"not an image")
    with pytest.raises(ValueError, match=r"case_c_t2\.nii\.gz can not be read"):
        find_pairs(cases, ["t2", "flair"])
    (atlas / "PET-MRI" / "MRI" / "41001.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"MRI/41001\.png can not be read"):
        find_pairs(atlas, ["MRI", PARTNERS])


def test_nothing_found(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="No pairs of t2 and flair"):
        find_pairs(tmp_path, ["t2", "flair"])
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        find_pairs(tmp_path / "nowhere", ["t2", "flair"])
    with pytest.raises(FileNotFoundError, match="list.json does not exist"):
        find_pairs(tmp_path, ["t2", "flair"], datalist=tmp_path / "list.json")


def test_same_image_twice(cases: Path) -> None:
    write_nifti(cases / "HGG" / "case_a" / "case_a_t2.nii")
    with pytest.raises(ValueError, match="same image twice"):
        find_pairs(cases, ["t2", "flair"])


@pytest.mark.parametrize("seed", range(20))
def test_subject_splits_do_not_leak(atlas: Path, seed: int) -> None:
    pairs = find_pairs(atlas, ["MRI", PARTNERS])
    splits = make_splits(pairs, val_fraction=0.2, test_fraction=0.2, seed=seed)
    subjects = {name: {pair["subject"] for pair in items} for name, items in splits.items()}
    assert not subjects["training"] & subjects["validation"]
    assert not subjects["training"] & subjects["test"]
    assert not subjects["validation"] & subjects["test"]
    assert sorted(p["case"] for items in splits.values() for p in items) == sorted(p["case"] for p in pairs)
    for name in ("training", "test"):
        assert {pair["task"] for pair in splits[name]} == set(SUBJECTS)
    assert splits["validation"]


def test_splits_are_repeated_by_their_seed(atlas: Path) -> None:
    pairs = find_pairs(atlas, ["MRI", PARTNERS])
    assert make_splits(pairs, seed=3) == make_splits(pairs, seed=3)
    assert any(make_splits(pairs, seed=3) != make_splits(pairs, seed=seed) for seed in range(4, 8))
    assert make_splits(pairs, seed=3)["test"] == [
        pair for pair in pairs if pair in make_splits(pairs[::-1], seed=3)["test"]
    ]


def test_fractions_are_met(cases: Path) -> None:
    pairs = [{"image": [], "case": str(i), "subject": str(i), "task": "HGG" if i < 80 else "LGG"} for i in range(100)]
    splits = make_splits(pairs, val_fraction=0.1, test_fraction=0.25)
    for task, total in (("HGG", 80), ("LGG", 20)):
        sizes = {name: sum(pair["task"] == task for pair in items) for name, items in splits.items()}
        assert sizes == {"training": 0.65 * total, "validation": 0.1 * total, "test": 0.25 * total}


def test_random_slices_put_subjects_on_both_sides(atlas: Path) -> None:
    pairs = find_pairs(atlas / "PET-MRI", ["MRI", "PET"])
    splits = make_splits(pairs, val_fraction=0.25, test_fraction=0.25, split_by="slice")
    assert [len(splits[name]) for name in ("training", "validation", "test")] == [4, 2, 2]
    assert len({pair["case"] for items in splits.values() for pair in items}) == len(pairs)


def test_split_that_can_not_be_filled(atlas: Path, caplog: pytest.LogCaptureFixture) -> None:
    pairs = find_pairs(atlas / "PET-MRI", ["MRI", "PET"])
    with pytest.raises(ValueError, match="too few for a validation split"):
        make_splits(pairs, val_fraction=0.1, test_fraction=0.1)
    assert make_splits(pairs, val_fraction=0, test_fraction=0.1)["validation"] == []
    with pytest.raises(ValueError, match="must leave pairs to train on"):
        make_splits(pairs, val_fraction=0.5, test_fraction=0.5)
    with pytest.raises(ValueError, match="split_by must be"):
        make_splits(pairs, split_by="patient")
    make_splits(find_pairs(atlas, ["MRI", PARTNERS]))
    assert "Task 'PET-MRI' has no subject to spare for the validation split." in caplog.text


def test_datalist_repeats_the_splits(atlas: Path, tmp_path: Path) -> None:
    file = tmp_path / "run" / "datalist.json"
    splits = pair_splits(atlas, ["MRI", PARTNERS], seed=5, output_file=file)
    assert json.loads(file.read_text())["training"][0]["image"][0].startswith("CT-MRI/MRI/")
    assert pair_splits(atlas, ["MRI", PARTNERS], datalist=file, seed=6) == splits
    assert find_pairs(atlas, ["MRI", PARTNERS], datalist=file, split="test") == splits["test"]
    assert list(file.parent.iterdir()) == [file]


def test_datalist_of_others(cases: Path, tmp_path: Path) -> None:
    # a folder below dataset_dir is called like the case, which is no reason to take the case for a path
    (cases / "case_a").mkdir()
    item = {"image": [f"HGG/case_a/case_a_{m}.nii.gz" for m in ("t2", "flair")]}
    write_nifti(cases / "both.nii.gz", (8, 8, 4, 2))
    file = tmp_path / "list.json"
    file.write_text(json.dumps({"training": [{**item, "case": "case_a"}], "test": [item, "both.nii.gz"]}))
    with pytest.raises(ValueError, match="Case case_a_case_a occurs twice"):
        find_pairs(cases, ["t2", "flair"], datalist=file)
    file.write_text(json.dumps({"training": [item], "test": ["both.nii.gz"]}))
    training, test = find_pairs(cases, ["t2", "flair"], datalist=file)
    assert (training["case"], training["subject"]) == ("case_a", "case_a")
    assert (test["case"], test["image"]) == ("both", str(cases / "both.nii.gz"))
    with pytest.raises(ValueError, match="lists nothing under 'validation'"):
        find_pairs(cases, ["t2", "flair"], datalist=file, split="validation")
    file.write_text(json.dumps({"training": [{"image": ["a.nii.gz", "b.nii.gz"]}]}))
    with pytest.raises(FileNotFoundError, match=r"a\.nii\.gz does not exist"):
        find_pairs(cases, ["t2", "flair"], datalist=file)
    file.write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        find_pairs(cases, ["t2", "flair"], datalist=file)


def test_datalist_with_training_only_is_split(cases: Path, tmp_path: Path) -> None:
    items = find_pairs(cases, ["t2", "flair"])
    file = tmp_path / "list.json"
    file.write_text(json.dumps({"training": items}))
    assert pair_splits(cases, ["t2", "flair"], datalist=file) == make_splits(items)


def test_replacing_leaves_nothing_behind(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")
    with pytest.raises(RuntimeError), replacing(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert target.read_text() == "old" and list(tmp_path.iterdir()) == [target]


def test_stack_slices(tmp_path: Path) -> None:
    # a bright spot wanders to the right, down and forwards
    for number in (4, 5, 7):
        for folder in ("MRI", "PET"):
            picture = np.zeros((12, 10, 3) if folder == "PET" else (12, 10), np.uint8)
            picture[number + 1, number] = (200, 100, 0) if folder == "PET" else 200
            (tmp_path / "in" / folder).mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(tmp_path / "in" / folder / f"3{number:03d}.png")
    with pytest.raises(ValueError, match="Subject 3 .* lacks 1 slices in a row"):
        stack_slices(str(tmp_path / "in"), str(tmp_path / "out"))
    stack_slices(str(tmp_path / "in"), str(tmp_path / "out"), spacing=(1.0, 1.5, 2.0), axcodes="LIA", max_gap=1)
    mri, pet = (nib.load(tmp_path / "out" / "3" / f"3_{m}.nii.gz") for m in ("mri", "pet"))
    assert mri.shape == pet.shape == (10, 12, 4)
    assert nib.aff2axcodes(mri.affine) == ("L", "I", "A")
    np.testing.assert_allclose(mri.header.get_zooms(), (1.0, 1.5, 2.0))
    assert mri.get_fdata()[7, 8, 3] == 200 and mri.get_fdata()[4, 5, 0] == 200
    assert pet.get_fdata()[7, 8, 3] == round(0.299 * 200 + 0.587 * 100)
    assert mri.get_fdata()[7, 8, 2] == 100
    assert find_pairs(tmp_path / "out", ["mri", "pet"])[0]["case"] == "3"

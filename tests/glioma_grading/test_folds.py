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

import pytest
import torch

from scripts.folds import class_weights, grading_splits, make_folds


def cases(lgg=15, hgg=45, sessions=1):
    patients = [(f"p{i}", int(i >= lgg)) for i in range(lgg + hgg)]
    return [{"case": f"{p}_{s}", "subject": p, "label": k} for p, k in patients for s in range(sessions)]


@pytest.mark.parametrize("sessions", [1, 3])
def test_no_patient_on_two_sides(sessions):
    items = cases(sessions=sessions)
    subject, label = ({case["case"]: case[key] for case in items} for key in ("subject", "label"))
    folds = make_folds(items, num_folds=5, val_fraction=0.2, seed=3)
    tested = [case for fold in folds for case in fold["test"]]
    assert sorted(tested) == sorted(subject), "every case is tested once"
    for fold in folds:
        patients = [{subject[case] for case in fold[split]} for split in ("training", "validation", "test")]
        assert sum(map(len, patients)) == len(set.union(*patients)) == 60
        assert [len(p) for p in patients] == pytest.approx([38, 10, 12], abs=2)
        for split in fold.values():
            assert sum(label[case] == 0 for case in split) / len(split) == pytest.approx(0.25, abs=0.07)


def test_seed_and_order():
    items = cases()
    assert make_folds(items) == make_folds(items[::-1]) != make_folds(items, seed=1)


def test_too_few():
    with pytest.raises(ValueError, match="4 LGG and 45 HGG patients are too few for 5 folds"):
        make_folds(cases(lgg=4))
    with pytest.raises(ValueError, match="val_fraction 0 must be above 0"):
        make_folds(cases(), val_fraction=0)


def test_written_and_used_again(few_patients, tmp_path):
    path = tmp_path / "folds.json"
    first = grading_splits(few_patients, folds_file=path, fold=1, num_folds=3)
    written = json.loads(path.read_text())
    assert written["seed"] == 0 and len(written["folds"]) == 3
    # another seed and number are not asked for any more
    again = grading_splits(few_patients, folds_file=path, fold=1, num_folds=2, seed=5)
    assert again == first and json.loads(path.read_text()) == written
    with pytest.raises(ValueError, match="fold 3 does not exist"):
        grading_splits(few_patients, folds_file=path, fold=3)
    with pytest.raises(ValueError, match="is of other cases than .*17 differ, the first is glioma_101"):
        grading_splits(few_patients / "..", folds_file=path, datalist=_list(few_patients, tmp_path))
    path.write_text("{}")
    with pytest.raises(ValueError, match="folds.json is not a file of folds"):
        grading_splits(few_patients, folds_file=path)


def _list(folder, tmp_path):
    image = [str(folder / "HGG" / "glioma_100" / f"glioma_100_{m}.nii.gz") for m in ("t2", "flair")]
    (tmp_path / "list.json").write_text(json.dumps({"training": [{"image": image, "label": 1}]}))
    return tmp_path / "list.json"


def test_splits_of_a_data_list(few_patients, tmp_path):
    def item(case, grade):
        return {
            "image": [str(few_patients / grade / case / f"{case}_{m}.nii.gz") for m in ("t2", "flair")],
            "label": grade,
        }

    lists = {"training": [item("glioma_100", "HGG")], "validation": [item("glioma_102", "LGG")]}
    (tmp_path / "list.json").write_text(json.dumps(lists))
    splits = grading_splits(few_patients, datalist=tmp_path / "list.json", folds_file=tmp_path / "folds.json")
    assert [len(splits[name]) for name in ("training", "validation", "test")] == [1, 1, 0]
    assert not (tmp_path / "folds.json").exists()


def test_shuffled_labels(few_patients):
    def labels(**settings):
        splits = grading_splits(few_patients, num_folds=2, **settings)
        return {case["case"]: case["label"] for split in splits.values() for case in split}

    shuffled = labels(shuffle_labels=True)
    assert sum(shuffled.values()) == 12 and shuffled != labels() and shuffled == labels(shuffle_labels=True)


def test_class_weights():
    weights = class_weights(cases(lgg=10, hgg=30))
    torch.testing.assert_close(weights, torch.tensor([2.0, 2 / 3]))
    with pytest.raises(ValueError, match="No LGG among the 30 cases"):
        class_weights(cases(lgg=0, hgg=30))

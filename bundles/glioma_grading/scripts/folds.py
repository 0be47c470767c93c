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
"""Folds for cross-validation: by patient, stratified by grade, written down so that every run uses the same."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from scripts.cases import GRADES, case_lists
from scripts.data import SPLITS, replacing

__all__ = ["class_weights", "grading_splits", "make_folds", "read_folds"]

Fold = dict[str, list[str]]


def make_folds(cases: Sequence[dict], num_folds: int = 5, val_fraction: float = 0.2, seed: int = 0) -> list[Fold]:
    """
    Divide cases into folds by patient, each with the data set's share of grades. In fold k, the k-th part is the test
    split; of the rest, about ``val_fraction`` is the validation split.

    Args:
        cases: items with ``case``, ``subject`` and ``label``.
        num_folds: number of folds.
        val_fraction: share of the cases that are not tested, at most a half.
        seed: decides which patients come together.

    Returns:
        for each fold the names of the cases in ``training``, ``validation`` and ``test``.

    Raises:
        ValueError: when a grade has fewer patients than there are folds.
    """
    # what only reads folds needs no scikit-learn
    from sklearn.model_selection import StratifiedGroupKFold

    patients = [Counter(label for _, label in {(c["subject"], c["label"]) for c in cases})[k] for k in (0, 1)]
    parts = round(1 / val_fraction) if 0 < val_fraction <= 0.5 else 0
    if not parts:
        raise ValueError(f"val_fraction {val_fraction} must be above 0 and at most 0.5: the threshold is chosen there.")
    if min(patients) < max(num_folds, parts + 1) or num_folds < 2:
        raise ValueError(
            f"{patients[0]} LGG and {patients[1]} HGG patients are too few for {num_folds} folds with validation: each"
            f" grade needs at least {max(num_folds, parts + 1)} (and num_folds at least 2)."
        )

    def split(items: Sequence[dict], n: int, random_state: int) -> list[tuple[list[dict], list[dict]]]:
        divide = StratifiedGroupKFold(n, shuffle=True, random_state=random_state)
        labels, groups = [c["label"] for c in items], [c["subject"] for c in items]
        return [([items[i] for i in a], [items[i] for i in b]) for a, b in divide.split(labels, labels, groups)]

    # in a stated order, so that the folds do not depend on how the files were found
    ordered = sorted(cases, key=lambda case: str(case["case"]))
    folds = []
    for k, (rest, test) in enumerate(split(ordered, num_folds, seed)):
        training, validation = split(rest, parts, seed + k + 1)[0]
        named = zip(SPLITS, (training, validation, test))
        folds.append({name: [str(case["case"]) for case in items] for name, items in named})
    return folds


def read_folds(path: str | os.PathLike) -> list[Fold]:
    """
    Raises:
        ValueError: when the file is not one that `grading_splits` wrote.
    """
    try:
        folds = json.loads(Path(path).read_text(encoding="utf-8"))["folds"]
        return [{name: [str(case) for case in fold[name]] for name in SPLITS} for fold in folds]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a file of folds: remove it, or name another folds_file.") from error


def grading_splits(
    dataset_dir: str | os.PathLike,
    modalities: Sequence[str | Sequence[str]] = ("t2", "flair"),
    datalist: str | os.PathLike | None = None,
    grades: str | os.PathLike | None = None,
    fused_files: bool = False,
    folds_file: str | os.PathLike | None = None,
    fold: int = 0,
    num_folds: int = 5,
    val_fraction: float = 0.2,
    seed: int = 0,
    shuffle_labels: bool = False,
) -> dict[str, list[dict]]:
    """
    Find the cases (:func:`scripts.cases.case_lists`) and divide them. A data list with a validation split is taken as
    it is. Otherwise ``folds_file`` is read if it exists, and written if it does not, so that runs on other sources or
    with other networks test the same patients.

    Args:
        folds_file: JSON of the folds, by the names of cases.
        fold: which of the folds.
        shuffle_labels: deal the labels out at random: what a network reaches then is not from the images.
        dataset_dir, modalities, datalist, grades, fused_files: see `case_lists`.
        num_folds, val_fraction, seed: see `make_folds`.

    Returns:
        ``{"training": [...], "validation": [...], "test": [...]}``.

    Raises:
        ValueError: when the folds are of other cases, or there is no such fold.
    """
    lists = case_lists(dataset_dir, modalities, datalist, grades, fused_files)
    if shuffle_labels:
        _shuffle_labels([case for cases in lists.values() for case in cases], seed)
    if lists.get("validation"):
        return {name: lists.get(name, []) for name in SPLITS}
    cases = {case["case"]: case for items in lists.values() for case in items}
    if folds_file is not None and Path(folds_file).is_file():
        folds = read_folds(folds_file)
        listed = {name for split in folds[0].values() for name in split}
        if odd := sorted(listed.symmetric_difference(cases)):
            raise ValueError(
                f"{folds_file} is of other cases than {dataset_dir} ({len(odd)} differ, the first is {odd[0]}): remove"
                " it, or name another folds_file."
            )
    else:
        folds = make_folds(list(cases.values()), num_folds, val_fraction, seed)
        if folds_file is not None:
            text = json.dumps({"seed": seed, "val_fraction": val_fraction, "folds": folds}, indent=4)
            with replacing(folds_file) as temporary:
                temporary.write_text(text + "\n", encoding="utf-8")
    if not 0 <= fold < len(folds):
        raise ValueError(f"fold {fold} does not exist: there are {len(folds)}, counted from 0.")
    return {name: [cases[case] for case in folds[fold][name]] for name in SPLITS}


def class_weights(cases: Sequence[Mapping], device: torch.device | str = "cpu") -> torch.Tensor:
    """
    Weights `(2,)` that make both grades count equally in a loss: N / (2 N_class).

    Raises:
        ValueError: when a grade is missing.
    """
    counts = Counter(case["label"] for case in cases)
    if missing := [grade for label, grade in enumerate(GRADES) if not counts[label]]:
        raise ValueError(f"No {missing[0]} among the {len(cases)} cases to train on: there is nothing to tell apart.")
    return torch.tensor([len(cases) / (2 * counts[label]) for label in (0, 1)], dtype=torch.float32, device=device)


def _shuffle_labels(cases: Sequence[dict], seed: int) -> None:
    order = torch.randperm(len(cases), generator=torch.Generator().manual_seed(seed)).tolist()
    for case, label in zip(cases, [cases[i]["label"] for i in order]):
        case["label"] = label

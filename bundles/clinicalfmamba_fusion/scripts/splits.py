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

"""Splits of a data set: by subject, seeded, written down so that they can be repeated."""

from __future__ import annotations

import json
import logging
import os
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch.distributed as dist

from scripts.data import SPLITS, dataset_root, find_pairs, read_datalist, replacing

__all__ = ["disjoint_draws", "make_splits", "pair_splits", "task_weights"]


def make_splits(
    pairs: Sequence[dict],
    val_fraction: float = 0.1,
    test_fraction: float = 0.2,
    seed: int = 0,
    split_by: str = "subject",
) -> dict[str, list[dict]]:
    """
    Divide pairs into training, validation and test, each task by itself.

    By subject, no subject lies in two splits, in whatever tasks it occurs. Every task keeps a training subject; with
    two subjects or more it has one in the test split, with three or more one in the validation split, wherever the
    sharing of subjects between tasks allows it. Fractions are shares of a task's pairs, met as nearly as whole
    subjects can.

    Args:
        pairs: items with ``subject``, and ``task`` where there are several kinds, as :func:`find_pairs` returns them.
        val_fraction: share of the pairs to validate with.
        test_fraction: share of the pairs to test with.
        seed: decides which subjects are drawn.
        split_by: ``"subject"``, or ``"slice"`` for the paper's protocol, which draws single pairs at random and so
            has neighbouring slices of one subject on both sides.

    Raises:
        ValueError: when a fraction or ``split_by`` is out of range, or a split that is asked for can not be filled.
    """
    if split_by not in ("subject", "slice"):
        raise ValueError(f"split_by must be 'subject' or 'slice', not '{split_by}'.")
    if min(val_fraction, test_fraction) < 0 or val_fraction + test_fraction >= 1:
        raise ValueError(f"val_fraction {val_fraction} and test_fraction {test_fraction} must leave pairs to train on.")
    units = [str(pair["subject"] if split_by == "subject" else index) for index, pair in enumerate(pairs)]
    sizes: dict[str, Counter[str]] = defaultdict(Counter)
    tasks: dict[str, set[str]] = defaultdict(set)
    for unit, pair in zip(units, pairs):
        sizes[pair.get("task", "")][unit] += 1
        tasks[unit].add(pair.get("task", ""))
    order = sorted(tasks)
    np.random.RandomState(seed).shuffle(order)

    free = {task: len(sizes[task]) for task in sizes}
    assigned: dict[str, str] = {}
    for split, fraction in (("test", test_fraction), ("validation", val_fraction)):
        held = dict.fromkeys(sizes, 0)
        # what stays free: a subject to train on and, where there are three, one to validate with
        keep = {task: 2 if split == "test" and len(sizes[task]) > 2 else 1 for task in sizes}
        # tasks with few subjects choose first, the others take account of what is drawn already
        for task in sorted(sizes if fraction else (), key=lambda t: (len(sizes[t]), t)):
            target = fraction * sizes[task].total()
            for unit in (u for u in order if u in sizes[task] and u not in assigned):
                fits = held[task] == 0 or held[task] + sizes[task][unit] / 2 <= target
                if fits and all(free[t] > keep[t] for t in tasks[unit]):
                    assigned[unit] = split
                    for t in tasks[unit]:
                        free[t] -= 1
                        held[t] += sizes[t][unit]
        if fraction and not any(held.values()):
            raise ValueError(
                f"{len(order)} subject(s) are too few for a {split} split: set its fraction to 0, tell the subjects"
                " apart with subject_pattern, or split_by 'slice'."
            )
        for task in (t for t in sizes if fraction and not held[t]):
            logging.getLogger(__name__).warning(f"Task '{task}' has no subject to spare for the {split} split.")
    splits: dict[str, list[dict]] = {name: [] for name in SPLITS}
    for unit, pair in zip(units, pairs):
        splits[assigned.get(unit, "training")].append(pair)
    return splits


def disjoint_draws(
    pairs: Sequence[dict], draws: int = 3, test_fraction: float = 0.2, seed: int = 0, split_by: str = "subject"
) -> list[dict[str, list[dict]]]:
    """
    Divide pairs into training and test several times, so that no pair is tested twice; each task by itself. There are
    fewer draws than asked for where the subjects do not suffice: two subjects give two.

    Args:
        pairs: items with ``subject`` and ``task``, as :func:`find_pairs` returns them.
        draws: how many divisions.
        test_fraction: share of a task's pairs in each test, met as nearly as whole subjects can.
        seed: decides the order in which subjects are dealt.
        split_by: ``"subject"``, or ``"slice"`` for single pairs at random, see :func:`make_splits`.

    Raises:
        ValueError: when an argument is out of range, or there is a single subject.
    """
    if split_by not in ("subject", "slice"):
        raise ValueError(f"split_by must be 'subject' or 'slice', not '{split_by}'.")
    if draws < 1 or not 0 < test_fraction * draws <= 1:
        raise ValueError(f"{draws} disjoint tests of {test_fraction} of the pairs each are not to be had.")
    units = [str(pair["subject"] if split_by == "subject" else index) for index, pair in enumerate(pairs)]
    sizes: dict[str, Counter[str]] = defaultdict(Counter)
    for unit, pair in zip(units, pairs):
        sizes[pair.get("task", "")][unit] += 1
    draw_of: dict[str, int] = {}
    for task in sorted(sizes):
        order = sorted(sizes[task])
        np.random.RandomState(seed).shuffle(order)
        held, target = [0] * draws, test_fraction * sizes[task].total()
        for unit in order if len(order) > 1 else ():
            size = sizes[task][unit]
            fitting = [k for k in range(draws) if held[k] == 0 or held[k] + size / 2 <= target]
            # a subject may have come with another task already
            if fitting and unit not in draw_of:
                draw_of[unit] = fitting[0]
            if unit in draw_of:
                held[draw_of[unit]] += size
    if not draw_of:
        raise ValueError(
            f"{len(set(units))} subject(s) are too few to train with some and test with others: tell them apart with"
            " subject_pattern, or split_by 'slice'."
        )
    return [
        {
            "training": [pair for unit, pair in zip(units, pairs) if draw_of.get(unit) != draw],
            "test": [pair for unit, pair in zip(units, pairs) if draw_of.get(unit) == draw],
        }
        for draw in sorted(set(draw_of.values()))
    ]


def pair_splits(
    dataset_dir: str | os.PathLike,
    modalities: Sequence[str | Sequence[str]],
    datalist: str | os.PathLike | None = None,
    val_fraction: float = 0.1,
    test_fraction: float = 0.2,
    split_by: str = "subject",
    seed: int = 0,
    subject_pattern: str | None = None,
    output_file: str | os.PathLike | None = None,
    required: Sequence[str] = (),
) -> dict[str, list[dict]]:
    """
    Find the pairs and split them: :func:`find_pairs`, then :func:`make_splits`. A ``datalist`` is taken as it is,
    except that one with ``training`` items only is split.

    Args:
        output_file: where to write the splits as a data-list JSON, with paths relative to ``dataset_dir``; given as
            ``datalist``, it repeats them. The other arguments are those of the two functions.
        required: names of the splits that are going to be used.

    Returns:
        ``{"training": [...], "validation": [...], "test": [...]}``.

    Raises:
        ValueError: when a required split has no pairs.
    """
    root = dataset_root(dataset_dir)
    lists: dict[str, list[dict]] = {}
    if datalist is not None:
        lists = read_datalist(root, Path(datalist), subject_pattern)
    if set(lists) <= {"training"}:
        pairs = lists.get("training") or find_pairs(root, modalities, subject_pattern=subject_pattern)
        lists = make_splits(pairs, val_fraction, test_fraction, seed, split_by)
    lists = {name: lists.get(name, []) for name in SPLITS}
    for name in required:
        if not lists.get(name):
            raise ValueError(
                f"The split '{name}' of {datalist or root} has no pairs, only"
                f" {', '.join(f'{split} ({len(pairs)})' for split, pairs in lists.items() if pairs)}: choose another"
                " split, change the fractions, or list pairs under its name in a datalist."
            )
    main_process = not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0
    if output_file is not None and main_process:
        relative = {
            name: [{**pair, "image": _relative(pair["image"], root)} for pair in pairs] for name, pairs in lists.items()
        }
        with replacing(output_file) as temporary:
            text = json.dumps({"split_by": split_by, "seed": seed, **relative}, indent=4)
            temporary.write_text(text + "\n", encoding="utf-8")
    return lists


def task_weights(pairs: Sequence[dict]) -> list[float]:
    """Chance of each pair to be drawn when every task (``pair["task"]``) is to be drawn equally often."""
    sizes = Counter(pair.get("task", "") for pair in pairs)
    return [1 / (len(sizes) * sizes[pair.get("task", "")]) for pair in pairs]


def _relative(image: str | list[str], root: Path) -> str | list[str]:
    if isinstance(image, list):
        return [str(_relative(file, root)) for file in image]
    return Path(image).relative_to(root).as_posix() if Path(image).is_relative_to(root) else image

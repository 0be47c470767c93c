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
"""
Data lists to train one network for all tasks, for slices and for volumes: every subject that the first draw of
`fusion_table.py` does not test in any task, so that its tables may load these weights.

    python benchmarks/training_lists.py --aanlib AANLIB --brats BRATS --stacks PET_STACKS --output_dir lists

Writes `slices.json` and `volumes.json` for the `datalist` of the fusion bundle's `train.json`. Every sixth test case
validates, by which no weights are chosen as long as `val_interval` is `max_epochs`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fire
from fusion_table import T2_FLAIR, TASKS, prepare_draws

from scripts.data import find_pairs, replacing

VALIDATED = 6


def named(pairs: list[dict[str, Any]], task: str) -> Iterator[dict[str, Any]]:
    """The pairs under names that no other task has; grades are one task, so that they are drawn as one."""
    for pair in pairs:
        yield {**pair, "case": f"{task}_{pair['case']}", "task": task}


def main(
    aanlib: str,
    brats: str,
    output_dir: str,
    stacks: str | None = None,
    slices_per_case: int = 1,
    volumes_tested: float = 0.07,
) -> None:
    """
    Args:
        aanlib: slices in folders ``MRI`` and ``CT``, ``SPECT`` or ``PET``.
        brats: T2 and FLAIR below ``HGG`` and ``LGG``; slices are cut from them for the network in 2D.
        output_dir: folder for the lists and the slices.
        stacks: folder with MRI-PET volumes of `scripts.stack_slices`, which all train in 3D.
        slices_per_case: as for ``fusion_table.py --task t2-flair-2d``.
        volumes_tested: its ``test_fraction`` for ``--task t2-flair-3d``.
    """
    folder = Path(output_dir).absolute()
    draws: dict[str, dict[str, list]] = {}
    for task, (names, dims) in TASKS.items():
        (folder / task).mkdir(parents=True, exist_ok=True)
        data = str(Path(brats if names == T2_FLAIR else aanlib).absolute())
        fraction = volumes_tested if dims == 3 else 0.2
        draws[task] = prepare_draws(task, data, folder / task, 1, fraction, "subject", slices_per_case, {})[0][1]
    lists: dict[int, dict[str, list]] = {dims: {"training": [], "validation": []} for dims in (2, 3)}
    for dims, found in lists.items():
        tasks = {task: draws[task] for task in draws if TASKS[task][1] == dims}
        # one MRI may be paired with CT and with SPECT: whoever is tested in one task must not train in another
        tested = {pair["subject"] for draw in tasks.values() for pair in draw["test"]}
        for task, draw in tasks.items():
            found["training"] += named([pair for pair in draw["training"] if pair["subject"] not in tested], task)
            found["validation"] += named(draw["test"][::VALIDATED], task)
    if stacks is not None:
        lists[3]["training"] += named(find_pairs(Path(stacks).absolute(), ["MRI", "PET"]), "mri-pet")
    for name, dims in (("slices", 2), ("volumes", 3)):
        with replacing(folder / f"{name}.json") as temporary:
            temporary.write_text(json.dumps(lists[dims], indent=4) + "\n", encoding="utf-8")
        print(f"{folder / name}.json: " + ", ".join(f"{len(pairs)} {split}" for split, pairs in lists[dims].items()))


if __name__ == "__main__":
    fire.Fire(main)

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
"""The paper's grading table: every source, by patient-level cross-validation, beside floors that need no network.

    python benchmarks/grading_table.py run --dataset_dir BRATS --output_dir table --dims "[2,3]" --jobs 6
    python benchmarks/grading_table.py report --dataset_dir BRATS --output_dir table

`run` trains and tests with the configs of `bundles/glioma_grading`, several small runs side by side on one device, and
can be stopped and started again: what has its predictions is not done twice. It needs torch, MONAI, pytorch-ignite,
nibabel and Pillow (and scikit-learn once, unless `folds.json` is there). `report` needs no GPU; it measures the floors
on the same folds and writes `table.md`, `table.csv`, `table.json` and the ROC curves.
"""

from __future__ import annotations

import csv
import json
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import fire
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
BUNDLE = ROOT / "bundles" / "glioma_grading"
sys.path[:0] = [str(ROOT), str(BUNDLE), str(ROOT / "benchmarks")]

from monai.bundle import ConfigWorkflow  # noqa: E402
from processes import process_pool  # noqa: E402

from scripts.cases import find_cases  # noqa: E402
from scripts.data import replacing  # noqa: E402
from scripts.folds import grading_splits, read_folds  # noqa: E402
from scripts.predictions import read_predictions, write_predictions  # noqa: E402

# a row of the table: what it sets in the configs, and which configs it adds
ROWS: dict[str, dict[str, Any]] = {
    **{source: {"source": source} for source in ("t2", "flair", "t2_flair", "average", "maximum", "fused")},
    "joint": {"configs": ["joint"]},
}
DEFAULT_ROWS = ("t2", "flair", "t2_flair", "average", "maximum", "fused")
KEYS = ("dims", "matching", "row", "fold", "seed")
GOAL = 0.90


def workflow(configs: Sequence[str], dims: int, matching: str, row: Mapping[str, Any], **overrides: Any) -> Any:
    """An initialised workflow of the bundle for one row of the table."""
    added = [*row.get("configs", ()), *(["volume"] if dims == 3 else [])]
    files = [str(BUNDLE / "configs" / f"{name}.json") for name in (*configs, *added)]
    settings = {key: value for key, value in row.items() if key != "configs"}
    quiet = {"progress": False, "tensorboard": False, "describe_training": False, "report": False}
    flow = ConfigWorkflow(
        files,
        workflow_type="train",
        logging_file=False,
        bundle_root=str(BUNDLE),
        intensity_matching=matching,
        **{**quiet, **overrides, **settings},
    )
    flow.initialize()
    return flow


def prepare(row: Mapping[str, Any], matching: str, **overrides: Any) -> None:
    """Preprocess all cases of a row into the cache, fusing them where the row does."""
    everything = "$[case for split in ('training', 'validation', 'test') for case in @splits[split]]"
    flow = workflow(("train",), 2, matching, row, **{**overrides, "validate#dataset#data": everything})
    fuse = flow.parser.get_parsed_content("fuse")
    dataset = flow.parser.get_parsed_content("validate#dataset")
    if fuse is not None:
        fuse.prepare(dataset.data)
    for index in range(len(dataset)):
        dataset[index]


def train_and_test(
    folder: Path, row: Mapping[str, Any], dims: int, matching: str, fold: int, seed: int, **overrides: Any
) -> None:
    """One network: train, choose its threshold, predict the test fold into ``folder / "predictions.csv"``."""
    shared = {**overrides, "fold": fold, "seed": seed}
    # the state of unfinished runs is not kept: one takes a minute
    flow = workflow(("train",), dims, matching, row, output_dir=str(folder), checkpoint_interval=10**6, **shared)
    flow.run()
    checkpoint = str(folder / "model.pt")
    shared.pop("max_epochs", None)
    flow = workflow(("train", "evaluate"), dims, matching, row, output_dir=str(folder), checkpoint=checkpoint, **shared)
    flow.run()


def run(
    dataset_dir: str,
    output_dir: str = "grading_table",
    rows: Sequence[str] = DEFAULT_ROWS,
    dims: Sequence[int] = (2, 3),
    matchings: Sequence[str] = ("none",),
    num_folds: int = 5,
    seeds: Sequence[int] = (0,),
    systems: Mapping[str, Mapping[str, Any]] | None = None,
    jobs: int = 1,
    minutes: float | None = None,
    keep_weights: bool = False,
    **overrides: Any,
) -> None:
    """
    Args:
        dataset_dir: BraTS cases below ``HGG`` and ``LGG``, see `scripts.cases.case_lists`.
        output_dir: folder of folds, caches, runs and ``predictions.csv``.
        rows: which rows, of `ROWS` and ``systems``.
        dims: 2 and 3, slices and volumes.
        matchings: how intensities are matched between sites, ``none``, ``robust``, ``histogram``.
        num_folds: folds of the cross-validation.
        seeds: a network is trained for each; their probabilities are averaged in the report.
        systems: more rows, each with what it sets in the configs and, as ``configs``, which configs it adds:
            ``{"ehdran": {"source": "fused", "fusion_configs": ["configs/inference.json", "configs/ehdran.json"]}}``.
        jobs: runs side by side.
        minutes: start no run after so many minutes; call again to go on.
        keep_weights: keep the weights of every run, too.
        overrides: ids of the configs, e.g. ``--max_epochs 20 --num_workers 2 --device cuda:0``.

    Raises:
        ValueError: when a row is unknown.
        RuntimeError: when runs have failed; the others are kept.
    """
    started, folder = time.monotonic(), Path(output_dir).absolute()
    known = {**ROWS, **(systems or {})}
    if unknown := [row for row in rows if row not in known]:
        raise ValueError(f"No row '{unknown[0]}': there are {', '.join(known)}; describe others as systems.")
    shared = {
        **overrides,
        "dataset_dir": str(Path(dataset_dir).absolute()),
        "cache_dir": str(folder / "cache"),
        "folds_file": str(folder / "folds.json"),
        "num_folds": num_folds,
    }
    grading_splits(dataset_dir, folds_file=folder / "folds.json", num_folds=num_folds)
    todo = []
    for d, matching, row, fold, seed in product(dims, matchings, rows, range(num_folds), seeds):
        path = folder / "runs" / f"{d}d_{matching}" / row / f"fold{fold}_seed{seed}"
        if not (path / "predictions.csv").is_file():
            todo.append((path, {"row": known[row], "dims": d, "matching": matching, "fold": fold, "seed": seed}))
    failed: list[str] = []
    with process_pool(jobs) as pool:
        settings = {json.dumps([job["row"], job["matching"]]): job for _, job in todo}.values()
        caches = [pool.submit(prepare, job["row"], job["matching"], **shared) for job in settings]
        for cache in tqdm(caches, desc="preparing"):
            cache.result()
        waiting, running = list(todo), {}
        with tqdm(total=len(todo), desc="runs") as bar:
            while waiting or running:
                late = minutes is not None and time.monotonic() - started > 60 * minutes
                while waiting and len(running) < jobs and not late:
                    path, job = waiting.pop(0)
                    running[pool.submit(train_and_test, path, **job, **shared)] = path
                if not running:
                    break
                for done in wait(running, return_when=FIRST_COMPLETED).done:
                    path = running.pop(done)
                    if error := done.exception():
                        failed.append(f"{path.relative_to(folder)}: {error.__cause__ or error}")
                    elif not keep_weights:
                        (path / "model.pt").unlink()
                    bar.update()
                collect(folder)
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(todo)} runs failed: " + "; ".join(failed))
    print(f"{len(todo) - len(waiting)} runs done, {len(waiting)} left; predictions in {folder / 'predictions.csv'}")


def collect(folder: Path) -> None:
    """Put the predictions of all runs so far into one file."""
    records = []
    for path in sorted((folder / "runs").glob("*/*/*/predictions.csv")):
        (dims, matching), row, run_name = path.parts[-4].split("_"), path.parts[-3], path.parts[-2]
        fold, seed = (int(part) for part in run_name.removeprefix("fold").split("_seed"))
        key = dict(zip(KEYS, (dims.rstrip("d"), matching, row, fold, seed)))
        records += [{**key, **record} for record in read_predictions(path)]
    if records:
        write_predictions(folder / "predictions.csv", records)


def floors(dataset_dir: str, folder: Path, matchings: Sequence[str]) -> list[dict[str, Any]]:
    """Out-of-fold predictions of the floors, in the form of `collect`."""
    import numpy as np

    from scripts.floors import acquisition, cross_validate, joint_histogram

    cases = find_cases(dataset_dir)
    labels, subjects = ({case["case"]: case[key] for case in cases} for key in ("label", "subject"))
    records = []
    # how images were acquired does not depend on what is done with their intensities
    measures = [("acquisition", "none", acquisition)]
    measures += [("joint histogram", matching, partial(joint_histogram, matching)) for matching in matchings]
    for name, matching, floor in measures:
        path = folder / "floors" / f"{name.replace(' ', '_')}_{matching}.npz"
        if not path.is_file():
            measure = floor()
            found = {case["case"]: measure(case) for case in tqdm(cases, desc=f"{name}, {matching}")}
            with replacing(path) as temporary:
                np.savez_compressed(temporary, **found)
        with np.load(path) as stored:
            features = dict(stored)
        for record in cross_validate(features, read_folds(folder / "folds.json"), labels, seed=0):
            key = {"dims": "-", "matching": matching, "row": f"floor: {name}", "seed": 0}
            records.append({**key, **record, "subject": subjects[record["case"]], "slices": "all"})
    return records


def average_seeds(records: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str, str], list[dict[str, Any]]]:
    """Predictions by (dims, matching, row), each case once: mean probability and threshold over the seeds."""
    groups: dict[tuple[str, str, str], dict[str, list[Mapping[str, Any]]]] = {}
    for record in records:
        key = record["dims"], record["matching"], record["row"]
        groups.setdefault(key, {}).setdefault(record["case"], []).append(record)
    return {
        key: [
            {**same[0], **{name: sum(r[name] for r in same) / len(same) for name in ("probability", "threshold")}}
            for same in cases.values()
        ]
        for key, cases in groups.items()
    }


def summarise(rows: Mapping[tuple[str, str, str], Sequence[dict[str, Any]]], samples: int) -> list[dict[str, Any]]:
    """A record of each row: metrics with intervals, AUC by fold, and the test against the fused row."""
    import numpy as np

    from scripts.statistics import bootstrap_intervals, delong_test, grading_metrics, patients

    table = []
    for (dims, matching, row), records in rows.items():
        labels, probabilities, decisions = patients(records)
        folds = sorted({record["fold"] for record in records})
        by_fold = [grading_metrics(*patients([r for r in records if r["fold"] == fold]))["auc"] for fold in folds]
        summary: dict[str, Any] = {"dims": dims, "matching": matching, "row": row, "patients": len(labels)}
        summary["metrics"] = grading_metrics(labels, probabilities, decisions)
        summary["intervals"] = bootstrap_intervals(labels, probabilities, decisions, samples)
        summary["auc_by_fold"] = {"mean": float(np.mean(by_fold)), "std": float(np.std(by_fold, ddof=1))}
        for other_dims in [dims] if dims != "-" else sorted({key[0] for key in rows} - {"-"}):
            fused = rows.get((other_dims, matching, "fused"))
            if fused is None or row == "fused" or {r["case"] for r in fused} != {r["case"] for r in records}:
                continue
            difference, p = delong_test(labels, probabilities, patients(fused)[1])
            summary.setdefault("against_fused", {})[f"{other_dims}D"] = {"difference": difference, "p": p}
        table.append(summary)
    return table


def verdicts(table: Sequence[Mapping[str, Any]]) -> list[str]:
    """Which of the goals are reached, in sentences."""
    auc = {(entry["dims"], entry["matching"], entry["row"]): entry["metrics"]["auc"] for entry in table}
    lines = []
    for dims, matching, row in auc:
        if row != "fused":
            continue
        own = auc[dims, matching, row]
        against = [GOAL] if matching == "none" else []
        names = [f"{GOAL:.2f}"] if against else []
        for other in ("t2", "flair", "t2_flair"):
            if (dims, matching, other) in auc:
                names.append(other)
                against.append(auc[dims, matching, other])
        if ("-", matching, "floor: joint histogram") in auc:
            names.append("the histogram floor")
            against.append(auc["-", matching, "floor: joint histogram"])
        for name, value in zip(names, against):
            reached = "reached" if own > value else "MISSED"
            lines.append(f"{dims}D, matching {matching}: fused {own:.3f} above {name} ({value:.3f}): {reached}")
    return lines


def to_markdown(table: Sequence[Mapping[str, Any]]) -> str:
    from scripts.statistics import METRICS

    names = ["dims", "matching", "row", "AUC by fold", *METRICS, "AUC against fused, p (DeLong)"]
    lines = [names, ["---"] * 3 + ["---:"] * (len(names) - 3)]
    for entry in table:
        cells = [entry["dims"], entry["matching"], entry["row"]]
        cells.append("{mean:.3f} ± {std:.3f}".format(**entry["auc_by_fold"]))
        for name in METRICS:
            low, high = entry["intervals"][name]
            cells.append(f"{entry['metrics'][name]:.3f} ({low:.3f} to {high:.3f})")
        tests = entry.get("against_fused", {}).items()
        cells.append("; ".join(f"{dims} {test['difference']:+.3f}, p {test['p']:.2g}" for dims, test in tests))
        lines.append(cells)
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def to_csv_rows(table: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    rows = []
    for entry in table:
        row = {name: entry[name] for name in ("dims", "matching", "row", "patients")}
        row |= {"auc_fold_mean": entry["auc_by_fold"]["mean"], "auc_fold_std": entry["auc_by_fold"]["std"]}
        for name, value in entry["metrics"].items():
            low, high = entry["intervals"][name]
            row |= {name: value, f"{name}_low": low, f"{name}_high": high}
        rows.append(row)
    return rows


def report(
    dataset_dir: str, output_dir: str = "grading_table", matchings: Sequence[str] = ("none",), samples: int = 1000
) -> None:
    """
    Args:
        dataset_dir: the cases that `run` graded; the floors are measured on them.
        output_dir: folder with ``folds.json`` and ``predictions.csv`` of `run`; tables and curves are written there.
            Without predictions the table has the floors alone.
        matchings: measure the floors with these, besides those in the predictions.
        samples: bootstrap draws of an interval.
    """
    from scripts.report import draw_curves

    folder = Path(output_dir)
    grading_splits(dataset_dir, folds_file=folder / "folds.json")
    path = folder / "predictions.csv"
    predictions = read_predictions(path) if path.is_file() else []
    matchings = list(dict.fromkeys([*matchings, *(record["matching"] for record in predictions)]))
    rows = average_seeds([*floors(dataset_dir, folder, matchings), *predictions])
    table = summarise(rows, samples)
    lines = verdicts(table)
    text = to_markdown(table) + "".join(f"\n- {line}" for line in lines) + "\n"
    for extension, content in (("md", text), ("json", json.dumps({"table": table, "goals": lines}, indent=4) + "\n")):
        with replacing(folder / f"table.{extension}") as temporary:
            temporary.write_text(content, encoding="utf-8")
    with replacing(folder / "table.csv") as temporary, open(temporary, "w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(to_csv_rows(table)[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(to_csv_rows(table))
    for dims, matching in sorted({key[:2] for key in rows} - {("-", m) for m in matchings}):
        shown = {row: records for (d, m, row), records in rows.items() if d in (dims, "-") and m == matching}
        draw_curves(folder / f"curves_{dims}d_{matching}.png", shown)
    print(text)


if __name__ == "__main__":
    fire.Fire({"run": run, "report": report})

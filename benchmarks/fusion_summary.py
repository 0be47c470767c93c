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
"""What the runs of `fusion_table.py` amount to: means over the draws, ranks, shares of what can be had, and goals."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import Any

from fusion_optimum import attainable_share

# the columns of `evaluate.json` that the systems are ranked by, higher being better in each
RANKED = {
    "ssim": "SSIM",
    "ssim_worse": "worse-source SSIM",
    "ms_ssim": "MS-SSIM",
    "fmi_edge": "FMI",
    "fsim": "FSIM",
    "qabf": "Q^AB/F",
    "vif": "VIF",
    "scd": "SCD",
}
# what the paper reports, as it computes it
PAPER = {"psnr": "PSNR", "ssim": "SSIM", "fmi_edge": "FMI", "fsim_published": "FSIM", "entropy_float": "EN"}
PAPER_3D = {"psnr": "PSNR", "ms_ssim": "MS-SSIM", "entropy_float": "EN"}
# Zhou and Khalvati 2025, tables of results, in the order of these columns
PUBLISHED: dict[str, dict[str, tuple[float, ...]]] = {
    "mri-ct": {
        "ehdran": (16.830, 0.753, 0.883, 0.820, 10.727),
        "swinfusion": (14.962, 0.768, 0.882, 0.810, 8.445),
        "mrscfusion": (14.476, 0.713, 0.877, 0.791, 7.544),
        "mambadfuse": (15.873, 0.771, 0.882, 0.817, 15.018),
        "clinicalfmamba_paper": (16.519, 0.783, 0.883, 0.820, 15.213),
    },
    "mri-spect": {
        "ehdran": (21.455, 0.736, 0.876, 0.843, 11.970),
        "swinfusion": (17.557, 0.728, 0.808, 0.819, 13.066),
        "mrscfusion": (18.412, 0.734, 0.827, 0.814, 9.87),
        "mambadfuse": (21.021, 0.748, 0.845, 0.829, 14.126),
        "clinicalfmamba_paper": (21.561, 0.759, 0.856, 0.848, 14.871),
    },
    "t2-flair-3d": {"ehdran": (30.653, 0.814, 17.402), "clinicalfmamba_paper": (33.937, 0.859, 20.468)},
}
OURS, FLOOR = "clinicalfmamba", "average"
OPTIMA = ("optimum_paper", "optimum_ssim", "optimum_joint")
JOINT = "joint loss"
MARK = 0.95


def summarise(
    rows: Mapping[str, Mapping[str, Any]], results: Mapping[str, Sequence[Mapping[str, Any]]]
) -> list[dict[str, Any]]:
    """
    Args:
        rows: systems by name, with ``label`` and ``kind`` (``system`` where there is none, ``ablation``, ``frame``).
        results: by name, what ``result.json`` of each draw holds.

    Returns:
        a record of each row that has results: ``mean`` and ``std`` of each metric over the draws (None without two of
        them, or where a value is infinite), ``mean_rank`` among the rows of kind ``system`` that have the most draws
        (None for others), ``share`` of the attainable range.
    """
    table = []
    for name, found in results.items():
        columns = {metric: [result["metrics"][metric] for result in found] for metric in found[0]["metrics"]}
        finite = {metric: values for metric, values in columns.items() if None not in values}
        row = {"name": name, "label": rows[name].get("label", name), "kind": rows[name].get("kind", "system")}
        row |= {"draws": len(found), "parameters": found[0]["parameters"], "device": found[0]["device"]}
        row["seconds_per_image"] = mean(result["seconds_per_image"] for result in found)
        row["mean"] = {metric: mean(finite[metric]) if metric in finite else None for metric in columns}
        row["std"] = {m: stdev(finite[m]) if m in finite and len(found) > 1 else None for m in columns}
        table.append(row)
    draws = max(row["draws"] for row in table)
    competing = [row for row in table if row["kind"] == "system" and row["draws"] == draws]
    ranks = {metric: rank([row["mean"].get(metric) for row in competing]) for metric in RANKED}
    for row in table:
        row["mean_rank"] = None
    for index, row in enumerate(competing):
        row["mean_rank"] = mean(ranks[metric][index] for metric in RANKED)
    add_shares(table)
    return table


def rank(values: Sequence[float | None]) -> list[float]:
    """Ranks from 1, the highest value; equal values share the mean of their ranks, None comes last."""
    known = [-math.inf if value is None else value for value in values]
    return [sum(v > value for v in known) + (known.count(value) + 1) / 2 for value in known]


def joint_loss(means: Mapping[str, float]) -> float:
    """The joint loss of mean metrics: it is linear in them."""
    return 20 * (1 - means["ssim"]) - means["scd"] - 5 * means["qabf"]


def add_shares(table: Sequence[dict[str, Any]]) -> None:
    """
    To each row, how much of what the pixels allow it reaches, from the average of the sources (0) to the best of the
    per-image optima (1) in that metric, and under `JOINT` from the average's joint loss to its optimum's. None where
    the range is empty or a row that it needs has not been tested on the same draws.
    """
    by_name = {row["name"]: row for row in table}
    for row in table:
        references = {n: by_name[n] for n in (FLOOR, *OPTIMA) if n in by_name and by_name[n]["draws"] == row["draws"]}
        optima = [references[name]["mean"] for name in OPTIMA if name in references]
        row["share"] = dict.fromkeys((*RANKED, JOINT))
        if FLOOR not in references or not optima:
            continue
        floor = references[FLOOR]["mean"]
        for metric in RANKED:
            values = [row["mean"].get(metric), floor.get(metric), *(means.get(metric) for means in optima)]
            if None not in values and max(values[2:]) > values[1]:
                row["share"][metric] = attainable_share(values[0], values[1], max(values[2:]))
        if "optimum_joint" in references:
            losses = [joint_loss(means) for means in (row["mean"], floor, references["optimum_joint"]["mean"])]
            if losses[2] < losses[1]:
                row["share"][JOINT] = attainable_share(*losses)


def verdicts(table: Sequence[Mapping[str, Any]]) -> list[str]:
    """Which of the goals for our default are reached, and by how much, in sentences."""
    rows = {row["name"]: row for row in table}
    if OURS not in rows:
        return []
    ours, lines = rows[OURS], []
    for metric, other in (("ssim", "average"), ("qabf", "maximum"), ("scd", "maximum"), ("fmi_edge", "maximum")):
        if other in rows and rows[other]["draws"] == ours["draws"]:
            own, value = ours["mean"][metric], rows[other]["mean"][metric]
            lines.append(f"{RANKED[metric]} {own:.4f}, {other} {value:.4f}: {judged(own - value)}")
    ranks = {row["label"]: row["mean_rank"] for row in table if row["mean_rank"] is not None}
    if len(ranks) > 1 and ours["mean_rank"] is not None:
        label = min((name for name in ranks if name != ours["label"]), key=lambda name: ranks[name])
        lines.append(
            f"mean rank {ours['mean_rank']:.2f}, {label} {ranks[label]:.2f}: "
            + judged(ranks[label] - ours["mean_rank"])
        )
    if (share := ours["share"][JOINT]) is not None:
        lines.append(f"share of the joint loss's range {share:.3f}, mark {MARK}: {judged(share - MARK)}")
    return lines


def judged(lead: float) -> str:
    return f"reached, by {lead:.4f}" if lead > 0 else f"MISSED by {-lead:.4f}"


def to_csv(table: Sequence[Mapping[str, Any]]) -> str:
    records = []
    for row in table:
        keys = ("name", "label", "kind", "draws", "parameters", "seconds_per_image", "device", "mean_rank")
        record = {key: row[key] for key in keys}
        for metric in row["mean"]:
            record |= {metric: row["mean"][metric], f"{metric}_std": row["std"][metric]}
        record |= {f"{metric}_share": value for metric, value in row["share"].items()}
        records.append(record)
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


def marked(texts: Sequence[str], values: Sequence[float | None]) -> list[str]:
    """Best in bold, second underlined, as they are printed; None does not compete."""
    shown = sorted({value for value in values if value is not None}, reverse=True)
    frames = dict(zip(shown, ("**{}**", "<u>{}</u>")))
    return [text if v is None else frames.get(v, "{}").format(text) for text, v in zip(texts, values)]


def spread(row: Mapping[str, Any], metric: str) -> str:
    value, deviation = row["mean"].get(metric), row["std"].get(metric)
    if value is None:
        return "–"
    return f"{value:.3f}" if deviation is None else f"{value:.3f} ± {deviation:.3f}"


def in_table(names: Sequence[str], columns: Sequence[Sequence[str]]) -> str:
    lines = [list(names), ["---"] + ["---:"] * (len(names) - 1), *(list(cells) for cells in zip(*columns))]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def to_markdown(
    table: Sequence[Mapping[str, Any]], goals: Sequence[str], task: str, settings: Mapping[str, Any]
) -> str:
    """The table for people: metrics and ranks, shares, the paper's columns, and what fell short."""
    labels = [row["label"] for row in table]
    draws = max(row["draws"] for row in table)
    competing = [row["kind"] == "system" and row["draws"] == draws for row in table]

    def column(metric: str) -> list[str]:
        # what looks equal is equal
        values = [
            round(r["mean"][metric], 3) if c and r["mean"].get(metric) is not None else None
            for r, c in zip(table, competing)
        ]
        return marked([spread(row, metric) for row in table], values)

    ranks = [row["mean_rank"] for row in table]
    rank_texts = ["–" if value is None else f"{value:.2f}" for value in ranks]
    rank_column = marked(rank_texts, [None if value is None else -round(value, 2) for value in ranks])
    parameters = [f"{row['parameters']:,}" for row in table]
    seconds = [f"{1000 * row['seconds_per_image']:.1f}" for row in table]
    main = in_table(
        ["system", *RANKED.values(), "mean rank", "parameters", "ms per image"],
        [labels, *(column(metric) for metric in RANKED), rank_column, parameters, seconds],
    )
    shares = in_table(
        ["system", *RANKED.values(), JOINT],
        [labels]
        + [
            ["–" if row["share"][m] is None else f"{round(row['share'][m], 2) + 0.0:.2f}" for row in table]
            for m in (*RANKED, JOINT)
        ],
    )
    columns = PAPER_3D if task.endswith("3d") else PAPER
    published = [PUBLISHED.get(task, {}).get(row["name"]) for row in table]
    cells = [
        [spread(row, metric) + (f" ({p[i]:g})" if p else "") for row, p in zip(table, published)]
        for i, metric in enumerate(columns)
    ]
    paper = in_table(["system", *columns.values()], [labels, *cells])
    pairs = ", ".join(f"{lists['training']} / {lists['test']}" for lists in settings["pairs"])
    unit = {"subject": "by subject", "slice": "single slices at random, as the paper does"}[settings["split_by"]]
    short = [f"{row['label']}: {row['draws']} of {draws}" for row in table if row["draws"] < draws]
    devices = ", ".join(sorted({row["device"] for row in table}))
    parts = [
        f"# {task}\n",
        f"{draws} of {len(settings['pairs'])} disjoint test draws, {unit}; pairs to train / test: {pairs}. Mean ±"
        " standard deviation over the draws, of images in float; SSIM, MS-SSIM, FMI, FSIM the mean over both sources;"
        f" {settings['max_epochs']} epochs, last weights; {settings['steps']} steps for the optima. Best **bold**,"
        " second <u>underlined</u>, and ranked, are the systems, not ablations, copies and optima. Times on"
        f" {devices}.\n",
        main,
        "## Share of the attainable range\n",
        f"0: average, 1: the best of the per-image optima in that metric; under {JOINT}: its own optimum.\n",
        shares,
        "## The paper's measures\n",
        "Here (as published, on other test images): PSNR and SSIM reward copies and blur, see the table above. FSIM and"
        " EN as the paper computes them.\n",
        paper,
    ]
    lists = {
        "Goals": goals,
        "Weights that were loaded, not trained": [f"{k}: {v}" for k, v in settings.get("weights", {}).items()],
        "Draws still missing, not ranked": short,
        "Failed": settings.get("failed", []),
    }
    for title, lines in lists.items():
        if lines:
            parts += [f"## {title}\n", "".join(f"- {line}\n" for line in lines)]
    return "\n".join(parts)

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
"""The report of an evaluation: metrics with intervals as JSON, curves as a picture."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from sklearn.calibration import calibration_curve
from sklearn.metrics import precision_recall_curve, roc_curve

from scripts.data import replacing
from scripts.statistics import bootstrap_intervals, grading_metrics, patients

__all__ = ["draw_curves", "write_report"]

DPI = 120


def write_report(output_dir: str | os.PathLike, records: Sequence[Mapping[str, Any]], samples: int = 1000) -> None:
    """
    Write ``metrics.json``, the metrics of `scripts.statistics` with their 95 % intervals over patients, and
    ``curves.png``.

    Args:
        output_dir: folder of the files.
        records: predictions with ``subject``, ``label``, ``probability``, ``threshold`` and ``slices``.
        samples: number of bootstrap draws.

    Raises:
        ValueError: when all cases have the same grade.
    """
    labels, probabilities, decisions = patients(records)
    if len(set(labels.tolist())) < 2:
        raise ValueError("An evaluation needs cases of both grades: choose another split or fold.")
    metrics = grading_metrics(labels, probabilities, decisions)
    intervals = bootstrap_intervals(labels, probabilities, decisions, samples)
    report = {
        "patients": {"LGG": int((labels == 0).sum()), "HGG": int((labels == 1).sum())},
        "slices": sorted({record["slices"] for record in records}),
        "metrics": {name: {"value": value, "interval": intervals[name]} for name, value in metrics.items()},
        "notice": "Not for clinical use.",
    }
    with replacing(Path(output_dir) / "metrics.json") as temporary:
        temporary.write_text(json.dumps(report, indent=4) + "\n", encoding="utf-8")
    draw_curves(Path(output_dir) / "curves.png", {"": records})


def draw_curves(path: str | os.PathLike, rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Draw ROC, precision-recall and calibration curves of predictions, a line for each named list of them."""
    figure = Figure(figsize=(13, 4.4), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    roc, recall, calibration = figure.subplots(1, 3)
    for name, records in rows.items():
        labels, probabilities, decisions = patients(records)
        metrics = grading_metrics(labels, probabilities, decisions)
        false, true, _ = roc_curve(labels, probabilities)
        (line,) = roc.plot(false, true, label=f"{name} AUC {metrics['auc']:.3f}".strip())
        colour = line.get_color()
        roc.plot(1 - metrics["specificity"], metrics["sensitivity"], "o", color=colour, markersize=4)
        precision, sensitivity, _ = precision_recall_curve(labels, probabilities)
        score = f"{name} AP {metrics['average_precision']:.3f}".strip()
        recall.plot(sensitivity, precision, color=colour, label=score)
        frequency, predicted = calibration_curve(labels, probabilities, n_bins=10)
        error = f"{name} ECE {metrics['ece']:.3f}".strip()
        calibration.plot(predicted, frequency, "o-", color=colour, markersize=4, label=error)
        share = labels.mean()
    diagonal = np.array([0.0, 1.0])
    roc.plot(diagonal, diagonal, color="grey", linewidth=0.8, linestyle=":")
    recall.axhline(share, color="grey", linewidth=0.8, linestyle=":")
    calibration.plot(diagonal, diagonal, color="grey", linewidth=0.8, linestyle=":")
    _label(roc, "ROC (dot: at the threshold)", "1 \N{MINUS SIGN} specificity", "sensitivity")
    _label(recall, "Precision and recall", "sensitivity (recall)", "precision")
    _label(calibration, "Calibration", "predicted probability of HGG", "share of HGG")
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=DPI)


def _label(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set(title=title, xlabel=x, ylabel=y, xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    axes.legend(fontsize=7, loc="lower right" if title.startswith("ROC") else "best")

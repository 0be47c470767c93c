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
"""How well patients are graded, and how sure that is: metrics, bootstrap intervals and DeLong's test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import norm, rankdata

__all__ = ["METRICS", "bootstrap_intervals", "delong_test", "expected_calibration_error", "grading_metrics", "patients"]

METRICS = (
    *("auc", "f1", "accuracy", "balanced_accuracy", "sensitivity", "specificity"),
    *("average_precision", "ece", "brier"),
)


def patients(records: Sequence[Mapping[str, Any]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """
    Labels, probabilities and decisions (0 or 1), each `(N,)`, of the N patients in predictions. A patient with several
    cases gets the mean of their probabilities and of their thresholds.
    """
    subjects: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        subjects.setdefault(record["subject"], []).append(record)
    groups = [subjects[name] for name in sorted(subjects)]
    labels = np.array([group[0]["label"] for group in groups])
    probabilities, thresholds = (
        np.array([np.mean([record[name] for record in group]) for group in groups])
        for name in ("probability", "threshold")
    )
    return labels, probabilities, (probabilities >= thresholds).astype(int)


def expected_calibration_error(labels: np.ndarray, probabilities: np.ndarray, num_bins: int = 10) -> float:
    """
    Mean distance between the probability of HGG and its frequency in equally wide bins, weighted by their cases
    (Naeini et al., AAAI 2015).
    """
    bins = np.minimum((probabilities * num_bins).astype(int), num_bins - 1)
    gaps = [abs(probabilities[bins == b].sum() - labels[bins == b].sum()) for b in range(num_bins)]
    return float(np.sum(gaps) / len(labels))


def grading_metrics(labels: np.ndarray, probabilities: np.ndarray, decisions: np.ndarray) -> dict[str, float]:
    """
    The metrics in `METRICS`, HGG being the positive class. AUC and average precision, ECE and Brier score are of the
    probabilities, the others of the decisions.

    Args:
        labels: 0 or 1, `(N,)`, both of them.
        probabilities: of label 1, `(N,)`.
        decisions: 0 or 1, `(N,)`.
    """
    # scikit-learn's functions give the same, but check their arguments for longer than a bootstrap can wait
    hits, misses = np.sum(decisions[labels == 1] == 1), np.sum(decisions[labels == 1] == 0)
    alarms, rejections = np.sum(decisions[labels == 0] == 1), np.sum(decisions[labels == 0] == 0)
    sensitivity, specificity = hits / (hits + misses), rejections / (rejections + alarms)
    values = {
        "auc": _placements(labels, probabilities)[0].mean(),
        "f1": 2 * hits / (2 * hits + misses + alarms),
        "accuracy": (hits + rejections) / len(labels),
        "balanced_accuracy": (sensitivity + specificity) / 2,
        "sensitivity": sensitivity,
        "specificity": specificity,
        "average_precision": _average_precision(labels, probabilities),
        "ece": expected_calibration_error(labels, probabilities),
        "brier": np.mean((probabilities - labels) ** 2),
    }
    return {name: float(value) for name, value in values.items()}


def bootstrap_intervals(
    labels: np.ndarray,
    probabilities: np.ndarray,
    decisions: np.ndarray,
    samples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, list[float]]:
    """
    Percentile intervals of :func:`grading_metrics` over patients drawn with replacement. A draw without one of the
    grades is drawn again.

    Returns:
        ``[lower, upper]`` by metric.
    """
    rng = np.random.default_rng(seed)
    drawn: list[dict[str, float]] = []
    while len(drawn) < samples:
        index = rng.integers(len(labels), size=len(labels))
        if 0 < labels[index].sum() < len(labels):
            drawn.append(grading_metrics(labels[index], probabilities[index], decisions[index]))
    tails = (50 * (1 - level), 50 * (1 + level))
    return {name: np.percentile([d[name] for d in drawn], tails).tolist() for name in METRICS}


def delong_test(labels: np.ndarray, first: np.ndarray, second: np.ndarray) -> tuple[float, float]:
    """
    Difference of two AUCs on the same patients and its two-sided p-value (DeLong et al., Biometrics 44(3), 1988, by the
    midranks of Sun and Xu, IEEE Signal Processing Letters 21(11), 2014).

    Args:
        labels: 0 or 1, `(N,)`.
        first, second: scores of label 1, `(N,)`.

    Returns:
        AUC of ``first`` minus that of ``second``, and p; p is 1 where they rank all patients alike.
    """
    components = [_placements(labels, scores) for scores in (first, second)]
    difference = float(components[0][0].mean() - components[1][0].mean())
    # variance over positives and over negatives of the difference of placements
    variance = sum(np.var(a - b, ddof=1) / len(a) for a, b in zip(*components))
    if variance <= 0:
        return difference, 1.0 if difference == 0 else 0.0
    return difference, float(2 * norm.sf(abs(difference) / np.sqrt(variance)))


def _average_precision(labels: np.ndarray, scores: np.ndarray) -> float:
    """Precision at each positive, equal scores taken together, averaged over the positives."""
    positive = np.sort(scores[labels == 1])
    hits = len(positive) - np.searchsorted(positive, positive)
    called = len(scores) - np.searchsorted(np.sort(scores), positive)
    return float((hits / called).mean())


def _placements(labels: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each positive the share of negatives below it, and for each negative the share of positives above it."""
    positive, negative = scores[labels == 1], scores[labels == 0]
    ranks = rankdata(np.concatenate([positive, negative]))
    m, n = len(positive), len(negative)
    return (ranks[:m] - rankdata(positive)) / n, 1 - (ranks[m:] - rankdata(negative)) / m

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
"""The decision threshold of a network, chosen on validation cases, and what belongs to it; kept beside the weights."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from scripts.data import replacing
from scripts.quality import training_ranges
from scripts.sources import PAIR_SOURCES

__all__ = ["add_training_ranges", "choose_threshold", "read_operating_point", "update_operating_point"]

PAIR = set(PAIR_SOURCES)


def choose_threshold(labels: Sequence[int], probabilities: Sequence[float]) -> float:
    """
    Threshold that maximises Youden's index, sensitivity + specificity - 1, over the midpoints of neighbouring
    probabilities; of several equally good ones the middle one.

    Args:
        labels: 0 or 1 of each case.
        probabilities: of label 1.

    Raises:
        ValueError: when one of the labels is missing.
    """
    truth, scores = np.asarray(labels), np.asarray(probabilities, dtype=np.float64)
    if len(set(truth.tolist())) < 2:
        raise ValueError("A threshold needs validation cases of both grades.")
    values = np.unique(scores)
    thresholds = (values[1:] + values[:-1]) / 2 if len(values) > 1 else values
    positive = scores[:, None] >= thresholds
    youden = positive[truth == 1].mean(axis=0) - positive[truth == 0].mean(axis=0)
    best = np.flatnonzero(youden >= youden.max() - 1e-12)
    return float(thresholds[best[len(best) // 2]])


def update_operating_point(path: str | os.PathLike, content: Mapping[str, Any]) -> None:
    """Write ``content`` to the JSON file at ``path``, over what stands there under the same names."""
    path = Path(path)
    old = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    with replacing(path) as temporary:
        temporary.write_text(json.dumps({**old, **content}, indent=4) + "\n", encoding="utf-8")


def add_training_ranges(path: str | os.PathLike, cases: Sequence[Mapping], fused_files: bool = False) -> None:
    """Add ``ranges`` of the images trained on (`scripts.quality.training_ranges`) to the JSON file at ``path``."""
    update_operating_point(path, {"ranges": training_ranges(cases, fused_files)})


def read_operating_point(
    path: str | os.PathLike, source: str, threshold: float | None = None, **settings: Any
) -> dict[str, Any]:
    """
    Args:
        path: JSON that training has written beside the weights.
        source: what is going to be graded.
        threshold: used instead of the one in the file, which then need not exist.
        settings: what else must be as in training.

    Raises:
        FileNotFoundError: when neither file nor threshold is there.
        ValueError: when the network was trained on another source or with other settings.
    """
    if not Path(path).is_file():
        if threshold is None:
            raise FileNotFoundError(f"{path} does not exist: it belongs beside the weights; or give a threshold.")
        return {"threshold": float(threshold), "ranges": {}}
    point = json.loads(Path(path).read_text(encoding="utf-8"))
    for name, value in {"source": source, **settings}.items():
        # files that a fusion has written stand for the network that wrote them
        files = name == "source" and "fused_files" in (sources := {value, point.get(name)}) and not sources & PAIR
        if point.get(name, value) != value and not files:
            raise ValueError(
                f"The weights beside {path} were trained with {name} '{point[name]}', not '{value}': set {name}, or"
                " name other weights as checkpoint."
            )
    return {"ranges": {}, **point, **({} if threshold is None else {"threshold": float(threshold)})}

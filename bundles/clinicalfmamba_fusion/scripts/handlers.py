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

import csv
import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import ignite.distributed as idist
import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.data import MetaTensor, decollate_batch
from monai.utils import ImageMetaKey, string_list_all_gather

from scripts.data import replacing, stem

__all__ = ["CaseMetricsSaver", "write_case_metrics"]


class CaseMetricsSaver:
    """
    Ignite handler that writes every metric of every case after each run of an evaluator, see `write_case_metrics`.

    The values are those of `engine.state.metric_details`, as `monai.handlers.IgniteMetricHandler` leaves them there,
    gathered over the processes. Unlike `monai.handlers.MetricsSaver` it writes one table with a row per case and a
    column per metric. A case is named by `meta["case"]` of its image, else by the stem of its file.

    Args:
        output_dir: folder of the two files, made if it is missing.
        image_key: the item of a batch whose `meta` names the case.
    """

    def __init__(self, output_dir: str, image_key: str = "image") -> None:
        self.output_dir = output_dir
        self.image_key = image_key
        self._cases: list[str] = []

    def attach(self, engine: Engine) -> None:
        """
        Args:
            engine: an evaluator, its metrics attached before (as MONAI's engines do).
        """
        engine.add_event_handler(Events.EPOCH_STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._collect_cases)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def _start(self, _engine: Engine) -> None:
        self._cases = []

    def _collect_cases(self, engine: Engine) -> None:
        batch = engine.state.batch
        # MONAI's engines have decollated the batch by now, unless they were told not to
        for item in batch if isinstance(batch, list) else decollate_batch(batch):
            self._cases.append(_case_name(item[self.image_key]))

    def __call__(self, engine: Engine) -> None:
        """
        Raises:
            ValueError: when a metric has not one value (or row of channels) per case.
        """
        # every process takes part in gathering, and in the same order as the metrics were gathered
        cases = string_list_all_gather(self._cases)
        if idist.get_rank() == 0:
            write_case_metrics(self.output_dir, cases, engine.state.metric_details)


def write_case_metrics(
    output_dir: str | os.PathLike, cases: Sequence[str], metrics: Mapping[str, torch.Tensor | np.ndarray]
) -> None:
    """
    Write `metrics.csv` (a row per case, then the rows ``mean`` and ``std``) and `metrics.json` (``metrics``: mean,
    std and n of each; ``cases``: a list of records). Rows are sorted by case, so that the number of processes does
    not show. `std` is the sample standard deviation; NaN values are left out of mean, std and n.

    Args:
        output_dir: folder of the files, made if it is missing.
        cases: their names.
        metrics: values by metric name, `(N,)` or `(N, C)` (then averaged over C) in the order of ``cases``.

    Raises:
        ValueError: when a metric has not one row per case.
    """
    columns = {}
    for name, values in metrics.items():
        values = np.asarray(values.cpu() if isinstance(values, torch.Tensor) else values, dtype=np.float64)
        if len(values) != len(cases):
            raise ValueError(f"metric {name!r} has {len(values)} values for {len(cases)} cases: attach it only once.")
        columns[name] = values.reshape(len(cases), -1).mean(axis=1)
    summary = {name: _summarise(values) for name, values in columns.items()}
    records = [
        {"case": cases[i], **{name: float(values[i]) for name, values in columns.items()}}
        for i in sorted(range(len(cases)), key=lambda i: cases[i])
    ]
    summary_rows = [{"case": row, **{name: stats[row] for name, stats in summary.items()}} for row in ("mean", "std")]

    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, fieldnames=["case", *columns], lineterminator="\n")
    writer.writeheader()
    for record in records + summary_rows:
        writer.writerow({k: v if k == "case" else f"{v:.6g}" for k, v in record.items()})

    report = {"metrics": {k: _finite(v) for k, v in summary.items()}, "cases": [_finite(r) for r in records]}
    texts = {"metrics.csv": table.getvalue(), "metrics.json": json.dumps(report, indent=4, allow_nan=False) + "\n"}
    for name, text in texts.items():
        with replacing(Path(output_dir) / name) as temporary:
            temporary.write_text(text, encoding="utf-8")


def _case_name(image: MetaTensor) -> str:
    if image.meta.get("case"):
        return str(image.meta["case"])
    return stem(image.meta[ImageMetaKey.FILENAME_OR_OBJ])


def _summarise(values: np.ndarray) -> dict[str, float]:
    values = values[~np.isnan(values)]
    n = len(values)
    # an infinite PSNR has no standard deviation
    with np.errstate(invalid="ignore"):
        return {
            "mean": float(values.mean()) if n else math.nan,
            "std": float(values.std(ddof=1)) if n > 1 else math.nan,
            "n": n,
        }


def _finite(record: dict) -> dict:
    """JSON has neither NaN nor infinity: they become null."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}

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
"""Predictions of an evaluator, collected case by case: the operating point from validation, a report from test."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events
from monai.utils import evenly_divisible_all_gather, string_list_all_gather

from scripts.data import replacing
from scripts.operating_point import choose_threshold, update_operating_point

__all__ = ["COLUMNS", "OperatingPointSaver", "PredictionSaver", "read_predictions", "write_predictions"]

COLUMNS = ("case", "subject", "label", "probability", "threshold", "slices")


class PredictionCollector:
    """
    Ignite handler that has, after each run of an evaluator, the prediction of every case, gathered over the processes
    and sorted by case, and then calls `finish`.

    The evaluator's postprocessing gives ``pred``, probabilities `(2,)`, and leaves ``label`` one-hot `(2,)`; its
    batches have ``case``, ``subject`` and ``slices``.
    """

    def __init__(self) -> None:
        self._names: list[str] = []
        self._values: list[torch.Tensor] = []

    def attach(self, engine: Engine) -> None:
        """
        Args:
            engine: an evaluator, its metrics attached before (as MONAI's engines do).
        """
        engine.add_event_handler(Events.EPOCH_STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._collect)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def _start(self, _engine: Engine) -> None:
        self._names, self._values = [], []

    def _collect(self, engine: Engine) -> None:
        for item, output in zip(engine.state.batch, engine.state.output):
            self._names.append("\t".join(str(item[key]) for key in ("case", "subject", "slices")))
            label = torch.as_tensor(output["label"]).argmax().float()
            self._values.append(torch.stack([label.cpu(), torch.as_tensor(output["pred"])[1].float().cpu()]))

    def __call__(self, engine: Engine) -> None:
        names = string_list_all_gather(self._names, delimiter="\n")
        values = evenly_divisible_all_gather(torch.stack(self._values).to(idist.device())).cpu()
        if idist.get_rank() != 0:
            return
        records = []
        for name, (label, probability) in zip(names, values.tolist()):
            case, subject, slices = name.split("\t")
            record = {"case": case, "subject": subject, "label": int(label), "probability": probability}
            records.append({**record, "slices": slices})
        self.finish(engine, sorted(records, key=lambda record: record["case"]))

    def finish(self, engine: Engine, records: list[dict[str, Any]]) -> None:
        raise NotImplementedError(f"Subclass {self.__class__.__name__} must implement this method.")


class OperatingPointSaver(PredictionCollector):
    """
    Handler of the validator that writes the operating point of the best epoch so far, by the key metric, whose weights
    are saved at the same moment: the threshold (:func:`scripts.operating_point.choose_threshold`), and what must be the
    same when the weights are used.

    Args:
        path: JSON file to write.
        settings: what to write beside the threshold.
    """

    def __init__(self, path: str | os.PathLike, settings: Mapping[str, Any]) -> None:
        super().__init__()
        self.path = Path(path)
        self.settings = dict(settings)

    def finish(self, engine: Engine, records: list[dict[str, Any]]) -> None:
        if engine.state.best_metric_epoch != engine.state.epoch:
            return
        labels, probabilities = ([record[name] for record in records] for name in ("label", "probability"))
        # of tied probabilities, MONAI's AUC is a NumPy number, which JSON does not know
        auc = float(engine.state.best_metric)
        threshold = {
            "threshold": choose_threshold(labels, probabilities),
            "rule": "largest Youden's index on the validation cases",
            "validation": {"cases": len(records), "epoch": engine.state.epoch, "auc": auc},
        }
        update_operating_point(self.path, {**threshold, **self.settings})


class PredictionSaver(PredictionCollector):
    """
    Handler of an evaluator that writes ``predictions.csv`` (the columns `COLUMNS`), and with it, where asked for,
    ``metrics.json`` with intervals and ``curves.png`` (see `scripts.report`).

    Args:
        output_dir: folder of the files.
        threshold: probability of HGG from which on a case is graded HGG.
        report: whether to write metrics and curves, too.
    """

    def __init__(self, output_dir: str | os.PathLike, threshold: float, report: bool = True) -> None:
        super().__init__()
        self.output_dir = Path(output_dir)
        self.threshold = threshold
        self.report = report

    def finish(self, engine: Engine, records: list[dict[str, Any]]) -> None:
        records = [{**record, "threshold": self.threshold} for record in records]
        write_predictions(self.output_dir / "predictions.csv", records)
        if self.report:
            # scikit-learn and matplotlib, which predicting alone does not need
            from scripts.report import write_report

            write_report(self.output_dir, records)


def write_predictions(path: str | os.PathLike, records: Sequence[Mapping[str, Any]]) -> None:
    """Write predictions as CSV: `COLUMNS`, before them whatever else the records have."""
    columns = [name for name in records[0] if name not in COLUMNS] + [name for name in COLUMNS if name in records[0]]
    with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)


def read_predictions(path: str | os.PathLike) -> list[dict[str, Any]]:
    """What :func:`write_predictions` has written, numbers as numbers."""
    kinds = {"label": int, "probability": float, "threshold": float, "fold": int, "seed": int}
    with open(path, newline="", encoding="utf-8") as stream:
        return [{key: kinds.get(key, str)(value) for key, value in row.items()} for row in csv.DictReader(stream)]

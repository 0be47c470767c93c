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
"""The page of a run: a sortable table of its cases."""

from __future__ import annotations

import json
import math
import os
import time
import warnings
from pathlib import Path
from urllib.parse import quote

import ignite.distributed as idist
from ignite.engine import Engine, Events

from scripts.data import replacing
from scripts.report import render

__all__ = ["ReportIndex", "write_index"]


class ReportIndex:
    """
    Ignite handler that writes ``<output_dir>/index.html`` over the reports of ``SaveReportd``: when the run ends, and
    on the way, so that there is one to look at when it is long or is stopped.

    Args:
        output_dir: that of ``SaveReportd``.
        interval: seconds that pass at least between two writings on the way.
    """

    def __init__(self, output_dir: str | os.PathLike, interval: float = 60.0) -> None:
        self.output_dir = Path(output_dir)
        self.interval = interval
        # before whenever that may be: the clock begins when the machine does
        self._written = -math.inf

    def attach(self, engine: Engine) -> None:
        """
        Args:
            engine: the evaluator whose postprocessing saves the reports.
        """
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._write_if_due)
        engine.add_event_handler(Events.COMPLETED, self)

    def _write_if_due(self, _engine: Engine) -> None:
        if idist.get_rank() == 0 and time.monotonic() - self._written >= self.interval:
            self._write()

    def __call__(self, _engine: Engine) -> None:
        # the others' last cases belong to it
        idist.barrier()
        if idist.get_rank() == 0:
            self._write()

    def _write(self) -> None:
        write_index(self.output_dir)
        self._written = time.monotonic()


def write_index(output_dir: str | os.PathLike) -> None:
    """
    Write ``<output_dir>/index.html``, a table of all ``<case>/<case>_report.json`` there, of this run or of those that
    it resumes: picture, name, modalities, metrics, warnings and time of each case. The columns sort on a click.
    """
    root = Path(output_dir)
    records = []
    for path in sorted(root.glob("*/*_report.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            page = path.with_suffix(".html").relative_to(root).as_posix()
            records.append({**record, "page": quote(page)})
        except ValueError:
            warnings.warn(f"{path.name} is not valid JSON: its case is left out of the index. Fuse it again.")
    metrics = list(dict.fromkeys(name for record in records for name in record["metrics"]))
    page = render("index.html", records=records, metrics=metrics, failed=any(root.glob("failed*.csv")))
    with replacing(root / "index.html") as temporary:
        temporary.write_text(page, encoding="utf-8")

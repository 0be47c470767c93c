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
How much of the time that fusing a folder takes is spent in the network?

Runs the bundle's inference workflow over generated volumes, loading, panels, reports and writing included, in a process
that has not used the GPU before, as users run it; kernels that are compiled at first use lie on disk from another run.
In the network means from a case's arrival to its fused image, copies to the GPU included. The rest is divided into
waiting for the next case, handing over what is to be written (measuring it for the report included), waiting until all
is written, and what surrounds these. Shares are of the time since the network was there: until then, the first cases
are loaded meanwhile. Writes `inference_overlap.md` and prints it:

    python benchmarks/inference_overlap.py --output_dir eval/overlap
    python benchmarks/inference_overlap.py --output_dir eval/overlap --report False --compile True
    python benchmarks/inference_overlap.py --output_dir eval/overlap --device cpu --cases 4 --size "[48,48,32]"

Whatever else is given overrides the bundle's configs. Folders are in the page cache, which generating them has filled.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fire
import torch
from ignite.engine import Engine, Events
from measuring import BUNDLE, machine, markdown, phantom_folder, write_results
from monai.bundle import ConfigWorkflow
from monai.engines import IterationEvents

BUILDING = "network built, not counted"
FIRST = "network, first case"
PARTS = (BUILDING, FIRST, "network", "waiting for cases", "handing over", "last cases written", "end")


class Stopwatch:
    """Ignite handler that adds up the seconds of a run by part."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._last = time.perf_counter()

    def attach(self, engine: Engine) -> None:
        """
        Args:
            engine: one of MONAI's evaluators.
        """
        for event, part in (
            (Events.GET_BATCH_STARTED, "handing over"),
            (Events.GET_BATCH_COMPLETED, "waiting for cases"),
            (IterationEvents.FORWARD_COMPLETED, "network"),
            (Events.ITERATION_COMPLETED, "handing over"),
            (Events.COMPLETED, "last cases written"),
        ):
            engine.add_event_handler(event, self._add, part)

    def _add(self, engine: Engine, part: str) -> None:
        if part == "network":
            if engine.state.output["pred"].is_cuda:  # type: ignore[index, call-overload]
                torch.cuda.synchronize()
            part = FIRST if engine.state.iteration == 1 else part
        self.lap(BUILDING if engine.state.iteration == 0 and part == "handing over" else part)

    def lap(self, part: str) -> None:
        """Give the time since the last call to a part."""
        now = time.perf_counter()
        self.seconds[part] += now - self._last
        self._last = now


def fuse(data: Path, output_dir: Path, **overrides: Any) -> dict[str, float]:
    """Seconds by part of a run over a folder."""
    flow = ConfigWorkflow(
        [str(BUNDLE / "configs" / f"{name}.json") for name in ("inference", "volume")],
        workflow_type="infer",
        logging_file=False,
        bundle_root=str(BUNDLE),
        dataset_dir=str(data),
        output_dir=str(output_dir),
        **overrides,
    )
    flow.initialize()
    watch = Stopwatch()
    # before what else follows the network
    flow.parser.get_parsed_content("handlers").insert(0, watch)
    flow.run()
    watch.lap("end")
    flow.finalize()
    return watch.seconds


def main(
    output_dir: str,
    cases: int = 50,
    size: Sequence[int] = (240, 240, 155),
    device: str = "cuda" if torch.cuda.is_available() else "cpu",
    **overrides: Any,
) -> None:
    """
    Args:
        output_dir: folder for the table.
        cases: number of volumes.
        size: of each.
        device: where to run.
        overrides: ids of the bundle's configs, e.g. ``--report False --num_workers 8``.
    """
    where = torch.device(device)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        phantom_folder(folder / "data", size, cases)
        if where.type == "cuda":
            case = next((folder / "data").rglob("*_t2.nii.gz")).parent
            shutil.copytree(case, folder / "first" / case.name)
            process = multiprocessing.get_context("spawn").Process(
                target=fuse, args=(folder / "first", folder / "fused_first"), kwargs={"device": where, **overrides}
            )
            process.start()
            process.join()
        seconds = fuse(folder / "data", folder / "fused", device=where, **overrides)
        written = len(list((folder / "fused").glob("*/*_fused.nii.gz")))
    if written != cases:
        raise RuntimeError(f"{written} of {cases} cases were written.")
    wall = sum(seconds.values()) - seconds[BUILDING]
    rows = [
        [part, f"{s:.2f}", *(["", ""] if part == BUILDING else [f"{s / cases:.3f}", f"{100 * s / wall:.1f} %"])]
        for part, s in [*seconds.items(), ("all", wall)]
    ]
    share = (seconds["network"] + seconds[FIRST]) / wall
    later = seconds["network"] / (wall - seconds[FIRST])
    title = f"{machine(where)}, {os.cpu_count()} cores; {cases} cases of {'x'.join(map(str, size))}"
    settings = ", ".join(f"{key} {value}" for key, value in overrides.items())
    parts = [
        title + (f"; {settings}" if settings else ""),
        markdown(["", "s", "s a case", "share"], rows),
        f"In the network: {100 * share:.1f} %, {100 * later:.1f} % without the first case.",
    ]
    write_results(output_dir, "inference_overlap", parts, {"machine": title, "seconds": seconds, **overrides})


if __name__ == "__main__":
    fire.Fire(main)

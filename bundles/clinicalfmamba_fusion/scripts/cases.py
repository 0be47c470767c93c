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
"""A run over many cases, of which some may fail: list them, go on without those that fail, and tell at the end."""

from __future__ import annotations

import csv
import os
import shutil
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events
from monai.data import Dataset
from monai.engines import IterationEvents, SupervisedEvaluator
from monai.transforms import Transform

from scripts.data import case_name, common_name, dataset_root, find_pairs, replacing
from scripts.dicom_cases import dicom_case, find_dicom_cases
from scripts.dicom_series import is_dicom
from scripts.errors import reason_of
from scripts.writers import CaseWriters

__all__ = ["CaseDataset", "CaseEvaluator", "FinishCased", "find_cases"]

FAILURE = "failure"
FAILED = "failed.csv"
PARTIAL = ".partial"


def find_cases(
    dataset_dir: str | os.PathLike,
    modalities: Sequence[str | Sequence[str]],
    datalist: str | os.PathLike | None = None,
    split: str | None = None,
    input_a: str | os.PathLike | None = None,
    input_b: str | os.PathLike | None = None,
    series: Sequence[str | int | None] = (None, None),
    finished: tuple[str | os.PathLike, str] | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> list[dict]:
    """
    The cases to fuse: the one pair ``input_a`` and ``input_b``, or else all pairs below ``dataset_dir``. Besides what
    `find_pairs` understands, these are folders of DICOM files, named as the modalities, side by side
    (``CASE/T2``, ``CASE/FLAIR``), and if both ``series`` are given every folder directly below ``dataset_dir`` that
    holds DICOM files. DICOM cases are named by a hash.

    Args:
        dataset_dir: folder with the images; without meaning for a single pair.
        modalities: see `find_pairs`, as the next two.
        datalist: see there.
        split: see there.
        input_a: file or folder of the first image; the same as ``input_b`` if it holds both series.
        input_b: file or folder of the second image.
        series: how to choose one series of the first and of the second input, see `select_series`.
        finished: output folder and extension (``".nii.gz"``); cases that have a fused image there are left out.
        rank: number of this process.
        world_size: number of processes; each gets every ``world_size``-th case. They are dealt out before the finished
            ones are left out: what another process finishes meanwhile does not change whose the others are.

    Returns:
        as `find_pairs`; for one of several processes it may be empty.

    Raises:
        FileNotFoundError: when an input does not exist, or as `find_pairs`.
        ValueError: when only one input is given, all cases are finished and one process runs, or as `find_pairs`.
    """
    if input_a is not None or input_b is not None:
        cases = [_single(input_a, input_b, series)]
    else:
        cases = [] if datalist is not None else find_dicom_cases(dataset_root(dataset_dir), modalities, series)
        cases = cases or find_pairs(dataset_dir, modalities, datalist, split, same_shape=False)
    cases = cases[rank::world_size]
    if finished is not None:
        folder, extension = Path(finished[0]), finished[1]
        cases = [c for c in cases if not (folder / c["case"] / f"{c['case']}_fused{extension}").exists()]
        if not cases and world_size == 1:
            raise ValueError(f"All cases in {folder} are finished: set resume to false to fuse them again.")
    return cases


def _single(a: str | os.PathLike | None, b: str | os.PathLike | None, series: Sequence[str | int | None]) -> dict:
    if a is None or b is None:
        raise ValueError("Only one of input_a and input_b is given: give both, or dataset_dir for many pairs.")
    files = [Path(path).expanduser().absolute() for path in (a, b)]
    for name, file in zip(("input_a", "input_b"), files):
        if not file.exists():
            raise FileNotFoundError(f"{name} {file} does not exist: name a file, or a folder of DICOM files.")
        if file.is_dir() and not is_dicom(file):
            raise FileNotFoundError(f"{name} {file} holds no DICOM images: name a file, or a folder of DICOM files.")
    if any(is_dicom(file) for file in files):
        return dicom_case(files[0], files[1], series, "")
    case = case_name(common_name(files))
    return {"image": [str(file) for file in files], "case": case, "subject": case, "task": ""}


class CaseDataset(Dataset):
    """
    Dataset whose items may fail: instead of raising, it gives ``{"case": ..., "failure": reason}``, which
    `CaseEvaluator` writes down. To be loaded in batches of one.
    """

    def _transform(self, index: int) -> Any:
        try:
            return super()._transform(index)
        except Exception as error:
            return {"case": self.data[index]["case"], FAILURE: reason_of(error)}


class CaseEvaluator(SupervisedEvaluator):
    """
    Evaluator that goes on with the next case after one has failed, be it in loading (see `CaseDataset`), in the network
    or in postprocessing. Failed cases stand in ``failed.csv`` (case, reason), from the moment on that they fail.

    Of several processes, each with cases of its own or none, every one has its own file, ``failed_<rank>.csv``, until
    all are through; only then the run ends for any of them, since a launcher stops the others when one fails.

    Args:
        args: as `monai.engines.SupervisedEvaluator`, as is ``kwargs``; the loader has batches of one case.
        output_dir: folder of ``failed.csv``.
        writers: processes that do the same postprocessing, on the CPU, while the network runs on the next cases;
            without them it is done between cases, where the network runs.

    Raises:
        ValueError: when the writers have another postprocessing.
    """

    def __init__(
        self, *args: Any, output_dir: str | os.PathLike, writers: CaseWriters | None = None, **kwargs: Any
    ) -> None:
        self.output_dir = Path(output_dir)
        self.failures: list[tuple[str, str]] = []
        self._writers = writers
        super().__init__(*args, **kwargs)

    def run(self) -> None:  # type: ignore[override]
        """
        Raises:
            RuntimeError: at the end, in every process, when cases have failed in any of them.
        """
        self.failures = []
        self._tidy(FAILED, "failed_*.csv")
        idist.barrier()
        try:
            if self.state.epoch_length:
                super().run()
            else:  # MONAI's engines leave out what the processes do together at the end
                self.fire_event(Events.COMPLETED)
            self._end()
        finally:
            if self._writers is not None:
                # those that have begun end well, also after an interruption
                self._note_written(self._writers.close())
            if idist.get_world_size() == 1:
                self._tidy()

    def _iteration(self, engine: Engine, batchdata: dict[str, Any]) -> dict:
        try:
            if FAILURE not in batchdata:
                return super()._iteration(engine, batchdata)  # type: ignore[arg-type]
            reason = batchdata[FAILURE][0]
        except Exception as error:
            reason = reason_of(error)
        self._note(batchdata["case"][0], reason)
        return {}

    def _register_postprocessing(self, posttrans: Callable) -> None:
        writers = self._writers
        if writers is None:
            super()._register_postprocessing(posttrans)
            return
        if posttrans is not writers.postprocessing:
            raise ValueError("The evaluator's postprocessing is not that of its writers: give both the same one.")
        # before the loader's threads are there
        self.add_event_handler(Events.STARTED, lambda _engine: writers.start())

        @self.on(IterationEvents.MODEL_COMPLETED)
        def _hand_over(engine: Engine) -> None:
            for item, output in zip(engine.state.batch, engine.state.output):  # type: ignore[call-overload, arg-type]
                # the sources are still where they were loaded
                self._note_written(writers.submit(item["case"], {**output, **item}))

        @self.on(Events.EPOCH_COMPLETED)
        def _wait(_engine: Engine) -> None:
            self._note_written(writers.wait())

    def _note_written(self, failures: Sequence[tuple[str, str]]) -> None:
        for case, reason in failures:
            self._note(case, reason)

    def _note(self, case: str, reason: str) -> None:
        self.failures.append((case, reason))
        several = idist.get_world_size() > 1
        self._write(f"failed_{idist.get_rank()}.csv" if several else FAILED, self.failures)

    def _end(self) -> None:
        counts = (self.state.iteration, self.failures)
        everywhere = [counts] * idist.get_world_size()
        if len(everywhere) > 1:
            torch.distributed.all_gather_object(everywhere, counts)
        failures = sorted(failure for _, failed in everywhere for failure in failed)
        if failures and idist.get_rank() == 0:
            self._write(FAILED, failures)
        self._tidy("failed_*.csv")
        idist.barrier()
        if failures:
            (case, reason), number = failures[0], sum(number for number, _ in everywhere)
            raise RuntimeError(
                f"{len(failures)} of {number} cases failed, {self.output_dir / FAILED} lists them; {case}: {reason}"
            )

    def _write(self, name: str, failures: Sequence[tuple[str, str]]) -> None:
        with replacing(self.output_dir / name) as temporary, open(temporary, "w", newline="") as stream:
            csv.writer(stream, lineterminator="\n").writerows([("case", "reason"), *failures])

    def _tidy(self, *patterns: str) -> None:
        """Remove what is not finished, and the files of these names; one process does that for all."""
        if idist.get_rank() == 0:
            shutil.rmtree(self.output_dir / PARTIAL, ignore_errors=True)
            for pattern in patterns:
                for file in self.output_dir.glob(pattern):
                    file.unlink()


class FinishCased(Transform):
    """
    Last step of a case: move what `SaveImaged` has written below ``<output_dir>/.partial`` to ``output_dir``, so that a
    fused image is there if and only if it is complete and everything else of its case is, too.

    Args:
        output_dir: folder of the case folders.
        case_key: key of the name of the case.
    """

    def __init__(self, output_dir: str | os.PathLike, case_key: str = "case") -> None:
        self.output_dir = Path(output_dir)
        self.case_key = case_key

    def __call__(self, data: Mapping[Hashable, Any]) -> Mapping[Hashable, Any]:
        case = str(data.get(self.case_key, ""))
        partial = self.output_dir / PARTIAL / case
        for file in sorted(partial.glob("*")) if case else ():
            (self.output_dir / case).mkdir(parents=True, exist_ok=True)
            os.replace(file, self.output_dir / case / file.name)
        return data

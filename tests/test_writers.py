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

import os
import signal
import time
from pathlib import Path

import pytest
import torch
from monai.data import MetaTensor

from scripts.writers import CaseWriters


class Save:
    """Writes an item as text, or does what the item says."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, item: dict) -> None:
        if item.get("do") == "fail":
            raise ValueError("no\nsuch thing")
        if item.get("do") == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(item.get("seconds", 0))
        image = item["image"]
        (self.folder / item["case"]).write_text(f"{image.meta['name']} {float(image.sum())}")


def item(case: str, **more: object) -> dict:
    return {"case": case, "image": MetaTensor(torch.ones(1, 2, 3), meta={"name": f"image {case}"}), **more}


@pytest.fixture
def writers(tmp_path: Path):
    writers = CaseWriters(Save(tmp_path), 2)
    yield writers
    writers.close()


def written(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_all_is_written_and_failures_are_told(writers: CaseWriters, tmp_path: Path) -> None:
    failures = []
    for case in "abcdefg":
        failures += writers.submit(case, item(case, do="fail" if case in "bf" else None))
    failures += writers.wait()
    assert sorted(failures) == [("b", "no such thing"), ("f", "no such thing")]
    assert written(tmp_path) == set("acdeg")
    assert (tmp_path / "c").read_text() == "image c 6.0"


def test_few_wait_at_a_time(writers: CaseWriters) -> None:
    writers.start()
    started = time.monotonic()
    for case in "abcdef":
        writers.submit(case, item(case, seconds=0.3))
    # two at a time: of six, at most three are left when the last one is handed over
    assert time.monotonic() - started > 0.5


def test_what_has_begun_is_finished(writers: CaseWriters, tmp_path: Path) -> None:
    for case in "ab":
        writers.submit(case, item(case, seconds=1))
    time.sleep(0.5)
    assert writers.close() == [] and written(tmp_path) == {"a", "b"}
    # and they start again
    assert writers.submit("c", item("c")) == [] and writers.wait() == []
    assert written(tmp_path) == {"a", "b", "c"}


def test_a_process_that_is_killed_fails_its_case_only(writers: CaseWriters, tmp_path: Path) -> None:
    writers.submit("a", item("a", do="die"))
    ((case, reason),) = writers.wait()
    assert case == "a" and reason.startswith("BrokenProcessPool: ")
    assert writers.submit("b", item("b")) == [] and writers.wait() == []
    assert written(tmp_path) == {"b"}


def test_what_can_not_be_handed_over_fails(writers: CaseWriters) -> None:
    writers.submit("a", item("a", more=lambda: None))
    ((case, reason),) = writers.wait()
    assert case == "a" and "pickle" in reason

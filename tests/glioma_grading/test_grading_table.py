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
import importlib.util
import json
import sys

import pytest
from grading import COMMON, ROOT, TRAIN_3D

from scripts.predictions import read_predictions, write_predictions

PATH = ROOT / "benchmarks" / "grading_table.py"
SMALL = {**COMMON, **TRAIN_3D, "num_folds": 2, "scale_range": [0.0, 0.0, 0.0]}


@pytest.fixture(scope="module")
def table():
    path = list(sys.path)
    spec = importlib.util.spec_from_file_location("grading_table", PATH)
    module = importlib.util.module_from_spec(spec)
    # so that another process finds it
    sys.modules["grading_table"] = module
    spec.loader.exec_module(module)
    sys.path[:] = path
    return module


@pytest.fixture
def in_this_process(table, monkeypatch):
    """The runs one after the other: starting processes takes longer than what they do here."""

    class Done:
        def __init__(self, error):
            self.error = error

        def result(self):
            if self.error:
                raise self.error

        def exception(self):
            return self.error

    class Pool:
        def __init__(self, *args, **kwargs):
            pass

        __enter__ = lambda self: self  # noqa: E731
        __exit__ = lambda *args: None  # noqa: E731

        def submit(self, function, *args, **kwargs):
            try:
                function(*args, **kwargs)
            except Exception as error:
                return Done(error)
            return Done(None)

    class Waited:
        def __init__(self, running):
            self.done = list(running)

    monkeypatch.setattr(table, "process_pool", Pool)
    monkeypatch.setattr(table, "wait", lambda running, return_when: Waited(running))


def test_run_and_report(table, in_this_process, few_patients, tmp_path, capsys):
    settings = {"rows": ["t2", "average"], "dims": [2], **SMALL, "slices_per_case": 1}
    table.run(str(few_patients), str(tmp_path), **settings)
    predictions = read_predictions(tmp_path / "predictions.csv")
    assert len(predictions) == 2 * 18 and {p["fold"] for p in predictions} == {0, 1}
    assert not list(tmp_path.glob("runs/*/*/*/*.pt")), "weights are not kept"
    # nothing is done twice, and a row is added without the others
    written = {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/*/*/*/predictions.csv")}
    table.run(str(few_patients), str(tmp_path), **settings | {"rows": ["t2", "average", "flair"]})
    assert {path: path.stat().st_mtime_ns for path in written} == written
    assert len(read_predictions(tmp_path / "predictions.csv")) == 3 * 18

    table.report(str(few_patients), str(tmp_path), samples=20)
    found = json.loads((tmp_path / "table.json").read_text())["table"]
    rows = [("-", "floor: acquisition"), ("-", "floor: joint histogram"), ("2", "average"), ("2", "flair"), ("2", "t2")]
    assert [(entry["dims"], entry["row"]) for entry in found] == rows
    assert all(entry["patients"] == 18 for entry in found)
    # the grade of the generated patients is visible in the histogram, and not in how they were acquired
    assert found[0]["metrics"]["auc"] < 0.9 and found[1]["metrics"]["auc"] > 0.95
    assert "| 2 | none | flair |" in capsys.readouterr().out
    with open(tmp_path / "table.csv", newline="") as stream:
        assert float(list(csv.DictReader(stream))[0]["auc"]) == found[0]["metrics"]["auc"]
    assert (tmp_path / "curves_2d_none.png").stat().st_size > 10000


def test_verdicts_and_tests_against_fused(table, few_patients, tmp_path, capsys):
    """A fused row that is right, a T2 row that is wrong: the table says so."""
    assert table.find_cases(few_patients)
    table.grading_splits(str(few_patients), folds_file=tmp_path / "folds.json", num_folds=2)
    folds = table.read_folds(tmp_path / "folds.json")
    fold = {case: k for k in (0, 1) for case in folds[k]["test"]}
    records = []
    for index, case in enumerate(table.find_cases(few_patients)):
        for row, right in (("fused", 0.9), ("t2", 0.1)):
            for seed in (0, 1):
                probability = (right if case["label"] else 1 - right) + 0.001 * index + 0.02 * seed
                key = {"dims": "2", "matching": "none", "row": row, "fold": fold[case["case"]], "seed": seed}
                record = {"case": case["case"], "subject": case["subject"], "label": case["label"]}
                records.append({**key, **record, "probability": probability, "threshold": 0.5, "slices": "brain"})
    write_predictions(tmp_path / "predictions.csv", records)
    table.report(str(few_patients), str(tmp_path), samples=20)
    report = json.loads((tmp_path / "table.json").read_text())
    entries = {entry["row"]: entry for entry in report["table"]}
    assert entries["fused"]["metrics"]["auc"] == 1 and entries["t2"]["metrics"]["auc"] == 0
    assert entries["t2"]["patients"] == 18, "seeds are averaged"
    assert entries["t2"]["against_fused"]["2D"] == {"difference": -1, "p": 0}
    lines = {line.split(": ", 1)[1] for line in report["goals"]}
    assert {"fused 1.000 above 0.90 (0.900): reached", "fused 1.000 above t2 (0.000): reached"} <= lines
    assert any(line.startswith("fused 1.000 above the histogram floor") for line in lines)


def test_what_can_not_be_run(table, in_this_process, few_patients, tmp_path):
    with pytest.raises(ValueError, match="No row 't1': there are t2, flair"):
        table.run(str(few_patients), str(tmp_path), rows=["t1"])
    systems = {"broken": {"source": "t2", "network_def#layers": "nonsense"}}
    settings = {"rows": ["t2", "broken"], "systems": systems, "dims": [2], "slices_per_case": 1}
    record = {"case": "a", "subject": "a", "label": 1, "probability": 0.5, "threshold": 0.5, "slices": "brain"}
    write_predictions(tmp_path / "runs" / "2d_none" / "broken" / "fold1_seed0" / "predictions.csv", [record])
    with pytest.raises(RuntimeError, match="1 of 3 runs failed: runs/2d_none/broken/fold0_seed0"):
        table.run(str(few_patients), str(tmp_path), **SMALL | settings)
    assert len(list(tmp_path.glob("runs/*/t2/*/predictions.csv"))) == 2, "the others are kept"
    table.run(str(few_patients), str(tmp_path), **SMALL | settings | {"rows": ["flair"], "minutes": 0})
    assert not list(tmp_path.glob("runs/*/flair"))


@pytest.mark.slow
def test_several_processes(few_patients, tmp_path):
    import subprocess

    from grading import ENVIRONMENT

    words = [sys.executable, str(PATH), "run", "--dataset_dir", few_patients, "--output_dir", tmp_path, "--jobs", "2"]
    for key, value in (SMALL | {"rows": ["t2"], "dims": [2, 3]}).items():
        words += [f"--{key}", value]
    result = subprocess.run([str(word) for word in words], env=ENVIRONMENT, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-3000:]
    assert len(read_predictions(tmp_path / "predictions.csv")) == 2 * 18

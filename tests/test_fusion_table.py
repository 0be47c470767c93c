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
import multiprocessing
import os
import shutil
import sys
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest
import torch
from PIL import Image

from scripts.checkpoints import LastEpochSaver
from scripts.phantom import write
from scripts.splits import disjoint_draws

pytestmark = pytest.mark.usefixtures("one_thread")

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
# with refinement it would start from nearly the maximum, and beat rules from the first epoch on
SMALL = {"label": "small", "refinement": 0, "network_def#channels": [8, 8, 16], "network_def#latent_depth": 1}
SETTINGS = {"device": "cpu", "num_workers": 0, "crop_size": [32, 32], "max_epochs": 1, "steps": 5, "draws": 2}


def load(name):
    path = list(sys.path)
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(BENCHMARKS))
    spec.loader.exec_module(module)
    sys.path[:] = path
    return module


@pytest.fixture(scope="module")
def table():
    return load("fusion_table")


@pytest.fixture(scope="module")
def slices(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slices")
    write(str(folder), kind="slices", subjects=3, shape=(40, 48))
    return str(folder)


def times(folder):
    return {path: path.stat().st_mtime_ns for path in folder.glob("mri-ct/*/*/result.json")}


def test_run_fail_and_go_on(table, slices, tmp_path, capsys):
    rows = ["copy_mri", "average", "optimum_joint", "broken", "small"]
    more = {"small": SMALL, "broken": {"label": "broken", "network_def#scan": "spiral"}}
    with pytest.raises(RuntimeError, match=r"2 of 10 runs failed: broken/draw0 \(ValueError: .*spiral"):
        table.main("mri-ct", slices, str(tmp_path), rows, more, **SETTINGS)
    written = times(tmp_path)
    assert len(written) == 8, "one system that fails does not lose the others"
    assert "- broken/draw1 (ValueError" in (tmp_path / "mri-ct.md").read_text()

    # nothing is done twice; the weights of one system may be loaded for another of the same network
    loaded = {"again": str(tmp_path / "mri-ct" / "small" / "draw{draw}" / "model.pt")}
    rows, more = ["copy_mri", "average", "optimum_joint", "small", "again"], {
        "small": SMALL,
        "again": {**SMALL, "label": "again"},
    }
    capsys.readouterr()
    table.main("mri-ct", slices, str(tmp_path), rows, more, loaded, **SETTINGS)
    assert {path: when for path, when in times(tmp_path).items() if path in written} == written
    assert not list(tmp_path.glob("mri-ct/again/*/model.pt"))
    text = capsys.readouterr().out
    assert f"- again: {loaded['again']}" in text and "## Failed" not in text

    report = json.loads((tmp_path / "mri-ct.json").read_text())
    found = {row["name"]: row for row in report["table"]}
    assert list(found) == ["copy_mri", "average", "optimum_joint", "small", "again"]
    assert report["settings"]["pairs"] == [{"training": 6, "test": 3}] * 2
    assert found["again"]["mean"] == found["small"]["mean"], "each draw has its own weights"
    assert found["copy_mri"]["mean"]["psnr"] is None and found["copy_mri"]["mean_rank"] is None
    assert found["average"]["mean_rank"] < found["small"]["mean_rank"], "one epoch beats nothing"
    assert found["small"]["parameters"] > 0 and found["small"]["seconds_per_image"] > 0
    assert found["optimum_joint"]["share"]["joint loss"] == pytest.approx(1)
    # mean and deviation are those of the two draws, the files of the bundle's evaluation
    values = []
    for draw in (0, 1):
        cases = json.loads((tmp_path / f"mri-ct/average/draw{draw}/metrics.json").read_text())["cases"]
        values.append(sum(case["qabf"] for case in cases) / len(cases))
    assert found["average"]["mean"]["qabf"] == pytest.approx(sum(values) / 2)
    assert found["average"]["std"]["qabf"] == pytest.approx(abs(values[0] - values[1]) / 2**0.5)
    with open(tmp_path / "mri-ct.csv", newline="") as stream:
        assert float(list(csv.DictReader(stream))[1]["qabf"]) == found["average"]["mean"]["qabf"]
    with Image.open(tmp_path / "mri-ct.png") as picture:
        assert picture.width == 6 * 228 - 4 and picture.height > 2 * 3 * 224 and len(picture.getcolors(256)) > 50

    with pytest.raises(ValueError, match="was written for other data, .* max_epochs"):
        table.main("mri-ct", slices, str(tmp_path), rows, more, **SETTINGS | {"max_epochs": 2})


def test_a_stopped_training_goes_on(table, slices, tmp_path, monkeypatch):
    save, epochs = LastEpochSaver.__call__, []

    def save_and_stop(self, engine):
        save(self, engine)
        epochs.append(engine.state.epoch)
        if len(epochs) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(LastEpochSaver, "__call__", save_and_stop)
    settings = {"dataset_dir": slices, "modalities": ["MRI", "CT"], "device": "cpu", "num_workers": 0}
    settings["crop_size"] = [32, 32]
    with pytest.raises(KeyboardInterrupt):
        table.train(tmp_path, SMALL, 2, (), 3, **settings)
    assert table.train(tmp_path, SMALL, 2, (), 3, **settings).is_file()
    assert epochs == [1, 2, 3] and not (tmp_path / "checkpoint_last.pt").exists()


def test_two_stages_share_the_epochs(table, tmp_path, monkeypatch):
    stages = []

    class Flow:
        def __init__(self, configs, spatial_dims, **settings):
            stages.append((configs[1], settings["max_epochs"], settings.get("autoencoder_checkpoint")))
            self.parser = self

        def run(self):
            pass

        def get_parsed_content(self, name):
            return torch.nn.Linear(1, 1)

    monkeypatch.setattr(table, "workflow", Flow)
    table.train(tmp_path, table.SYSTEMS["mrscfusion"], 2, (), 5)
    before = str(tmp_path / "before" / "model.pt")
    assert stages == [("baselines/mrscfusion_autoencoder", 2, None), ("baselines/mrscfusion", 3, before)]


def test_volumes_and_slices_of_them(table, tmp_path):
    write(str(tmp_path / "volumes"), kind="volumes", subjects=2, shape=(24, 24, 16))
    settings = {**SETTINGS, "systems": ["average", "maximum"], "pictures": 1, "batch_size": 2}
    for task in ("t2-flair-3d", "t2-flair-2d"):
        table.main(task, str(tmp_path / "volumes"), str(tmp_path / "out"), **settings, slices_per_case=2)
        report = json.loads((tmp_path / "out" / f"{task}.json").read_text())
        count = 1 if task == "t2-flair-3d" else 2
        assert report["settings"]["pairs"] == [{"training": count, "test": count}] * 2
        assert (tmp_path / "out" / f"{task}.png").is_file()
    assert len(list((tmp_path / "out").glob("t2-flair-2d/slices2/**/flair/*.png"))) == 4


def test_unknown_names(table, slices, tmp_path):
    with pytest.raises(ValueError, match="No task 'ct-mri': there are mri-ct"):
        table.main("ct-mri", slices, str(tmp_path))
    with pytest.raises(ValueError, match="No system 'densefuse'"):
        table.main("mri-ct", slices, str(tmp_path), ["densefuse"])
    with pytest.raises(ValueError, match="Two systems are labelled 'average'"):
        table.main("mri-ct", slices, str(tmp_path), ["average", "other"], {"other": {"label": "average"}})
    assert not list(tmp_path.iterdir())


def result(value, **metrics):
    means = dict.fromkeys(sys.modules["fusion_summary"].RANKED, value) | metrics
    return {"parameters": 1, "seconds_per_image": 0.1, "device": "cpu", "metrics": means}


def test_ranks_shares_and_goals(table):
    rows = {name: {"label": name.upper(), "kind": kind} for name, kind in (("copy_mri", "frame"), ("a", "system"))}
    rows |= {name: {} for name in ("average", "maximum", "clinicalfmamba", "late")} | {
        "optimum_joint": {"kind": "frame"}
    }
    results = {
        "copy_mri": [result(0.99), result(0.99)],
        "average": [result(0.4), result(0.4)],
        "maximum": [result(0.5, ssim=0.3), result(0.5, ssim=0.3)],
        "a": [result(0.5, ssim=0.3, vif=0.9), result(0.5, ssim=0.3, vif=0.9)],
        "clinicalfmamba": [result(0.6), result(0.8, fmi_edge=0.2)],
        "late": [result(1.0)],
        "optimum_joint": [result(0.8), result(0.8)],
    }
    found = {row["name"]: row for row in table.summarise(rows, results)}
    ours = found["clinicalfmamba"]
    assert ours["mean"]["qabf"] == pytest.approx(0.7) and ours["std"]["qabf"] == pytest.approx(0.02**0.5)
    # ranks: FMI 0.4 beside 0.4 of average, VIF 0.7 behind 0.9, the other six first
    assert ours["mean_rank"] == pytest.approx((6 * 1 + 2 + 3.5) / 8)
    assert found["a"]["mean_rank"] == pytest.approx((3.5 + 5 * 2.5 + 1 + 1.5) / 8)
    assert found["copy_mri"]["mean_rank"] is None and found["late"]["mean_rank"] is None, "not the same test"
    assert ours["share"]["ssim"] == pytest.approx(0.75) and found["average"]["share"]["ssim"] == 0
    assert ours["share"]["joint loss"] == pytest.approx(0.75), "linear in three metrics that all are at 0.75"
    lines = table.verdicts(list(found.values()))
    assert lines[0] == "SSIM 0.7000, average 0.4000: reached, by 0.3000"
    assert lines[3] == "FMI 0.4000, maximum 0.5000: MISSED by 0.1000"
    assert lines[-1].endswith("MISSED by 0.2000")
    note = {"pairs": [{"training": 4, "test": 2}] * 2, "split_by": "slice", "max_epochs": 2, "steps": 3}
    text = table.to_markdown(list(found.values()), lines, "mri-ct", note)
    line = next(line for line in text.splitlines() if line.startswith("| clinicalfmamba |"))
    assert "| **0.700 ± 0.141** |" in line and "| <u>0.700 ± 0.141</u> |" in line, "best, and second in VIF"
    assert "| COPY_MRI | 0.990 ± 0.000 |" in text, "copies bear no marks"
    assert "single slices at random" in text and "- late: 1 of 2" in text


def test_ties_and_missing_values(table):
    rank, marked = sys.modules["fusion_summary"].rank, sys.modules["fusion_summary"].marked
    assert rank([0.5, None, 0.7, 0.5]) == [2.5, 4, 1, 2.5]
    assert marked(["a", "b", "c", "d"], [2.0, None, 2.0, 1.0]) == ["**a**", "b", "**c**", "<u>d</u>"]


def test_window_where_they_differ(table):
    images = torch.zeros(3, 40, 30, dtype=torch.uint8)
    images[1, 25:30, 4:8] = 200
    left, upper, right, lower = sys.modules["fusion_picture"].window_of_difference(images)
    assert left <= 25 and right >= 30 and upper <= 4 and lower >= 8 and right <= 40


@pytest.mark.parametrize("subjects, expected", [(12, 3), (3, 3), (2, 2)])
def test_disjoint_draws(subjects, expected):
    pairs = [{"subject": f"s{i // 4}", "task": "PET", "case": i} for i in range(4 * subjects)]
    found = disjoint_draws(pairs, 3, 0.2)
    assert len(found) == expected
    tested = [{pair["subject"] for pair in splits["test"]} for splits in found]
    assert all(tested) and sum(map(len, tested)) == len(set.union(*tested))
    for splits, subjects_tested in zip(found, tested):
        assert splits["training"] and not subjects_tested & {pair["subject"] for pair in splits["training"]}
        assert len(splits["training"]) + len(splits["test"]) == len(pairs)


def test_draws_that_can_not_be():
    pairs = [{"subject": "s", "case": i} for i in range(10)]
    with pytest.raises(ValueError, match="1 subject\\(s\\) are too few"):
        disjoint_draws(pairs)
    assert [len(splits["test"]) for splits in disjoint_draws(pairs, split_by="slice")] == [2, 2, 2]
    with pytest.raises(ValueError, match="6 disjoint tests of 0.2"):
        disjoint_draws(pairs, draws=6)
    with pytest.raises(ValueError, match="split_by"):
        disjoint_draws(pairs, split_by="patient")


def test_lists_to_train_on(slices, tmp_path):
    """What the tables test does not train, in any task and dimension."""
    shutil.copytree(slices, tmp_path / "slices")
    for name, other in (("MRI", "MRI"), ("SPECT", "PET")):
        shutil.copytree(Path(slices) / "MRI-PET" / other, tmp_path / "slices" / "MRI-SPECT" / name)
    write(str(tmp_path / "brats"), kind="volumes", subjects=6, shape=(24, 24, 12))
    stacks = tmp_path / "stacks"
    stacks.mkdir()
    for name, other in (("mri", "t2"), ("pet", "flair")):
        first, *_ = sorted((tmp_path / "brats").rglob(f"*_{other}.nii.gz"))
        (stacks / f"7_{name}.nii.gz").write_bytes(first.read_bytes())
    main = load("training_lists").main
    main(str(tmp_path / "slices"), str(tmp_path / "brats"), str(tmp_path / "lists"), str(stacks), volumes_tested=0.3)
    tasks = {"slices": {"mri-ct", "mri-spect", "mri-pet", "t2-flair-2d"}, "volumes": {"t2-flair-3d", "mri-pet"}}
    for name, expected in tasks.items():
        lists = json.loads((tmp_path / "lists" / f"{name}.json").read_text())
        trained = {(pair["task"], pair["subject"]) for pair in lists["training"]}
        assert {task for task, _ in trained} == expected
        assert len({pair["case"] for pair in lists["training"]}) == len(lists["training"])
        for task in expected - {"mri-pet"} if name == "volumes" else expected:
            draw = json.loads((tmp_path / "lists" / task / "draw0.json").read_text())
            assert draw["test"] and not {pair["subject"] for pair in draw["test"]} & {subject for _, subject in trained}


def test_processes(monkeypatch):
    """Loaders start there as elsewhere, and one that dies is not the end of the others."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))  # where the process looks, too
    from processes import in_new_process

    assert in_new_process(multiprocessing.get_start_method) == multiprocessing.get_start_method()
    with pytest.raises(BrokenProcessPool):
        in_new_process(os._exit, 1)
    assert in_new_process(os.getpid) != os.getpid()

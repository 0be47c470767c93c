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
"""Many cases, several processes: none is lost or fused twice, also where a run is killed and started again."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from custom_nets.nets import build_network
from scripts.cases import find_cases
from scripts.phantom import write

BUNDLE = Path(__file__).resolve().parents[1] / "bundles" / "clinicalfmamba_fusion"
CONFIGS = [str(BUNDLE / "configs" / f"{name}.json") for name in ("inference", "multi_gpu_inference")]
SETTINGS = {"network_def#channels": [8, 8, 16], "network_def#latent_depth": 1, "num_workers": 0}
MODALITIES = ["MRI", ["CT", "PET"]]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"]
# a machine with GPUs is made to look like one without
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
ENVIRONMENT |= {"CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    folder = tmp_path_factory.mktemp("archive")
    write(str(folder), kind="slices", subjects=4, shape=(48, 48))
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    settings = {"channels": (8, 8, 16), "latent_depth": 1, "refinement": 4}
    path = tmp_path_factory.mktemp("weights") / "model.pt"
    torch.save(build_network("clinicalfmamba", spatial_dims=2, **settings).state_dict(), path)
    return path


def start(**settings):
    words = [*TORCHRUN, "monai.bundle", "run", "--bundle_root", BUNDLE, "--config_file", CONFIGS]
    for key, value in (SETTINGS | settings).items():
        words += [f"--{key}", value]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([str(word) for word in words], env=ENVIRONMENT, **pipes)


def run(**settings):
    process = start(**settings)
    _, errors = process.communicate(timeout=300)
    return process.returncode, errors


def finished(folder):
    return {path.parent.name: path.stat().st_mtime_ns for path in folder.glob("*/*_fused.png")}


@pytest.mark.parametrize("world_size", [1, 2, 5, 30])
def test_every_case_belongs_to_one_process(archive, world_size):
    expected = [case["case"] for case in find_cases(archive, MODALITIES)]
    shards = [find_cases(archive, MODALITIES, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert sorted(case["case"] for shard in shards for case in shard) == sorted(expected) and len(expected) == 24
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


def test_what_others_finish_does_not_change_the_shares(archive, tmp_path):
    """The second process may look for its cases when the first one has finished some, or some of an earlier run."""
    cases = [case["case"] for case in find_cases(archive, MODALITIES)]
    for case in [*cases[0:6:2], cases[1]]:
        (tmp_path / case).mkdir()
        (tmp_path / case / f"{case}_fused.png").touch()
    settings = {"finished": (tmp_path, ".png"), "world_size": 2}
    shards = [[c["case"] for c in find_cases(archive, MODALITIES, rank=rank, **settings)] for rank in (0, 1)]
    assert shards == [cases[6::2], cases[3::2]]
    for case in cases[1::2]:
        (tmp_path / case).mkdir(exist_ok=True)
        (tmp_path / case / f"{case}_fused.png").touch()
    assert find_cases(archive, MODALITIES, rank=1, **settings) == []


@pytest.mark.slow
def test_killed_and_started_again(archive, weights, tmp_path):
    out = tmp_path / "out"
    settings = {"dataset_dir": archive, "checkpoint": weights, "output_dir": out}
    process = start(**settings)
    while len(finished(out)) < 5:
        assert process.poll() is None, process.communicate()[1][-3000:]
        time.sleep(0.02)
    # one process gets no chance to tidy up; torchrun stops the other one
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGKILL)
    process.communicate()
    assert process.returncode != 0
    before = finished(out)
    assert 5 <= len(before) < 24, "killed too late to show anything"

    code, errors = run(**settings, resume=True)
    assert code == 0, errors[-3000:]
    after = finished(out)
    assert len(after) == 24 and before.items() <= after.items(), "what was finished is not fused again"
    for case in after:
        assert json.loads((out / case / f"{case}_report.json").read_text())["case"] == case
    page = (out / "index.html").read_text()
    assert all(f"{case}/{case}_report.html" in page for case in after)
    assert not (out / ".partial").exists() and not list(out.glob("*.csv"))

    assert run(**settings, resume=True)[0] == 0, "nothing to do is no failure"
    assert finished(out) == after


@pytest.mark.slow
def test_failures_of_all_processes_are_told_when_all_are_through(archive, weights, tmp_path):
    """Three cases for two processes, of which each has one that fails; the first one's fails at once."""
    out = tmp_path / "out"
    cases = find_cases(archive, MODALITIES)[:3]
    for case in cases[:2]:
        broken = tmp_path / f"{case['case']}.png"
        broken.write_bytes(Path(case["image"][0]).read_bytes()[:60])
        case["image"] = [str(broken), case["image"][1]]
    datalist = tmp_path / "cases.json"
    datalist.write_text(json.dumps({"test": [{"image": case["image"]} for case in cases]}))
    settings = {"dataset_dir": tmp_path, "datalist": datalist, "split": "test"}
    code, errors = run(**settings, checkpoint=weights, output_dir=out)
    assert code != 0 and f"RuntimeError: 2 of 3 cases failed, {out / 'failed.csv'} lists them" in errors
    with open(out / "failed.csv", newline="") as stream:
        assert len(list(csv.DictReader(stream))) == 2
    assert len(finished(out)) == 1 and len(list(out.glob("*.csv"))) == 1
    assert "failed.csv" in (out / "index.html").read_text()


@pytest.mark.slow
def test_more_processes_than_cases(archive, weights, tmp_path):
    pair = {f"input_{k}": archive / "MRI-CT" / name / "1001.png" for k, name in (("a", "MRI"), ("b", "CT"))}
    code, errors = run(**pair, checkpoint=weights, output_dir=tmp_path / "out")
    assert code == 0, errors[-3000:]
    assert list(finished(tmp_path / "out")) == ["1001"] and (tmp_path / "out" / "index.html").is_file()

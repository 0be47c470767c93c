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
import json
import os
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
import torch
from dicom_samples import IDENTITY, affine_lps, write_series
from ignite.engine import Engine, Events
from monai.bundle import ConfigWorkflow
from PIL import Image

from scripts import compiling
from scripts.cases import CaseDataset, FinishCased, find_cases
from scripts.dataloader import EarlyDataLoader
from scripts.phantom import digital_brain, write
from scripts.writers import CaseWriters

BUNDLE = Path(__file__).resolve().parents[1] / "bundles" / "clinicalfmamba_fusion"
NETWORK = {"network_def#channels": [8, 8, 16], "network_def#latent_depth": 1, "device": "cpu", "num_workers": 0}
SHAPE = (32, 32, 18)


@pytest.fixture(autouse=True)
def untouched_process(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    """Of small networks that have learned nothing."""
    folder, paths = tmp_path_factory.mktemp("weights"), {}
    for dims, names in ((2, ["inference"]), (3, ["inference", "volume"])):
        flow = workflow(names)
        paths[dims] = str(folder / f"{dims}.pt")
        torch.save(flow.network_def.state_dict(), paths[dims])
    return paths


def workflow(names: list[str], **overrides: object) -> ConfigWorkflow:
    files = [str(BUNDLE / "configs" / f"{name}.json") for name in names]
    flow = ConfigWorkflow(
        files, logging_file=False, workflow_type="infer", bundle_root=str(BUNDLE), **{**NETWORK, **overrides}
    )
    flow.initialize()
    return flow


def fuse(weights: dict[int, str], output_dir: Path, dims: int = 3, **overrides: object) -> None:
    names = ["inference", "volume"] if dims == 3 else ["inference"]
    overrides = {key: str(value) if isinstance(value, Path) else value for key, value in overrides.items()}
    flow = workflow(names, checkpoint=weights[dims], output_dir=str(output_dir), **overrides)
    flow.run()
    flow.finalize()


def write_patient(folder: Path, **values: object) -> None:
    brain = digital_brain(SHAPE, seed=2)
    affine = affine_lps((6, 6, 6), (-90, -90, -40), np.diag([1, 1, 1]))
    for number, name in ((1, "t2"), (2, "flair")):
        pixels = (brain[name] * 1000).astype(np.uint16)
        write_series(folder / name.upper(), pixels, number=number, affine=affine, SeriesDescription=name, **values)


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def failures(folder: Path) -> dict[str, str]:
    with open(folder / "failed.csv", newline="") as stream:
        return {row["case"]: row["reason"] for row in csv.DictReader(stream)}


def test_one_dicom_pair(weights: dict, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd) -> None:
    write_patient(tmp_path / "Secret Name")
    inputs = {f"input_{key}": tmp_path / "Secret Name" / name for key, name in (("a", "T2"), ("b", "FLAIR"))}
    fuse(weights, tmp_path / "out", **inputs)
    (folder,) = (path for path in (tmp_path / "out").iterdir() if path.is_dir())
    case = folder.name
    written = names(folder)
    assert {f"{case}_fused.nii.gz", f"{case}_panel.png", f"{case}_dicom/0001.dcm"} <= set(written)
    assert len([name for name in written if name.endswith(".dcm")]) == SHAPE[2]
    logged = caplog.text + "".join(capfd.readouterr())
    secrets = [value for keyword, value in IDENTITY.items() if len(value) > 1 and "UID" not in keyword]
    assert not any(secret in logged or secret in " ".join(written) for secret in secrets)
    assert b"SECRET" not in (folder / f"{case}_panel.png").read_bytes()
    pages = (folder / f"{case}_report.html").read_text() + (tmp_path / "out" / "index.html").read_text()
    assert not any(secret in pages for secret in secrets)
    assert nib.load(folder / f"{case}_fused.nii.gz").shape == SHAPE


def test_one_pair_of_pictures(weights: dict, tmp_path: Path) -> None:
    write(str(tmp_path / "in"), kind="slices", subjects=1, shape=(48, 48))
    inputs = {f"input_{k}": tmp_path / "in" / "MRI-PET" / name / "1001.png" for k, name in (("a", "MRI"), ("b", "PET"))}
    fuse(weights, tmp_path / "out", dims=2, **inputs)
    assert {"1001/1001_fused.png", "1001/1001_panel.png"} <= set(names(tmp_path / "out"))
    assert Image.open(tmp_path / "out" / "1001" / "1001_fused.png").mode == "RGB"


def write_volumes(folder: Path, *cases: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for case in cases:
        for name in ("t2", "flair"):
            image = nib.Nifti1Image(
                np.random.RandomState(len(name)).rand(*SHAPE).astype(np.float32), np.diag([2, 2, 2, 1])
            )
            nib.save(image, folder / f"{case}_{name}.nii.gz")


@pytest.mark.parametrize("num_writers", [0, 2])
def test_failing_cases_are_listed_and_the_others_finished(weights: dict, tmp_path: Path, num_writers: int) -> None:
    write_volumes(tmp_path / "in", "a", "b", "c", "d")
    # what only loading, and what only writing finds
    truncated = tmp_path / "in" / "b_flair.nii.gz"
    image = nib.load(tmp_path / "in" / "a_flair.nii.gz")
    nib.save(image, tmp_path / "whole.nii")
    truncated.unlink()
    (tmp_path / "in" / "b_flair.nii").write_bytes((tmp_path / "whole.nii").read_bytes()[:-5000])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "c").write_text("a file where the folder of the case should be")
    (tmp_path / "out" / "failed.csv").write_text("of an earlier run")
    with pytest.raises(RuntimeError) as error:
        fuse(weights, tmp_path / "out", dataset_dir=tmp_path / "in", report=False, num_writers=num_writers)
    cause = error.value.__cause__ or error.value
    assert "2 of 4 cases failed, " in str(cause) and "failed.csv lists them; b: " in str(cause)
    failed = failures(tmp_path / "out")
    assert list(failed) == ["b", "c"]
    assert "b_flair.nii can not be read as an image" in failed["b"]
    assert names(tmp_path / "out") == sorted(
        ["c", "failed.csv", *(f"{c}/{c}_{end}" for c in "ad" for end in ("fused.nii.gz", "panel.png"))]
    )

    # a second run does what is missing, and leaves no list where nothing fails
    (tmp_path / "out" / "c").unlink()
    (tmp_path / "in" / "b_flair.nii").write_bytes((tmp_path / "whole.nii").read_bytes())
    before = (tmp_path / "out" / "a" / "a_fused.nii.gz").stat().st_mtime_ns
    settings = {"resume": True, "report": False, "num_writers": num_writers}
    fuse(weights, tmp_path / "out", dataset_dir=tmp_path / "in", **settings)
    assert names(tmp_path / "out") == sorted(f"{c}/{c}_{end}" for c in "abcd" for end in ("fused.nii.gz", "panel.png"))
    assert (tmp_path / "out" / "a" / "a_fused.nii.gz").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="are finished: set resume to false"):
        find_cases(tmp_path / "in", ["t2", "flair"], finished=(tmp_path / "out", ".nii.gz"))


def test_processes_start_before_the_network_is_built(
    weights: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_volumes(tmp_path / "in", "a", "b")
    settings = {"checkpoint": weights[3], "output_dir": str(tmp_path / "out"), "dataset_dir": str(tmp_path / "in")}
    flow = workflow(["inference", "volume"], num_writers=1, **settings | {"num_workers": 1})
    called = []
    for place in (EarlyDataLoader, CaseWriters):
        start = place.start
        monkeypatch.setattr(place, "start", lambda self, start=start: (called.append(type(self)), start(self)))
    prepare = compiling.prepare_network
    monkeypatch.setattr(compiling, "prepare_network", lambda **kwargs: called.append("network") or prepare(**kwargs))
    flow.run()
    assert called[:3] == [EarlyDataLoader, CaseWriters, "network"]
    assert {"a/a_fused.nii.gz", "b/b_fused.nii.gz"} <= set(names(tmp_path / "out"))


def test_no_postprocessing_is_passed_over(tmp_path: Path) -> None:
    write_volumes(tmp_path, "a")
    flow = workflow(["inference", "volume"], num_writers=1, dataset_dir=str(tmp_path))
    flow.parser["evaluator#postprocessing"] = "$monai.transforms.Compose([])"
    with pytest.raises(RuntimeError) as error:
        flow.parser.get_parsed_content("evaluator")
    assert "postprocessing is not that of its writers" in str(error.value.__cause__)


def test_what_is_being_written_when_a_run_is_interrupted_is_finished(weights: dict, tmp_path: Path) -> None:
    write_volumes(tmp_path / "in", *"abcdef")
    settings = {"checkpoint": weights[3], "output_dir": str(tmp_path / "out"), "dataset_dir": str(tmp_path / "in")}
    flow = workflow(["inference", "volume"], num_writers=1, **settings)

    def interrupt(_engine: Engine) -> None:
        raise KeyboardInterrupt

    flow.evaluator.add_event_handler(Events.ITERATION_COMPLETED(once=4), interrupt)
    with pytest.raises(KeyboardInterrupt):
        flow.run()
    written = names(tmp_path / "out")
    finished = [case for case in "abcdef" if f"{case}/{case}_fused.nii.gz" in written]
    # each of them with all its files, and nothing of the others
    assert 1 <= len(finished) <= 4 and finished == list("abcdef")[: len(finished)]
    ends = ("fused.nii.gz", "panel.png", "report.html", "report.json")
    assert [name for name in written if "/" in name] == sorted(f"{c}/{c}_{end}" for c in finished for end in ends)
    # what the network took is told by each case's own report
    seconds = [json.loads((tmp_path / f"out/{c}/{c}_report.json").read_text())["seconds"] for c in finished]
    assert len(set(seconds)) == len(finished) and min(seconds) > 0

    fuse(weights, tmp_path / "out", dataset_dir=tmp_path / "in", resume=True, num_writers=1)
    assert len(names(tmp_path / "out")) == 6 * 4 + 1
    assert (tmp_path / "out" / "index.html").read_text().count("_report.html") >= 6


def test_the_command_ends_with_a_code_and_the_reason(tmp_path: Path, weights: dict) -> None:
    write_volumes(tmp_path, "a")
    words = [sys.executable, "-m", "monai.bundle", "run", "--bundle_root", BUNDLE]
    words += ["--config_file", BUNDLE / "configs" / "inference.json", "--checkpoint", weights[2]]
    settings = {"input_a": "a_t2.nii.gz", "input_b": "a_flair.nii.gz", "output_dir": "out", **NETWORK}
    for key, value in settings.items():
        words += [f"--{key}", value]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [str(word) for word in words], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].endswith(
        "a_t2.nii.gz is a volume of 32 x 32 x 18: add configs/volume.json as the last config."
    )
    assert list(failures(tmp_path / "out")) == ["a"]


def test_folders_of_dicom_files(tmp_path: Path) -> None:
    for number, name in enumerate(("Meier", "Schmidt")):
        write_patient(tmp_path / name, SeriesInstanceUID=None)
        for folder in ("T2", "FLAIR"):
            give_uid(tmp_path / name / folder, f"1.2.{number}.{len(folder)}")
    cases = find_cases(tmp_path, ["T2", "FLAIR"])
    assert [case["image"] for case in cases] == [
        [str(tmp_path / name / folder) for folder in ("T2", "FLAIR")] for name in ("Meier", "Schmidt")
    ]
    assert len({case["case"] for case in cases}) == 2
    assert not any(
        name in case["case"] + case["subject"] + case["task"] for case in cases for name in ("Meier", "Schmidt")
    )
    # studies that hold all series, told apart by their description
    studies = find_cases(tmp_path, ["MRI", "CT"], series=("t2", "flair"))
    assert [case["image"] for case in studies] == [[str(tmp_path / name)] * 2 for name in ("Meier", "Schmidt")]


def give_uid(folder: Path, uid: str) -> None:
    for file in folder.iterdir():
        image = pydicom.dcmread(file)
        image.SeriesInstanceUID = uid
        image.save_as(file)


def test_bad_inputs(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.nii").write_text("")
    with pytest.raises(ValueError, match="Only one of input_a and input_b is given"):
        find_cases(tmp_path, [], input_a=tmp_path / "a.nii")
    with pytest.raises(FileNotFoundError, match=r"input_b .*b\.nii does not exist"):
        find_cases(tmp_path, [], input_a=tmp_path / "a.nii", input_b=tmp_path / "b.nii")
    with pytest.raises(FileNotFoundError, match="input_b .*empty holds no DICOM images"):
        find_cases(tmp_path, [], input_a=tmp_path / "a.nii", input_b=tmp_path / "empty")


def test_volumes_may_differ_in_shape_and_pictures_not(tmp_path: Path) -> None:
    write_volumes(tmp_path / "volumes", "a")
    nib.save(nib.Nifti1Image(np.zeros((5, 6, 7), np.uint8), np.eye(4)), tmp_path / "volumes" / "a_flair.nii.gz")
    assert len(find_cases(tmp_path / "volumes", ["t2", "flair"])) == 1
    for name, size in (("MRI", 8), ("CT", 9)):
        (tmp_path / "slices" / name).mkdir(parents=True)
        Image.fromarray(np.zeros((8, size), np.uint8)).save(tmp_path / "slices" / name / "1.png")
    with pytest.raises(ValueError, match="differ in shape"):
        find_cases(tmp_path / "slices", ["MRI", "CT"])


def test_a_failing_item_is_an_item() -> None:
    def transform(item: dict) -> dict:
        if item["case"] == "b":
            raise RuntimeError("out of\nmemory")
        return item

    dataset = CaseDataset([{"case": "a"}, {"case": "b"}], transform)
    assert dataset[0] == {"case": "a"}
    assert dataset[1] == {"case": "b", "failure": "RuntimeError: out of memory"}


def test_finishing_moves_what_is_complete(tmp_path: Path) -> None:
    (tmp_path / ".partial" / "a").mkdir(parents=True)
    (tmp_path / ".partial" / "a" / "a_fused.png").write_text("new")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "a_fused.png").write_text("old")
    item = {"case": "a", "pred": 1}
    assert FinishCased(tmp_path)(item) == item
    assert (tmp_path / "a" / "a_fused.png").read_text() == "new"
    # as in a server that saves by itself
    assert FinishCased(tmp_path)({"pred": 1}) == {"pred": 1}

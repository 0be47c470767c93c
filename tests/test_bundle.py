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
import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import monai
import nibabel as nib
import numpy as np
import pytest
import torch
from ignite.engine import Events
from monai.bundle import ConfigWorkflow
from PIL import Image
from skimage.color import rgb2lab
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from scripts.phantom import write

ROOT = Path(__file__).resolve().parents[1]
BUNDLE = ROOT / "bundles" / "clinicalfmamba_fusion"
CONFIGS = BUNDLE / "configs"
VOLUME_SHAPE = (24, 20, 22)
AFFINE = np.array([[0, -1.5, 0, 30], [0.1, 0, 1, -20], [2, 0, 0, 5], [0, 0, 0, 1]], dtype=np.float64)

NETWORK = {"network_def#channels": [8, 8, 16], "network_def#latent_depth": 1}
COMMON = {**NETWORK, "device": "cpu", "num_workers": 0}
# crops that are not square: turned by 90 degrees, they must still make a batch
TRAIN = {**COMMON, "max_epochs": 2, "val_interval": 1, "crop_size": [32, 24]}
TRAIN_3D = {**TRAIN, "crop_size": [16, 24, 8], "batch_size": 2, "max_epochs": 1}

EVALUATION = ["ssim", *json.loads((CONFIGS / "evaluate.json").read_text())["validate#additional_metrics"]]

ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}


def arguments(configs, overrides, folder=CONFIGS):
    files = [f"{Path(folder) / name}.json" for name in configs]
    words = ["--config_file", files[0] if len(files) == 1 else str(files)]
    for key, value in overrides.items():
        words += [f"--{key}", str(value)]
    return words


def run_command(*configs, cwd, run_id=None, folder=CONFIGS, launch=("-m",), check=True, **overrides):
    """What users type: ``python -m monai.bundle run [ID] --config_file ... --key value``."""
    words = [sys.executable, *launch, "monai.bundle", "run", *([run_id] if run_id else [])]
    command = words + arguments(configs, overrides, folder)
    result = subprocess.run(command, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=600)
    if check:
        assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return result


def workflow(*configs, kind="train", run_id="run", **overrides):
    files = [str(CONFIGS / f"{name}.json") for name in configs]
    flow = ConfigWorkflow(
        files, logging_file=False, workflow_type=kind, run_id=run_id, bundle_root=str(BUNDLE), **overrides
    )
    flow.initialize()
    return flow


def run(*configs, **overrides):
    flow = workflow(*configs, **overrides)
    flow.run()
    flow.finalize()
    return flow


def read_metrics(folder):
    with open(folder / "metrics.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    return rows, json.loads((folder / "metrics.json").read_text())


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def fused_files(case, extension=".png"):
    return [f"{case}/{case}_{end}" for end in (f"fused{extension}", "panel.png", "report.html", "report.json")]


def check_report(folder, case, weights):
    record = json.loads((folder / case / f"{case}_report.json").read_text())
    slices = record["inputs"][0]["shape"] == [48, 48]
    assert list(record["metrics"]) == ["ssim", "psnr", *(["qabf"] if slices else []), "scd", "entropy"]
    assert record["seconds"] > 0 and record["warnings"] == []
    assert record["provenance"]["weights"]["sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert f"{case}/{case}_report.html" in (folder / "index.html").read_text()


def assert_same(a, b):
    """Equal to the last bit, whatever they hold."""
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert_same(x, y)
    else:
        assert a == b


@pytest.fixture(autouse=True)
def untouched_process(monkeypatch):
    """Workflows in this process change what the other tests should find as it was; many threads make them slow."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    monai.utils.set_determinism(seed=None)


@pytest.fixture(scope="module")
def slices(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slices")
    write(str(folder), kind="slices", subjects=4, shape=(48, 48))
    return folder


@pytest.fixture(scope="module")
def volumes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("volumes")
    write(str(folder), kind="volumes", subjects=3, shape=VOLUME_SHAPE)
    for path in folder.rglob("*.nii.gz"):
        image = nib.load(path)
        nib.save(nib.Nifti1Image(np.asarray(image.dataobj), AFFINE), path)
    return folder


@pytest.fixture(scope="module")
def trained(slices, tmp_path_factory):
    """From the bundle's folder, all paths relative."""
    folder = tmp_path_factory.mktemp("run") / "new"
    run_command(
        "train", cwd=BUNDLE, run_id="training", folder="configs", dataset_dir=slices, output_dir=folder, **TRAIN
    )
    return folder


@pytest.fixture(scope="module")
def trained_3d(volumes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run_3d") / "new"
    run("train", "volume", run_id="training", dataset_dir=str(volumes), output_dir=str(folder), **TRAIN_3D)
    return folder


def check_run(folder, tags):
    files = [file for file in names(folder) if not file.startswith("events.out.tfevents")]
    assert files == ["checkpoint_last.pt", "datalist.json", "model.pt"], "a file is missing, or a temporary one is left"
    datalist = json.loads((folder / "datalist.json").read_text())
    subjects = [{pair["subject"] for pair in datalist[split]} for split in ("training", "validation", "test")]
    assert all(subjects) and sum(map(len, subjects)) == len(set.union(*subjects))

    found = set()
    for path in folder.glob("events.out.tfevents*"):
        events = EventAccumulator(str(path)).Reload()
        found |= set(events.Tags()["scalars"] + events.Tags()["images"])
    assert tags <= found

    # nothing but tensors, numbers and strings
    last = torch.load(folder / "checkpoint_last.pt", weights_only=True)
    assert set(last) == {"model", "optimizer", "lr_scheduler", "trainer", "scaler", "best_model"}
    best = torch.load(folder / "model.pt", weights_only=True)
    assert best.keys() == last["model"].keys() and all(isinstance(v, torch.Tensor) for v in best.values())
    assert last["best_model"]["best_metric_epoch"] > 0
    return last


class TestSlices:
    def test_train(self, trained):
        last = check_run(trained, {"train_loss", "val_ssim", "val_psnr", "input_0_HW_0", "input_0_HW_1", "output_HW_0"})
        assert last["trainer"]["max_epochs"] == 2 and last["trainer"]["iteration"] == 2 * 3

    def test_evaluate_from_another_folder(self, slices, trained, tmp_path):
        run_command(
            "train",
            "evaluate",
            cwd=tmp_path,
            bundle_root=BUNDLE,
            dataset_dir=slices,
            output_dir="evaluated",
            datalist=trained / "datalist.json",
            checkpoint=trained / "model.pt",
            **COMMON,
        )
        folder = tmp_path / "evaluated"
        assert names(folder) == ["datalist.json", "metrics.csv", "metrics.json"]
        rows, report = read_metrics(folder)
        cases = sorted(pair["case"] for pair in json.loads((trained / "datalist.json").read_text())["test"])
        assert [row["case"] for row in rows] == [*cases, "mean", "std"] and len(cases) == 6
        assert list(rows[0]) == ["case", *EVALUATION]
        assert report["metrics"]["ssim"]["n"] == 6 and -1 < report["metrics"]["ssim"]["mean"] < 1

    def test_infer_from_another_folder(self, slices, trained, tmp_path):
        run_command(
            "inference",
            cwd=tmp_path,
            bundle_root=BUNDLE,
            dataset_dir=slices,
            output_dir="fused",
            checkpoint=trained / "model.pt",
            **COMMON,
        )
        cases = [f"MRI-{k}_{subject}{n:03d}" for k in ("CT", "PET") for subject in (1, 2, 3, 4) for n in (1, 2, 3)]
        assert names(tmp_path / "fused") == sorted(
            ["index.html", *(file for case in cases for file in fused_files(case))]
        )
        check_report(tmp_path / "fused", cases[0], trained / "model.pt")
        for case in cases:
            with Image.open(tmp_path / "fused" / case / f"{case}_fused.png") as picture:
                assert picture.size == (48, 48)
                assert picture.mode == ("RGB" if "PET" in case else "L")
                # written as loaded: not transposed, and the colour is the partner's
                if "PET" in case:
                    fused, pet = np.asarray(picture, int), slices / "MRI-PET" / "PET" / f"{case[-4:]}.png"
                    partner = np.asarray(Image.open(pet), int)
                    warmth = [np.ravel(i[..., 0] - i[..., 2]) for i in (fused, partner)]
                    assert np.corrcoef(warmth)[0, 1] > 0.5

    def test_last_checkpoint_and_other_names_of_a_run(self, slices, trained, tmp_path):
        run(
            "train",
            "evaluate",
            run_id="training",
            dataset_dir=str(slices),
            output_dir=str(tmp_path),
            checkpoint=str(trained / "checkpoint_last.pt"),
            split="validation",
            **COMMON,
        )
        assert len(read_metrics(tmp_path)[1]["cases"]) == 6

    def test_sixteen_bit_pictures(self, slices, trained, tmp_path):
        overrides = {"checkpoint": str(trained / "model.pt"), "output_dtype": "uint16", "modalities": ["MRI", "CT"]}
        run("inference", kind="infer", dataset_dir=str(slices), output_dir=str(tmp_path), **COMMON, **overrides)
        picture = np.asarray(Image.open(tmp_path / "1001" / "1001_fused.png"))
        assert picture.max() > 255, "16 bits were asked for"

    def test_cielab_and_no_report(self, slices, trained, tmp_path):
        overrides = {"checkpoint": str(trained / "model.pt"), "modalities": ["MRI", "PET"], "report": False}
        written = {}
        for space in ("ycbcr", "cielab"):
            folder, overrides["colour_space"] = tmp_path / space, space
            run("inference", kind="infer", dataset_dir=str(slices), output_dir=str(folder), **COMMON, **overrides)
            assert names(folder)[:3] == ["1001/1001_fused.png", "1001/1001_panel.png", "1002/1002_fused.png"]
            written[space] = np.asarray(Image.open(folder / "1001" / "1001_fused.png"), int)
        assert np.abs(written["ycbcr"] - written["cielab"]).max() > 8

    def test_a_run_without_validation(self, slices, tmp_path):
        overrides = TRAIN | {"max_epochs": 1, "val_fraction": 0, "cache_rate": 0.0}
        run("train", dataset_dir=str(slices), output_dir=str(tmp_path), **overrides)
        assert (tmp_path / "checkpoint_last.pt").exists()


class TestVolumes:
    def test_train(self, trained_3d):
        check_run(trained_3d, {"train_loss", "val_ssim", "val_psnr", "input_0_HWD/image/0", "output_HWD/image"})

    def test_evaluate(self, volumes, trained_3d, tmp_path):
        overrides = {"checkpoint": str(trained_3d / "model.pt"), "output_dir": str(tmp_path)}
        run("train", "volume", "evaluate", dataset_dir=str(volumes), **COMMON, **overrides)
        held_out = json.loads((trained_3d / "datalist.json").read_text())["test"]
        assert [case["case"] for case in read_metrics(tmp_path)[1]["cases"]] == [pair["case"] for pair in held_out]

    @pytest.mark.parametrize("dtype", ["uint8", "int16", "float32"])
    def test_infer(self, volumes, trained_3d, tmp_path, dtype):
        overrides = {"checkpoint": str(trained_3d / "model.pt"), "output_dtype": dtype, "output_dir": str(tmp_path)}
        if dtype == "float32":  # in windows
            overrides |= {"max_voxels": 4000, "roi_size": [16, 16, 16]}
        run("inference", "volume", kind="infer", dataset_dir=str(volumes), **COMMON, **overrides)
        cases = [f"phantom_{subject:03d}" for subject in (1, 2, 3)]
        assert names(tmp_path) == sorted(
            ["index.html", *(file for case in cases for file in fused_files(case, ".nii.gz"))]
        )
        check_report(tmp_path, cases[0], trained_3d / "model.pt")
        fused = nib.load(tmp_path / cases[0] / f"{cases[0]}_fused.nii.gz")
        assert fused.shape == VOLUME_SHAPE and fused.get_data_dtype() == dtype
        np.testing.assert_allclose(fused.affine, AFFINE, atol=1e-5)
        peak = np.iinfo(dtype).max if dtype != "float32" else 1
        values = fused.get_fdata()
        assert 0 <= values.min() < values.max() <= peak and values.max() > 0.02 * peak

    def test_colour_map(self, volumes, trained_3d, tmp_path):
        overrides = {"checkpoint": str(trained_3d / "model.pt"), "colormap": "hot", "output_dir": str(tmp_path)}
        run("inference", "volume", kind="infer", dataset_dir=str(volumes), **COMMON, **overrides)
        case = tmp_path / "phantom_001"
        grey, colour = (nib.load(case / f"phantom_001_fused{end}.nii.gz") for end in ("", "_colour"))
        assert grey.shape == VOLUME_SHAPE and colour.shape == (*VOLUME_SHAPE, 3)
        np.testing.assert_allclose(colour.affine, AFFINE, atol=1e-5)
        # the colours are as light to the eye as the grey volume, which stays as it is
        pictures = colour.get_fdata(), np.repeat(grey.get_fdata()[..., None], 3, axis=-1)
        lightness = [rgb2lab(picture / 255)[..., 0] for picture in pictures]
        assert np.abs(lightness[0] - lightness[1]).max() < 1 and np.ptp(pictures[0], axis=-1).max() > 30

    @pytest.mark.slow
    def test_as_commands(self, volumes, tmp_path):
        shared = {"bundle_root": BUNDLE, "dataset_dir": volumes}
        run_command("train", "volume", cwd=tmp_path, output_dir="run", **shared, **TRAIN_3D)
        check_run(tmp_path / "run", {"val_ssim"})
        shared |= {"checkpoint": "run/model.pt", **COMMON}
        run_command("train", "volume", "evaluate", cwd=tmp_path, run_id="training", output_dir="evaluated", **shared)
        assert len(read_metrics(tmp_path / "evaluated")[1]["cases"]) == 1
        run_command("inference", "volume", cwd=tmp_path, output_dir="fused", **shared)
        assert len(names(tmp_path / "fused")) == 3 * 4 + 1


class TestProperties:
    CONFIGS = {"train": ["train"], "evaluate": ["train", "evaluate"], "infer": ["inference"]}

    @pytest.mark.parametrize("volume", [False, True], ids=["2d", "3d"])
    @pytest.mark.parametrize("task", CONFIGS)
    def test_nothing_is_missing(self, slices, volumes, tmp_path, task, volume):
        flow = workflow(
            *self.CONFIGS[task],
            *(["volume"] if volume else []),
            kind="infer" if task == "infer" else "train",
            dataset_dir=str(volumes if volume else slices),
            output_dir=str(tmp_path),
            **COMMON,
        )
        assert flow.check_properties() == []
        for key in ("run", "training") if task != "infer" else ("run",):
            assert key in flow.parser

    def test_network_without_data(self, tmp_path):
        """As `monai.bundle.load` does."""
        shutil.copytree(BUNDLE, tmp_path / "fusion", ignore=shutil.ignore_patterns("__pycache__", "models"))
        flow = ConfigWorkflow(str(tmp_path / "fusion" / "configs" / "train.json"), logging_file=False, **NETWORK)
        flow.initialize()
        weights = flow.network_def.state_dict()
        (tmp_path / "fusion" / "models").mkdir()
        torch.save(weights, tmp_path / "fusion" / "models" / "model.pt")
        settings = {key.split("#")[1]: value for key, value in NETWORK.items()}
        loaded = monai.bundle.load("fusion", bundle_dir=tmp_path, net_override=settings)
        assert_same(dict(loaded.state_dict()), dict(weights))

    @pytest.mark.parametrize(
        ("configs", "stride", "units"),
        [
            (["train"], 8, 4),
            (["train", "volume"], 8, 1),
            (["train", "paper_loss"], 4, 0),
            (["train", "paper_loss", "volume"], 8, 0),
            (["inference", "volume", "volume_without_refinement"], 8, 0),
        ],
    )
    def test_networks_of_the_configs(self, configs, stride, units):
        flow = workflow(*configs, kind="infer" if "inference" in configs else "train", **NETWORK)
        network = flow.parser.get_parsed_content("network_def")
        found = 0 if network.refinement is None else len(network.refinement.units)
        assert (network.stride, found) == (stride, units) and (network.head is None) == (units > 0)

    @pytest.mark.parametrize("n", [1, 2])
    @pytest.mark.parametrize("volume", [False, True], ids=["2d", "3d"])
    def test_input_and_output_are_as_described(self, volume, n):
        meta = json.loads((CONFIGS / "metadata.json").read_text())
        overrides = {"_meta_#network_data_format": meta["volume_data_format"]} if volume else {}
        files = [str(CONFIGS / f"{name}.json") for name in (["train", "volume"] if volume else ["train"])]
        monai.bundle.verify_net_in_out(
            "network_def", str(CONFIGS / "metadata.json"), files, device="cpu", n=n, **overrides
        )


class TestResume:
    """A run that is stopped in the middle of an epoch and resumed ends like one that was not, to the last bit."""

    def start(self, slices, folder, **overrides):
        flow = workflow("train", dataset_dir=str(slices), output_dir=str(folder), **(TRAIN | overrides))
        return flow, flow.parser.get_parsed_content("train#trainer")

    @pytest.mark.parametrize("num_workers", [0, 1])
    def test_resumed_run(self, slices, tmp_path, num_workers):
        settings = {"max_epochs": 4, "num_workers": num_workers, "cache_rate": 0.5}
        whole, parts = tmp_path / "whole", tmp_path / "parts"
        flow, _ = self.start(slices, whole, **settings)
        flow.run()

        def interrupt(_):
            raise KeyboardInterrupt

        flow, trainer = self.start(slices, parts, **settings)
        trainer.add_event_handler(Events.ITERATION_COMPLETED(once=2 * trainer.state.epoch_length + 1), interrupt)
        with pytest.raises(KeyboardInterrupt):
            flow.run()
        last = str(parts / "checkpoint_last.pt")
        assert torch.load(last, weights_only=True)["trainer"]["iteration"] == 2 * trainer.state.epoch_length
        flow, _ = self.start(slices, parts, **settings, resume=last)
        flow.run()

        for name in ("checkpoint_last.pt", "model.pt"):
            expected, resumed = (torch.load(folder / name, weights_only=True) for folder in (whole, parts))
            assert_same(resumed, expected)
        assert expected.keys() and torch.load(last, weights_only=True)["trainer"]["iteration"] == 4 * 3

    def test_seeds_differ(self, slices, tmp_path):
        weights = []
        for seed in (0, 1):
            flow, _ = self.start(slices, tmp_path, max_epochs=1, seed=seed)
            flow.run()
            weights.append(torch.load(tmp_path / "model.pt", weights_only=True)["refinement.head.weight"])
        assert not torch.equal(*weights)


ONE_OF_ONE = """
import sys
import torch
from monai.bundle import ConfigWorkflow

for files, overrides in eval(sys.argv[1]):
    flow = ConfigWorkflow(files, workflow_type="train", **overrides)
    flow.initialize()
    assert torch.distributed.get_backend() == "gloo"
    assert flow.check_properties() == []
    flow.run()
    print("network:", type(flow.parser.get_parsed_content("network")).__name__)
    flow.finalize()
    assert not torch.distributed.is_initialized()
"""


class TestSeveralProcesses:
    """What runs on several GPUs, on several CPU processes."""

    TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m")
    # the device is for the configs to choose; a machine with GPUs is made to look like one without
    SHARED = {**NETWORK, "num_workers": 0}

    @pytest.fixture(autouse=True)
    def cpu_only(self, monkeypatch):
        monkeypatch.setitem(ENVIRONMENT, "CUDA_VISIBLE_DEVICES", "")

    def train(self, *configs, **overrides):
        settings = {key: value for key, value in TRAIN.items() if key != "device"} | overrides
        return run_command("train", *configs, "multi_gpu_train", launch=self.TORCHRUN, **settings)

    def test_one_of_one(self, slices, tmp_path):
        shared = {"bundle_root": str(BUNDLE), "dataset_dir": str(slices), **self.SHARED}
        train = {
            **shared,
            "output_dir": str(tmp_path / "run"),
            "max_epochs": 1,
            "val_interval": 1,
            "crop_size": [24, 32],
        }
        evaluate = {**shared, "output_dir": str(tmp_path / "eval"), "checkpoint": str(tmp_path / "run" / "model.pt")}
        flows = []
        for configs, overrides in (
            (("train", "multi_gpu_train"), train),
            (("train", "evaluate", "multi_gpu_evaluate"), evaluate),
        ):
            flows.append(([str(CONFIGS / f"{name}.json") for name in configs], overrides))
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(s.getsockname()[1])}
        process = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", **address}
        command = [sys.executable, "-c", ONE_OF_ONE, repr(flows)]
        result = subprocess.run(
            command, cwd=tmp_path, env=ENVIRONMENT | process, capture_output=True, text=True, timeout=600
        )
        assert result.returncode == 0, result.stderr[-4000:]
        assert re.findall("network: (.*)", result.stdout) == ["DistributedDataParallel", "ClinicalFMamba"]
        check_run(tmp_path / "run", {"val_ssim"})
        assert len(read_metrics(tmp_path / "eval")[1]["cases"]) == 6

    @pytest.mark.slow
    def test_train_and_resume(self, slices, tmp_path):
        shared = {"cwd": tmp_path, "bundle_root": BUNDLE, "dataset_dir": slices, "output_dir": "run"}
        result = self.train(run_id="training", max_epochs=1, **shared)
        assert result.stdout.count("Epoch[1] Metrics -- ") == 1, "one process tells"
        last = check_run(tmp_path / "run", {"train_loss", "val_ssim", "output_HW_0"})
        # 12 pairs: each process has 6 of them, in batches of 4
        assert last["trainer"] == {"epoch_length": 2, "iteration": 2, "max_epochs": 1}
        assert not any(key.startswith("module.") for key in last["model"])
        self.train(max_epochs=2, resume="run/checkpoint_last.pt", **shared)
        assert check_run(tmp_path / "run", {"val_ssim"})["trainer"]["iteration"] == 4

    @pytest.mark.slow
    def test_evaluate_as_one_process_does(self, slices, trained, tmp_path):
        shared = {"bundle_root": BUNDLE, "dataset_dir": slices, "checkpoint": trained / "model.pt", **self.SHARED}
        # an uneven share: five cases for two
        datalist = json.loads((trained / "datalist.json").read_text())
        del datalist["test"][2]
        (tmp_path / "five.json").write_text(json.dumps(datalist))
        shared |= {"datalist": "five.json", "cwd": tmp_path}
        run_command("train", "evaluate", output_dir="one", **shared)
        run_command("train", "evaluate", "multi_gpu_evaluate", launch=self.TORCHRUN, output_dir="two", **shared)
        (rows, _), (expected, _) = read_metrics(tmp_path / "two"), read_metrics(tmp_path / "one")
        assert [row["case"] for row in rows] == [row["case"] for row in expected] and len(rows) == 5 + 2
        for row, other in zip(rows, expected):
            for key in EVALUATION:
                assert float(row[key]) == pytest.approx(float(other[key]), rel=1e-4, abs=1e-6)

    @pytest.mark.slow
    def test_fewer_cases_than_processes(self, volumes, tmp_path):
        """One to train on, one to validate with, one to test: two processes must neither wait for ever nor differ."""
        shared = {"cwd": tmp_path, "bundle_root": BUNDLE, "dataset_dir": volumes}
        self.train("volume", output_dir="run", **shared, **{key: TRAIN_3D[key] for key in ("crop_size", "max_epochs")})
        check_run(tmp_path / "run", {"val_ssim"})
        result = run_command(
            "train",
            "volume",
            "evaluate",
            "multi_gpu_evaluate",
            launch=self.TORCHRUN,
            check=False,
            output_dir="evaluated",
            checkpoint="run/model.pt",
            **shared,
            **self.SHARED,
        )
        assert result.returncode != 0 and "no enough data to be split into 2 partitions" in result.stderr


class TestMistakes:
    """The last line that a failed command prints says what is wrong, and names the file."""

    def last_line(self, capsys, *configs, **overrides):
        with pytest.raises(RuntimeError) as error:
            run(*configs, **(COMMON | overrides))
        capsys.readouterr()
        sys.excepthook(error.type, error.value, error.tb)
        lines = capsys.readouterr().err.splitlines()
        assert lines[0] == "Traceback (most recent call last):" and len(lines) > 3
        return lines[-1]

    @pytest.fixture
    def copy(self, slices, tmp_path):
        shutil.copytree(slices, tmp_path / "data")
        return tmp_path / "data"

    @pytest.mark.parametrize("configs", [("train", "evaluate"), ("inference",)], ids="-".join)
    def test_no_checkpoint(self, slices, tmp_path, configs):
        out = tmp_path / "out"
        result = run_command(
            *configs,
            cwd=tmp_path,
            check=False,
            bundle_root=BUNDLE,
            dataset_dir=slices,
            output_dir=out,
            checkpoint="no/model.pt",
            **COMMON,
        )
        assert result.returncode == 1
        assert result.stderr.splitlines()[-1] == (
            "FileNotFoundError: Checkpoint no/model.pt does not exist: name the file that a training run has written."
        )
        # known before anything is looked for or loaded
        assert not out.exists() and "Loading dataset" not in result.stderr

    def test_nothing_to_resume(self, capsys, slices, tmp_path):
        out, resume = tmp_path / "out", str(tmp_path / "checkpoint_last.pt")
        line = self.last_line(capsys, "train", dataset_dir=str(slices), output_dir=str(out), resume=resume)
        assert line.startswith(f"FileNotFoundError: Checkpoint {resume} does not exist") and not out.exists()

    @pytest.mark.parametrize("configs", [("train",), ("inference",)], ids="-".join)
    def test_empty_folder(self, capsys, trained, tmp_path, configs):
        (tmp_path / "data").mkdir()
        overrides = {"dataset_dir": str(tmp_path / "data"), "checkpoint": str(trained / "model.pt")}
        line = self.last_line(capsys, *configs, output_dir=str(tmp_path / "out"), **overrides)
        assert line.startswith(f"FileNotFoundError: No pairs of MRI and CT or SPECT or PET below {tmp_path / 'data'}:")
        assert names(tmp_path) == []

    @pytest.mark.parametrize("configs", [("train",), ("inference",)], ids="-".join)
    def test_no_partner(self, capsys, copy, trained, tmp_path, configs):
        partner = copy / "MRI-CT" / "CT" / "2001.png"
        partner.unlink()
        overrides = {"dataset_dir": str(copy), "checkpoint": str(trained / "model.pt")}
        line = self.last_line(capsys, *configs, output_dir=str(tmp_path / "out"), **overrides)
        assert line.startswith(f"ValueError: {copy / 'MRI-CT' / 'MRI' / '2001.png'} has no partner, {partner} does not")

    @pytest.mark.parametrize("configs", [("train",), ("inference",)], ids="-".join)
    def test_unequal_shapes(self, capsys, copy, trained, tmp_path, configs):
        partner = copy / "MRI-CT" / "CT" / "2001.png"
        Image.new("L", (40, 48)).save(partner)
        overrides = {"dataset_dir": str(copy), "checkpoint": str(trained / "model.pt")}
        line = self.last_line(capsys, *configs, output_dir=str(tmp_path / "out"), **overrides)
        assert line.startswith("ValueError: The images of a pair differ in shape,")
        assert f"{copy / 'MRI-CT' / 'MRI' / '2001.png'} (48, 48) and {partner} (40, 48)" in line

    @pytest.mark.parametrize("split", ["test", "tset"])
    def test_nothing_to_evaluate(self, capsys, slices, trained, tmp_path, split):
        overrides = {"split": split, "test_fraction": 0, "checkpoint": str(trained / "model.pt")}
        line = self.last_line(
            capsys, "train", "evaluate", dataset_dir=str(slices), output_dir=str(tmp_path / "out"), **overrides
        )
        assert line.startswith(f"ValueError: The split '{split}' of {slices} has no pairs, only training (18)")
        assert not (tmp_path / "out").exists()


GUARD = """
import runpy, sys
from importlib.machinery import PathFinder

class OnlyTheBundle:
    # the project's packages from the copy or not at all, however they may be installed here
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] not in ("custom_nets", "scripts"):
            return None
        spec = PathFinder.find_spec(name, path)
        if spec is None or not str(spec.origin).startswith({bundle!r}):
            raise ModuleNotFoundError(f"{{name}} is outside of the bundle", name=name)
        return spec

sys.meta_path.insert(0, OnlyTheBundle())
try:
    import custom_nets
except ModuleNotFoundError:
    print("custom_nets is not installed")
sys.argv[0] = "monai.bundle"
runpy.run_module("monai.bundle", run_name="__main__", alter_sys=True)
"""


def test_the_bundle_alone(slices, trained, tmp_path):
    """Copied with links followed into an empty folder, it needs nothing of this project."""
    bundle, out = tmp_path / "fusion", tmp_path / "out"
    shutil.copytree(BUNDLE, bundle, symlinks=False, ignore=shutil.ignore_patterns("__pycache__"))
    overrides = {"bundle_root": bundle, "dataset_dir": slices, "checkpoint": trained / "model.pt", "output_dir": out}
    (tmp_path / "empty").mkdir()
    command = [sys.executable, "-c", GUARD.format(bundle=str(bundle)), "run"]
    command += arguments(["inference"], overrides | COMMON, bundle / "configs")
    result = subprocess.run(
        command, cwd=tmp_path / "empty", env=ENVIRONMENT, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stderr[-4000:]
    assert "custom_nets is not installed" in result.stdout
    assert len(names(out)) == 4 * 24 + 1


class TestFiles:
    def test_versions_are_the_tested_ones(self):
        pins = re.findall(r"(?m)^([\w-]+)==([\w.]+)", (ROOT / "constraints.txt").read_text())
        meta = json.loads((CONFIGS / "metadata.json").read_text())
        packages = meta["required_packages_version"]
        # the Model Zoo's checks install every one of them, and mamba-ssm needs a compiler for CUDA
        assert "mamba-ssm" not in packages
        packages |= {"monai": meta["monai_version"], "torch": meta["pytorch_version"], "numpy": meta["numpy_version"]}
        assert set(packages.items()) <= set(pins)

    @pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.json")), ids=lambda path: path.stem)
    def test_format(self, path):
        text = path.read_text()
        assert text == json.dumps(json.loads(text), indent=4, ensure_ascii=False) + "\n"

    def test_what_a_bundle_consists_of(self):
        for file in ("LICENSE", "configs/logging.conf", "configs/metadata.json", "docs/data_license.txt"):
            assert (BUNDLE / file).is_file()
        assert os.readlink(BUNDLE / "custom_nets") == "../../custom_nets"
        assert all(path.stat().st_size < 25e6 for path in BUNDLE.rglob("*") if path.is_file()), "the zoo's limit"

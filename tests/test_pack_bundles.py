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
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FUSION, GRADING = "clinicalfmamba_fusion", "glioma_grading"
# Without `site`, Python sees the installed packages by PYTHONPATH only and reads no .pth file: no editable install.
ISOLATED = [sys.executable, "-S", "-P"]
ENVIRONMENT = os.environ | {"PYTHONPATH": sysconfig.get_path("purelib"), "OMP_NUM_THREADS": "1"}

SETTINGS = {
    FUSION: {"device": "cpu", "num_workers": 0, "network_def#channels": [8, 8, 16], "network_def#latent_depth": 1},
    GRADING: {
        **{"device": "cpu", "num_workers": 0, "network_def#block_inplanes": [8, 16, 32, 64], "source": "average"},
        **{"network_def#conv1_t_size": 3, "image_size": [48, 56], "num_slices": 4},
    },
}
SHORT = {"max_epochs": 1, "val_interval": 1}
FOLDS = {"max_epochs": 1, "num_folds": 2, "batch_size": 4}
TRAIN = {
    (FUSION, 2): {**SHORT, "crop_size": [32, 24]},
    (FUSION, 3): {**SHORT, "crop_size": [16, 24, 8], "batch_size": 2},
    (GRADING, 2): {**FOLDS, "scale_range": [0.0, 0.0], "translate_range": [2, 2]},
    (GRADING, 3): {**FOLDS, "scale_range": [0.0, 0.0, 0.0], "translate_range": [2, 2, 0]},
}
PHANTOM = {
    (FUSION, 2): ["--kind", "slices", "--subjects", "4", "--shape", "[48, 48]"],
    (FUSION, 3): ["--kind", "volumes", "--subjects", "4", "--shape", "[24, 20, 22]"],
    (GRADING, 2): ["--num_patients", "18", "--seed", "100"],
    (GRADING, 3): ["--num_patients", "18", "--seed", "100"],
}
RUN_PHANTOM = "import runpy, sys; sys.path.insert(0, '.'); runpy.run_module('scripts.phantom', run_name='__main__')"


def pack(output_dir, root=ROOT):
    command = [sys.executable, str(root / "tools" / "pack_bundles.py"), "--output_dir", str(output_dir)]
    return subprocess.run(command, capture_output=True, text=True)


def start(*words, cwd):
    result = subprocess.run([*ISOLATED, *words], cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return result.stdout


def run(bundle, configs, cwd, **settings):
    files = [os.path.relpath(bundle / "configs" / f"{name}.json", cwd) for name in configs]
    words = ["-m", "monai.bundle", "run", "--bundle_root", os.path.relpath(bundle, cwd)]
    words += ["--config_file", str(files)]
    for key, value in settings.items():
        words += [f"--{key}", str(value)]
    start(*words, cwd=cwd)


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    result = pack(folder)
    assert result.returncode == 0, result.stderr
    return {path.name.rsplit("-", 1)[0]: path for path in folder.iterdir()}


def test_contents(archives):
    assert {name: path.name for name, path in archives.items()} == {
        FUSION: f"{FUSION}-0.1.0.zip",
        GRADING: f"{GRADING}-0.1.0.zip",
    }
    for name, path in archives.items():
        with zipfile.ZipFile(path) as packed:
            files = packed.namelist()
            assert all(file.startswith(f"{name}/") for file in files) and files == sorted(set(files))
            assert not any("__pycache__" in file or "/runs/" in file for file in files)
            inside = {file.removeprefix(f"{name}/") for file in files}
            source = packed.read(f"{name}/custom_nets/ops/csrc/selective_scan.cpp")
        assert source == (ROOT / "custom_nets" / "ops" / "csrc" / "selective_scan.cpp").read_bytes()
        assert {"LICENSE", "configs/metadata.json", "docs/README.md", "scripts/colour.py"} <= inside
        weights = {str(path.relative_to(ROOT / "bundles" / name)) for path in (ROOT / "bundles" / name).rglob("*.pt")}
        assert {file for file in inside if file.endswith(".pt")} == weights


def test_equal_bundles_give_equal_archives(archives, tmp_path):
    """Wherever they lie, whenever they were written, and whatever runs have left in them."""
    shutil.copytree(ROOT / "tools", tmp_path / "tools")
    other = tmp_path / "bundles" / GRADING
    shutil.copytree(ROOT / "bundles" / GRADING, other)
    for rest in ("runs/model.pt", "scripts/__pycache__/data.pyc", "docs/.DS_Store"):
        (other / rest).parent.mkdir(parents=True, exist_ok=True)
        (other / rest).touch()
    assert pack(tmp_path / "dist", tmp_path).returncode == 0
    assert (tmp_path / "dist" / archives[GRADING].name).read_bytes() == archives[GRADING].read_bytes()


def test_too_large_a_file(tmp_path):
    shutil.copytree(ROOT / "tools", tmp_path / "tools")
    shutil.copytree(ROOT / "bundles" / GRADING, tmp_path / "bundles" / GRADING)
    large = tmp_path / "bundles" / GRADING / "models" / "model.pt"
    large.parent.mkdir(exist_ok=True)
    with open(large, "wb") as file:
        file.truncate(25_000_001)
    result = pack(tmp_path / "dist", tmp_path)
    assert f"ValueError: {large} has more than 25 MB" in result.stderr
    assert list((tmp_path / "dist").iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("dims", [2, 3], ids=["2d", "3d"])
@pytest.mark.parametrize("name", [FUSION, GRADING])
def test_unpacked_alone(archives, tmp_path, name, dims):
    """Training, evaluation, inference, with no `custom_nets` but its own, from its own folder and from elsewhere."""
    with zipfile.ZipFile(archives[name]) as packed:
        packed.extractall(tmp_path)
    bundle, elsewhere = tmp_path / name, tmp_path / "elsewhere"
    elsewhere.mkdir()
    assert start("-c", "import importlib.util as u; print(u.find_spec('custom_nets'))", cwd=elsewhere) == "None\n"
    start("-c", RUN_PHANTOM, "--output_dir", str(tmp_path / "data"), *PHANTOM[name, dims], cwd=bundle)
    added = ["volume"] if dims == 3 else []
    split = {FUSION: ("datalist", "trained/datalist.json"), GRADING: ("folds_file", "trained/folds.json")}[name]
    for cwd in (bundle, elsewhere):
        settings = {**SETTINGS[name], "dataset_dir": tmp_path / "data"}
        run(bundle, ["train", *added], cwd, output_dir="trained", **settings, **TRAIN[name, dims])
        settings |= {"checkpoint": "trained/model.pt"}
        evaluate = {split[0]: split[1], "output_dir": "evaluated"}
        run(bundle, ["train", "evaluate", *added], cwd, **settings, **evaluate)
        assert (cwd / "evaluated" / "metrics.json").is_file()
        run(bundle, ["inference", *added], cwd, output_dir="results", **settings)
        assert any((cwd / "results").rglob("*_fused.*" if name == FUSION else "grades.csv"))


@pytest.mark.slow
@pytest.mark.parametrize("dims", [2, 3], ids=["2d", "3d"])
def test_shipped_weights_unpacked_alone(archives, tmp_path, dims):
    with zipfile.ZipFile(archives[FUSION]) as packed:
        packed.extractall(tmp_path)
    kind = ["--kind", "slices"] if dims == 2 else ["--kind", "volumes", "--shape", "[32, 32, 32]"]
    arguments = ["--output_dir", str(tmp_path / "data"), *kind, "--subjects", "1"]
    start("-c", RUN_PHANTOM, *arguments, cwd=tmp_path / FUSION)
    settings = {"dataset_dir": tmp_path / "data", "output_dir": "fused", "device": "cpu", "num_workers": 0}
    run(tmp_path / FUSION, ["inference"] if dims == 2 else ["inference", "volume"], tmp_path, **settings)
    assert len(list((tmp_path / "fused").rglob("*_fused.*"))) == (6 if dims == 2 else 1)

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
What the READMEs of both bundles say about MONAI Label, word for word, with a real server.

Its environment (gigabytes, minutes) is kept in pytest's cache, so that it is installed once.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from scripts.phantom import digital_brain

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
FUSION, GRADING = "clinicalfmamba_fusion", "glioma_grading"
MODELS = {
    f"{FUSION}": "segmentation",
    f"{FUSION}_volume": "segmentation",
    f"{GRADING}_classification": "classification",
}
SHAPE = (64, 72, 20)
AFFINE = np.array([[-1.0, 0, 0, 30], [0, 0, 1.5, -40], [0, 1.0, 0, 5], [0, 0, 0, 1]])


def blocks(bundle: str) -> list[str]:
    section = (ROOT / "bundles" / bundle / "docs" / "README.md").read_text().split("## MONAI Label\n")[1]
    return re.findall(r"```bash\n(.*?)```", section.split("\n## ")[0], re.DOTALL)


def bash(script: str, cwd: Path, environment: dict[str, str], seconds: int = 600) -> str:
    command = ["bash", "-euo", "pipefail", "-c", script]
    result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=seconds)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return result.stdout


@pytest.fixture(scope="module")
def environment(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Variables with which the commands run; ``$LABEL/env`` is installed."""
    folder, nothing = tmp_path_factory.mktemp("label"), tmp_path_factory.mktemp("nothing")
    variables = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    variables["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{variables['PATH']}"
    # torch and torchvision must be built for each other, which a folder with only one of them does not give
    variables |= {"OMP_NUM_THREADS": "1", "PIP_FIND_LINKS": str(nothing)}
    install = blocks(FUSION)[0]
    digest = hashlib.sha256((install + sys.version).encode()).hexdigest()[:16]
    kept = request.config.cache.mkdir(f"monai_label_{digest}")  # type: ignore[union-attr]
    if not (kept / "ready").is_file():
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(nothing)]
        found = subprocess.run([*download, "monailabel==0.8.5"], env=variables, capture_output=True, text=True)
        if found.returncode != 0:
            pytest.skip(f"pip finds no monailabel to install: {found.stderr.strip()[-300:]}")
        shutil.rmtree(kept / "env", ignore_errors=True)
        bash(install, kept, variables | {"LABEL": str(kept)}, seconds=3600)
        (kept / "ready").touch()
    (folder / "env").symlink_to(kept / "env")
    return variables | {"LABEL": str(folder)}


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both bundles as `make bundles` packs them, with a pair of volumes."""
    folder = tmp_path_factory.mktemp("bundles")
    subprocess.run([sys.executable, str(ROOT / "tools" / "pack_bundles.py"), "--output_dir", str(folder)], check=True)
    for archive in folder.glob("*.zip"):
        with zipfile.ZipFile(archive) as packed:
            packed.extractall(folder)
    brain = digital_brain(SHAPE, seed=3)
    for modality in ("t2", "flair"):
        image = nib.Nifti1Image((brain[modality] * 1000).astype(np.int16), AFFINE)
        nib.save(image, folder / FUSION / f"CASE_{modality}.nii.gz")
    return folder


@pytest.fixture(scope="module")
def server(environment: dict[str, str], bundles: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Port of a server with both bundles, and its environment."""
    bash(blocks(FUSION)[1], bundles / FUSION, environment)
    bash(blocks(GRADING)[0], bundles / GRADING, environment)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    path = f"{environment['LABEL']}/env/bin{os.pathsep}{environment['PATH']}"
    variables, log = environment | {"PATH": path}, bundles / "server.log"
    with open(log, "w") as stream:
        process = subprocess.Popen(
            ["bash", "-c", blocks(FUSION)[2].replace("8123", port)],
            cwd=bundles,
            env=variables,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        end = time.monotonic() + 300
        while f"running on http://127.0.0.1:{port}" not in log.read_text():
            assert process.poll() is None and time.monotonic() < end, log.read_text()[-4000:]
            time.sleep(1)
        yield port, variables
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def ask(command: str, server: tuple[str, dict[str, str]], cwd: Path) -> str:
    port, variables = server
    return bash(command.replace("8123", port), cwd, variables)


def infer(bundle: Path, *configs: str, **settings: object) -> None:
    """The bundle's own inference of the pair."""
    words = ["-m", "monai.bundle", "run", "--config_file", str([f"configs/{config}.json" for config in configs])]
    files = {f"input_{ab}": bundle.parent / FUSION / f"CASE_{m}.nii.gz" for ab, m in (("a", "t2"), ("b", "flair"))}
    for key, value in {"device": "cpu", "num_workers": 0, **files, **settings}.items():
        words += [f"--{key}", str(value)]
    variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, *words]
    result = subprocess.run(command, cwd=bundle, env=variables, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-4000:]


def test_info_lists_the_models(server, bundles):
    info, _ = blocks(FUSION)[3].splitlines()
    models = json.loads(ask(info, server, bundles))["models"]
    assert {name: model["type"] for name, model in models.items()} == MODELS
    assert [models[name]["dimension"] for name in MODELS] == [2, 3, 2]
    assert models[f"{GRADING}_classification"]["labels"] == {"lgg": 0, "hgg": 1}


def test_fused_volume(server, bundles):
    """What the bundle's own inference writes of the pair, on its grid."""
    _, fuse = blocks(FUSION)[3].splitlines()
    ask(fuse, server, bundles)
    answer = nib.load(bundles / "CASE_fused.nii.gz")
    np.testing.assert_allclose(answer.affine, AFFINE, atol=1e-4)
    infer(bundles / FUSION, "inference", "volume", output_dir=bundles / "fused", report=False)
    expected = nib.load(bundles / "fused" / "CASE" / "CASE_fused.nii.gz").get_fdata()
    assert answer.get_data_dtype() == np.uint8 and expected.max() > 200
    # bfloat16 where the CPU has it, in which the bundle's own run folds the batch norms and Label does not
    np.testing.assert_allclose(answer.get_fdata(), expected, atol=3)


def test_fused_slices(server, bundles):
    _, fuse = blocks(FUSION)[3].splitlines()
    ask(fuse.replace("fusion_volume", "fusion").replace("CASE_fused", "slices_fused"), server, bundles)
    answer = nib.load(bundles / "slices_fused.nii.gz")
    np.testing.assert_allclose(answer.affine, AFFINE, atol=1e-4)
    t2 = nib.load(bundles / FUSION / "CASE_t2.nii.gz").get_fdata()
    assert answer.shape == SHAPE and np.corrcoef(answer.get_fdata().ravel(), t2.ravel())[0, 1] > 0.7


def test_grade(server, bundles):
    """The probabilities that the bundle's own inference gives."""
    answer = json.loads(ask(blocks(GRADING)[1], server, bundles))
    scores = {entry["label"]: entry["score"] for entry in answer["prediction"]}
    infer(bundles / GRADING, "inference", output_dir=bundles / "graded", saliency=False)
    (expected,) = json.loads((bundles / "graded" / "grades.json").read_text())
    assert scores["lgg"] + scores["hgg"] == pytest.approx(1)
    assert scores["hgg"] == pytest.approx(expected["probability"], abs=2e-3)


def test_nothing_else_is_written(server):
    """Neither reports nor fused images stay on the server."""
    app = Path(server[1]["LABEL"]) / "apps" / "monaibundle"
    assert not list(app.glob("model/*/runs"))

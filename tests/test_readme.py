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
"""What the READMEs show runs as it stands there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from dicom_samples import affine_lps, write_series
from PIL import Image

from scripts.phantom import digital_brain, write

ROOT = Path(__file__).resolve().parents[1]
FUSION, GRADING = "clinicalfmamba_fusion", "glioma_grading"
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
ENVIRONMENT |= {"CUDA_VISIBLE_DEVICES": "", "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}

# what makes them short, appended to the command
SHORT = "--num_workers 0 --max_epochs 1"
FUSION_2D, FUSION_3D = (
    "--val_interval 1 --crop_size '[32,32]'",
    "--val_interval 1 --crop_size '[16,16,16]' --batch_size 2",
)
GRADING_SHORT = "--image_size '[48,56]' --num_slices 4"
GRADING_2D = "--num_folds 2 --batch_size 4 --scale_range '[0.0,0.0]' --translate_range '[2,2]'"
GRADING_3D = "--num_folds 2 --batch_size 4 --scale_range '[0.0,0.0,0.0]' --translate_range '[2,2,0]'"


def blocks(readme, language):
    return [block.split("```")[0] for block in readme.read_text().split(f"```{language}\n")[1:]]


def bundle_commands(readme):
    """Commands that run a bundle on one machine without a GPU: the lines of bash as they stand, joined."""
    lines = "\n".join(blocks(readme, "bash")).replace("\\\n", "").splitlines()
    start = re.compile(r"(python -m monai\.bundle run|python -m scripts\.phantom|torchrun --standalone) ")
    return [line for line in lines if start.match(line) and "--compile True" not in line]


def run_all(commands, cwd, paths, shorten):
    """One after the other, since they use what those before have written; all that fail are told."""
    failed = {}
    for command in commands:
        words = command
        for name, path in paths.items():
            words = re.sub(rf"(?<![\w/.]){re.escape(name)}(?![\w/])", str(path), words)
        if "monai.bundle" in command:
            words = f"{words} {shorten(command)}"
        result = subprocess.run(
            words, shell=True, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=600
        )
        if result.returncode:
            failed[command] = (result.stdout[-500:] + result.stderr[-1500:]).splitlines()[-8:]
    assert not failed, failed


def shorten_fusion(command):
    if "training" in command:
        return f"{SHORT} {FUSION_3D if 'volume.json' in command else FUSION_2D}"
    return "--num_workers 0"


def shorten_grading(command):
    if "training" in command:
        return f"{SHORT} {GRADING_SHORT} {GRADING_3D if 'volume.json' in command else GRADING_2D}"
    # the weights that ship want what they were trained on
    return f"--num_workers 0 {GRADING_SHORT if '--checkpoint' in command else ''}"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write(str(folder / "slices"), kind="slices", subjects=4, shape=(48, 48))
    write(str(folder / "volumes"), kind="volumes", subjects=4, shape=(24, 24, 24))
    brain = digital_brain((32, 32, 18), seed=2)
    affine = affine_lps((6, 6, 6), (-90, -90, -40), np.diag([1, 1, 1]))
    for number, (name, description) in enumerate((("t2", "T2 TSE"), ("flair", "FLAIR"))):
        pixels = (brain[name] * 1000).astype(np.uint16)
        for target in (folder / "study" / name, folder / name):
            write_series(target, pixels, number=number, affine=affine, SeriesDescription=description)
    return folder


@pytest.fixture
def project(tmp_path):
    """The project's bundles, where what the commands write does no harm."""
    ignore = shutil.ignore_patterns("__pycache__", "runs")
    for name in (FUSION, GRADING):
        shutil.copytree(ROOT / "bundles" / name, tmp_path / "bundles" / name, ignore=ignore)
    return tmp_path


def paths(data):
    pairs = {"/path/to/aanlib": "slices", "/path/to/pairs": "slices", "/path/to/cases": "volumes"}
    pairs |= {"/path/to/brats": "volumes", "../shared/data/aanlib": "slices", "../shared/data/brats20-slabs": "volumes"}
    pairs |= {"/path/to/T2": "t2", "/path/to/FLAIR": "flair", "/path/to/study": "study"}
    pairs |= {"mri.png": "slices/MRI-PET/MRI/1001.png", "pet.png": "slices/MRI-PET/PET/1001.png"}
    return {name: data / path for name, path in pairs.items()}


@pytest.mark.slow
def test_commands_of_the_project(project, data):
    commands = bundle_commands(ROOT / "README.md")
    assert len(commands) >= 7
    run_all(commands, project, paths(data), shorten_fusion)
    written = ("fused/index.html", "runs/slices/model.pt", "runs/volumes/model.pt")
    for name in (*written, "runs/slices_evaluated/metrics.csv", "runs/volumes_evaluated/metrics.csv"):
        assert (project / name).is_file()


@pytest.mark.slow
def test_commands_of_the_fusion_bundle(project, data):
    bundle = project / "bundles" / FUSION
    commands = bundle_commands(bundle / "docs" / "README.md")
    assert len(commands) >= 17
    run_all(commands, bundle, paths(data), shorten_fusion)


@pytest.mark.slow
def test_commands_of_the_grading_bundle(project, data):
    bundle = project / "bundles" / GRADING
    commands = bundle_commands(bundle / "docs" / "README.md")
    assert len(commands) >= 6
    # of the ways to train, the one whose weights the others take comes last
    commands.sort(key=lambda command: "training" not in command)
    commands[:3] = commands[2::-1]
    make = [
        sys.executable,
        "-m",
        "scripts.phantom",
        "--output_dir",
        "patients",
        "--num_patients",
        "18",
        "--seed",
        "100",
    ]
    subprocess.run(make, cwd=bundle, env=ENVIRONMENT, check=True, capture_output=True)
    case = bundle / "patients" / "HGG" / "glioma_100"
    places = {**paths(data), "/path/to/brats": bundle / "patients", "/path/to/cases": bundle / "patients" / "LGG"}
    places |= {f"CASE_{name}.nii.gz": case / f"glioma_100_{name}.nii.gz" for name in ("t2", "flair")}
    run_all(commands, bundle, places, shorten_grading)


def run_python(lines, folder):
    command = [sys.executable, "-c", lines]
    result = subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr


def test_python(tmp_path):
    """The README's lines as they stand, where `pairs` and `bundles` are."""
    (tmp_path / "bundles").symlink_to(ROOT / "bundles")
    for name in ("MRI", "CT"):
        (tmp_path / "pairs" / name).mkdir(parents=True)
        image = np.random.default_rng(0).integers(0, 255, (34, 45), dtype=np.uint8)
        Image.fromarray(image).save(tmp_path / "pairs" / name / "7003.png")
    module, api = blocks(ROOT / "README.md", "python")
    run_python(module + "assert fused.shape == (1, 1, 256, 256) and 0 <= fused.min() < fused.max() <= 1\n", tmp_path)
    assert len(api.splitlines()) == 10
    run_python(api + "assert fused.shape == (1, 1, 45, 34) and 0 <= fused.min() < fused.max() <= 1\n", tmp_path)

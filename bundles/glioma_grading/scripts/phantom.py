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
"""Generated glioma patients whose grade can be seen: anybody may have them, and a network must learn them.

A low-grade tumour is a homogeneous blob, bright in T2 and FLAIR; a high-grade one has a bright rim, a dark core and a
wide oedema. Brains differ in size, contrast and noise in the same way for both.

    python -m scripts.phantom --output_dir patients --num_patients 40
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import fire
import nibabel as nib
import numpy as np
from scipy.ndimage import gaussian_filter

from scripts.cases import GRADES
from scripts.data import replacing

__all__ = ["glioma", "write"]


def glioma(grade: str, seed: int, shape: Sequence[int] = (48, 56, 6)) -> dict[str, np.ndarray]:
    """
    One patient.

    Args:
        grade: ``"LGG"`` or ``"HGG"``.
        seed: which patient.
        shape: of the volume; axes point to the Right, Anterior and Superior.

    Returns:
        ``"t2"`` and ``"flair"``, skull-stripped, and ``"seg"``, the tumour: uint8 volumes.
    """
    rng = np.random.default_rng(seed)
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    size = rng.uniform(0.78, 0.9)
    brain = (x / size) ** 2 + (y / (size + 0.08)) ** 2 + (z / 2.2) ** 2 < 1
    ventricles = (x / 0.22) ** 2 + ((y - 0.05) / 0.35) ** 2 + (z / 1.5) ** 2 < 1
    side = rng.choice([-1, 1])
    centre = side * rng.uniform(0.35, 0.5), rng.uniform(-0.35, 0.35), rng.uniform(-0.3, 0.3)
    distance = np.sqrt(sum(((axis - c) / s) ** 2 for axis, c, s in zip((x, y, z), centre, (1, 1, 6))))
    radius = rng.uniform(0.25, 0.35)
    t2, flair = np.full(shape, 0.4), np.full(shape, 0.42)
    t2[ventricles], flair[ventricles] = 0.9, 0.15
    if grade == "HGG":
        t2[distance < 1.5 * radius], flair[distance < 1.5 * radius] = 0.62, 0.75
        t2[distance < radius], flair[distance < radius] = 0.75, 0.9
        t2[distance < 0.7 * radius], flair[distance < 0.7 * radius] = 0.95, 0.2
    else:
        t2[distance < 1.1 * radius], flair[distance < 1.1 * radius] = 0.72, 0.8
    images = {}
    for name, image in (("t2", t2), ("flair", flair)):
        image = gaussian_filter(image * rng.uniform(0.85, 1.1), 0.6) + rng.normal(scale=0.03, size=shape)
        images[name] = np.where(brain, np.rint(255 * image.clip(1 / 255, 1)), 0).astype(np.uint8)
    return {**images, "seg": ((distance < radius) & brain).astype(np.uint8)}


def write(output_dir: str, num_patients: int = 40, shape: Sequence[int] = (48, 56, 6), seed: int = 0) -> None:
    """
    Write patients, every third one LGG, in the layout of BraTS: ``<grade>/<case>/<case>_{t2,flair,seg}.nii.gz``, 1 mm.

    Args:
        output_dir: folder of the data set.
        num_patients: how many.
        shape: of a volume.
        seed: number of the first patient.
    """
    for number in range(seed, seed + num_patients):
        grade = GRADES[0] if number % 3 == 0 else GRADES[1]
        case = f"glioma_{number:03d}"
        for name, volume in glioma(grade, number, shape).items():
            with replacing(Path(output_dir) / grade / case / f"{case}_{name}.nii.gz") as path:
                nib.save(nib.Nifti1Image(volume, np.eye(4)), path)
    print(f"{num_patients} generated patients written to {output_dir}")


if __name__ == "__main__":
    fire.Fire(write)

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
Stack the slices of a two-folder data set into one pair of volumes per subject, to train on them in 3D::

    python -m scripts.stack_slices --dataset_dir aanlib/PET-MRI --output_dir pet-volumes \
        --modalities "['MRI', 'PET']" --spacing "[1.0, 1.0, 1.0]" --axcodes LIA --max_gap 2
"""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import fire
import nibabel as nib
import numpy as np
from scipy.interpolate import interp1d

from scripts.data import SLICE_SUBJECT, find_pairs, replacing, stem
from scripts.transforms import LoadPair


def stack_slices(
    dataset_dir: str,
    output_dir: str,
    modalities: Sequence[str] = ("MRI", "PET"),
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
    axcodes: str = "LPS",
    max_gap: int = 0,
) -> None:
    """
    Write ``<output_dir>/<subject>/<subject>_<modality>.nii.gz``, 8 bit, for both modalities of every subject. Files are
    named by subject and three digits of slice number, as in AANLIB; of a colour image the luma is taken.

    Args:
        dataset_dir: folder with one folder of slices per modality (see ``find_pairs``).
        output_dir: where to write; it can then serve as ``dataset_dir`` with the modalities in lower case.
        modalities: names of the two folders.
        spacing: millimetres between pixels from left to right, from top to bottom, and between slices.
        axcodes: where the picture's right edge, its lower edge and the growing slice number point: ``LPS`` for axial
            slices numbered upwards, ``LIA`` for coronal ones numbered forwards (AANLIB's PET-MRI).
        max_gap: how many missing slices in a row may be interpolated linearly (AANLIB's PET-MRI lacks up to two).

    Raises:
        ValueError: when a name ends in no slice number, or more than ``max_gap`` slices in a row are missing.
    """
    pairs = find_pairs(dataset_dir, modalities)
    slices: dict[str, dict[int, list[str]]] = defaultdict(dict)
    for pair in pairs:
        name = stem(pair["image"][0])
        if not re.search(SLICE_SUBJECT, name):
            raise ValueError(f"{pair['image'][0]} must be named by subject and three digits of slice number.")
        slices[pair["subject"]][int(name[-3:])] = pair["image"]
    directions = nib.orientations.inv_ornt_aff(nib.orientations.axcodes2ornt(axcodes), (1, 1, 1))
    affine = np.diag([*spacing, 1.0])
    affine[:3, :3] = np.linalg.inv(directions[:3, :3]) @ affine[:3, :3]
    loader = LoadPair()
    for subject, files in slices.items():
        numbers = sorted(files)
        if (gap := max(np.diff(numbers, append=numbers[-1])) - 1) > max_gap:
            raise ValueError(
                f"Subject {subject} in {dataset_dir} lacks {gap} slices in a row: add them, or set max_gap to fill them"
                " in from their neighbours."
            )
        known = np.stack([loader(files[number])[0].numpy() for number in numbers], axis=-1)
        wanted = np.arange(numbers[0], numbers[-1] + 1)
        if filled := len(wanted) - len(numbers):
            logging.getLogger(__name__).warning(f"Subject {subject}: {filled} missing slice(s) filled in.")
        volume = interp1d(numbers, known)(wanted) if filled else known
        for modality, channel in zip(modalities, volume):
            image = nib.Nifti1Image(channel.round().astype(np.uint8), affine)
            with replacing(Path(output_dir) / subject / f"{subject}_{modality.lower()}.nii.gz") as temporary:
                nib.save(image, temporary)
    logging.getLogger(__name__).info(f"Stacked {len(slices)} subject(s) into {output_dir}.")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    fire.Fire(stack_slices)

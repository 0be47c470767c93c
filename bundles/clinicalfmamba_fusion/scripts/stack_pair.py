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
Stack two images of one head into one file with two channels, for programs that take one image, such as MONAI Label::

    python -m scripts.stack_pair --input_a CASE_t2.nii.gz --input_b CASE_flair.nii.gz --output_file studies/CASE.nii.gz
"""

from __future__ import annotations

import logging
from pathlib import Path

import fire
import nibabel as nib

from scripts.data import replacing
from scripts.load_case import INFO, NIFTI, LoadCase, note_units

__all__ = ["stack_pair"]


def stack_pair(
    input_a: str,
    input_b: str,
    output_file: str,
    series_a: str | int | None = None,
    series_b: str | int | None = None,
    resample: str = "auto",
    registration: str = "auto",
    allow_mismatch: bool = False,
) -> None:
    """
    Write a NIfTI ``(W, H, D, 2)``, float32, of the raw intensities of two images, slices (D = 1) or volumes, on the
    grid of the first. Hounsfield units and SUV, which only DICOM tells, stand in its header. Of a colour image the luma
    is taken. The file gives what the pair gives, wherever this bundle reads one.

    Args:
        input_a: the first image (MRI): a file of any kind that MONAI reads, or a DICOM file or folder.
        input_b: the second image.
        output_file: where to write, ``.nii.gz`` or ``.nii``.
        series_a: which DICOM series of the first input, if there are several: its number, UID or description.
        series_b: the same for the second input.
        resample: "auto" brings the second image onto the grid of the first, "none" refuses where they differ.
        registration: "auto" (where the headers ask for it), "none", "rigid" or "affine".
        allow_mismatch: stack DICOM images of different patients or studies.

    Raises:
        FileNotFoundError: when an input does not exist.
        ValueError: when ``output_file`` is no NIfTI, or the two inputs do not make a pair, see ``LoadCase``.
    """
    output = Path(output_file).expanduser()
    if not output.name.lower().endswith(NIFTI):
        raise ValueError(f"output_file {output} must end in .nii.gz or .nii.")
    load = LoadCase(None, (series_a, series_b), resample, registration, allow_mismatch)
    pair, _ = load([Path(path).expanduser() for path in (input_a, input_b)])
    info = pair.meta[INFO]
    for warning in info["warnings"]:
        logging.getLogger(__name__).warning(warning)
    values = pair.as_tensor() if pair.ndim == 4 else pair.as_tensor()[..., None]
    image = nib.Nifti1Image(values.movedim(0, -1).numpy(), pair.affine.numpy())
    image.header["descrip"] = note_units([source["units"] for source in info["inputs"]])
    image.header.set_xyzt_units("mm")
    with replacing(output) as temporary:
        nib.save(image, temporary)
    logging.getLogger(__name__).info(f"{output}: {' x '.join(map(str, values.shape[1:]))} voxels, two channels.")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    fire.Fire(stack_pair)

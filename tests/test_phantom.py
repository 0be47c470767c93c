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

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from scripts.phantom import CONTRASTS, TISSUES, _anatomy, digital_brain, write

HALF = 64
SLICE = (2 * HALF, 2 * HALF)


@pytest.fixture(scope="module")
def brain() -> dict[str, np.ndarray]:
    return digital_brain(SLICE, seed=3)


@pytest.fixture(scope="module")
def shares() -> dict[str, np.ndarray]:
    points = (np.indices((*SLICE, 1), dtype=np.float32) - (HALF - 0.5)) / HALF
    points[2] = 0
    return {name: share[..., 0] for name, share in _anatomy(points, 1 / HALF, np.random.default_rng(3)).items()}


@pytest.mark.parametrize("shape", [(64, 64), (65, 48), (32, 32, 32), (40, 32, 11)])
def test_range_type_and_shape(shape):
    images = digital_brain(shape, seed=1)
    assert tuple(images) == CONTRASTS
    for image in images.values():
        assert image.shape == shape and image.dtype == np.float32
        assert image.min() == 0 and 0.5 < image.max() <= 1


def test_other_shapes_are_refused():
    with pytest.raises(ValueError, match=r"\(64,\)"):
        digital_brain((64,))


def test_a_seed_is_a_subject():
    first, again, other = (digital_brain((48, 48), seed) for seed in (1, 1, 2))
    for name in CONTRASTS:
        np.testing.assert_array_equal(first[name], again[name])
        assert np.abs(first[name] - other[name]).mean() > 0.02


def test_a_slice_cuts_the_volume_of_its_seed():
    points = (np.indices((32, 32, 33), dtype=np.float32) - np.float32([15.5, 15.5, 16]).reshape(3, 1, 1, 1)) / 16
    volume = _anatomy(points, 1 / 16, np.random.default_rng(5))
    plane = _anatomy(points[..., 16:17], 1 / 16, np.random.default_rng(5))
    assert set(volume) == set(TISSUES)
    for tissue, share in plane.items():
        np.testing.assert_allclose(volume[tissue][..., 16:17], share, atol=1e-3)


def test_what_each_contrast_shows(brain, shares):
    def mean(contrast: str, tissue: str) -> float:
        painted_over = list(TISSUES)[list(TISSUES).index(tissue) + 1 :]
        where = (shares[tissue] > 0.9) & np.all([shares[name] < 0.05 for name in painted_over], axis=0)
        return float(brain[contrast][where].mean())

    assert mean("t2", "ventricles") > mean("t2", "grey") > mean("t2", "white")
    assert mean("flair", "ventricles") < 0.5 * mean("flair", "white")
    assert mean("flair", "oedema") > 1.5 * mean("flair", "grey")
    assert mean("ct", "bone") > 2 * mean("ct", "grey") > 10 * mean("mri", "bone")
    assert abs(mean("ct", "grey") - mean("ct", "white")) < 0.1
    assert mean("pet", "nuclei") > 1.8 * mean("pet", "white")
    assert mean("mri", "ventricles") > 2 * mean("pet", "ventricles")


@pytest.mark.parametrize("tissue, seen, unseen", [("metastasis", "pet", "mri"), ("plaque", "flair", "t2")])
def test_findings_that_one_of_two_images_shows(tissue, seen, unseen):
    levels = dict(zip(CONTRASTS, TISSUES[tissue]))
    assert levels[seen] > 0.9 and levels[unseen] is None


def test_skull_is_stripped_from_t2_and_flair_only(brain, shares):
    skull = (shares["bone"] > 0.9) & (shares["csf"] == 0)
    outside = shares["scalp"] == 0
    for name, image in brain.items():
        assert not image[outside].any()
        assert (image[skull] == 0).all() == (name in ("t2", "flair"))
    assert ((brain["t2"] > 0) == (brain["flair"] > 0)).all()


def test_slices_on_disk(tmp_path):
    write(str(tmp_path), kind="slices", subjects=2, shape=(40, 48))
    for task, partner, mode in (("MRI-CT", "CT", "L"), ("MRI-PET", "PET", "RGB")):
        names = sorted(path.name for path in (tmp_path / task / "MRI").iterdir())
        assert names == [f"{subject}{number:03d}.png" for subject in (1, 2) for number in (1, 2, 3)]
        assert names == sorted(path.name for path in (tmp_path / task / partner).iterdir())
        with Image.open(tmp_path / task / partner / "1002.png") as picture:
            assert picture.mode == mode and picture.size == (40, 48)
    # the middle slice is the plane through the basal ganglia, front up and right side left
    written = np.asarray(Image.open(tmp_path / "MRI-CT" / "MRI" / "2002.png"))
    np.testing.assert_array_equal(written, np.rint(255 * digital_brain((40, 48), 2)["mri"]).T[::-1, ::-1])


def test_volumes_on_disk(tmp_path):
    write(str(tmp_path), kind="volumes", subjects=1, shape=(32, 32, 24), seed=7)
    assert sorted(path.name for path in (tmp_path / "phantom_007").iterdir()) == [
        "phantom_007_flair.nii.gz",
        "phantom_007_t2.nii.gz",
    ]
    image = nib.load(tmp_path / "phantom_007" / "phantom_007_t2.nii.gz")
    assert image.shape == (32, 32, 24) and image.get_data_dtype() == np.uint8
    assert nib.aff2axcodes(image.affine) == ("R", "A", "S") and image.header.get_zooms() == (1, 1, 1)
    brain = digital_brain((32, 32, 24), 7)["t2"] > 0
    np.testing.assert_array_equal(np.asarray(image.dataobj) > 0, brain)


@pytest.mark.parametrize("options, message", [({"kind": "tiles"}, "tiles"), ({"shape": (32, 32, 32)}, "slices need")])
def test_wrong_requests_are_explained(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        write(str(tmp_path), **options)

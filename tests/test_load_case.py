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

import json
from pathlib import Path

import itk
import nibabel as nib
import numpy as np
import pytest
import torch
from dicom_samples import IDENTITY, affine_lps, write_series
from monai.data import MetaTensor, decollate_batch, list_data_collate
from PIL import Image

from scripts.dicom_series import select_series
from scripts.grid import resample_onto
from scripts.identity import check_same_identity, hashed_case
from scripts.load_case import LoadCased, PackNotesd, UnpackNotesd
from scripts.match_grid import MatchGrid, MatchGridd
from scripts.phantom import digital_brain

SHAPE = (40, 40, 16)
FINE = affine_lps((4.8, 4.8, 4.8), (-90, -90, -30), np.diag([1, 1, 1]))
COARSE = affine_lps((7, 6, 5), (-95, -92, -32), np.diag([1, 1, 1]))


@pytest.fixture(scope="module")
def brain() -> dict[str, np.ndarray]:
    return {name: (image * 1000).astype(np.uint16) for name, image in digital_brain(SHAPE, seed=1).items()}


@pytest.fixture
def inputs(tmp_path: Path, brain: dict[str, np.ndarray]) -> list[str]:
    """T2, and FLAIR on a coarser grid."""
    write_series(tmp_path / "a", brain["t2"], number=301, affine=FINE)
    as_fine = MetaTensor(torch.as_tensor(brain["flair"].astype(np.float32))[None], affine=ras(FINE))
    coarse = resample_onto(as_fine, MetaTensor(torch.zeros(1, 30, 34, 16), affine=ras(COARSE)))
    write_series(tmp_path / "b", coarse[0].numpy().astype(np.uint16), number=401, affine=COARSE)
    return [str(tmp_path / "a"), str(tmp_path / "b")]


def ras(affine: np.ndarray) -> torch.Tensor:
    return torch.as_tensor(np.diag([-1.0, -1, 1, 1]) @ affine)


def save_nifti(path: Path, volume: np.ndarray, affine: np.ndarray) -> str:
    nib.save(nib.Nifti1Image(volume.astype(np.int16), ras(affine).numpy()), path)
    return str(path)


def test_the_second_series_comes_onto_the_grid_of_the_first(inputs: list[str], brain: dict, tmp_path: Path) -> None:
    item = LoadCased(output_dir=tmp_path / "out")({"image": inputs, "case": "c"})
    assert item["image"].shape == (2, *SHAPE) and item["image"].dtype == torch.float32
    np.testing.assert_allclose(item["image"].affine, ras(FINE), atol=1e-4)
    np.testing.assert_array_equal(item["image"][0], brain["t2"])
    assert np.corrcoef(item["image"][1].numpy().ravel(), brain["flair"].ravel())[0, 1] > 0.9
    info = item["fusion_info"]
    assert info["case"] == "c" and info["registration"] is None and info["warnings"] == [] and info["resampled"]
    assert not LoadCased()({"image": [inputs[0]] * 2})["fusion_info"]["resampled"]
    assert [(i["name"], i["modality"], i["shape"]) for i in info["inputs"]] == [
        ("MR 301", "MR", list(SHAPE)),
        ("MR 401", "MR", [30, 34, 16]),
    ]
    np.testing.assert_allclose(info["inputs"][1]["spacing"], (7, 6, 5), atol=1e-5)
    assert [len(files) for files in item["sources"]] == [16, 16]
    assert not (tmp_path / "out").exists()
    noted = json.dumps(info) + str(item["image"].meta)
    assert not any(value in noted for value in IDENTITY.values() if len(value) > 1)


def test_notes_survive_a_batch(inputs: list[str]) -> None:
    item = LoadCased()({"image": inputs, "case": "c"})
    (back,) = decollate_batch(list_data_collate([PackNotesd()(item)]))
    back = UnpackNotesd()(back)
    assert back["fusion_info"] == item["fusion_info"] and back["sources"] == item["sources"]
    assert UnpackNotesd()({"pred": 1}) == {"pred": 1}


def test_another_frame_of_reference_is_registered(brain: dict, tmp_path: Path) -> None:
    moved = FINE.copy()
    moved[:3, 3] += (9, -7, 4)
    write_series(tmp_path / "a", brain["t2"], affine=FINE)
    write_series(tmp_path / "b", brain["flair"], number=401, affine=moved, FrameOfReferenceUID="1.2.3")
    item = LoadCased(output_dir=tmp_path / "out")({"image": [tmp_path / "a", tmp_path / "b"], "case": "c"})
    assert np.corrcoef(item["image"][1].numpy().ravel(), brain["flair"].ravel())[0, 1] > 0.98
    registration = item["fusion_info"]["registration"]
    assert registration["kind"] == "rigid" and registration["translation_mm"] == pytest.approx(12.1, abs=1)
    assert (tmp_path / "out" / "c" / registration["transform_file"]).is_file()
    assert "different frames of reference" in item["fusion_info"]["warnings"][0]


def test_what_visibly_does_not_fit_is_told(brain: dict, tmp_path: Path) -> None:
    moved = FINE.copy()
    moved[:3, 3] += (12, -9, 0)
    files = [
        save_nifti(tmp_path / "x_mri.nii", brain["mri"], FINE),
        save_nifti(tmp_path / "x_ct.nii", brain["ct"], moved),
    ]
    info = LoadCased()({"image": files})["fusion_info"]
    assert [i["name"] for i in info["inputs"]] == ["mri", "ct"]
    assert any("visibly do not fit" in warning for warning in info["warnings"])
    info = LoadCased(registration="rigid")({"image": files})["fusion_info"]
    assert not any("visibly" in w for w in info["warnings"]) and info["registration"]["transform_file"] is None


def test_positions_that_hardly_overlap(brain: dict) -> None:
    a, b = (MetaTensor(torch.as_tensor(brain[c].astype(np.float32))[None], affine=ras(FINE)) for c in ("t2", "flair"))
    far = b.clone()
    far.affine[:3, 3] += 150
    matched = MatchGrid()(far, a)
    assert matched.alignment is not None and "hardly overlap" in matched.warnings[0]
    assert np.corrcoef(matched.image.numpy().ravel(), b.numpy().ravel())[0, 1] > 0.98
    far.affine[:3, 3] += 1000
    with pytest.raises(ValueError, match="no common field of view"):
        MatchGrid(registration="none")(far, a)
    half = MetaTensor(b.as_tensor()[..., :8], affine=b.affine)
    assert "covers 5" in MatchGrid()(half, a).warnings[0]
    with pytest.raises(ValueError, match="not on one grid: set resample to auto"):
        MatchGridd("b", "a", resample="none")({"a": a, "b": half})
    with pytest.raises(ValueError, match="registration must be one of auto, none, rigid, affine, got 'demons'"):
        MatchGrid(registration="demons")


def test_slices(brain: dict, tmp_path: Path) -> None:
    affine = affine_lps((1.2, 1.2, 5), (-20, 30, 8), np.array([[1, 0, 0], [0, 0, 1], [0, -1, 0]]))
    for name in ("t2", "flair"):
        write_series(tmp_path / name, brain[name][:, :, 8:9], affine=affine, number=len(name))
    item = LoadCased(spatial_dims=2)({"image": [tmp_path / "t2", tmp_path / "flair"]})
    assert item["image"].shape == (2, 40, 40)
    np.testing.assert_array_equal(item["image"][1], brain["flair"][:, :, 8])
    with pytest.raises(ValueError, match="t2 is a slice of 40 x 40: leave"):
        LoadCased(spatial_dims=3)({"image": [tmp_path / "t2", tmp_path / "flair"]})


def test_volumes_and_slices_in_the_wrong_config(inputs: list[str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a is a volume of 40 x 40 x 16: add configs/volume\.json"):
        LoadCased(spatial_dims=2)({"image": inputs})
    Image.fromarray(np.zeros((20, 20), np.uint8)).save(tmp_path / "x.png")
    with pytest.raises(ValueError, match=r"x\.png is a slice of 20 x 20: leave configs/volume\.json out"):
        LoadCased(spatial_dims=3)({"image": [tmp_path / "x.png"] * 2})


def test_pictures_of_different_shape_are_registered_only_on_request(tmp_path: Path) -> None:
    brain = digital_brain((160, 160), seed=1)
    for name, image in (("mri", brain["mri"]), ("ct", brain["ct"][8:, :150])):
        Image.fromarray((image * 255).astype(np.uint8)).save(tmp_path / f"{name}.png")
    files = [tmp_path / "mri.png", tmp_path / "ct.png"]
    with pytest.raises(ValueError, match="differ in shape"):
        LoadCased(spatial_dims=2)({"image": files})
    item = LoadCased(spatial_dims=2, registration="rigid")({"image": files})
    assert np.corrcoef(item["image"][1].T.numpy()[8:, :150].ravel(), brain["ct"][8:, :150].ravel())[0, 1] > 0.98


@pytest.mark.parametrize("extension", ["nrrd", "mha", "nii"])
def test_files_of_other_formats_lie_where_they_say(tmp_path: Path, brain: dict, extension: str) -> None:
    image = itk.image_from_array(np.ascontiguousarray(brain["flair"].T.astype(np.int16)))
    image.SetSpacing([4.8] * 3)
    image.SetOrigin(FINE[:3, 3].tolist())
    itk.imwrite(image, str(tmp_path / f"x.{extension}"))
    write_series(tmp_path / "a", brain["t2"], affine=FINE)
    item = LoadCased()({"image": [tmp_path / "a", tmp_path / f"x.{extension}"]})
    np.testing.assert_array_equal(item["image"][1], brain["flair"])


def test_one_file_with_two_channels(tmp_path: Path) -> None:
    nib.save(nib.Nifti1Image(np.random.rand(6, 7, 8, 2).astype(np.float32), np.eye(4)), tmp_path / "x.nii")
    item = LoadCased()({"image": str(tmp_path / "x.nii")})
    assert item["image"].shape == (2, 6, 7, 8) and len(item["fusion_info"]["inputs"]) == 2
    assert item["sources"] == [[], []] and "fusion_info" not in item["image"].meta


@pytest.mark.parametrize(
    ("change", "what"), [({"PatientID": "other"}, "patients"), ({"StudyInstanceUID": "1.9"}, "studies")]
)
def test_identities_are_not_mixed(inputs: list[str], brain: dict, tmp_path: Path, change: dict, what: str) -> None:
    write_series(tmp_path / "c", brain["flair"], number=501, affine=FINE, **change)
    item = {"image": [inputs[0], tmp_path / "c"]}
    with pytest.raises(ValueError, match=f"two series are of different {what}") as error:
        LoadCased()(item)
    assert "other" not in str(error.value).replace("other inputs", "") and "SECRET" not in str(error.value)
    assert (
        f"of different {what}; that was allowed" in LoadCased(allow_mismatch=True)(item)["fusion_info"]["warnings"][0]
    )


def test_an_input_without_identity_is_told(inputs: list[str], brain: dict, tmp_path: Path) -> None:
    file = save_nifti(tmp_path / "John_Doe.nii", brain["flair"], FINE)
    info = LoadCased()({"image": [inputs[0], file]})["fusion_info"]
    assert "Only one input is DICOM" in info["warnings"][0]
    assert info["inputs"][1]["name"] == ".nii file" and "John" not in str(info)
    series = [select_series(path) for path in inputs]
    assert check_same_identity(*series) is None


def test_cases_are_named_by_a_hash(inputs: list[str]) -> None:
    name = hashed_case(*inputs)
    assert name == hashed_case(*inputs) and name.startswith("case_") and len(name) == 17
    assert len({name, hashed_case(*inputs[::-1]), hashed_case(*inputs, "301", None)}) == 3

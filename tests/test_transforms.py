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

import warnings
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, SaveImaged, ScaleIntensityd
from PIL import Image

from scripts.transforms import CaseName, LoadPair, LoadPaird, RestoreChromad, ScaleToDtype, ScaleToDtyped

# 3 mm slices, an axis that runs to the left, another order of axes and an oblique angle
OBLIQUE = np.array([[0, -0.9, 0.1, 7.0], [1.1, 0, 0, -20.0], [0, 0.1, 2.9, 5.0], [0, 0, 0, 1.0]])


def random_image(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.RandomState(seed).randint(0, 256, shape).astype(np.uint8)


def save_nifti(path: Path, array: np.ndarray, affine: np.ndarray = OBLIQUE) -> str:
    nib.save(nib.Nifti1Image(array, affine), path)
    return str(path)


def save_png(path: Path, array: np.ndarray, mode: str | None = None) -> str:
    picture = Image.fromarray(array)
    (picture.convert(mode) if mode else picture).save(path)
    return str(path)


def fuse_like_mri(output_dir: Path, extension: str, dtype: str) -> Compose:
    """Load, scale by 255, call the MRI the fused image, and save it as the bundle does."""

    def take_mri(item: dict) -> dict:
        return {**item, "pred": item["image"][:1] / 255}

    return Compose(
        [
            LoadPaird(),
            take_mri,
            RestoreChromad(),
            ScaleToDtyped(output_dtype=dtype),
            SaveImaged(
                "pred",
                output_dir=output_dir,
                output_postfix="fused",
                output_ext=extension,
                output_dtype=None,
                output_name_formatter=CaseName(),
                print_log=False,
            ),
        ]
    )


def test_grey_pair(tmp_path: Path) -> None:
    mri, ct = random_image(20, 30), random_image(20, 30, seed=1)
    files = [save_png(tmp_path / "a.png", mri), save_png(tmp_path / "b.png", ct)]
    item = LoadPaird()({"image": files})
    assert item["image"].shape == (2, 30, 20) and item["image"].dtype == torch.float32
    np.testing.assert_array_equal(item["image"].numpy(), np.stack([mri.T, ct.T]))
    assert item["image"].meta["case"] == "a" and item["image"].meta["filename_or_obj"] == files[0]
    assert "chroma" not in item


@pytest.mark.parametrize("extension", ["png", "tif", "tiff", "jpg"])
def test_colour_partner(tmp_path: Path, extension: str) -> None:
    rgb = np.repeat(random_image(2, 2, 3), 8, axis=0).repeat(8, axis=1)
    files = [save_png(tmp_path / "a.png", random_image(16, 16)), save_png(tmp_path / f"b.{extension}", rgb)]
    item = LoadPaird(chroma_key="colour")({"image": files, "case": "x"})
    stored = np.asarray(Image.open(files[1])).astype(np.float32)
    luma = stored @ np.array([0.299, 0.587, 0.114], np.float32)
    np.testing.assert_allclose(item["image"][1].numpy(), luma.T, atol=1e-3)
    assert item["colour"].shape == (2, 16, 16) and not isinstance(item["colour"], MetaTensor)
    assert item["image"].meta["case"] == "x"
    assert "chroma" not in LoadPaird(chroma_key=None)({"image": files})


def test_equal_channels_are_grey_and_a_coloured_mri_is_luma(tmp_path: Path) -> None:
    grey, rgb = random_image(16, 16), random_image(16, 16, 3)
    files = [save_png(tmp_path / "a.png", rgb), save_png(tmp_path / "b.png", grey, "RGB")]
    pair, chroma = LoadPair()(files)
    assert chroma is None
    np.testing.assert_array_equal(pair[1].numpy(), grey.T)
    np.testing.assert_allclose(pair[0].numpy(), (rgb @ [0.299, 0.587, 0.114]).T, atol=1e-3)


@pytest.mark.parametrize("mode", ["LA", "RGBA", "P"])
def test_alpha_and_palettes(tmp_path: Path, mode: str) -> None:
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    pair, chroma = LoadPair()([save_png(tmp_path / "a.png", grey), save_png(tmp_path / "b.png", grey, mode)])
    assert chroma is None and torch.equal(pair[0], pair[1])


def test_sixteen_bit_picture(tmp_path: Path) -> None:
    deep = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)
    pair, _ = LoadPair()([save_png(tmp_path / "a.png", deep), save_png(tmp_path / "b.png", random_image(16, 16))])
    assert pair[0].max() == 65535


def test_two_volumes_and_one_file_with_two_channels(tmp_path: Path) -> None:
    both = random_image(7, 8, 9, 2)
    files = [save_nifti(tmp_path / f"{name}.nii.gz", both[..., i]) for i, name in enumerate("ab")]
    pair, _ = LoadPair()(files)
    single, _ = LoadPair()(save_nifti(tmp_path / "both.nii.gz", both))
    assert pair.shape == (2, 7, 8, 9)
    assert torch.equal(pair.as_tensor(), single.as_tensor())
    np.testing.assert_allclose(pair.affine, OBLIQUE, atol=1e-6)
    np.testing.assert_array_equal(pair.numpy(), np.moveaxis(both, -1, 0))


def test_fields_of_a_nifti_header_are_not_carried_along(tmp_path: Path) -> None:
    affine = np.diag([1.0, 2.0, 3.0, 1.0])
    for name in ("a", "b"):
        nib.save(nib.Nifti1Image(np.ones((4, 5, 6), np.float32), affine), tmp_path / f"{name}.nii.gz")
    pair, _ = LoadPair()([tmp_path / "a.nii.gz", tmp_path / "b.nii.gz"])
    assert not set(nib.Nifti1Header()) & set(pair.meta)
    np.testing.assert_array_equal(pair.affine, affine)
    assert pair.meta["filename_or_obj"] == str(tmp_path / "a.nii.gz")


def test_bad_files(tmp_path: Path) -> None:
    small, large = random_image(16, 16), random_image(16, 18)
    a, b = save_png(tmp_path / "a.png", small), save_png(tmp_path / "b.png", large)
    with pytest.raises(ValueError, match=r"a\.png \(16, 16\) and .*b\.png \(18, 16\)"):
        LoadPair()([a, b])
    with pytest.raises(FileNotFoundError, match=r"c\.png does not exist"):
        LoadPair()([a, str(tmp_path / "c.png")])
    broken = tmp_path / "broken.nii.gz"
    broken.write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"broken\.nii\.gz can not be read"):
        LoadPair()([a, broken])
    Path(b).write_bytes(Path(a).read_bytes()[:60])
    with pytest.raises(ValueError, match=r"b\.png can not be read"):
        LoadPair()([a, b])
    with pytest.raises(ValueError, match=r"a\.png has 1 channel"):
        LoadPair()(a)
    with pytest.raises(ValueError, match="Expected two images, got 3"):
        LoadPair()([a, a, a])


def test_affines_that_disagree_warn_without_names(tmp_path: Path) -> None:
    shifted = OBLIQUE.copy()
    shifted[0, 3] += 0.5
    a = save_nifti(tmp_path / "name_t2.nii", random_image(4, 5, 6))
    with pytest.warns(UserWarning, match="different affines") as caught:
        pair, _ = LoadPair()([a, save_nifti(tmp_path / "name_flair.nii", random_image(4, 5, 6), shifted)])
    assert not any("name" in str(warning.message) for warning in caught)
    np.testing.assert_allclose(pair.affine, OBLIQUE, atol=1e-6)
    loader = LoadPair()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loader([a, a])


def test_chroma_of_another_grid() -> None:
    with pytest.raises(ValueError, match="differ in shape"):
        RestoreChromad()({"pred": torch.rand(1, 4, 4), "chroma": torch.rand(2, 4, 5)})


def test_without_chroma_nothing_changes() -> None:
    pred = torch.rand(1, 4, 4)
    assert RestoreChromad()({"pred": pred})["pred"] is pred


@pytest.mark.parametrize("name", ["uint8", "uint16", "int16", "int32"])
def test_scale_to_integers(name: str) -> None:
    peak = np.iinfo(name).max
    values = torch.tensor([-0.2, 0.0, 0.4 / peak, 0.6 / peak, 1.0, 1.7], dtype=torch.float64)
    scaled = ScaleToDtype(name)(values)
    assert scaled.numpy().dtype == name
    assert scaled.numpy().tolist() == [0, 0, 0, 1, peak, peak]


def test_scale_to_float_keeps_values() -> None:
    values = torch.tensor([-0.5, 0.123, 2.0])
    assert torch.equal(ScaleToDtype("float32")(values), values)
    assert ScaleToDtype(np.float16)(values).dtype == torch.float16


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_saved_slice_lies_as_the_mri(tmp_path: Path, dtype: str) -> None:
    mri = random_image(20, 30)
    files = [save_png(tmp_path / "a.png", mri), save_png(tmp_path / "b.png", random_image(20, 30, seed=1))]
    fuse_like_mri(tmp_path / "out", ".png", dtype)({"image": files, "case": "CT-MRI_16003"})
    saved = np.asarray(Image.open(tmp_path / "out" / "CT-MRI_16003" / "CT-MRI_16003_fused.png"))
    np.testing.assert_array_equal(saved, mri.astype(dtype) * (np.iinfo(dtype).max // 255))


def test_saved_colour_slice_lies_as_the_mri(tmp_path: Path) -> None:
    mri = random_image(20, 30)
    rgb = np.full((20, 30, 3), (130, 128, 126), np.uint8)
    files = [save_png(tmp_path / "a.png", mri), save_png(tmp_path / "b.png", rgb)]
    fuse_like_mri(tmp_path / "out", ".png", "uint8")({"image": files})
    saved = Image.open(tmp_path / "out" / "a" / "a_fused.png")
    assert saved.mode == "RGB" and saved.size == (30, 20)
    assert np.abs(np.asarray(saved)[..., 1].astype(int) - mri).max() <= 1


@pytest.mark.parametrize("dtype", ["uint8", "int16", "float32"])
def test_saved_volume_lies_as_the_mri(tmp_path: Path, dtype: str) -> None:
    mri = random_image(7, 8, 9)
    files = [save_nifti(tmp_path / f"{name}.nii.gz", mri) for name in "ab"]
    # a dot in the name is no extension
    fuse_like_mri(tmp_path / "out", ".nii.gz", dtype)({"image": files, "case": "case.1.2"})
    saved = nib.load(tmp_path / "out" / "case.1.2" / "case.1.2_fused.nii.gz")
    assert saved.get_data_dtype() == dtype and saved.shape == (7, 8, 9)
    np.testing.assert_allclose(saved.affine, OBLIQUE, atol=1e-5)
    peak = 1 if dtype == "float32" else np.iinfo(dtype).max
    np.testing.assert_allclose(np.asarray(saved.dataobj) / peak, mri / 255.0, atol=0.51 / peak if peak > 1 else 1e-6)


def test_pair_can_be_scaled_by_channel(tmp_path: Path) -> None:
    files = [save_png(tmp_path / f"{n}.png", random_image(16, 16, seed=i) // (i + 1)) for i, n in enumerate("ab")]
    item = Compose([LoadPaird(), ScaleIntensityd("image", channel_wise=True)])({"image": files})
    assert item["image"].amax((1, 2)).tolist() == [1.0, 1.0]
    assert item["image"].meta["case"] == "a"

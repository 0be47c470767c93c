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

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import itk
import nibabel as nib
import numpy as np
import pydicom
import pytest
import torch
from dicom_samples import IDENTITY, OBLIQUE, affine_lps, write_enhanced, write_series
from monai.data import MetaTensor
from monai.transforms import LoadImage
from pydicom.uid import CTImageStorage, MRImageStorage, SecondaryCaptureImageStorage

from scripts.colour_maps import ColourMapd
from scripts.dicom_series import read_pixels, select_series
from scripts.dicom_writer import SaveDicomSeriesd, derive_series
from scripts.dicom_writer import write_series as write_derived
from scripts.load_case import LoadCased

SHAPE = (16, 20, 6)
BRAINIX = Path(os.environ.get("SHARED_DATA", Path(__file__).resolve().parents[2] / "shared" / "data")) / "brainix-dicom"
SECRETS = [value for value in IDENTITY.values() if len(value) > 1]


def fuse(folder: Path, modality: str = "MR", colour: bool = False, anonymise: bool = False, **values: object) -> Path:
    """Load two generated series, call random numbers the fused image, and save it."""
    rng = np.random.RandomState(0)
    values = {"PatientWeight": "71", **values}
    write_series(folder / "a", rng.randint(0, 900, SHAPE).astype(np.uint16), modality, 301, **values)
    write_series(folder / "b", rng.randint(0, 900, (16, 20, 7)).astype(np.uint16), "MR", 401, **values)
    item = LoadCased(registration="none")({"image": [folder / "a", folder / "b"], "case": "c"})
    pred = torch.as_tensor(rng.rand(3 if colour else 1, *SHAPE).astype(np.float32))
    item["pred"] = MetaTensor(pred).copy_meta_from(item["image"])
    (folder / "model.pt").write_bytes(b"weights")
    SaveDicomSeriesd(output_dir=folder / "out", checkpoint=folder / "model.pt", anonymise=anonymise)(item)
    np.save(folder / "pred.npy", pred.numpy())
    return folder / "out" / "c" / "c_dicom"


def headers(folder: Path) -> list[pydicom.Dataset]:
    return [pydicom.dcmread(file) for file in sorted(folder.iterdir())]


def assert_valid(file: Path) -> None:
    if shutil.which("dciodvfy") is None:
        pytest.skip("dciodvfy (Debian: dicom3tools) is not installed")
    checked = subprocess.run(["dciodvfy", "-new", file], capture_output=True, text=True)
    assert "Image" in checked.stderr and "Error" not in checked.stderr, checked.stderr


@pytest.mark.parametrize(("modality", "kind"), [("MR", MRImageStorage), ("CT", CTImageStorage)])
def test_grey_series_lies_where_the_first_input_does(tmp_path: Path, modality: str, kind: str) -> None:
    out = fuse(tmp_path, modality)
    source, derived = select_series(tmp_path / "a"), select_series(out)
    assert sorted(file.name for file in out.iterdir()) == [f"{n:04d}.dcm" for n in range(1, 7)]
    np.testing.assert_allclose(derived.affine, source.affine, atol=1e-9)
    array, _ = read_pixels(derived)
    np.testing.assert_allclose(array / 4095, np.load(tmp_path / "pred.npy")[0], atol=0.6 / 4095)
    # and so does MONAI's reader see it
    np.testing.assert_allclose(LoadImage()(out).affine, LoadImage()(tmp_path / "a").affine, atol=1e-6)
    for image, original in zip(headers(out), source.headers):
        assert image.SOPClassUID == kind and image.Modality == modality
        assert list(image.ImagePositionPatient) == list(original.ImagePositionPatient)
        assert image.InstanceNumber == original.InstanceNumber
        assert (image.BitsStored, image.WindowCenter, image.WindowWidth) == (12, 2048, 4096)


def test_it_belongs_to_the_study_and_tells_where_it_came_from(tmp_path: Path) -> None:
    images = headers(fuse(tmp_path))
    source = select_series(tmp_path / "a")
    for image in images:
        assert {str(image[keyword].value).replace("['", "") for keyword in IDENTITY} == set(IDENTITY.values())
        assert image.FrameOfReferenceUID == source.header.FrameOfReferenceUID
        assert image.SeriesInstanceUID not in (source.uid, IDENTITY["StudyInstanceUID"])
        assert list(image.ImageType)[:2] == ["DERIVED", "SECONDARY"] and image.SeriesNumber == 9301
        assert image.SeriesDescription == "Fused MR 301 + MR 401" and image.PatientWeight == 71
        assert hashlib.sha256(b"weights").hexdigest() in image.DerivationDescription
        assert image.DerivationCodeSequence[0].CodeMeaning == "Spatial resampling"
        assert image.Manufacturer == "ClinicalFMamba"
        assert len(image.SourceImageSequence) == 1 + 7
        named = {s.SeriesInstanceUID: len(s.ReferencedInstanceSequence) for s in image.ReferencedSeriesSequence}
        assert named == {source.uid: 1, select_series(tmp_path / "b").uid: 7}
    first = [image.SourceImageSequence[0].ReferencedSOPInstanceUID for image in images]
    assert first == [header.SOPInstanceUID for header in source.headers]
    assert len({image.SOPInstanceUID for image in images}) == 6
    assert len({image.SeriesInstanceUID for image in images}) == 1
    again = headers(fuse(tmp_path))
    assert again[0].SeriesInstanceUID != images[0].SeriesInstanceUID and len(again) == 6


def test_colour_and_other_modalities_are_secondary_capture(tmp_path: Path) -> None:
    out = fuse(tmp_path / "rgb", colour=True)
    image = headers(out)[0]
    assert image.SOPClassUID == SecondaryCaptureImageStorage and image.PhotometricInterpretation == "RGB"
    expected = np.load(tmp_path / "rgb" / "pred.npy").transpose(1, 2, 3, 0)
    np.testing.assert_allclose(read_pixels(select_series(out))[0] / 255, expected, atol=0.51 / 255)
    np.testing.assert_allclose(select_series(out).affine, select_series(tmp_path / "rgb" / "a").affine)
    image = headers(fuse(tmp_path / "pet", "PT", Units="BQML"))[0]
    assert image.SOPClassUID == SecondaryCaptureImageStorage and image.Modality == "PT" and "Units" not in image


def test_sources_of_other_studies(tmp_path: Path) -> None:
    """Fused all the same on request; and a sex that DICOM does not know is none."""
    write_series(tmp_path / "a", np.ones(SHAPE, np.uint16), PatientSex="0000")
    write_series(tmp_path / "b", np.ones(SHAPE, np.uint16), number=401, StudyInstanceUID="1.9")
    a, b = select_series(tmp_path / "a"), select_series(tmp_path / "b")
    image = derive_series(np.zeros((1, *SHAPE), np.float32), a.affine, [a.files, b.files])[0]
    assert [series.SeriesInstanceUID for series in image.ReferencedSeriesSequence] == [a.uid]
    (other,) = image.StudiesContainingOtherReferencedInstancesSequence
    assert other.StudyInstanceUID == "1.9" and other.ReferencedSeriesSequence[0].SeriesInstanceUID == b.uid
    assert image.PatientSex == ""


def test_colours_of_a_map_are_a_second_series(tmp_path: Path) -> None:
    rng = np.random.RandomState(0)
    write_series(tmp_path / "a", rng.randint(0, 900, SHAPE).astype(np.uint16))
    write_series(tmp_path / "b", rng.randint(0, 900, SHAPE).astype(np.uint16), "PT", 401, Units="CNTS")
    item = LoadCased()({"image": [tmp_path / "a", tmp_path / "b"], "case": "c"})
    item["image"] = item["image"] / 900
    item["pred"] = item["image"][:1]
    item = ColourMapd(colormap="hot_iron")(item)
    SaveDicomSeriesd(keys=("pred", "pred_colour"), output_dir=tmp_path / "out", colormap="hot_iron")(item)
    grey, colour = headers(tmp_path / "out" / "c" / "c_dicom"), headers(tmp_path / "out" / "c" / "c_dicom_colour")
    assert len(colour) == SHAPE[2] and len({image.SeriesInstanceUID for image in [*grey, *colour]}) == 2
    for image, other in zip(colour, grey):
        assert (image.PhotometricInterpretation, image.SamplesPerPixel, image.PlanarConfiguration) == ("RGB", 3, 0)
        assert (image.BitsAllocated, image.BitsStored, image.HighBit) == (8, 8, 7)
        assert not {"WindowCenter", "WindowWidth", "VOILUTSequence", "RescaleSlope"} & set(image.dir())
        assert (image.SeriesNumber, other.SeriesNumber) == (9801, 9301)
        assert image.SeriesDescription == "Fused MR 301 + PT 401 (hot_iron)"
        assert image.DerivationDescription.endswith("in the colours of hot_iron")
        for keyword in ("StudyInstanceUID", "FrameOfReferenceUID", "ImagePositionPatient", "ImageOrientationPatient"):
            assert image[keyword].value == other[keyword].value
    derived = select_series(tmp_path / "out" / "c" / "c_dicom_colour")
    np.testing.assert_allclose(derived.affine, select_series(tmp_path / "a").affine, atol=1e-9)
    expected = item["pred_colour"].permute(1, 2, 3, 0).numpy()
    np.testing.assert_allclose(read_pixels(derived)[0] / 255, expected, atol=0.51 / 255)
    assert_valid(tmp_path / "out" / "c" / "c_dicom_colour" / "0003.dcm")


def test_anonymised(tmp_path: Path) -> None:
    out = fuse(tmp_path, anonymise=True, IssuerOfPatientID="Secret hospital", LossyImageCompression="01")
    source = select_series(tmp_path / "a")
    uids = {str(source.uid), str(source.header.FrameOfReferenceUID), *(str(h.SOPInstanceUID) for h in source.headers)}
    for file in out.iterdir():
        content = file.read_bytes().lower()
        assert not any(secret.lower().encode() in content for secret in SECRETS) and b"secret" not in content
        image = pydicom.dcmread(file)
        assert not uids & {str(element.value) for element in image.iterall() if element.VR == "UI"}
        assert image.PatientIdentityRemoved == "YES" and "PatientWeight" not in image
        assert image.LossyImageCompression == "01"
    # one study stays one
    assert headers(fuse(tmp_path / "x", anonymise=True))[0].StudyInstanceUID == image.StudyInstanceUID
    np.testing.assert_allclose(select_series(out).affine, source.affine, atol=1e-9)


def test_a_single_slice_and_files_without_a_header(tmp_path: Path) -> None:
    write_series(tmp_path / "a", np.ones((12, 10, 1), np.uint16))
    item = LoadCased(spatial_dims=2)({"image": [tmp_path / "a"] * 2, "case": "c"})
    item["pred"] = item["image"][:1] / 2
    SaveDicomSeriesd(output_dir=tmp_path / "out")(item)
    (image,) = headers(tmp_path / "out" / "c" / "c_dicom")
    assert (image.Rows, image.Columns) == (10, 12) and (image.pixel_array == 2048).all()
    for name in ("x", "y"):
        nib.save(nib.Nifti1Image(np.random.rand(6, 7, 8), np.eye(4)), tmp_path / f"{name}.nii")
    item = LoadCased()({"image": [tmp_path / "x.nii", tmp_path / "y.nii"], "case": "n"})
    SaveDicomSeriesd(keys="image", output_dir=tmp_path / "none")(item)
    assert not (tmp_path / "none").exists()


def test_a_multi_frame_input(tmp_path: Path) -> None:
    affine = affine_lps((0.9, 1.1, 3.0), (-20, 30, 40.5), OBLIQUE)
    volume = np.random.RandomState(0).randint(0, 900, SHAPE).astype(np.uint16)
    write_enhanced(tmp_path / "a" / "enhanced", volume, affine)
    item = LoadCased()({"image": [tmp_path / "a"] * 2, "case": "c"})
    np.testing.assert_array_equal(item["image"][0], volume)
    np.testing.assert_allclose(item["image"].affine, np.diag([-1, -1, 1, 1]) @ affine, atol=1e-5)
    item["pred"] = item["image"][:1] / 900
    SaveDicomSeriesd(output_dir=tmp_path / "out")(item)
    derived = select_series(tmp_path / "out" / "c" / "c_dicom")
    assert derived.header.SOPClassUID == SecondaryCaptureImageStorage and derived.slices == SHAPE[2]
    np.testing.assert_allclose(derived.affine, item["image"].affine, atol=1e-5)
    np.testing.assert_allclose(read_pixels(derived)[0] / 4095, volume / 900, atol=1e-3)


def test_another_grid_is_refused(tmp_path: Path) -> None:
    write_series(tmp_path / "a", np.ones(SHAPE, np.uint16))
    series = select_series(tmp_path / "a")
    sources = [series.files, series.files]
    far = series.affine.copy()
    far[0, 3] += 1
    for shape, affine in (((1, 16, 20, 5), series.affine), ((1, *SHAPE), far)):
        with pytest.raises(ValueError, match="is not on the grid of its first input"):
            derive_series(np.zeros(shape, np.float32), affine, sources)


def test_an_older_series_is_replaced_whole(tmp_path: Path) -> None:
    write_series(tmp_path / "a", np.ones(SHAPE, np.uint16))
    series = select_series(tmp_path / "a")
    images = derive_series(np.zeros((1, *SHAPE), np.float32), series.affine, [series.files, series.files])
    write_derived(images, tmp_path / "out")
    write_derived(images[:2], tmp_path / "out")
    assert [file.name for file in sorted((tmp_path / "out").iterdir())] == ["0001.dcm", "0002.dcm"]
    with pytest.raises(AttributeError):
        write_derived([images[0], None], tmp_path / "out")  # type: ignore[list-item]
    assert len(list((tmp_path / "out").iterdir())) == 2 and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(("modality", "colour"), [("MR", False), ("CT", False), ("MR", True), ("PT", False)])
@pytest.mark.parametrize("anonymise", [False, True])
def test_dciodvfy_finds_no_errors(tmp_path: Path, modality: str, colour: bool, anonymise: bool) -> None:
    assert_valid(fuse(tmp_path, modality, colour, anonymise) / "0003.dcm")


def test_dcm2niix_puts_it_where_the_first_input_is(tmp_path: Path) -> None:
    if shutil.which("dcm2niix") is None:
        pytest.skip("dcm2niix is not installed")
    affine = affine_lps((0.9, 1.1, 3.0), (-20, 30, 40.5), np.diag([1, 1, 1]))
    out = fuse(tmp_path, affine=affine)
    images = []
    for name, folder in (("a", tmp_path / "a"), ("b", out)):
        command = ["dcm2niix", "-f", name, "-o", tmp_path, folder]
        subprocess.run(command, check=True, capture_output=True)
        images.append(nib.load(tmp_path / f"{name}.nii"))
    assert images[0].shape == images[1].shape
    np.testing.assert_allclose(images[1].affine, images[0].affine, atol=1e-4)


def test_a_real_study(tmp_path: Path) -> None:
    """T2 and FLAIR of different grids: grey and colour lie where T2 does, for whatever reads them."""
    if not BRAINIX.is_dir():
        pytest.skip(f"{BRAINIX} is not there: set SHARED_DATA to the folder that holds brainix-dicom")
    item = LoadCased()({"image": [BRAINIX / "T2", BRAINIX / "FLAIR"], "case": "c"})
    item["image"] = item["image"] / item["image"].amax(dim=(1, 2, 3), keepdim=True)
    item["pred"] = item["image"][:1]
    item = ColourMapd(colormap="hot")(item)
    SaveDicomSeriesd(keys=("pred", "pred_colour"), output_dir=tmp_path, colormap="hot")(item)
    for name in ("c_dicom", "c_dicom_colour"):
        folder = tmp_path / "c" / name
        for reader in ("ITKReader", "PydicomReader"):
            affines = [LoadImage(reader=reader)(path).affine for path in (BRAINIX / "T2", folder)]
            np.testing.assert_allclose(affines[1], affines[0], atol=1e-4)
        original, derived = (gdcm_geometry(path) for path in (BRAINIX / "T2", folder))
        np.testing.assert_allclose(derived, original, atol=1e-4)
        assert_valid(folder / "0011.dcm")


def gdcm_geometry(folder: Path) -> np.ndarray:
    """Origin, spacing, direction and size as ITK's series reader has them."""
    names = itk.GDCMSeriesFileNames.New(Directory=str(folder))
    image = itk.imread(list(names.GetFileNames(names.GetSeriesUIDs()[0])))
    parts = (image.GetOrigin(), image.GetSpacing(), itk.array_from_matrix(image.GetDirection()).ravel())
    return np.concatenate([*(np.asarray(list(part)) for part in parts), itk.size(image)])

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

import io
import warnings
from pathlib import Path

import itk
import numpy as np
import pydicom
import pytest
from dicom_samples import IDENTITY, affine_lps, write_series
from monai.transforms import LoadImage
from PIL import Image
from pydicom.encaps import encapsulate, generate_frames
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    HTJ2KLossless,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

from scripts.dicom_series import DicomSeriesReader, find_series, is_dicom, read_header, read_pixels, select_series

TO_RAS = np.diag([-1, -1, 1, 1])


def random_volume(*shape: int, seed: int = 0, dtype: type = np.uint16) -> np.ndarray:
    return np.random.RandomState(seed).randint(0, 200, shape).astype(dtype)


def test_slices_are_ordered_by_position_and_lie_obliquely(tmp_path: Path) -> None:
    volume = random_volume(7, 9, 5)
    affine = write_series(tmp_path, volume)
    array, meta = read_pixels(select_series(tmp_path))
    np.testing.assert_array_equal(array, volume)
    np.testing.assert_allclose(meta["affine"], TO_RAS @ affine, atol=1e-5)
    image = LoadImage(reader=DicomSeriesReader(), ensure_channel_first=True)(tmp_path)
    assert image.shape == (1, 7, 9, 5)
    # MONAI's own reader puts an upright series at the same place
    np.testing.assert_allclose(image.affine, LoadImage()(tmp_path).affine, atol=1e-4)


def test_a_tilted_gantry_shears_the_volume(tmp_path: Path) -> None:
    affine = affine_lps((1, 1, 2), (0, 0, 0), np.eye(3))
    affine[1, 2] = 0.7
    write_series(tmp_path, random_volume(6, 6, 4), "CT", affine=affine)
    np.testing.assert_allclose(read_pixels(select_series(tmp_path))[1]["affine"], TO_RAS @ affine, atol=1e-6)


def test_every_slice_has_its_own_rescaling(tmp_path: Path) -> None:
    volume = random_volume(6, 5, 3)
    scales = [(2, -100), (0.37, 12.5), (1.01, 0)]
    write_series(tmp_path, volume, "CT", rescale=scales)
    array, meta = read_pixels(select_series(tmp_path))
    np.testing.assert_allclose(array, volume * [s for s, _ in scales] + [i for _, i in scales], rtol=1e-5, atol=1e-4)
    assert array.dtype == np.float32 and (meta["units"], meta["modality"]) == ("HU", "CT")


def test_compressed_inverted_and_coloured(tmp_path: Path) -> None:
    volume = random_volume(32, 24, 2)
    write_series(tmp_path / "rle", volume, compress=RLELossless)
    write_series(tmp_path / "inverted", volume, PhotometricInterpretation="MONOCHROME1")
    colour = random_volume(8, 6, 2, 3, dtype=np.uint8)
    write_series(tmp_path / "colour", colour, "OT")
    np.testing.assert_array_equal(read_pixels(select_series(tmp_path / "rle"))[0], volume)
    np.testing.assert_array_equal(read_pixels(select_series(tmp_path / "inverted"))[0], 65535 - volume)
    np.testing.assert_array_equal(read_pixels(select_series(tmp_path / "colour"))[0], colour)


def by_itk(pixels: np.ndarray, folder: Path) -> bytes:
    """JPEG lossless, which no Python package writes."""
    settings = itk.GDCMImageIO.New()
    settings.SetCompressionType(itk.GDCMImageIOEnums.Compression_JPEG)
    itk.imwrite(itk.image_from_array(pixels), str(folder / "whole.dcm"), compression=True, imageio=settings)
    whole = pydicom.dcmread(folder / "whole.dcm")
    assert whole.file_meta.TransferSyntaxUID == JPEGLosslessSV1
    return next(generate_frames(whole.PixelData, number_of_frames=1))


def by_pillow(pixels: np.ndarray, kind: str, **settings: object) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind, **settings)
    return stream.getvalue()


ENCODERS = {
    JPEGLosslessSV1: by_itk,
    JPEG2000Lossless: lambda pixels, _: by_pillow(pixels, "JPEG2000", no_jp2=True),
    JPEGBaseline8Bit: lambda pixels, _: by_pillow(pixels, "JPEG", quality=100),
    # not an image in that syntax
    HTJ2KLossless: lambda pixels, _: b"\xff\x4f\xff\x51" + pixels.tobytes(),
}


def write_compressed(folder: Path, volume: np.ndarray, syntax: UID) -> None:
    write_series(folder, volume)
    for file in folder.iterdir():
        image = pydicom.dcmread(file)
        if syntax in ENCODERS:
            image.PixelData = encapsulate([ENCODERS[syntax](image.pixel_array, folder.parent)])
            image["PixelData"].VR, image["PixelData"].is_undefined_length = "OB", True
        image.file_meta.TransferSyntaxUID = syntax
        image.save_as(file)


@pytest.mark.parametrize(
    ("syntax", "dtype", "error"),
    [
        (DeflatedExplicitVRLittleEndian, np.uint16, 0),
        (JPEGLosslessSV1, np.uint16, 0),
        (JPEG2000Lossless, np.uint16, 0),
        (JPEGBaseline8Bit, np.uint8, 2),
    ],
    ids=["deflated", "jpeg_lossless", "jpeg_2000", "jpeg"],
)
def test_compressed_transfer_syntaxes(tmp_path: Path, syntax: UID, dtype: type, error: int) -> None:
    volume = random_volume(32, 24, 2, dtype=dtype)
    write_compressed(tmp_path / "a", volume, syntax)
    assert np.abs(read_pixels(select_series(tmp_path / "a"))[0] - volume).max() <= error


def test_jpeg_ls(tmp_path: Path) -> None:
    volume = random_volume(32, 24, 2)
    write_series(tmp_path, volume, compress=JPEGLSLossless)
    np.testing.assert_array_equal(read_pixels(select_series(tmp_path))[0], volume)


def test_no_decoder(tmp_path: Path) -> None:
    write_compressed(tmp_path / "a", random_volume(32, 24, 2), HTJ2KLossless)
    with pytest.raises(ValueError, match=r"a/IM000\d \(High-Throughput JPEG 2000 .*\) can not be decoded: store them"):
        read_pixels(select_series(tmp_path / "a"))


def test_single_slice(tmp_path: Path) -> None:
    affine = write_series(tmp_path, random_volume(6, 5, 1))
    array, meta = read_pixels(select_series(tmp_path))
    assert array.shape in ((6, 5), (6, 5, 1))
    np.testing.assert_allclose(meta["affine"], TO_RAS @ affine, atol=1e-5)


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """Two MR series and a CT, all in one folder and one below it, with what lies about in such folders."""
    write_series(tmp_path / "a", random_volume(6, 6, 3), number=1, SeriesDescription="sT2 TSE")
    write_series(tmp_path / "b", random_volume(6, 6, 4), number=2, SeriesDescription="sT2 FLAIR")
    write_series(tmp_path / "b" / "deep", random_volume(6, 6, 2), "CT", number=3)
    for number, folder in enumerate(("a", "b")):
        for file in (tmp_path / folder).glob("IM*"):
            file.rename(tmp_path / f"{file.name}_{number}")
    (tmp_path / "DICOMDIR").write_bytes(b"\0" * 128 + b"DICM")
    (tmp_path / "readme.txt").write_text("no image")
    (tmp_path / ".hidden").write_bytes(b"\0" * 128 + b"DICM")
    return tmp_path


def test_several_series_are_listed_without_the_patient(study: Path) -> None:
    assert [s.slices for s in find_series(study)] == [3, 4, 2]
    with pytest.raises(ValueError) as error:
        select_series(study)
    for part in ("1 MR 'sT2 TSE' (3 slices)", "2 MR 'sT2 FLAIR' (4 slices)", "3 CT 'series 3' (2 slices)"):
        assert part in str(error.value)
    assert not any(str(value).lower() in str(error.value).lower() for value in IDENTITY.values() if len(value) > 1)


@pytest.mark.parametrize(
    ("wanted", "number"), [("ct", "3"), ("flair", "2"), (1, "1"), ("1.3.6.1.4.1.99999.2", "2"), ("st2 tse", "1")]
)
def test_one_of_several_series(study: Path, wanted: str | int, number: str) -> None:
    assert select_series(study, wanted).number == number


@pytest.mark.parametrize(("wanted", "found"), [("T2", "2 series like 'T2'"), ("PET", "no series like 'PET'")])
def test_a_choice_that_does_not_tell(study: Path, wanted: str, found: str) -> None:
    with pytest.raises(ValueError, match=found):
        select_series(study, wanted)


def test_echoes_orientations_and_localisers_are_series_of_their_own(tmp_path: Path) -> None:
    volume = random_volume(6, 6, 3)
    for echo in (20.0, 90.0):
        write_series(tmp_path / str(echo), volume, number=5, EchoTime=echo, SeriesDescription="PD T2")
    assert select_series(tmp_path, "te 90").header.EchoTime == 90
    write_series(tmp_path / "scout", random_volume(6, 6, 1), number=5, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    assert len(find_series(tmp_path)) == 2


def test_gaps_and_overlaps(tmp_path: Path) -> None:
    write_series(tmp_path / "gap", random_volume(6, 6, 5))
    next(f for f in (tmp_path / "gap").iterdir() if pydicom.dcmread(f).InstanceNumber == 3).unlink()
    with pytest.raises(ValueError, match=r"4 slices of series 301 in .*gap are 3\.00 to 6\.00 mm apart"):
        find_series(tmp_path / "gap")
    write_series(tmp_path / "twice", random_volume(6, 6, 3))
    write_series(tmp_path / "twice" / "again", random_volume(6, 6, 3))
    with pytest.raises(ValueError, match=r"0\.00 to 3\.00 mm apart"):
        find_series(tmp_path / "twice")


def test_nothing_and_damaged(tmp_path: Path) -> None:
    (tmp_path / "a.nii.gz").write_bytes(b"\0" * 128 + b"DICM")
    assert not is_dicom(tmp_path)
    with pytest.raises(FileNotFoundError, match="holds no DICOM images"):
        find_series(tmp_path)
    write_series(tmp_path / "cut", random_volume(16, 16, 2))
    file = next((tmp_path / "cut").iterdir())
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="can not be decoded"):
        read_pixels(select_series(tmp_path / "cut"))


def test_metadata_has_nothing_of_the_patient(tmp_path: Path) -> None:
    write_series(tmp_path, random_volume(6, 6, 3))
    meta = str(read_pixels(select_series(tmp_path))[1])
    assert not any(str(value) in meta for value in IDENTITY.values() if len(value) > 1)


def test_no_warning_quotes_a_header(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A birth date that is not written as it should be is one all the same."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        write_series(tmp_path, random_volume(6, 6, 3), PatientBirthDate="31.12.1949", StudyInstanceUID="1.02.3")
    caplog.clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        series = select_series(tmp_path)
        values = read_header(series.files[0], None).PatientBirthDate, series.header.StudyInstanceUID
    assert [str(value) for value in values] == ["31.12.1949", "1.02.3"]
    told = caplog.text + "".join(str(warning.message) for warning in caught)
    assert not any(str(value) in told for value in values)

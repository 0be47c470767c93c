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

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from pydicom.dataset import Dataset

from scripts.intensity import ScaleByUnit, ScaleByUnitd
from scripts.suv import suv_factor


def pet_header(**changes: object) -> Dataset:
    """70 kg, 370 MBq of fluorine-18 injected an hour before the scan."""
    injection = Dataset()
    injection.RadionuclideTotalDose = 370e6
    injection.RadionuclideHalfLife = 6586.2
    injection.RadiopharmaceuticalStartTime = "090000"
    header = Dataset()
    header.Modality, header.Units, header.CorrectedImage, header.DecayCorrection = (
        "PT",
        "BQML",
        ["ATTN", "DECY"],
        "START",
    )
    header.PatientWeight = 70
    header.SeriesDate = header.AcquisitionDate = "20200131"
    header.SeriesTime = header.AcquisitionTime = "100000.00"
    header.RadiopharmaceuticalInformationSequence = [injection]
    for keyword, value in changes.items():
        setattr(injection if keyword.startswith("Radio") else header, keyword, value)
    return header


EXPECTED = 70_000 / (370e6 * 0.5 ** (3600 / 6586.2))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, EXPECTED),
        ({"DecayCorrection": "ADMIN"}, 70_000 / 370e6),
        ({"Units": "GML"}, 1),
        # processed in the evening: the acquisition tells when it began
        ({"SeriesTime": "200000"}, EXPECTED),
        ({"RadiopharmaceuticalStartDateTime": "20200131090000"}, EXPECTED),
        # injected half an hour before midnight, scanned half an hour after
        ({"SeriesTime": "003000", "AcquisitionTime": "003000", "RadiopharmaceuticalStartTime": "233000"}, EXPECTED),
    ],
)
def test_suv(changes: dict, expected: float) -> None:
    assert suv_factor(pet_header(**changes)) == pytest.approx(expected)


@pytest.mark.parametrize(
    "changes",
    [
        {"Modality": "CT"},
        {"Units": "CNTS"},
        {"CorrectedImage": ["ATTN"]},
        {"PatientWeight": 0},
        {"RadionuclideTotalDose": None},
        {"RadionuclideHalfLife": None},
        {"DecayCorrection": "NONE"},
        {"SeriesTime": "", "AcquisitionTime": ""},
        {"RadiopharmaceuticalStartTime": ""},
    ],
)
def test_no_suv_without_what_it_needs(changes: dict) -> None:
    assert suv_factor(pet_header(**changes)) is None


def test_every_unit_has_its_scale() -> None:
    image = torch.stack([torch.tensor([[-1000.0, 0, 40, 80, 2000]]), torch.tensor([[0.0, 3, 15, 20, 1]])])
    expected = torch.tensor([[0, 0, 0.5, 1, 1], [0, 0.2, 1, 1, 1 / 15]])
    torch.testing.assert_close(ScaleByUnit()(image, ["HU", "SUV"])[:, 0], expected)
    by_percentiles = ScaleByUnit(ct_window=(500, 1000))(image, ["HU"])
    torch.testing.assert_close(by_percentiles[:, 0], torch.tensor([[0, 0, 0.04, 0.08, 1], [0, 0.15, 0.75, 1, 0.05]]))
    with pytest.raises(ValueError, match="centre, width"):
        ScaleByUnit(ct_window=(40, 0))


def test_units_come_from_the_notes() -> None:
    affine = np.diag([1.0, 2, 3, 1])
    image = MetaTensor(torch.tensor([[[0.0, 40, 80]], [[0, 5, 10]]]), affine=affine)
    item = {"image": image, "fusion_info": {"inputs": [{"units": "HU"}, {"units": ""}]}}
    for d in (ScaleByUnitd()(item), ScaleByUnitd()({"image": image})):
        torch.testing.assert_close(d["image"].as_tensor(), torch.tensor([[[0, 0.5, 1]], [[0, 0.5, 1]]]))
        np.testing.assert_array_equal(d["image"].affine, affine)

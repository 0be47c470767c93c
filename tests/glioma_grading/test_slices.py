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

from scripts.slices import LoadMaskd, MatchIntensityd, PickSlicesd, evenly_spaced
from scripts.sources import LoadSourced


def test_evenly_spaced():
    area = np.array([0, 10, 60, 80, 100, 90, 70, 20, 0])
    assert evenly_spaced(area, 3, 0.5).tolist() == [2, 4, 6]
    assert evenly_spaced(area, 1, 0.5).tolist() == [2] and evenly_spaced(area, 10, 0.5).min() == 2
    assert len(evenly_spaced(area, 10, 0.5)) == 10, "some are taken twice"
    assert evenly_spaced(np.zeros(4), 2, 0.5).tolist() == [0, 3], "an empty image has no slice with more brain"


def test_pick_slices():
    image = torch.zeros(1, 8, 8, 12)
    image[..., 2:10] = torch.arange(1.0, 9) / 8  # a value for each slice
    picked = PickSlicesd(num_slices=4)({"image": MetaTensor(image)})
    assert picked["image"].shape == (1, 8, 8, 4) and picked["slices"] == "brain"
    assert picked["image"][0, 0, 0].tolist() == [0.125, 0.375, 0.75, 1.0]


def test_pick_slices_by_mask():
    image = MetaTensor(torch.arange(6.0).expand(1, 4, 4, 6) / 6)
    mask = torch.zeros(1, 4, 4, 6)
    mask[0, :2, :2, 1], mask[0, :3, :3, 4], mask[0, 0, 0, 5] = 1, 4, 2
    picked = PickSlicesd(num_slices=2)({"image": image, "mask": mask})
    assert (picked["image"][0, 0, 0] * 6).round().tolist() == [1, 4] and picked["slices"] == "mask"
    assert "mask" not in picked


def test_load_mask(few_patients):
    files = [str(few_patients / "HGG" / "glioma_100" / f"glioma_100_{m}.nii.gz") for m in ("t2", "flair")]
    assert LoadMaskd(suffix="seg")({"image": files})["mask"].shape == (1, 48, 56, 6)
    assert "mask" not in LoadMaskd()({"image": files})
    with pytest.raises(FileNotFoundError, match="glioma_100_tumour.nii.gz does not exist"):
        LoadMaskd(suffix="tumour")({"image": files})


class TestMatchIntensity:
    def image(self, gain):
        brain = torch.rand(2, 20, 20, 5, generator=torch.Generator().manual_seed(0)) * 0.5 + 0.2
        return torch.where(torch.arange(20).view(20, 1, 1) < 12, brain * gain, 0.0)

    @pytest.mark.parametrize("method", ["robust", "histogram"])
    def test_sites_become_alike(self, method):
        match = MatchIntensityd(method=method)
        one, other = (match({"image": MetaTensor(self.image(gain))})["image"].as_tensor() for gain in (1.0, 1.4))
        torch.testing.assert_close(one, other, atol=0.01, rtol=0)
        assert one[:, 12:].abs().max() == 0 and 0 <= one.min() and one.max() <= 1

    def test_flat_histogram_of_each_channel(self):
        image = self.image(1.0)
        image[1] = image[1] ** 3
        matched = MatchIntensityd(method="histogram")({"image": image.clamp_min(0)})["image"]
        for channel, source in zip(matched, image):
            values = channel[source > 0.1]
            np.testing.assert_allclose(np.quantile(values, [0.25, 0.5, 0.75]), [0.25, 0.5, 0.75], atol=0.02)

    def test_robust(self):
        matched = MatchIntensityd(method="robust")({"image": self.image(1.0)})["image"]
        low, median, high = np.quantile(matched[0, :12], [0.25, 0.5, 0.75])
        assert median == pytest.approx(0.5, abs=1e-3) and high - low == pytest.approx(0.25, abs=1e-3)

    def test_none_and_unknown(self):
        image = self.image(1.0)
        assert MatchIntensityd()({"image": image})["image"] is image
        assert MatchIntensityd(method="histogram")({"image": torch.zeros(1, 4, 4, 4)})["image"].sum() == 0
        with pytest.raises(ValueError, match="must be one of none, robust, histogram"):
            MatchIntensityd(method="nyul")


class TestSources:
    @pytest.fixture
    def files(self, few_patients):
        return [str(few_patients / "HGG" / "glioma_100" / f"glioma_100_{m}.nii.gz") for m in ("t2", "flair")]

    def test_pair_sources(self, files):
        images = {
            source: LoadSourced("image", source)({"image": files, "case": "a"})["image"]
            for source in ("t2", "flair", "t2_flair", "average", "maximum")
        }
        t2, flair = images["t2_flair"].as_tensor()
        assert torch.equal(images["t2"].as_tensor()[0], t2) and torch.equal(images["flair"].as_tensor()[0], flair)
        torch.testing.assert_close(images["average"].as_tensor()[0], (t2 + flair) / 2)
        torch.testing.assert_close(images["maximum"].as_tensor()[0], torch.maximum(t2, flair))
        assert all(i.meta["case"] == "a" and 0 <= i.min() and i.max() == 1 for i in (images["t2"], images["flair"]))
        assert not torch.equal(t2, flair)

    def test_anything_else_needs_a_fusion(self, files):
        with pytest.raises(ValueError, match="it needs `fuse`"):
            LoadSourced("image", "fused")
        with pytest.raises(ValueError, match="needs one image a case, not 2"):
            LoadSourced("image", "fused_files")({"image": files})
        given = LoadSourced("image", "fused", fuse=lambda d: {"image": MetaTensor(torch.ones(1, 4, 4))})
        assert given({"image": files})["image"].shape == (1, 4, 4, 1), "a slice is a volume of one"

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

import os
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from PIL import Image
from skimage import color

from custom_nets.nets import ClinicalFMamba
from scripts.colour import COLOUR_SPACES, join_colour, lab_to_rgb, rgb_to_lab, rgb_to_ycbcr, split_colour, ycbcr_to_rgb
from scripts.colour_maps import DICOM_PALETTES, ColourMap, ColourMapd
from scripts.phantom import digital_brain, write
from scripts.transforms import LoadPair, LoadPaird, RestoreChroma, RestoreChromad

ROOT = Path(__file__).resolve().parents[1]
AANLIB = Path(os.environ.get("SHARED_DATA", ROOT.parent / "shared" / "data")) / "aanlib"
WEIGHTS = ROOT / "bundles" / "clinicalfmamba_fusion" / "models" / "model.pt"
# chroma in CIELAB from which an area has a colour, and from which a hue can be seen
COLOURED, VISIBLE = 10, 2


def scaled(image: torch.Tensor) -> torch.Tensor:
    return (image - image.min()) / (image.max() - image.min())


def hues(rgb: torch.Tensor) -> dict[str, np.ndarray]:
    """Hue in degrees, as skimage has it, in CIELAB and in HSV; and the chroma in CIELAB."""
    picture = rgb.permute(1, 2, 0).numpy()
    _, a, b = np.moveaxis(color.rgb2lab(picture), -1, 0)
    return {"lab": np.degrees(np.arctan2(b, a)), "hsv": 360 * color.rgb2hsv(picture)[..., 0], "chroma": np.hypot(a, b)}


def hue_differences(partner: torch.Tensor, fused: torch.Tensor) -> dict[str, float]:
    """Mean difference in degrees between two RGB images where the first has colour and the second shows it."""
    before, after = hues(partner), hues((fused * 255).round() / 255)
    area = (before["chroma"] > COLOURED) & (after["chroma"] > VISIBLE)
    assert area.any()
    differences = {}
    for name in ("lab", "hsv"):
        difference = np.abs(before[name] - after[name])[area] % 360
        differences[name] = float(np.minimum(difference, 360 - difference).mean())
    return differences


def test_cielab_is_that_of_skimage() -> None:
    rgb = torch.rand(3, 40, 30)
    # dark colours and greys take the other branches
    rgb[:, :10] /= 50
    rgb[:, 10:12] = rgb[:1, 10:12]
    lab = rgb_to_lab(rgb)
    np.testing.assert_allclose(lab.permute(1, 2, 0), color.rgb2lab(rgb.permute(1, 2, 0).numpy()), atol=1e-3)
    torch.testing.assert_close(lab_to_rgb(lab), rgb, atol=1e-5, rtol=0)


def test_ycbcr_there_and_back() -> None:
    rgb = torch.rand(3, 9, 7)
    luma, chroma = rgb_to_ycbcr(rgb)
    assert luma.shape == (1, 9, 7) and chroma.shape == (2, 9, 7)
    torch.testing.assert_close(ycbcr_to_rgb(luma, chroma), rgb)
    # JFIF's pure red, green and blue
    primaries = rgb_to_ycbcr(torch.eye(3)[:, :, None])
    torch.testing.assert_close(primaries[0][0, :, 0], torch.tensor([0.299, 0.587, 0.114]))
    assert primaries[1].amax() == pytest.approx(1.0)


@pytest.mark.parametrize("space", COLOUR_SPACES)
class TestSpaces:
    def test_there_and_back_in_any_shape(self, space: str) -> None:
        for shape in ((5, 6), (5, 6, 4), (2, 5, 6, 4)):
            rgb = torch.rand(3, *shape)
            grey, chroma = split_colour(rgb, space)
            assert grey.shape == (1, *shape) and chroma.shape == (2, *shape) and 0 <= grey.min() <= grey.max() <= 1
            torch.testing.assert_close(join_colour(grey, chroma, space), rgb, atol=2e-5, rtol=0)

    def test_grey_is_itself(self, space: str) -> None:
        values = torch.linspace(0, 1, 256)
        grey, chroma = split_colour(values.expand(3, 1, 256), space)
        torch.testing.assert_close(grey[0, 0], values, atol=1e-4, rtol=0)
        neutral = 0.5 if space == "ycbcr" else 0.0
        torch.testing.assert_close(chroma, torch.full((2, 1, 256), neutral), atol=0.02, rtol=0)

    def test_any_lightness_keeps_grey_and_hue_within_the_gamut(self, space: str) -> None:
        """Every colour at every lightness: most of them do not exist, and clipping would change them."""
        steps = torch.linspace(0, 1, 9)
        rgb = torch.stack(torch.meshgrid(steps, steps, steps, indexing="ij")).flatten(1)[:, None]
        _, chroma = split_colour(rgb, space)
        for level in (0.05, 0.4, 0.7, 0.95):
            grey = torch.full((1, *rgb.shape[1:]), level)
            joined = join_colour(grey, chroma, space)
            assert 0 <= joined.min() and joined.max() <= 1
            new_grey, new_chroma = split_colour(joined, space)
            torch.testing.assert_close(new_grey, grey, atol=1e-3, rtol=0)
            centred, new_centred = (c - 0.5 if space == "ycbcr" else c for c in (chroma, new_chroma))
            lengths = centred.norm(dim=0), new_centred.norm(dim=0)
            assert (lengths[1] <= lengths[0] + 1e-3).all()
            seen = (lengths[0] > 0.02 * lengths[0].max()) & (lengths[1] > 0.02 * lengths[0].max())
            cosine = (centred * new_centred).sum(0)[seen] / (lengths[0] * lengths[1])[seen]
            assert seen.float().mean() > 0.5 and cosine.min() > 0.999

    def test_what_can_be_shown_is_not_changed(self, space: str) -> None:
        rgb = 0.4 + 0.2 * torch.rand(3, 8, 8)
        grey, chroma = split_colour(rgb, space)
        _, kept = split_colour(join_colour(grey + 0.05, chroma, space), space)
        torch.testing.assert_close(kept, chroma, atol=1e-3, rtol=0)

    # the first two are like those of AANLIB's SPECT and PET; of hot_iron and hot_metal_blue, see TestColourMap
    @pytest.mark.parametrize("colormap", ["CMRmap", "jet", "hot", "inferno", "pet", "pet_20_step"])
    def test_hue_of_generated_pairs(self, space: str, colormap: str) -> None:
        brain = digital_brain((96, 96), seed=3)
        mri, functional = torch.from_numpy(brain["mri"])[None], torch.from_numpy(brain["pet"])[None]
        partner = ColourMap(colormap)(functional)
        grey, chroma = split_colour(partner, space)
        differences = hue_differences(partner, join_colour(torch.maximum(mri, grey), chroma, space))
        assert max(differences.values()) < 5

    def test_through_files(self, space: str, tmp_path: Path) -> None:
        rgb = np.random.RandomState(0).randint(0, 256, (16, 24, 3)).astype(np.uint8)
        files = [tmp_path / "a.png", tmp_path / "b.png"]
        Image.fromarray(rgb[..., 0]).save(files[0])
        Image.fromarray(rgb).save(files[1])
        item = LoadPaird(colour_space=space)({"image": files, "case": "pet"})
        item["pred"] = item["image"][1:] / 255
        restored = RestoreChromad(colour_space=space)(item)["pred"]
        assert restored.shape == (3, 24, 16) and restored.meta["case"] == "pet"
        assert np.abs(restored.numpy() * 255 - rgb.transpose(2, 1, 0)).max() < 1


def test_grey_of_cielab_is_as_light_as_the_colour() -> None:
    rgb = torch.rand(3, 10, 10)
    grey, _ = split_colour(rgb, "cielab")
    torch.testing.assert_close(rgb_to_lab(grey.expand(3, -1, -1))[0], rgb_to_lab(rgb)[0], atol=1e-2, rtol=0)


@pytest.mark.parametrize("make", [LoadPair, RestoreChroma, lambda s: ColourMapd(colour_space=s)])
def test_unknown_space(make) -> None:
    with pytest.raises(ValueError, match="colour_space is 'hsv', but must be one of: ycbcr, cielab"):
        make("hsv")


@pytest.mark.parametrize("task", ["SPECT", "PET"])
def test_hue_of_real_pairs(task: str) -> None:
    folder = AANLIB / f"{task}-MRI"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there: set SHARED_DATA to the folder that holds aanlib")
    network = ClinicalFMamba(spatial_dims=2, refinement=4).eval()
    network.load_state_dict(torch.load(WEIGHTS, map_location="cpu", weights_only=True))
    files = sorted((folder / task).glob("*.png"))
    differences = []
    for file in files[:: len(files) // 3]:
        pair, chroma = LoadPair()([folder / "MRI" / file.name, file])
        # half the resolution is enough, and four times as fast
        pair, chroma = pair.as_tensor()[:, ::2, ::2], chroma[:, ::2, ::2]
        sources = torch.stack([scaled(channel) for channel in pair])
        with torch.inference_mode():
            fused = network(sources[None])[0]
        partner = join_colour(pair[1:] / 255, chroma)
        differences.append(hue_differences(partner, join_colour(fused, chroma)))
    for name in ("lab", "hsv"):
        assert np.mean([difference[name] for difference in differences]) < 5


def test_benchmark(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", ["fusion_colour.py", "--dataset_dir", str(tmp_path), "--limit", "1"])
    write(str(tmp_path), kind="slices", subjects=1, shape=(48, 48))
    runpy.run_path(str(ROOT / "benchmarks" / "fusion_colour.py"), run_name="__main__")
    rows = [
        line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| MRI-PET (1 pairs)")
    ]
    assert [row[0].split(": ")[1] for row in rows] == ["YCbCr, clipped", "YCbCr", "CIELAB"]
    clipped, ycbcr, cielab = ([float(value.strip(" |")) for value in row[1:]] for row in rows)
    # hue in CIELAB, hue in HSV, and lightness
    assert cielab[0] < min(clipped[0], ycbcr[0]) and ycbcr[2] < min(clipped[2], cielab[2])
    assert max(ycbcr[4], cielab[4]) <= clipped[4]


def coloured_brain(colormap: str, **settings: str) -> dict[str, torch.Tensor]:
    """Where bone and white matter are brighter than the tracer, the colours have to become lighter than in the map."""
    brain = digital_brain((96, 96), seed=3)
    sources = torch.stack([torch.from_numpy(brain[name]).float() for name in ("mri", "pet")])
    return ColourMapd(colormap=colormap, **settings)({"image": sources, "pred": sources.amax(dim=0, keepdim=True)})


class TestColourMap:
    @pytest.mark.parametrize("colormap", ["hot", "inferno", "jet", "CMRmap", *DICOM_PALETTES])
    def test_hue_of_every_map(self, colormap: str) -> None:
        item = coloured_brain(colormap)
        assert hue_differences(item["partner_colour"], item["pred_colour"])["lab"] < 0.5

    @pytest.mark.parametrize("colormap", ["hot", "hot_iron"])
    def test_why_not_ycbcr(self, colormap: str) -> None:
        """Lighter reds of one ratio of red, green and blue are pink: the space can not keep their hue."""
        item = coloured_brain(colormap, colour_space="ycbcr")
        assert hue_differences(item["partner_colour"], item["pred_colour"])["lab"] > 4

    def test_maps(self) -> None:
        ends = torch.tensor([[-1.0, 0.0, 0.5, 1.0, 2.0]])
        hot = ColourMap("hot")(ends)
        assert hot.shape == (3, 5) and torch.equal(hot[:, 0], hot[:, 1]) and torch.equal(hot[:, 3], torch.ones(3))
        for name in DICOM_PALETTES:
            colours = ColourMap(name)(ends)
            assert torch.equal(colours[:, 1], torch.zeros(3)) and torch.equal(colours[:, 3], torch.ones(3))
        # PS3.6: hot iron is half red at a quarter
        torch.testing.assert_close(
            ColourMap("hot_iron")(torch.tensor([[0.25]]))[:, 0], torch.tensor([0.5, 0, 0]), atol=0.01, rtol=0
        )
        with pytest.raises(ValueError, match="no colour map 'hotter'"):
            ColourMap("hotter")

    @pytest.mark.parametrize("space", COLOUR_SPACES)
    @pytest.mark.parametrize("shape", [(12, 10), (12, 10, 8)])
    def test_grey_fusion_gets_the_colours_and_stays(self, space: str, shape: tuple[int, ...]) -> None:
        sources = MetaTensor(torch.rand(2, *shape), meta={"case": "a"})
        item = {"image": sources, "pred": sources[:1]}
        coloured = ColourMapd(colormap="jet", colour_space=space)(item)
        assert coloured["pred"] is item["pred"] and coloured["pred_colour"].meta["case"] == "a"
        assert coloured["pred_colour"].shape == coloured["partner_colour"].shape == (3, *shape)
        torch.testing.assert_close(coloured["partner_colour"], ColourMap("jet")(sources[1:]))
        grey, _ = split_colour(coloured["pred_colour"].as_tensor(), space)
        torch.testing.assert_close(grey, item["pred"].as_tensor(), atol=1e-3, rtol=0)

    def test_own_colours_win(self) -> None:
        item = {"image": torch.rand(2, 4, 4), "pred": torch.rand(3, 4, 4), "chroma": torch.rand(2, 4, 4)}
        assert ColourMapd()(item).keys() == item.keys()

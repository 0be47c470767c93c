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
Which colour space keeps the colours of a SPECT or PET image best when its lightness is exchanged for a fused one?

Fuses pairs with a network and puts the colour back in each space: clipped to RGB as is, and as the bundle does, which
gives up chroma where a colour does not exist. Prints a table, means over the pairs of each task:

    python benchmarks/fusion_colour.py --dataset_dir ../shared/data/aanlib --limit 12

and a second one for the colours of maps on a grey functional image, a generated brain.

Hue is compared where the partner has a colour (chroma of 10 in CIELAB), after rounding to 8 bit, in degrees: in CIELAB,
in HSV and in Oklab (Ottosson, 2020), since each space keeps its own hue. SSIM and Q^AB/F are those of the result's
luma against MRI and luma of the partner, so that the spaces are measured alike.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path

import fire
import numpy as np
import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
BUNDLE = ROOT / "bundles" / "clinicalfmamba_fusion"
sys.path[:0] = [str(ROOT), str(BUNDLE), str(ROOT / "benchmarks")]

from measuring import load_network  # noqa: E402
from skimage.color import rgb2hsv, rgb2lab, rgb2xyz  # noqa: E402

from scripts.colour import COLOUR_SPACES, join_colour, rgb_to_ycbcr, split_colour, ycbcr_to_rgb  # noqa: E402
from scripts.colour_maps import ColourMapd  # noqa: E402
from scripts.data import find_pairs  # noqa: E402
from scripts.metrics import EdgePreservationMetric, FusionSSIMMetric  # noqa: E402
from scripts.phantom import digital_brain  # noqa: E402
from scripts.transforms import LoadPair  # noqa: E402

METHODS = {
    "YCbCr, clipped": ("ycbcr", lambda grey, chroma, _: ycbcr_to_rgb(grey, chroma).clamp(0, 1)),
    "YCbCr": ("ycbcr", join_colour),
    "CIELAB": ("cielab", join_colour),
}
MAPS = ("hot", "hot_iron", "pet", "pet_20_step", "hot_metal_blue", "inferno", "jet", "CMRmap")
COLOURED, VISIBLE = 10, 2
# Ottosson's matrices, from XYZ (D65) to cone responses and from their cube roots to L, a, b
XYZ_TO_LMS = np.array([[0.8189, 0.3619, -0.1289], [0.0330, 0.9293, 0.0361], [0.0482, 0.2644, 0.6339]])
LMS_TO_OKLAB = np.array([[0.2105, 0.7936, -0.0041], [1.9780, -2.4286, 0.4506], [0.0259, 0.7828, -0.8087]])


def hues(picture: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Hues in degrees, and the chroma in CIELAB, of an RGB picture ``(H, W, 3)``."""
    lab = rgb2lab(picture)
    oklab = np.cbrt(rgb2xyz(picture) @ XYZ_TO_LMS.T) @ LMS_TO_OKLAB.T
    angles = {name: np.degrees(np.arctan2(i[..., 2], i[..., 1])) for name, i in (("CIELAB", lab), ("Oklab", oklab))}
    return angles | {"HSV": 360 * rgb2hsv(picture)[..., 0]}, np.hypot(lab[..., 1], lab[..., 2])


def compare(partner: torch.Tensor, fused: torch.Tensor) -> dict[str, float]:
    """How far the colours of ``fused`` are from those of ``partner``, both RGB ``(3, H, W)``."""
    (before, chroma), (after, new_chroma) = (
        hues(np.rint(255 * i.permute(1, 2, 0).numpy()) / 255) for i in (partner, fused)
    )
    coloured = chroma > COLOURED
    seen = coloured & (new_chroma > VISIBLE)
    result = {}
    for name in before:
        difference = np.abs(before[name] - after[name])[seen] % 360
        result[f"hue {name}"] = float(np.minimum(difference, 360 - difference).mean())
    return result | {"chroma kept": float(new_chroma[coloured].mean() / chroma[coloured].mean())}


def print_maps(network: torch.nn.Module) -> None:
    """What each space makes of the colours of maps, on one fused slice of a generated brain."""
    brain = digital_brain((256, 256), seed=3)
    sources = torch.stack([torch.from_numpy(brain[name]).float() for name in ("mri", "pet")])
    with torch.inference_mode():
        item = {"image": sources, "pred": network(sources[None])[0]}
    columns: list[str] = []
    for name in MAPS:
        for space in COLOUR_SPACES:
            coloured = ColourMapd(colormap=name, colour_space=space)(item)
            row = compare(coloured["partner_colour"], coloured["pred_colour"])
            if not columns:
                columns = list(row)
                print(f"\n| | {' | '.join(columns)} |\n|---|{'---:|' * len(columns)}")
            print(f"| {name}: {space} | {' | '.join(f'{value:.3f}' for value in row.values())} |")


def main(dataset_dir: str, weights: str = str(BUNDLE / "models" / "model.pt"), limit: int = 12) -> None:
    """
    Args:
        dataset_dir: folder with the pairs, as ``find_pairs`` reads it.
        weights: of the bundle's 2D network.
        limit: pairs of each task, spread evenly.
    """
    network = load_network(2, weights=False)
    network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    metrics = {"SSIM": FusionSSIMMetric(), "Q^AB/F": EdgePreservationMetric()}
    pairs = find_pairs(dataset_dir, ["MRI", ["SPECT", "PET"]])
    columns: list[str] = []
    for task in sorted({pair["task"] for pair in pairs}):
        chosen = [pair for pair in pairs if pair["task"] == task]
        chosen = [chosen[int(i)] for i in np.linspace(0, len(chosen) - 1, limit)]
        rows: dict[str, list[dict[str, float]]] = defaultdict(list)
        for pair in tqdm(chosen, desc=task, leave=False):
            fusions: dict[str, torch.Tensor] = {}
            for method, (space, join) in METHODS.items():
                loaded, chroma = LoadPair(space)(pair["image"])
                low, high = (f(loaded.as_tensor(), dim=(1, 2), keepdim=True) for f in (torch.amin, torch.amax))
                sources = (loaded.as_tensor() - low) / (high - low)
                if space not in fusions:
                    with torch.inference_mode():
                        fusions[space] = network(sources[None])[0]
                partner = join_colour(loaded.as_tensor()[1:] / 255, chroma, space)
                fused = join(fusions[space], chroma, space)
                reference = torch.cat([sources[:1], rgb_to_ycbcr(partner)[0]])[None]
                row = compare(partner, fused) | {
                    "lightness error": float((split_colour(fused, space)[0] - fusions[space]).abs().mean()),
                    **{
                        name: float(metric(rgb_to_ycbcr(fused)[0][None], reference)) for name, metric in metrics.items()
                    },
                }
                rows[method].append(row)
        if not columns:
            columns = list(row)
            print(f"| | {' | '.join(columns)} |\n|---|{'---:|' * len(columns)}")
        for method, values in rows.items():
            means = [f"{np.mean([row[column] for row in values]):.3f}" for column in columns]
            print(f"| {task} ({len(values)} pairs): {method} | {' | '.join(means)} |")
    print_maps(network)


if __name__ == "__main__":
    fire.Fire(main)

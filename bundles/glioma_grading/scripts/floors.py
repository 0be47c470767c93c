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
What needs no network: how well grades can be told from intensities alone, and from how the images were acquired. A
network has to be above both before it can be said to have seen a tumour's shape.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from monai.data.utils import affine_to_spacing
from monai.transforms import Compose
from sklearn.ensemble import RandomForestClassifier

from scripts.operating_point import choose_threshold
from scripts.quality import describe
from scripts.slices import MatchIntensityd
from scripts.sources import LoadSourced
from scripts.transforms import LoadPair

__all__ = ["acquisition", "cross_validate", "joint_histogram"]

BINS = 16
Measure = Callable[[Mapping[str, Any]], np.ndarray]


def joint_histogram(intensity_matching: str = "none") -> Measure:
    """
    Measure of a case: the shares of its brain's voxels in 16 x 16 bins of T2 and FLAIR, `(256,)`. Each image is scaled
    by itself, as for a network, and matched between sites by ``intensity_matching`` (`scripts.slices.MatchIntensityd`).
    """
    load = Compose([LoadSourced("image", "t2_flair"), MatchIntensityd("image", intensity_matching)])

    def measure(case: Mapping[str, Any]) -> np.ndarray:
        t2, flair = load({"image": case["image"]})["image"].numpy()
        brain = (t2 > 0) | (flair > 0)
        counts, _, _ = np.histogram2d(t2[brain], flair[brain], bins=BINS, range=[[0, 1], [0, 1]])
        return (counts / max(brain.sum(), 1)).ravel()

    return measure


def acquisition() -> Measure:
    """
    Measure of a case, `(7,)`: what scanner and protocol leave in an image besides the tumour. The field of view
    (largest section and extent of the brain), the intensity scale (median of the raw brain in T2 and in FLAIR), and
    where the slices lie (position of the first one along the axis).
    """
    load = LoadPair()

    def measure(case: Mapping[str, Any]) -> np.ndarray:
        pair, _ = load(case["image"])
        raw = pair.as_tensor().float()
        measures = describe(raw, affine_to_spacing(pair.affine).tolist())
        field = [measures[name] for name in ("area", "width", "length", "height")]
        scale = [float(np.median(image[image > 0])) if (image > 0).any() else 0.0 for image in raw.numpy()]
        return np.array([*field, *scale, float(pair.affine[2, 3])])

    return measure


def cross_validate(
    features: Mapping[str, np.ndarray],
    folds: Sequence[Mapping[str, Sequence[str]]],
    labels: Mapping[str, int],
    seed: int,
) -> list[dict[str, Any]]:
    """
    Out-of-fold predictions of a random forest, threshold chosen on each fold's validation cases as for a network.

    Args:
        features: of each case.
        folds: names of the cases in ``training``, ``validation`` and ``test`` of each fold.
        labels: 0 or 1 of each case.
        seed: of the forest.

    Returns:
        records as `scripts.predictions` writes them, without ``subject`` and ``slices``.
    """
    records = []
    for number, fold in enumerate(folds):
        forest = RandomForestClassifier(500, random_state=seed)
        forest.fit([features[case] for case in fold["training"]], [labels[case] for case in fold["training"]])
        validation, test = (
            forest.predict_proba([features[case] for case in fold[name]])[:, 1] for name in ("validation", "test")
        )
        threshold = choose_threshold([labels[case] for case in fold["validation"]], validation.tolist())
        for case, probability in zip(fold["test"], test.tolist()):
            record = {"fold": number, "case": case, "label": labels[case], "probability": probability}
            records.append({**record, "threshold": threshold})
    return records

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
"""What inference gives: grades as JSON and CSV, unsure ones flagged, and a picture of what the network looked at."""

from __future__ import annotations

import csv
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from monai.utils import convert_to_tensor
from monai.visualize import GradCAM

from scripts.cases import GRADES
from scripts.data import replacing
from scripts.quality import find_flags

__all__ = ["NOTICE", "GradeWriter", "SaliencySaver"]

NOTICE = "Not for clinical use."
DPI = 110


class GradeWriter:
    """
    Ignite handler that writes ``grades.json`` and ``grades.csv`` in a folder, a record for each case:

    - ``case``; ``grade``, LGG or HGG, or null (in the CSV empty) where a modality is missing; ``probability`` of HGG;
      ``threshold`` from which on a case is HGG; ``weights``, file name and the first 12 digits of its SHA-256;
    - ``unsure``, whether the grade should not be relied on, and ``flags``, why: the probability is within ``margin``
      of the threshold, or the input is not like the training images (`scripts.quality.find_flags`);
    - ``notice``: not for clinical use.

    The files are written anew after every case, so that an interrupted run leaves those that are done.

    Args:
        output_dir: folder of the files.
        operating_point: ``threshold`` and ``ranges`` of the training images, as training has written them.
        weights: file of the network's weights.
        margin: distance from the threshold up to which a probability is unsure.
        fusion: digest of the weights of the fusion network in use, None without one.
    """

    def __init__(
        self,
        output_dir: str | os.PathLike,
        operating_point: Mapping[str, Any],
        weights: str | os.PathLike,
        margin: float = 0.1,
        fusion: str | None = None,
    ) -> None:
        self.output_dir = Path(output_dir)
        self.point = operating_point
        self.weights = Path(weights)
        self.margin = margin
        self.fusion = fusion
        self.records: list[dict[str, Any]] = []
        self._weights_name = ""

    def attach(self, engine: Engine) -> None:
        """
        Args:
            engine: an evaluator whose postprocessing gives ``pred``, probabilities `(2,)`.
        """
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    def _start(self, _engine: Engine) -> None:
        self.records = []
        self._weights_name = f"{self.weights.name} {hashlib.sha256(self.weights.read_bytes()).hexdigest()[:12]}"

    def __call__(self, engine: Engine) -> None:
        for item, output in zip(engine.state.batch, engine.state.output):
            measures = {name: float(value) for name, value in item["quality"].items()}
            self.records.append(self._grade(str(item["case"]), float(output["pred"][1]), measures))
        self._write()

    def _grade(self, case: str, probability: float, measures: Mapping[str, float]) -> dict[str, Any]:
        threshold = self.point["threshold"]
        flags = find_flags(measures, self.point["ranges"])
        missing = bool(measures["blank"] or measures["identical"])
        if abs(probability - threshold) < self.margin:
            flags.append(f"probability within {self.margin:g} of the threshold")
        if None not in (self.fusion, self.point.get("fusion")) and self.fusion != self.point["fusion"]:
            flags.append("the fused images are from another fusion network than those in training")
        return {
            "case": case,
            "grade": None if missing else GRADES[int(probability >= threshold)],
            "probability": round(probability, 6),
            "threshold": round(threshold, 6),
            "weights": self._weights_name,
            "unsure": bool(flags),
            "flags": flags,
            "notice": NOTICE,
        }

    def _write(self) -> None:
        with replacing(self.output_dir / "grades.json") as temporary:
            temporary.write_text(json.dumps(self.records, indent=4) + "\n", encoding="utf-8")
        with replacing(self.output_dir / "grades.csv") as temporary:
            with open(temporary, "w", newline="", encoding="utf-8") as stream:
                writer = csv.DictWriter(stream, list(self.records[0]), lineterminator="\n")
                writer.writeheader()
                writer.writerows({**record, "flags": "; ".join(record["flags"])} for record in self.records)


class SaliencySaver:
    """
    Ignite handler that draws, for every case, up to five of the slices that were graded and over them what speaks for
    HGG (Grad-CAM, Selvaraju et al., ICCV 2017, by `monai.visualize.GradCAM`): ``<case>/<case>_saliency.png``.

    Args:
        output_dir: folder of the case folders.
        network: the network that grades.
        layer: name of its layer whose activations are shown.
        spatial_dims: of the network, 2 or 3.
        image_key: key of the image in the evaluator's batch, ``(C, H, W, K)``.
    """

    SHOWN = 5

    def __init__(
        self,
        output_dir: str | os.PathLike,
        network: torch.nn.Module,
        layer: str,
        spatial_dims: int,
        image_key: str = "image",
    ) -> None:
        self.output_dir = Path(output_dir)
        self.network = network
        self.layer = layer
        self.spatial_dims = spatial_dims
        self.image_key = image_key
        self._cam: GradCAM | None = None

    def attach(self, engine: Engine) -> None:
        """
        Args:
            engine: an evaluator.

        Raises:
            ValueError: when the network has no such layer.
        """
        if self.layer not in dict(self.network.named_modules()):
            raise ValueError(f"{type(self.network).__name__} has no layer '{self.layer}': set saliency_layer.")
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        for item, output in zip(engine.state.batch, engine.state.output):
            image = convert_to_tensor(item[self.image_key], track_meta=False).to(engine.state.device)
            case = str(item["case"])
            with replacing(self.output_dir / case / f"{case}_saliency.png") as temporary:
                self._draw(case, image, float(output["pred"][1])).savefig(temporary, dpi=DPI)

    def _maps(self, image: torch.Tensor) -> torch.Tensor:
        """Saliency of the slices of ``(C, H, W, K)``, ``(K, H, W)`` in [0, 1], on one scale."""
        if self._cam is None:
            # only when it is needed: its hooks stay in the network
            self._cam = GradCAM(nn_module=self.network, target_layers=self.layer, postprocessing=lambda x: x)
        batch = image.movedim(-1, 0) if self.spatial_dims == 2 else image[None]
        with torch.enable_grad():
            found = self._cam(batch.requires_grad_(), class_idx=1)
        plain = torch.as_tensor(found).detach().float().cpu()
        # a network that takes every channel by itself has a map for each
        plain = plain.unflatten(0, (len(batch), -1)).mean(dim=1)
        maps = plain[:, 0] if self.spatial_dims == 2 else plain[0, 0].movedim(-1, 0)
        return maps / maps.max().clamp_min(1e-12)

    def _draw(self, case: str, image: torch.Tensor, probability: float) -> Figure:
        maps = self._maps(image.detach().clone())
        pictures = image.detach().float().cpu().movedim(-1, 1)
        chosen = np.unique(np.linspace(0, len(maps) - 1, min(self.SHOWN, len(maps))).round().astype(int))
        rows = len(pictures) + 1
        figure = Figure(figsize=(2.1 * len(chosen) + 0.4, 2.5 * rows + 0.6), facecolor="white", layout="constrained")
        FigureCanvasAgg(figure)
        figure.suptitle(f"{case}: probability of HGG {probability:.2f}. {NOTICE}", fontsize=10)
        for axes in np.ravel(grid := figure.subplots(rows, len(chosen), squeeze=False)):
            axes.set_axis_off()
        for column, index in zip(grid.T, chosen):
            for axes, channel in zip(column, pictures):
                axes.imshow(_upright(channel[index]), cmap="gray", vmin=0, vmax=1)
            column[-1].imshow(_upright(pictures[0, index]), cmap="gray", vmin=0, vmax=1)
            shown = _upright(maps[index])
            column[-1].imshow(shown, cmap="inferno", vmin=0, vmax=1, alpha=0.7 * shown)
        grid[-1, 0].set_title("what speaks for HGG", fontsize=9, loc="left")
        return figure


def _upright(picture: torch.Tensor) -> np.ndarray:
    """A slice ``(x, y)``, axes to the right and to the front, as radiologists see it: front up, right at the left."""
    return picture.flip(0, 1).T.numpy()

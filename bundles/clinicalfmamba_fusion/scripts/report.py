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
"""A page per case to look at: pictures, metrics, where the result comes from, and what to beware of."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import time
from collections.abc import Hashable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from pathlib import Path, PurePath
from typing import Any

import jinja2
import monai
import torch
from ignite.engine import Engine, Events
from monai.config import KeysCollection
from monai.engines import IterationEvents
from monai.transforms import MapTransform
from monai.utils import convert_to_tensor

from scripts.colour import check_colour_space
from scripts.data import replacing
from scripts.metrics import FusionMetric
from scripts.report_images import colour_difference, picture_uri, thumbnail_uri, volume_mosaics
from scripts.views import PLANES, CaseImages, Cut, case_name, view_titles

__all__ = ["METRIC_NAMES", "CaseMetrics", "CaseTimer", "SaveReportd", "render"]

# short names and what they say, for the metrics that the bundle's configs name so
METRIC_NAMES = {
    "ssim": ("SSIM", "structural similarity, mean of both sources; 1: identical"),
    "psnr": ("PSNR (dB)", "peak signal-to-noise ratio, mean of both sources; rewards a copy of one of them"),
    "qabf": ("Q AB/F", "share of the sources' edges that the fused image kept, 0 to 1"),
    "scd": ("SCD", "what each source gave to the fused image beyond the other, up to 2"),
    "entropy": ("Entropy (bit)", "spread of the fused image's grey levels, up to 8"),
}


class CaseTimer:
    """
    Ignite handler that times the network: from a batch's arrival to its fused images, per case. Each item gets the time
    as ``seconds``, for `SaveReportd`.

    Attributes:
        seconds: of the last batch, per case; None before the first.
    """

    def __init__(self) -> None:
        self.seconds: float | None = None
        self._started = 0.0

    def attach(self, engine: Engine) -> None:
        """
        Args:
            engine: one of MONAI's evaluators.
        """
        engine.add_event_handler(Events.ITERATION_STARTED, self._start)
        engine.add_event_handler(IterationEvents.FORWARD_COMPLETED, self._stop)

    def _start(self, _engine: Engine) -> None:
        self._started = time.perf_counter()

    def _stop(self, engine: Engine) -> None:
        pred = engine.state.output["pred"]  # type: ignore[index, call-overload]
        if pred.is_cuda:
            torch.cuda.synchronize(pred.device)
        self.seconds = (time.perf_counter() - self._started) / len(pred)
        engine.state.batch["seconds"] = [self.seconds] * len(pred)  # type: ignore[index, call-overload]


class CaseMetrics:
    """
    Ignite handler that measures fused images where the network left them: a GPU needs milliseconds for what keeps a
    core busy for a second. Each item gets its values by name as ``metrics``, for `SaveReportd`; NaN where the fused
    image holds values that are no numbers.

    Args:
        metrics: the metrics to compute, by name.
    """

    def __init__(self, metrics: Mapping[str, FusionMetric]) -> None:
        self.metrics = dict(metrics)

    def attach(self, engine: Engine) -> None:
        """
        Args:
            engine: one of MONAI's evaluators.
        """
        engine.add_event_handler(IterationEvents.FORWARD_COMPLETED, self._measure)

    def _measure(self, engine: Engine) -> None:
        output: Mapping[str, torch.Tensor] = engine.state.output  # type: ignore[assignment]
        # an image apiece: what one of them holds is nothing to the others
        pairs = list(zip(output["pred"].split(1), output["image"].split(1)))
        try:
            scores = [self._scores(*pair) for pair in pairs]
        except torch.cuda.OutOfMemoryError:
            scores = [self._scores(*(image.cpu() for image in pair)) for pair in pairs]
        values = {name: torch.tensor([score[name] for score in scores]) for name in self.metrics}
        engine.state.batch["metrics"] = values  # type: ignore[index, call-overload]

    def _scores(self, fused: torch.Tensor, sources: torch.Tensor) -> dict[str, float]:
        fused, sources = (convert_to_tensor(i, track_meta=False).float() for i in (fused, sources))
        if not fused.isfinite().all():
            return dict.fromkeys(self.metrics, math.nan)
        values = {}
        with torch.inference_mode():
            for name, metric in self.metrics.items():
                values[name] = float(metric(fused, sources))
                metric.reset()  # it would keep every case for an average
        return values


class SaveReportd(MapTransform):
    """
    Save ``<output_dir>/<case>/<case>_report.html``, one file that needs no other and no network, and what it says as
    ``<case>_report.json``, from which ``ReportIndex`` makes the page of the whole run.

    It shows the pictures of ``SavePaneld`` (any slice of a volume in three planes), the metrics that `CaseMetrics` has
    left, the inputs and their registration, warnings, versions, weights and times. It names the case; files, folders
    and whatever else of the images' metadata are left out.

    An item may hold a dictionary ``info_key``, all of whose keys are optional: ``"inputs"``, a list of ``{"name",
    "modality", "shape", "spacing"}``; ``"registration"``, None or ``{"kind", "translation_mm", "rotation_deg",
    "mutual_information": [before, after], "overlap": [before, after], "transform_file"}``; ``"warnings"``, texts.

    Args:
        keys: keys of the fused images, ``(1, H, W[, D])`` or RGB ``(3, H, W[, D])``, in [0, 1].
        output_dir: folder for the case folders.
        checkpoint: file of the weights, for its name and SHA-256.
        device: that of the network.
        image_key: key of the sources ``(2, H, W[, D])`` in [0, 1], in the grid of the fused image.
        chroma_key: key of the partner's chroma, which an item may have (see ``LoadPaird``).
        colour_space: that of ``LoadPaird``.
        info_key: see above.
        seconds_key: key of the time that the network took, which an item may have (see `CaseTimer`).
        metrics_key: key of the metrics' values by name, which an item may have (see `CaseMetrics`).
        titles: names of the two sources whose modality ``info_key`` does not tell.
        difference_limit: end of the colour scale of the difference, on both sides.
        allow_missing_keys: do not raise when a key is missing.
    """

    def __init__(
        self,
        keys: KeysCollection = "pred",
        output_dir: str | Path = "./",
        checkpoint: str | Path | None = None,
        device: torch.device | str = "cpu",
        image_key: str = "image",
        chroma_key: str = "chroma",
        colour_space: str = "ycbcr",
        info_key: str = "fusion_info",
        seconds_key: str = "seconds",
        metrics_key: str = "metrics",
        titles: Sequence[str] = ("MRI", "Partner"),
        difference_limit: float = 0.5,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.output_dir = Path(output_dir)
        self.checkpoint = checkpoint
        # now, since a process that writes must not touch the GPU
        self.device = _describe_device(torch.device(device))
        self.image_key = image_key
        self.chroma_key = chroma_key
        self.colour_space = check_colour_space(colour_space)
        self.info_key = info_key
        self.seconds_key = seconds_key
        self.metrics_key = metrics_key
        self.titles = tuple(titles)
        self.difference_limit = difference_limit

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d):
            self._save(d, key)
        return d

    def _save(self, data: Mapping[Hashable, Any], key: Hashable) -> None:
        case, info = case_name(data[key]), dict(data.get(self.info_key) or {})
        images = CaseImages.of_item(data, key, self.image_key, self.chroma_key, self.colour_space)
        inputs = self._inputs(info, images)
        # two images of one modality are told apart by their names
        label = "name" if inputs[0]["modality"] == inputs[1]["modality"] else "modality"
        titles = [source[label] or title for source, title in zip(inputs, self.titles)]
        viewer, cuts = _cut(images, self.difference_limit)
        shown = cuts[0]
        record = {
            "case": case,
            "created": datetime.now().astimezone().isoformat(timespec="seconds"),
            "seconds": data.get(self.seconds_key),
            "inputs": inputs,
            "registration": _registration(info.get("registration")),
            "metrics": {n: v if math.isfinite(v) else None for n, v in data.get(self.metrics_key, {}).items()},
            "warnings": [*(info.get("warnings") or []), *_findings(images, titles)],
            "provenance": self._provenance(),
            "thumbnail": thumbnail_uri(shown.fused, shown.height, shown.width),
        }
        page = render(
            "case.html",
            **record,
            cuts=[self._pictures(cut, titles) for cut in cuts],
            viewer=viewer,
            gradient=_gradient(self.difference_limit),
            limit=self.difference_limit,
        )
        folder = self.output_dir / case
        texts = {"html": page, "json": json.dumps(record, indent=4, allow_nan=False) + "\n"}
        # the index lists what has a record: the page has to be there before
        for extension, text in texts.items():
            with replacing(folder / f"{case}_report.{extension}") as temporary:
                temporary.write_text(text, encoding="utf-8")

    def _inputs(self, info: Mapping[str, Any], images: CaseImages) -> list[dict[str, Any]]:
        known = list(info.get("inputs") or []) + [{}, {}]
        grid = {"shape": list(images.mri.shape[1:]), "spacing": images.spacing}
        return [
            {
                # a name only, whatever was given
                "name": PurePath(str(source.get("name") or title)).name,
                "modality": source.get("modality") or "",
                "shape": list(source.get("shape") or grid["shape"]),
                "spacing": [float(s) for s in source.get("spacing") or grid["spacing"]],
            }
            for source, title in zip(known, self.titles)
        ]

    def _provenance(self) -> dict[str, Any]:
        return {
            "bundle": _bundle_version(),
            "weights": _describe_weights(self.checkpoint) if self.checkpoint else None,
            "pytorch": torch.__version__,
            "monai": monai.__version__,
            "python": platform.python_version(),
            "device": self.device,
        }

    def _pictures(self, cut: Cut, titles: Sequence[str]) -> dict[str, Any]:
        views = ("mri", "partner", "fused", "checkerboard", "difference")
        pictures = [*cut.pictures[:-1], colour_difference(cut.difference, self.difference_limit)]
        _, left, upper = PLANES.get(cut.plane, (0, "", ""))
        return {
            "plane": cut.plane,
            "left": left,
            "upper": upper,
            "ratio": cut.width / cut.height,
            "views": [
                {"name": name, "title": title, "uri": picture_uri(picture)}
                for name, title, picture in zip(views, view_titles(titles), pictures)
            ],
        }


def render(template: str, **values: Any) -> str:
    """A page from a file in ``templates/``; all values are escaped."""
    return _environment().get_template(template).render(metric_names=METRIC_NAMES, **values)


@lru_cache(maxsize=1)
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _cut(images: CaseImages, limit: float) -> tuple[dict[str, Any] | None, list[Cut]]:
    """Data for the viewer of a volume, and the cuts that are shown without it."""
    if images.mri.ndim == 3:
        return None, images.cuts()
    volume = images.as_seen()
    content, start = volume.cropped()
    middle = content.middle()
    viewer = volume_mosaics(content, start, list(volume.mri.shape[1:]), limit)
    return viewer, [content.cut(plane, middle[PLANES[plane][0]]) for plane in volume.planes()]


def _registration(registration: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """As it was given, but for the folder of its file."""
    if not registration:
        return None
    file = registration.get("transform_file")
    return {**registration, "transform_file": PurePath(file).name if file else None}


def _findings(images: CaseImages, titles: Sequence[str]) -> list[str]:
    """What is wrong with the images themselves."""
    findings = []
    for name, image in {titles[0]: images.mri, titles[1]: images.partner, "The fused image": images.grey}.items():
        low, high = (float(i) for i in image.aminmax())
        if math.isnan(low):
            findings.append(f"{name} holds values that are no numbers.")
        elif low == high:
            findings.append(f"{name} is empty: it has one value only.")
    return findings


def _gradient(limit: float, stops: int = 9) -> list[str]:
    """Colours of the difference from its lower to its upper end, as CSS has them."""
    values = torch.linspace(-limit, limit, stops).numpy()
    return ["#" + "".join(f"{round(255 * c):02x}" for c in colour) for colour in colour_difference(values, limit)]


@lru_cache(maxsize=1)
def _bundle_version() -> str:
    metadata = Path(__file__).resolve().parents[1] / "configs" / "metadata.json"
    meta = json.loads(metadata.read_text(encoding="utf-8"))
    return f"{meta['name']} {meta['version']}"


@lru_cache(maxsize=4)
def _describe_weights(path: str | os.PathLike) -> dict[str, str]:
    return {"file": Path(path).name, "sha256": hashlib.sha256(Path(path).read_bytes()).hexdigest()}


def _describe_device(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type.upper()}, {torch.get_num_threads()} thread(s)"

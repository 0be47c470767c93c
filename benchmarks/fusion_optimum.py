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
How close is a network to the best that its loss and the metrics allow?

Optimises the fused pixels of each pair directly under a loss, which no network can beat, and sets the result beside
plain rules and, if given, a network. Writes `optimum.csv`, `optimum.json` and `optimum.md` and prints the table:

    python benchmarks/fusion_optimum.py --dataset_dir DIR --datalist splits.json --weights model.pt --device cuda

`--loss joint` optimises the joint loss, `--loss ssim` the mean SSIM alone.
"""

from __future__ import annotations

import csv
import io
import json
import math
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import fire
import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "bundles" / "clinicalfmamba_fusion")]

from monai.bundle import ConfigParser  # noqa: E402
from monai.transforms import Compose, ScaleIntensityRangePercentilesd  # noqa: E402

from custom_nets.nets import build_network  # noqa: E402
from scripts.data import find_pairs, replacing  # noqa: E402
from scripts.losses import ClinicalFMambaLoss, FusionSSIMLoss, JointFusionLoss  # noqa: E402
from scripts.metrics import (  # noqa: E402
    EdgePreservationMetric,
    FeatureMutualInformationMetric,
    FeatureSimilarityMetric,
    FusionMultiScaleSSIMMetric,
    FusionPSNRMetric,
    FusionSSIMMetric,
    SumOfCorrelationDifferencesMetric,
    VisualInformationFidelityMetric,
    WorseSourceSSIMMetric,
)
from scripts.transforms import LoadPaird  # noqa: E402

# sources (B, 2, H, W[, D]) in [0, 1] -> fused (B, 1, H, W[, D])
Fuse = Callable[[torch.Tensor], torch.Tensor]

RULES: dict[str, Fuse] = {
    "copy MRI": lambda sources: sources[:, :1],
    "copy partner": lambda sources: sources[:, 1:],
    "average": lambda sources: sources.mean(dim=1, keepdim=True),
    "maximum": lambda sources: sources.amax(dim=1, keepdim=True),
}
METRICS = {
    "ssim": FusionSSIMMetric(),
    "ssim_worse": WorseSourceSSIMMetric(),
    "ms_ssim": FusionMultiScaleSSIMMetric(),
    "qabf": EdgePreservationMetric(),
    "scd": SumOfCorrelationDifferencesMetric(),
    "fmi": FeatureMutualInformationMetric(),
    "fsim": FeatureSimilarityMetric(),
    "vif": VisualInformationFidelityMetric(),
    "psnr": FusionPSNRMetric(),
}
# by name, for 2 or 3 spatial dimensions
LOSSES: dict[str, Callable[[int], torch.nn.Module]] = {
    "paper": ClinicalFMambaLoss,
    "joint": lambda spatial_dims: JointFusionLoss(),
    "ssim": lambda spatial_dims: FusionSSIMLoss(),
}
FLOOR, OPTIMUM, NETWORK, RATIO, SHARE = "average", "optimum", "network", "network / optimum", "share of the range"


def build_loss(loss: str | dict, spatial_dims: int) -> torch.nn.Module:
    """A loss by its name in `LOSSES`, or from its MONAI config."""
    if isinstance(loss, dict):
        return ConfigParser({"loss": loss}).get_parsed_content("loss")
    if loss not in LOSSES:
        raise ValueError(f"loss must be one of {tuple(LOSSES)} or a MONAI config, got {loss!r}.")
    return LOSSES[loss](spatial_dims)


def optimise(sources: torch.Tensor, loss: torch.nn.Module, steps: int, lr: float) -> torch.Tensor:
    """
    Minimise ``loss`` over the fused pixels: Adam with a cosine schedule, projected to [0, 1], each case started from
    the better of average and maximum.
    """
    average, maximum = RULES["average"](sources), RULES["maximum"](sources)
    better = losses_per_case(average, sources, loss) < losses_per_case(maximum, sources, loss)
    fused = torch.where(better.view(-1, *[1] * (sources.ndim - 1)), average, maximum).requires_grad_()
    optimiser = torch.optim.Adam([fused], lr=lr)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for _ in tqdm(range(steps), desc="optimum", leave=False):
        optimiser.zero_grad()
        # a mean over all pixels has gradients near Adam's epsilon
        (loss(fused, sources) * fused.numel()).backward()
        optimiser.step()
        scheduler.step()
        fused.data.clamp_(0, 1)
    return fused.detach()


def losses_per_case(fused: torch.Tensor, sources: torch.Tensor, loss: torch.nn.Module) -> torch.Tensor:
    """The loss of each case, `(B,)`."""
    with torch.no_grad():
        return torch.stack([loss(f, s) for f, s in zip(fused.split(1), sources.split(1))])


def score(fused: torch.Tensor, sources: torch.Tensor, loss: torch.nn.Module) -> dict[str, list[float]]:
    """Loss of the fused images as they are, metrics of their 8-bit version; a value per case each."""
    rounded = (fused.clamp(0, 1) * 255).round() / 255
    scores = {"loss": losses_per_case(fused, sources, loss)}
    scores |= {name: metric(rounded, sources).flatten() for name, metric in METRICS.items()}
    return {name: values.tolist() for name, values in scores.items()}


def load_network(weights: str, config: str | None, spatial_dims: int, device: torch.device) -> Fuse:
    """The network of a bundle's config (id ``network_def``), or the default one, as a function of the sources."""
    if config is None:
        network = build_network("clinicalfmamba", spatial_dims=spatial_dims)
    else:
        parser = ConfigParser()
        parser.read_config(config)
        network = parser.get_parsed_content("network_def")
    network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    network = network.to(device).eval()

    @torch.inference_mode()
    def fuse(sources: torch.Tensor) -> torch.Tensor:
        return network(sources)

    return fuse


def load_batches(pairs: list[dict], size: int) -> list[tuple[str, torch.Tensor]]:
    """Load the pairs; return (task, sources), cases of one task and one shape together, at most ``size`` of them."""
    load = Compose(
        [
            LoadPaird(keys="image"),
            ScaleIntensityRangePercentilesd("image", lower=0, upper=100, b_min=0, b_max=1, channel_wise=True),
        ]
    )
    groups = defaultdict(list)
    for pair in tqdm(pairs, desc="loading", leave=False):
        sources = load(pair)["image"].as_tensor()
        groups[pair["task"], sources.shape].append(sources)
    return [(task, batch) for (task, _), group in groups.items() for batch in torch.stack(group).split(size)]


def pick(pairs: list[dict], limit: int | None) -> list[dict]:
    """At most ``limit`` pairs of each task, evenly spread over its list; a task is by default the pair's folder."""
    tasks = defaultdict(list)
    for pair in pairs:
        first = pair["image"][0] if isinstance(pair["image"], list) else pair["image"]
        task = pair.get("task") or Path(first).parents[1].name
        tasks[task].append({**pair, "task": task})
    picked = []
    for task in tasks.values():
        n = min(limit or len(task), len(task))
        picked += [task[i * len(task) // n] for i in range(n)]
    return picked


def attainable_share(value: float, floor: float, optimum: float) -> float:
    """
    The share of a metric's (or a loss's) attainable range that is reached, whichever direction is good: 0 at the
    floor, which needs no network (averaging the sources), 1 at the optimum of the pixels. NaN without a range.

    Args:
        value: what was reached, a mean over cases.
        floor: mean of the average of the sources over the same cases.
        optimum: mean of the images that were optimised one by one, over the same cases.
    """
    return (value - floor) / (optimum - floor) if optimum != floor else math.nan


def summarise(scores: dict[str, dict[str, dict[str, list[float]]]]) -> list[dict]:
    """Scores by task, row and column -> records of means; the last two of each task are the network's shares."""
    records = []
    for task, rows in scores.items():
        means = {row: {k: sum(v) / len(v) for k, v in columns.items()} for row, columns in rows.items()}
        if NETWORK in means:
            network, optimum, floor = (means[row] for row in (NETWORK, OPTIMUM, FLOOR))
            means[RATIO] = {k: network[k] / optimum[k] for k in network}
            means[SHARE] = {k: attainable_share(network[k], floor[k], optimum[k]) for k in network}
        n = len(rows[OPTIMUM]["loss"])
        records += [{"task": task, "row": row, "n": n, **columns} for row, columns in means.items()]
    return records


def to_csv(records: list[dict]) -> str:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=list(records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


def to_markdown(records: list[dict]) -> str:
    rows = [[f"{v:.3f}" if isinstance(v, float) else str(v) for v in record.values()] for record in records]
    table = [list(records[0]), ["---"] * 3 + ["---:"] * len(["loss", *METRICS]), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in table)


def main(
    dataset_dir: str,
    datalist: str | None = None,
    split: str | None = "test",
    modalities: tuple = ("MRI", ("CT", "SPECT", "PET")),
    output_dir: str = "fusion_optimum",
    weights: str | None = None,
    config: str | None = None,
    loss: str | dict = "paper",
    spatial_dims: int = 2,
    steps: int = 1000,
    lr: float = 0.1,
    limit: int | None = None,
    batch_size: int = 16,
    device: str = "cpu",
) -> None:
    """
    Args:
        dataset_dir: folder with the images.
        datalist: JSON of the pairs, paths relative to ``dataset_dir``; without it all pairs in the folder are taken.
        split: key of ``datalist``.
        modalities: names of the first image and of its partners, see `scripts.data.find_pairs`.
        output_dir: folder for the tables.
        weights: state dict of a network to compare.
        config: bundle config whose ``network_def`` has these weights; by default the registered network's defaults.
        loss: what is minimised: ``paper`` (its training loss), ``joint`` (`JointFusionLoss`), ``ssim`` (mean SSIM
            alone), or a MONAI config of any other loss, ``'{"_target_": "scripts.losses.JointFusionLoss",
            "ssim_weight": 50}'``.
        spatial_dims: 2 or 3, of the paper's loss and of the default network.
        steps: optimisation steps.
        lr: first learning rate, in units of intensity.
        limit: take at most so many pairs of each task.
        batch_size: pairs optimised at once.
        device: where to compute, e.g. ``cuda``.

    Raises:
        ValueError: when ``loss`` is a name that is none of these.
    """
    criterion = build_loss(loss, spatial_dims)
    rows = dict(RULES)
    rows[OPTIMUM] = lambda sources: optimise(sources, criterion, steps, lr)
    if weights is not None:
        rows[NETWORK] = load_network(weights, config, spatial_dims, torch.device(device))

    pairs = pick(find_pairs(dataset_dir, modalities, datalist, split if datalist else None), limit)
    scores: dict = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for task, sources in tqdm(load_batches(pairs, batch_size), desc="batches"):
        sources = sources.to(device)
        for row, fuse in rows.items():
            for column, values in score(fuse(sources), sources, criterion).items():
                scores[task][row][column] += values

    records = summarise(scores)
    # JSON has no infinity, which a copy's PSNR is
    finite = [
        {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        for record in records
    ]
    settings = {"split": split, "limit": limit, "weights": weights, "loss": loss, "steps": steps, "lr": lr}
    report = json.dumps({"settings": settings, "table": finite}, indent=4) + "\n"
    for extension, text in (("csv", to_csv(records)), ("json", report), ("md", to_markdown(records))):
        with replacing(Path(output_dir) / f"optimum.{extension}") as temporary:
            temporary.write_text(text, encoding="utf-8")
    print(to_markdown(records))


if __name__ == "__main__":
    fire.Fire(main)

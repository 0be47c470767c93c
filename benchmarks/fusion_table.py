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
"""The paper's fusion tables: every system trained or loaded under one protocol, beside floors and optima.

    python benchmarks/fusion_table.py --task mri-ct --dataset_dir AANLIB --output_dir table --max_epochs 25

Trains with the configs of `bundles/clinicalfmamba_fusion`, scores with its `evaluate.json` and writes, below
`output_dir`, `TASK.md`, `TASK.csv`, `TASK.json` and `TASK.png`, after every run anew. It can be stopped and started
again: what has its `result.json` is not done twice, a training that was stopped goes on after its last epoch. It needs
torch, MONAI, pytorch-ignite, nibabel, Pillow and fire.
"""

from __future__ import annotations

import gc
import json
import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import fire
import numpy as np
import torch
import torch._dynamo
from PIL import Image
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
BUNDLE = ROOT / "bundles" / "clinicalfmamba_fusion"
sys.path[:0] = [str(ROOT), str(BUNDLE), str(ROOT / "benchmarks")]

from fusion_optimum import LOSSES, RULES, Fuse, optimise  # noqa: E402
from fusion_picture import draw_systems  # noqa: E402
from fusion_summary import summarise, to_csv, to_markdown, verdicts  # noqa: E402
from monai.bundle import ConfigWorkflow  # noqa: E402
from monai.data import MetaTensor  # noqa: E402
from monai.inferers import Inferer  # noqa: E402
from monai.transforms import Compose, ScaleIntensityRangePercentilesd  # noqa: E402
from processes import in_new_process  # noqa: E402

from scripts.data import PICTURES, find_pairs, replacing  # noqa: E402
from scripts.splits import disjoint_draws  # noqa: E402
from scripts.transforms import LoadPaird  # noqa: E402

T2_FLAIR = ["t2", "flair"]
# names of the two images, and spatial dimensions
TASKS: dict[str, tuple[list[str], int]] = {
    "mri-ct": (["MRI", "CT"], 2),
    "mri-spect": (["MRI", "SPECT"], 2),
    "mri-pet": (["MRI", "PET"], 2),
    "t2-flair-2d": (T2_FLAIR, 2),
    "t2-flair-3d": (T2_FLAIR, 3),
}
# A system is what it sets in the configs and, as `configs`, which configs it adds; `before` is a stage that is trained
# first, whose weights the config's id `before_id` names. Ablations are not ranked.
SYSTEMS: dict[str, dict[str, Any]] = {
    "clinicalfmamba": {"label": "ClinicalFMamba"},
    "clinicalfmamba_paper": {"label": "ClinicalFMamba, paper's loss", "configs": ["paper_loss"]},
    "no_cmca": {
        "label": "paper's loss, without CMCA",
        "kind": "ablation",
        "configs": ["paper_loss"],
        "network_def#cross_modal_attention": False,
    },
    "raster_scan": {
        "label": "paper's loss, raster scan",
        "kind": "ablation",
        "configs": ["paper_loss"],
        "network_def#scan": "raster",
    },
    "msrpan": {"label": "MSRPAN", "configs": ["baselines/msrpan"]},
    "msdra": {"label": "MSDRA", "configs": ["baselines/msdra"]},
    "ehdran": {"label": "EH-DRAN", "configs": ["baselines/ehdran"]},
    "swinfusion": {"label": "SwinFusion", "configs": ["baselines/swinfusion"]},
    "mrscfusion": {
        "label": "MRSCFusion",
        "configs": ["baselines/mrscfusion"],
        "before": {"configs": ["baselines/mrscfusion_autoencoder"]},
        "before_id": "autoencoder_checkpoint",
    },
    "mactfusion": {"label": "MACTFusion", "configs": ["baselines/mactfusion"]},
    "mambadfuse": {"label": "MambaDFuse", "configs": ["baselines/mambadfuse"]},
}
# what needs no training: plain rules, and pixels that are optimised case by case under a loss of `LOSSES`
FRAME: dict[str, dict[str, Any]] = {
    "copy_mri": {"label": "copy of the first source", "kind": "frame", "rule": "copy MRI"},
    "copy_partner": {"label": "copy of the second source", "kind": "frame", "rule": "copy partner"},
    "average": {"label": "average", "rule": "average"},
    "maximum": {"label": "maximum", "rule": "maximum"},
    "optimum_paper": {"label": "optimum of the paper's loss", "kind": "frame", "optimum": "paper"},
    "optimum_ssim": {"label": "optimum of mean SSIM", "kind": "frame", "optimum": "ssim"},
    "optimum_joint": {"label": "optimum of the joint loss", "kind": "frame", "optimum": "joint"},
}
NOT_SETTINGS = ("label", "kind", "configs", "before", "before_id", "rule", "optimum")
# handlers of train.json that a table has no use for: nothing is validated, the last epoch's weights are taken
IDLE_HANDLERS = ("ValidationHandler", "TensorBoardStatsHandler", "ignite.handlers.ProgressBar", "StatsHandler")


class ObservedInferer(Inferer):
    """
    Fuse as ``inferer`` does and round to 8 bits, as images are stored; measure the time and keep some of the results.

    Args:
        inferer: called with sources and network, as MONAI's inferers are.
        cases: names of the cases whose sources and fused images are kept, of volumes the middle slice.
    """

    def __init__(self, inferer: Callable[..., torch.Tensor], cases: Sequence[str]) -> None:
        super().__init__()
        self.inferer = inferer
        self.cases = set(cases)
        self.seconds: list[float] = []
        self.kept: dict[str, torch.Tensor] = {}

    def __call__(self, inputs: torch.Tensor, network: Callable, *args: Any, **kwargs: Any) -> torch.Tensor:
        _wait_for(inputs.device)
        start = time.perf_counter()
        fused = self.inferer(inputs, network, *args, **kwargs)
        _wait_for(inputs.device)
        self.seconds += [(time.perf_counter() - start) / len(inputs)] * len(inputs)
        fused = (fused.clamp(0, 1) * 255).round() / 255
        for image, result in zip(inputs, fused):
            case = image.meta["case"] if isinstance(image, MetaTensor) else ""
            if case in self.cases:
                both = torch.cat([torch.as_tensor(image), torch.as_tensor(result)])
                plane = both[..., both.shape[-1] // 2] if both.ndim == 4 else both
                self.kept[case] = (plane * 255).round().to(torch.uint8).cpu()
        return fused


class PixelInferer(Inferer):
    """Fuse by a function of the pixels, in float32 and with gradients, in place of a network."""

    def __init__(self, fuse: Fuse) -> None:
        super().__init__()
        self.fuse = fuse

    def __call__(self, inputs: torch.Tensor, network: Callable, *args: Any, **kwargs: Any) -> torch.Tensor:
        sources = inputs.as_tensor() if isinstance(inputs, MetaTensor) else inputs
        with torch.enable_grad(), torch.autocast(sources.device.type, enabled=False):
            fused = self.fuse(sources)
        return MetaTensor(fused).copy_meta_from(inputs) if isinstance(inputs, MetaTensor) else fused


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def workflow(configs: Sequence[str], spatial_dims: int, **settings: Any) -> ConfigWorkflow:
    """An initialised workflow of the bundle."""
    names = [*configs, *(["volume"] if spatial_dims == 3 else [])]
    files = [str(BUNDLE / "configs" / f"{name}.json") for name in names]
    # it warns of the folder of the baselines, once a run
    logging.getLogger("monai.bundle.workflows").setLevel(logging.ERROR)
    settings = {"train#dataset#progress": False, "validate#dataset#progress": False, **settings}
    flow = ConfigWorkflow(files, workflow_type="train", logging_file=False, bundle_root=str(BUNDLE), **settings)
    flow.initialize()
    return flow


def settings_of(system: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in system.items() if key not in NOT_SETTINGS}


def train(
    folder: Path, system: Mapping[str, Any], spatial_dims: int, configs: Sequence[str], max_epochs: int, **shared: Any
) -> Path:
    """Train a system, its earlier stage first (both share the epochs); return its weights after the last epoch."""
    path, stopped = folder / "model.pt", folder / "checkpoint_last.pt"
    if path.is_file():
        return path
    settings = settings_of(system)
    if "before" in system:
        epochs, max_epochs = max(1, max_epochs // 2), max(1, max_epochs - max_epochs // 2)
        before = train(folder / "before", system["before"], spatial_dims, configs, epochs, **shared)
        settings[system["before_id"]] = str(before)
    recipe = json.loads((BUNDLE / "configs" / "train.json").read_text(encoding="utf-8"))
    handlers = [h for h in recipe["train"]["handlers"] if h["_target_"] not in IDLE_HANDLERS]
    fixed = {"max_epochs": max_epochs, "output_dir": str(folder), "resume": str(stopped) if stopped.is_file() else ""}
    items = {name: item for name, item in recipe["checkpoint_items"].items() if name != "best_model"}
    quiet = {"train#handlers": handlers, "checkpoint_items": items}
    names = ("train", *system.get("configs", ()), *configs)
    flow = workflow(names, spatial_dims, **quiet, **{**shared, **settings, **fixed})
    flow.run()
    with replacing(path) as temporary:
        torch.save(flow.parser.get_parsed_content("network").state_dict(), temporary)
    stopped.unlink(missing_ok=True)
    return path


def evaluate(
    folder: Path,
    system: Mapping[str, Any],
    spatial_dims: int,
    checkpoint: str | Path | None,
    cases: Sequence[str],
    steps: int,
    optimum_batch_size: int,
    **shared: Any,
) -> None:
    """Score a system on the test cases and write what the table is made of, ``result.json`` last."""
    added = system.get("configs", ()) if checkpoint else ["baselines/average"]
    settings = {**shared, **settings_of(system), "output_dir": str(folder), "checkpoint": str(checkpoint or "")}
    if "optimum" in system:
        settings["validate#dataloader#batch_size"] = optimum_batch_size
    recipe = json.loads((BUNDLE / "configs" / "evaluate.json").read_text(encoding="utf-8"))
    handlers = [h for h in recipe["validate#handlers"] if h["_target_"] not in IDLE_HANDLERS]
    flow = workflow(("train", "evaluate", *added), spatial_dims, **{**settings, "validate#handlers": handlers})
    evaluator = flow.parser.get_parsed_content("validate#evaluator")
    inferer = evaluator.inferer
    if "rule" in system:
        inferer = PixelInferer(RULES[system["rule"]])
    elif "optimum" in system:
        loss = LOSSES[system["optimum"]](spatial_dims)
        inferer = PixelInferer(lambda sources: optimise(sources, loss, steps, lr=0.1))
    evaluator.inferer = observed = ObservedInferer(inferer, cases)
    flow.run()
    with replacing(folder / "pictures.pt") as temporary:
        torch.save(observed.kept, temporary)
    device = torch.device(flow.parser.get_parsed_content("device"))
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["cases"]
    result = {
        "parameters": sum(p.numel() for p in evaluator.network.parameters()),
        # the median leaves out the first case, which compiles and fills caches
        "seconds_per_image": float(np.median(observed.seconds)),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type}",
        "metrics": {name: mean_of(metrics, name) for name in metrics[0] if name != "case"},
    }
    with replacing(folder / "result.json") as temporary:
        temporary.write_text(json.dumps(result, indent=4) + "\n", encoding="utf-8")


def mean_of(cases: Sequence[Mapping[str, Any]], name: str) -> float | None:
    """Mean over the cases; None where one is infinite, as the PSNR of a copy, or undefined."""
    values = [case[name] for case in cases]
    return None if None in values else float(np.mean(values))


def train_and_evaluate(
    folder: Path,
    system: Mapping[str, Any],
    spatial_dims: int,
    weights: str | None,
    training: Mapping[str, Any],
    evaluation: Mapping[str, Any],
    **shared: Any,
) -> None:
    """One system on one draw."""
    trained = not {"rule", "optimum"}.intersection(system)
    checkpoint: str | Path | None = weights
    if trained and weights is None:
        checkpoint = train(folder, system, spatial_dims, **training, **shared)
    evaluate(folder, system, spatial_dims, checkpoint, **evaluation, **shared)


def cut_slices(pairs: Sequence[dict], names: Sequence[str], folder: Path, per_case: int) -> list[dict]:
    """Write slices of volumes, evenly spread along the last axis, as 8-bit PNG; return the pairs of them."""
    scale = {"lower": 0.1, "upper": 99.9, "b_min": 0, "b_max": 255, "clip": True, "channel_wise": True}
    load = Compose([LoadPaird("image"), ScaleIntensityRangePercentilesd("image", **scale)])
    for pair in tqdm(pairs, desc="slices"):
        files = [folder / (pair["task"] or "all") / name for name in names]
        done = files[1] / f".{pair['case']}"
        if done.is_file():
            continue
        volumes = load(pair)["image"].as_tensor().round().to(torch.uint8).numpy()
        depth = volumes.shape[-1]
        for index in sorted({(2 * i + 1) * depth // (2 * per_case) for i in range(per_case)}):
            for volume, where in zip(volumes, files):
                where.mkdir(parents=True, exist_ok=True)
                Image.fromarray(volume[..., index].T).save(where / f"{pair['case']}_{index:03d}.png")
        done.touch()
    return find_pairs(folder, names)


def prepare_draws(
    task: str,
    dataset_dir: str,
    folder: Path,
    draws: int,
    test_fraction: float,
    split_by: str,
    slices_per_case: int,
    budget: Mapping[str, int],
) -> list[tuple[Path, dict[str, list[dict]]]]:
    """The data lists of all draws, written to ``folder``, or read where an earlier call has written the same."""
    names, spatial_dims = TASKS[task]
    pairs = find_pairs(dataset_dir, names)
    if spatial_dims == 2 and not str(pairs[0]["image"][0]).lower().endswith(PICTURES):
        pairs = cut_slices(pairs, names, folder / f"slices{slices_per_case}", slices_per_case)
    lists = []
    for draw, splits in enumerate(disjoint_draws(pairs, draws, test_fraction, split_by=split_by)):
        path = folder / f"draw{draw}.json"
        text = json.dumps({"split_by": split_by, **budget, **splits}, indent=4) + "\n"
        if path.is_file() and path.read_text(encoding="utf-8") != text:
            raise ValueError(
                f"{path} was written for other data, test_fraction, split_by, max_epochs or steps: choose another"
                " output_dir, so that a table is of one protocol."
            )
        with replacing(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
        lists.append((path, splits))
    return lists


def attempt(path: Path, job: Mapping[str, Any]) -> str | None:
    """Do one run; return what went wrong, below what MONAI's parser says about it."""
    try:
        train_and_evaluate(path, **job)
        return None
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        lines = [line for line in str(cause).strip().splitlines() if line.strip('" ')]
        return f"{type(cause).__name__}: {lines[-1] if lines else ''}"
    finally:
        # the process goes on with other systems; trainers, networks and what was recorded of them refer to each other
        torch._dynamo.reset()
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()


def outcomes(todo: Mapping[Path, dict[str, Any]], jobs: int) -> Iterator[tuple[Path, str | None]]:
    """Do the runs, one after the other or several side by side; yield each folder with its error, if any."""
    if jobs == 1:
        yield from ((path, attempt(path, job)) for path, job in todo.items())
        return
    with ThreadPoolExecutor(jobs) as pool:
        running = {pool.submit(in_new_process, attempt, path, job): path for path, job in todo.items()}
        try:
            for done in as_completed(running):
                broken = done.exception()  # a process that died
                yield running[done], f"{type(broken).__name__}: {broken}" if broken else done.result()
        finally:
            pool.shutdown(cancel_futures=True)


def report(folder: Path, task: str, rows: Mapping[str, Mapping[str, Any]], draws: int, note: Mapping[str, Any]) -> str:
    """Write table, goals and picture of what is done so far; return them as Markdown."""
    results: dict[str, list[dict[str, Any]]] = {}
    for name in rows:
        paths = [folder / name / f"draw{draw}" / "result.json" for draw in range(draws)]
        if found := [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.is_file()]:
            results[name] = found
    if not results:
        return ""
    table = summarise(rows, results)
    goals = verdicts(table)
    texts = {
        "md": to_markdown(table, goals, task, note),
        "csv": to_csv(table),
        "json": json.dumps({"task": task, "settings": note, "table": table, "goals": goals}, indent=4) + "\n",
    }
    for extension, text in texts.items():
        with replacing(folder.parent / f"{task}.{extension}") as temporary:
            temporary.write_text(text, encoding="utf-8")
    # the sources are in the picture anyway
    shown = [row for row in table if not row["name"].startswith("copy_")]
    files = {row["label"]: folder / row["name"] / "draw0" / "pictures.pt" for row in shown}
    kept = {label: torch.load(path, weights_only=True) for label, path in files.items() if path.is_file()}
    if kept:
        draw_systems(folder.parent / f"{task}.png", kept, TASKS[task][0])
    return texts["md"]


def main(
    task: str,
    dataset_dir: str,
    output_dir: str = "fusion_table",
    systems: Sequence[str] | None = None,
    more: Mapping[str, Mapping[str, Any]] | None = None,
    weights: Mapping[str, str] | None = None,
    configs: Sequence[str] = (),
    draws: int = 3,
    test_fraction: float = 0.2,
    split_by: str = "subject",
    max_epochs: int = 200,
    steps: int = 1000,
    optimum_batch_size: int = 16,
    slices_per_case: int = 3,
    pictures: int = 3,
    jobs: int = 1,
    minutes: float | None = None,
    **overrides: Any,
) -> None:
    """
    Args:
        task: one of `TASKS`.
        dataset_dir: folder with the images; ``t2-flair-2d`` cuts slices from volumes, or takes slices as they are.
        output_dir: folder of tables, pictures and runs; give every protocol its own.
        systems: rows of the table, of `SYSTEMS`, `FRAME` and ``more``; all by default.
        more: more systems, in the form of `SYSTEMS`.
        weights: by system, a file of weights to load in place of training, ``{draw}`` in its name standing for the
            number of the draw. Say beside the table if they have seen test subjects.
        configs: configs of the bundle over all that are trained, in their order.
        draws: how many disjoint tests; fewer where the subjects do not suffice.
        test_fraction: share of the pairs in each test. All others train; the last epoch's weights are taken.
        split_by: ``subject``, or ``slice`` as the paper drew.
        max_epochs: epochs of every system; the two stages of a two-stage one share them.
        steps: steps of the per-image optima.
        optimum_batch_size: pairs that are optimised at once; 1 where their shapes differ.
        slices_per_case: slices that are cut from a volume.
        pictures: cases in the picture.
        jobs: runs side by side on one device, which disturbs the times per image.
        minutes: start no run after so many minutes; call again to go on.
        overrides: ids of the configs, e.g. ``--compile True --device cuda:0 --train#sampler#num_samples 800``.

    Raises:
        ValueError: when a task or row is unknown, a label is given twice, or ``output_dir`` holds another protocol.
        RuntimeError: when runs have failed; the others are kept and stand in the table.
    """
    started = time.monotonic()
    if task not in TASKS:
        raise ValueError(f"No task '{task}': there are {', '.join(TASKS)}.")
    known = {**FRAME, **SYSTEMS, **(more or {})}
    chosen = list(known) if systems is None else list(systems)
    if unknown := [name for name in [*chosen, *(weights or {})] if name not in known]:
        raise ValueError(f"No system '{unknown[0]}': there are {', '.join(known)}; describe others with more.")
    folder = Path(output_dir).absolute() / task
    rows = {name: known[name] for name in known if name in chosen}
    labels = [row.get("label", name) for name, row in rows.items()]
    if twice := [label for label in labels if labels.count(label) > 1]:
        raise ValueError(f"Two systems are labelled '{twice[0]}': give each its own label.")
    budget = {"max_epochs": max_epochs, "steps": steps}
    lists = prepare_draws(task, dataset_dir, folder, draws, test_fraction, split_by, slices_per_case, budget)
    shared = {"dataset_dir": str(Path(dataset_dir).absolute()), "modalities": TASKS[task][0], **overrides}
    todo: dict[Path, dict[str, Any]] = {}
    for draw, (datalist, splits) in enumerate(lists):
        tested = [pair["case"] for pair in splits["test"]]
        cases = [tested[i * len(tested) // pictures] for i in range(min(pictures, len(tested)))] if draw == 0 else []
        for name, system in rows.items():
            path = folder / name / f"draw{draw}"
            if not (path / "result.json").is_file():
                loaded = (weights or {}).get(name)
                todo[path] = {
                    "system": system,
                    "spatial_dims": TASKS[task][1],
                    "weights": loaded.format(draw=draw) if loaded else None,
                    "training": {"configs": configs, "max_epochs": max_epochs},
                    "evaluation": {"cases": cases, "steps": steps, "optimum_batch_size": optimum_batch_size},
                    "datalist": str(datalist),
                    "seed": draw,
                    **shared,
                }
    note = {
        "pairs": [{name: len(pairs) for name, pairs in splits.items()} for _, splits in lists],
        "split_by": split_by,
        **budget,
        "weights": dict(weights or {}),
        "configs": list(configs),
        "overrides": {key: str(value) for key, value in overrides.items()},
    }
    failed: list[str] = []
    done = 0
    with tqdm(total=len(todo), desc=task) as bar:
        for path, error in outcomes(todo, jobs):
            if error is not None:
                failed.append(f"{path.relative_to(folder)} ({error})")
            report(folder, task, rows, len(lists), {**note, "failed": failed})
            done += 1
            bar.update()
            if minutes is not None and time.monotonic() - started > 60 * minutes:
                break
    print(report(folder, task, rows, len(lists), {**note, "failed": failed}))
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(todo)} runs failed: " + "; ".join(failed))
    if done < len(todo):
        print(f"{len(todo) - done} runs are left: give the same command again to go on.")


if __name__ == "__main__":
    fire.Fire(main)

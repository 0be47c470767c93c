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
How fast is ClinicalFMamba, plain and with everything that makes it faster, and does it still give the same image?

Forward passes with the weights that ship on generated images, training steps, and training with its data loading; time
and peak memory of plain PyTorch in float32 beside the fastest setting, and how much their fused images differ. All
settings stand in the JSON. Writes `networks.md` and `networks.json` and prints the former:

    python benchmarks/networks.py --output_dir eval/networks

On a CPU, with smaller volumes and a thread setting of one's own:

    OMP_NUM_THREADS=2 python benchmarks/networks.py --output_dir eval/networks --cases "[[1,[256,256]]]" \\
        --training "[[4,[64,64]]]" --loading None
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fire
import torch
from ignite.engine import Events
from measuring import (
    BUNDLE,
    CASES,
    load_network,
    machine,
    markdown,
    median_time,
    peak_memory,
    phantom_folder,
    phantom_pair,
    write_results,
)
from monai.bundle import ConfigParser, ConfigWorkflow
from tqdm import tqdm

from custom_nets.nets import prepare_for_inference
from scripts.compiling import CompiledForward, channels_last
from scripts.memory import keep_freed_memory
from scripts.trainers import CUDAGraphTrainer

Case = tuple[int, Sequence[int]]


@dataclass(frozen=True)
class Setting:
    """
    What a network is run with; ``compiled`` is nothing, what the bundle does (``blocks``), or the ``whole``;
    ``prepared``, by `prepare_for_inference`, is for forward passes alone.
    """

    name: str
    bfloat16: bool = False
    channels_last: bool = False
    compiled: str = ""
    prepared: bool = False


PLAIN = Setting("plain, float32")
SETTINGS = {
    "cuda": [
        PLAIN,
        Setting("bfloat16, channels last", True, True),
        Setting("bfloat16, channels last, CUDA graph, blocks compiled", True, True, "blocks"),
        Setting("bfloat16, prepared, CUDA graph, blocks compiled", True, True, "blocks", True),
    ],
    "cpu": [PLAIN, Setting("prepared, float32", prepared=True), Setting("prepared, bfloat16", True, prepared=True)],
}
WHOLE = {
    "cuda": Setting("bfloat16, channels last, CUDA graph, all compiled", True, True, "whole"),
    "cpu": Setting("compiled", compiled="whole"),
}


def title(case: Case) -> str:
    return f"{'x'.join(map(str, case[1]))}, batch {case[0]}"


def attempt(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What was measured, or why it was not."""
    try:
        return measure()
    except torch.cuda.OutOfMemoryError:
        return {"seconds": None, "error": "out of memory"}
    finally:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def forward(case: Case, setting: Setting, device: torch.device, images: torch.Tensor, reference: list) -> dict:
    """Time, memory and difference to the first setting's fused image, which ``reference`` keeps."""
    network = load_network(len(case[1])).to(device)
    if setting.channels_last:
        channels_last(network)
    if setting.prepared:
        prepare_for_inference(network, torch.bfloat16 if setting.bfloat16 else torch.float32)
    if setting.compiled:
        network.forward = CompiledForward(network, whole=setting.compiled == "whole")
    inputs = images.to(device)

    def call() -> torch.Tensor:
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=setting.bfloat16):
            return network(inputs)

    fused: list[torch.Tensor] = []
    peak = peak_memory(lambda: fused.append(call().float().cpu()), device)
    reference.append(fused[0])
    apart = (fused[0] - reference[0]).abs()
    found = {"difference": float(apart.mean()), "largest_difference": float(apart.max())}
    # A replay allocates nothing: what it works in was taken when the graph was recorded. On a CPU, a first call also
    # takes what it keeps for later ones.
    again = peak_memory(call, device)
    return {
        **found,
        "peak_mib": max(peak, again) if device.type == "cuda" else again,
        "seconds": median_time(call, device),
    }


def training_step(
    case: Case, setting: Setting, device: torch.device, configs: Sequence[str], steps: int, skipped: int
) -> dict:
    """Time and memory of a step of the bundle's trainer, data on the device already."""
    batch, size = case
    network = load_network(len(size), weights=False).to(device)
    if setting.channels_last:
        channels_last(network)
    graph = bool(setting.compiled)
    optimizer = torch.optim.Adam(
        network.parameters(),
        lr=torch.tensor(1e-4, device=device) if graph else 1e-4,
        fused=True if setting is not PLAIN else None,
        capturable=graph,
    )
    images = phantom_pair(batch, size).to(device)
    trainer = CUDAGraphTrainer(
        device=device,
        max_epochs=1,
        train_data_loader=[{"image": images, "label": images}] * steps,
        network=network,
        optimizer=optimizer,
        loss_function=load_loss(configs, len(size)),
        amp=setting.bfloat16,
        amp_kwargs={"dtype": torch.bfloat16},
        compile=graph,
        decollate=False,
    )
    moments: list[float] = []

    def note(_engine: object) -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        moments.append(time.perf_counter())

    trainer.add_event_handler(Events.STARTED, note)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, note)
    peak = peak_memory(trainer.run, device)
    taken = [stop - start for start, stop in zip(moments, moments[1:])][skipped:]
    return {"seconds": sorted(taken)[len(taken) // 2], "peak_mib": peak}


def load_loss(configs: Sequence[str], spatial_dims: int) -> torch.nn.Module:
    """That of the bundle's training with further configs."""
    parser = ConfigParser()
    names = ["train", *configs, *(["volume"] if spatial_dims == 3 else [])]
    parser.read_config([str(BUNDLE / "configs" / f"{name}.json") for name in names])
    return parser.get_parsed_content("loss")


def with_loading(case: Case, device: torch.device, steps: int, skipped: int, workers: int, compiled: bool) -> dict:
    """Steps of a whole training run, loading, augmentation and all, over volumes that memory holds after the first."""
    batch, size = case
    moments: list[float] = []
    waited: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        phantom_folder(Path(folder) / "data", size, 8)
        flow = ConfigWorkflow(
            [str(BUNDLE / "configs" / f"{name}.json") for name in ("train", "volume")],
            workflow_type="train",
            logging_file=False,
            bundle_root=str(BUNDLE),
            dataset_dir=str(Path(folder) / "data"),
            output_dir=str(Path(folder) / "run"),
            device=device,
            crop_size=list(size),
            batch_size=batch,
            num_workers=workers,
            max_epochs=1,
            val_interval=1000,
            compile=compiled,
            **{"train#sampler#num_samples": steps * batch, "train#handlers": []},
        )
        flow.initialize()
        trainer = flow.parser.get_parsed_content("train#trainer")
        asked = [0.0]
        trainer.add_event_handler(Events.GET_BATCH_STARTED, lambda _: asked.__setitem__(0, time.perf_counter()))
        trainer.add_event_handler(Events.GET_BATCH_COMPLETED, lambda _: waited.append(time.perf_counter() - asked[0]))
        trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda _: moments.append(time.perf_counter()))
        trainer.run()
        flow.finalize()
    taken = moments[-1] - moments[skipped - 1]
    return {"images_per_second": batch * (len(moments) - skipped) / taken, "waiting": sum(waited[skipped:]) / taken}


def compare(name: str, found: dict[Setting, dict[str, Any]]) -> list[list[str]]:
    """The row of the first setting and that of the fastest."""
    done = [setting for setting, values in found.items() if values["seconds"] is not None]
    rows = []
    for setting in dict.fromkeys([PLAIN, *([min(done, key=lambda s: found[s]["seconds"])] if done else [])]):
        values = found[setting]
        if values["seconds"] is None:
            rows.append([name, setting.name, values["error"], "", "", ""])
            continue
        plain = found[PLAIN]["seconds"]
        gain = f"{plain / values['seconds']:.1f}" if plain else ""
        difference = f"{values['difference']:.1e}" if "difference" in values else ""
        row = [name, setting.name, f"{1000 * values['seconds']:.2f}", gain, f"{values['peak_mib']:.0f}", difference]
        rows.append(row)
    return rows


def main(
    output_dir: str,
    device: str = "cuda" if torch.cuda.is_available() else "cpu",
    cases: Sequence[Case] = tuple(CASES),
    training: Sequence[Case] = ((1, (128, 128, 128)),),
    loading: Case | None = (1, (128, 128, 128)),
    configs: Sequence[str] = (),
    steps: int = 20,
    workers: int = 2,
    whole: bool | None = None,
) -> None:
    """
    Args:
        output_dir: folder for the table.
        device: where to run.
        cases: batch and size of the forward passes.
        training: batch and size of the training steps; an empty list leaves them out.
        loading: batch and size of training with data loading; None leaves it out.
        configs: configs of the bundle that change the loss of the training steps.
        steps: training steps, of which the first five are not counted.
        workers: processes that load.
        whole: compile the whole network, too, a minute for each case, on a CPU minutes; by default on a GPU.
    """
    where = torch.device(device)
    if where.type == "cpu":
        keep_freed_memory()
    settings = list(SETTINGS[where.type])
    if whole or (whole is None and where.type == "cuda"):
        settings.append(WHOLE[where.type])
    skipped = min(5, steps - 1)
    rows, records = [], []

    def table() -> list[str]:
        return [machine(where), markdown(["", "setting", "ms", "times as fast", "peak MiB", "mean difference"], rows)]

    def write(parts: Sequence[str], show: bool = False) -> None:
        write_results(output_dir, "networks", parts, {"machine": machine(where), "results": records}, show)

    def note(kind: str, case: Case, found: dict[Setting, dict[str, Any]]) -> None:
        rows.extend(compare(f"{kind} {title(case)}", found))
        records.extend({"measured": kind, "case": title(case), "setting": s.name, **v} for s, v in found.items())
        write(table())  # a run that is stopped has measured something

    for case in tqdm(cases, desc="forward"):
        images, reference = phantom_pair(*case), []
        run = {s: attempt(lambda s=s: forward(case, s, where, images, reference)) for s in settings}
        note("forward", case, run)
    for case in tqdm(training, desc="training"):
        # the trainer has no more than the blocks compiled
        choice = [s for s in settings if s.compiled != "whole" and not s.prepared]
        run = {s: attempt(lambda s=s: training_step(case, s, where, configs, steps, skipped)) for s in choice}
        note(f"training step ({load_loss(configs, len(case[1])).__class__.__name__})", case, run)
    parts = table()
    if loading is not None:
        found = with_loading(loading, where, 3 * steps, skipped, workers, where.type == "cuda")
        records.append({"measured": "training with data loading", "case": title(loading), "workers": workers, **found})
        parts.append(
            f"Training with data loading, {title(loading)}, {workers} workers: {found['images_per_second']:.2f} images"
            f" a second, {100 * found['waiting']:.0f} % of the time waiting for data."
        )
    write(parts, show=True)


if __name__ == "__main__":
    fire.Fire(main)

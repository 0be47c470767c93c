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

"""What the benchmarks of networks have in common: what is measured, on which machine, and how it is written down."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser

ROOT = Path(__file__).resolve().parents[1]
BUNDLE = ROOT / "bundles" / "clinicalfmamba_fusion"
sys.path[:0] = [str(ROOT), str(BUNDLE)]

from scripts.phantom import digital_brain  # noqa: E402
from scripts.phantom import write as write_phantom  # noqa: E402

__all__ = [
    "BUNDLE",
    "CASES",
    "figure",
    "load_network",
    "machine",
    "markdown",
    "median_time",
    "peak_memory",
    "phantom_folder",
    "phantom_pair",
    "write_results",
]

# batch and size
CASES = [(1, (128, 128)), (16, (128, 128)), (1, (256, 256)), (1, (128, 128, 128)), (1, (240, 240, 155))]

MIB = 2**20


def load_network(spatial_dims: int, weights: bool = True) -> torch.nn.Module:
    """The network of the bundle's configs, in evaluation, with the weights that ship if they are wanted."""
    parser = ConfigParser()
    parser.read_config(
        [str(BUNDLE / "configs" / name) for name in ["inference.json", "volume.json"][: spatial_dims - 1]]
    )
    parser["bundle_root"] = str(BUNDLE)
    network = parser.get_parsed_content("network_def")
    if weights:
        path = parser.get_parsed_content("checkpoint")
        network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return network.eval()


def phantom_pair(batch: int, size: Sequence[int]) -> torch.Tensor:
    """Generated MRI and CT, or T2 and FLAIR, ``(batch, 2, *size)`` in [0, 1]; all of a batch are the same."""
    brain = digital_brain(size)
    names = ("mri", "ct") if len(size) == 2 else ("t2", "flair")
    pair = torch.stack([torch.from_numpy(brain[name]).float() for name in names])
    return pair.clamp(0, 1).expand(batch, *pair.shape).contiguous()


def phantom_folder(folder: Path, size: Sequence[int], cases: int) -> None:
    """Generated volumes, one brain under as many names as there shall be cases."""
    write_phantom(str(folder), kind="volumes", subjects=1, shape=tuple(size))
    (first,) = folder.rglob("*_t2.nii.gz")
    for number in range(1, cases):
        for name in ("t2", "flair"):
            copy = folder / f"case_{number:03d}" / f"case_{number:03d}_{name}.nii.gz"
            copy.parent.mkdir(exist_ok=True)
            shutil.copy(first.with_name(first.name.replace("_t2.", f"_{name}.")), copy)


def machine(device: torch.device) -> str:
    """Name of the device, versions and day."""
    if device.type == "cuda":
        import triton

        name = f"{torch.cuda.get_device_name(device)}, Triton {triton.__version__}"
    else:
        info = Path("/proc/cpuinfo")
        lines = info.read_text().splitlines() if info.is_file() else []
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "CPU")
        name = f"{model}, {torch.get_num_threads()} thread(s) of {os.cpu_count()} cores"
    return f"{name}, PyTorch {torch.__version__}, {time.strftime('%Y-%m-%d')}"


def median_time(call: Callable[[], object], device: torch.device, budget: float = 2.0, most: int = 50) -> float:
    """Median seconds of a call that has been made before, over three repeats or more that fill ``budget`` seconds."""
    times: list[float] = []
    while len(times) < 3 or (sum(times) < budget and len(times) < most):
        if device.type == "cuda":
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize(device)
            start.record()
            call()
            stop.record()
            stop.synchronize()
            times.append(start.elapsed_time(stop) / 1e3)
        else:
            begin = time.perf_counter()
            call()
            times.append(time.perf_counter() - begin)
    return statistics.median(times)


def peak_memory(call: Callable[[], object], device: torch.device) -> float:
    """MiB that are held at most during a call: by tensors on a GPU, weights and input included; on a CPU, beyond what
    the process held before (Linux only, else NaN)."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) / MIB
    try:
        # what is free goes back to the system, and the peak is that since now
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        call()
        return (_status("VmHWM") - before) / MIB
    except (AttributeError, OSError):
        return float("nan")


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


def figure(value: float) -> str:
    """Three digits, and all before the point."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *rows])


def write_results(
    output_dir: str | os.PathLike, name: str, parts: Sequence[str], records: Any, show: bool = True
) -> None:
    """Write ``name.md``, whose parts are divided by empty lines, and ``name.json``, and print the first."""
    text = "\n\n".join(parts) + "\n"
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.md").write_text(text, encoding="utf-8")
    (folder / f"{name}.json").write_text(json.dumps(records, indent=4) + "\n", encoding="utf-8")
    if show:
        print(text)

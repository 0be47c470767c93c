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
Do time and memory of ClinicalFMamba grow linearly with the number of voxels?

One pass over cubes of growing size, as the bundle runs it (bfloat16 and channels last on a GPU, float32 on a CPU), with
a line through the times and one through the peaks that makes the relative deviations small. Writes `scaling.md` and
prints it:

    python benchmarks/scaling.py --output_dir eval/scaling
    python benchmarks/scaling.py --output_dir eval/scaling --device cpu --sides "[32,48,64,80,96]"
"""

from __future__ import annotations

from collections.abc import Sequence

import fire
import numpy as np
import torch
from measuring import figure, load_network, machine, markdown, median_time, peak_memory, write_results
from tqdm import tqdm

from scripts.compiling import prepare_network
from scripts.memory import keep_freed_memory

SIDES = {"cuda": (64, 96, 128, 160, 192, 224, 256), "cpu": (32, 48, 64, 80, 96)}


def measure(side: int, network: torch.nn.Module, device: torch.device) -> tuple[float, float]:
    """Milliseconds and MiB of one pass over a cube."""
    volume = torch.rand(1, 2, side, side, side, device=device)

    def call() -> torch.Tensor:
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            return network(volume)

    call()
    return peak_memory(call, device), 1000 * median_time(call, device)


def fit(voxels: Sequence[int], values: Sequence[float]) -> dict[str, float]:
    """Line by least squares of relative deviations: slope, intercept, R^2, and the largest relative deviation."""
    x, y = np.asarray(voxels, float), np.asarray(values)
    slope, intercept = np.polyfit(x, y, 1, w=1 / y)
    residual = y - slope * x - intercept
    explained = 1 - (residual**2).sum() / ((y - y.mean()) ** 2).sum()
    deviation = np.abs(residual / y).max()
    return {"slope": slope, "intercept": intercept, "r2": float(explained), "largest_deviation": float(deviation)}


def main(
    output_dir: str,
    device: str = "cuda" if torch.cuda.is_available() else "cpu",
    sides: Sequence[int] | None = None,
    compile: bool = False,
) -> None:
    """
    Args:
        output_dir: folder for the table.
        device: where to run.
        sides: of the cubes, in voxels; 64 to 256 on a GPU and 32 to 96 on a CPU by default.
        compile: as the switch of the bundle's configs.
    """
    where = torch.device(device)
    if where.type == "cpu":
        keep_freed_memory()
    network = prepare_network(load_network(3), where, compile)
    measured = {}
    for side in tqdm(sides or SIDES[where.type], desc="scaling"):
        measured[side] = measure(side, network, where)
        if where.type == "cuda":
            torch.cuda.empty_cache()
    voxels = [side**3 for side in measured]
    peaks, times = zip(*measured.values())
    lines = {"ms": fit(voxels, times), "peak MiB": fit(voxels, peaks)}
    rows = [
        [
            f"{side}^3",
            f"{voxels_:,}",
            figure(ms),
            f"{1e6 * ms / voxels_:.0f}",
            f"{peak:.0f}",
            figure(peak * 2**20 / voxels_),
        ]
        for (side, (peak, ms)), voxels_ in zip(measured.items(), voxels)
    ]
    fits = [
        [name, f"{1e6 * line['slope']:.3g}", figure(line["intercept"]), f"{line['r2']:.5f}"]
        + [f"{100 * line['largest_deviation']:.1f} %"]
        for name, line in lines.items()
    ]
    parts = [
        f"{machine(where)}, {'compiled' if compile else 'not compiled'}",
        markdown(["cube", "voxels", "ms", "ns a voxel", "peak MiB", "bytes a voxel"], rows),
        markdown(["line through", "slope, a million voxels", "intercept", "R^2", "largest deviation"], fits),
    ]
    write_results(output_dir, "scaling", parts, {"machine": machine(where), "measured": measured, "fits": lines})


if __name__ == "__main__":
    fire.Fire(main)

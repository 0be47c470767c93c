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
What does ClinicalFMamba have to compute and to move, stage by stage, and how fast could it be at best?

Nothing is run: shapes are followed through the network. Operations are two for each multiply-add of a convolution or a
matrix product; for each token, channel and direction a scan takes 7 a state and 5, its convolution 2 a tap. Bytes are
what convolutions, matrix products and scans read and write, each tensor once and in bfloat16, as if all else between
them were free. A stage takes no less than the longer of the two. Writes `network_cost.md` and prints it:

    python benchmarks/network_cost.py --output_dir eval/cost
"""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import fire
import torch
from measuring import CASES, figure, load_network, machine, markdown, write_results
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from torch.utils.module_tracker import ModuleTracker

from custom_nets.blocks import DilatedGatedConvBlock
from custom_nets.ops import BACKEND_VARIABLE

# dense bfloat16 and memory of an H100 SXM, in 1/s
H100 = (989e12, 3.35e12)
BYTES = 2


def scan_operations(u: torch.Tensor, delta: torch.Tensor, A: torch.Tensor, *_args: Any, **_kwargs: Any) -> int:
    """Of ``u`` ``(B, K, L, D)`` and ``A`` ``(K, D, N)``; decay 2, drive 1, recurrence 2, output 2; step 2, skip 3."""
    return delta.numel() * (7 * A.shape[-1] + 5)


def conv_operations(x: torch.Tensor, weight: torch.Tensor, *_args: Any, **_kwargs: Any) -> int:
    """Of ``x`` ``(B, L, C)`` and ``weight`` ``(K, width, C)``."""
    return 2 * weight.shape[0] * weight.shape[1] * x.numel()


def formulas() -> dict[Any, Callable[..., int]]:
    """Operations of a call, by what is called."""
    import custom_nets.ops.directional_conv_cpp  # noqa: F401
    import custom_nets.ops.selective_scan_cpp  # noqa: F401

    ours = torch.ops.custom_nets
    own = {ours.selective_scan_cpu_forward: scan_operations, ours.directional_conv_cpu_forward: conv_operations}
    return {**flop_registry, **own}


class CostCounter(TorchDispatchMode):
    """Operations and elements moved, by the module that is running."""

    def __init__(self, stage_of: Callable[[set[str]], str]) -> None:
        super().__init__()
        self.stage_of = stage_of
        self.tracker = ModuleTracker()
        self.formulas = formulas()
        self.costs: dict[str, list[int]] = defaultdict(lambda: [0, 0])

    def __enter__(self) -> CostCounter:
        self.tracker.__enter__()
        return super().__enter__()

    def __exit__(self, *args: Any) -> None:
        super().__exit__(*args)
        self.tracker.__exit__(*args)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        packet = _out_of_place(func.overloadpacket)
        if packet in self.formulas:
            tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor)]
            cost = self.costs[self.stage_of(self.tracker.parents)]
            cost[0] += self.formulas[packet](*args, **kwargs, out_val=result)
            cost[1] += sum(x.numel() for x in tensors)
        elif func.namespace == "custom_nets":
            raise RuntimeError(f"{func} has no formula: say in formulas() what it computes.")
        return result


def _out_of_place(packet: Any) -> Any:
    name = packet.__name__
    return getattr(torch.ops.aten, name[:-1], packet) if name.endswith("_") and not name.startswith("_") else packet


def stages(network: torch.nn.Module) -> dict[str, str]:
    """Stage of each of the network's own modules, in the order of the forward pass."""
    known = {"stem": "stem"}
    number = 1
    for name, module in network.encoder.named_children():
        known[f"encoder.{name}"] = f"encoder, stage {number}"
        number += isinstance(module, DilatedGatedConvBlock)
    known |= dict.fromkeys(["latent_x", "latent_y"], "Mamba blocks")
    known |= dict.fromkeys(["exchange", "cross_x", "cross_y", "merge"], "exchange and cross Mamba")
    known |= dict.fromkeys(["refine", "refine_norm"], "Mamba blocks before the decoder")
    number = 0
    for name, module in network.decoder.named_children():
        # each begins with its convolution, the only one that it has
        number += any(weight.ndim > 3 for weight in module.parameters())
        known[f"decoder.{name}"] = f"decoder, stage {number}"
    return {**known, "skip": "channel attention (CMCA)", "refinement": "refinement", "head": "head"}


def count(batch: int, size: Sequence[int]) -> dict[str, list[int]]:
    """Operations and bytes of each stage for a batch of images of some size."""
    # its operators have shapes without being run
    os.environ[BACKEND_VARIABLE] = "cpp"
    with FakeTensorMode(allow_non_fake_inputs=True):
        network = load_network(len(size), weights=False)
        known = stages(network)
        prefix = type(network).__name__

        def stage_of(parents: set[str]) -> str:
            names = {parent.removeprefix(f"{prefix}.") for parent in parents}
            for name, stage in known.items():
                if any(parent == name or parent.startswith(f"{name}.") for parent in names):
                    return stage
            return "other"

        counter = CostCounter(stage_of)
        with torch.no_grad(), counter:
            network(torch.empty(batch, network.in_channels, *size))
    order = list(dict.fromkeys([*known.values(), "other"]))
    return {s: [n, BYTES * e] for s in order if s in counter.costs for n, e in [counter.costs[s]]}


def cpu_speed(repeats: int = 5) -> tuple[float, float]:
    """Float32 operations of a matrix product and bytes of a copy in a second, the best of some repeats."""
    a, large = torch.rand(1536, 1536), torch.rand(1 << 26)
    copy = torch.empty_like(large)

    def best(call: Callable[[], object]) -> float:
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        return min(times)

    return 2 * len(a) ** 3 / best(lambda: a @ a), 2 * large.nbytes / best(lambda: copy.copy_(large))


def table(dims: int, speed: tuple[float, float] | None) -> tuple[str, list[dict[str, Any]]]:
    """Stages by cases of 2 or 3 dimensions, and the same as records."""
    columns, records = {}, []
    for batch, size in CASES:
        if len(size) != dims:
            continue
        costs = count(batch, size)
        floors = {stage: max(n / H100[0], b / H100[1]) for stage, (n, b) in costs.items()}
        total = [sum(column) for column in zip(*costs.values())]
        cells = {stage: _cell(n, b, floors[stage]) for stage, (n, b) in costs.items()}
        cells["**all**"] = _cell(*total, sum(floors.values()))
        case = f"{'x'.join(map(str, size))}, batch {batch}"
        record = {"case": case, "stages": {s: [*costs[s], floors[s]] for s in costs}, "total": total}
        if speed is not None:
            seconds = sum(max(n / speed[0], 2 * b / speed[1]) for n, b in costs.values())
            cells["**all, on this CPU, s**"] = f"{seconds:.3g}"
            record["cpu_s"] = seconds
        columns[case] = cells
        records.append(record)
    stages_ = list(dict.fromkeys(stage for cells in columns.values() for stage in cells))
    return markdown(["", *columns], [[stage, *(c[stage] for c in columns.values())] for stage in stages_]), records


def _cell(operations: float, moved: float, seconds: float) -> str:
    return " / ".join(figure(value) for value in (operations / 1e9, moved / 1e6, seconds * 1e6))


def main(output_dir: str, cpu: bool = True) -> None:
    """
    Args:
        output_dir: folder for the table.
        cpu: whether to measure what this machine's CPU reaches, for its floor; float32 moves twice the bytes there.
    """
    speed = cpu_speed() if cpu else None
    tables, records = zip(*(table(dims, speed) for dims in (2, 3)))
    notes = [
        f"GFLOP / MB / µs at least on an H100 ({H100[0] / 1e12:.0f} TFLOP/s, {H100[1] / 1e12:.2f} TB/s); "
        f"PyTorch {torch.__version__}."
    ]
    if speed is not None:
        reached = f"{speed[0] / 1e9:.0f} GFLOP/s (float32), {speed[1] / 1e9:.1f} GB/s"
        notes.append(f"CPU: {machine(torch.device('cpu'))}; a product of matrices and a copy reached {reached}.")
    write_results(output_dir, "network_cost", [*notes, *tables], [record for part in records for record in part])


if __name__ == "__main__":
    fire.Fire(main)

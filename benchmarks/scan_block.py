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
How fast is a Mamba block with several scan directions, and how much memory does it take?

On a GPU, our block (project, convolve, scan, merge), which walks the tokens in every direction where they lie, against
the same block built from mamba-ssm's and causal-conv1d's kernels, one direction after the other on permuted copies.
Both have the same weights; the largest difference of their outputs stands in the table. Writes `scan_block.md` and
prints it:

    python benchmarks/scan_block.py --output_dir eval/scan
"""

from __future__ import annotations

import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import fire
import torch
import torch.nn as nn
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from custom_nets.blocks import Mamba  # noqa: E402
from custom_nets.ops import BACKEND_VARIABLE, scan_orders, to_raster  # noqa: E402

# scan and tokens along each axis
CASES = [("cross", (64, 64)), ("tri_plane", (16, 16, 16)), ("tri_plane", (30, 30, 20)), ("tri_plane", (32, 32, 32))]
DIM = 128


class PermutedMamba(nn.Module):
    """The block of :py:class:`custom_nets.blocks.Mamba`, with its weights, from the kernels that mamba-ssm has."""

    def __init__(self, block: Mamba) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: torch.Tensor, spatial_shape: list[int]) -> torch.Tensor:
        from causal_conv1d import causal_conv1d_fn
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

        ssm = self.block.ssm
        batch, length, _ = x.shape
        xz = self.block.in_proj(x).transpose(1, 2).unflatten(2, spatial_shape)
        outputs = []
        for k, (axes, backward) in enumerate(ssm.orders):
            sequence = xz.permute(0, 1, *(axis + 2 for axis in axes)).flatten(2)
            content, gate = (sequence.flip(2) if backward else sequence).contiguous().chunk(2, dim=1)
            content = causal_conv1d_fn(content, ssm.conv_weight[k].t(), ssm.conv_bias[k], activation="silu")
            step, B, C = (content.transpose(1, 2) @ ssm.projection[k]).split(ssm.split, dim=-1)
            delta = (step @ ssm.step_weight[k]).transpose(1, 2).contiguous()
            B, C = (matrix.transpose(1, 2).contiguous() for matrix in (B, C))
            A = -torch.exp(ssm.A_log[k].float())
            outputs.append(selective_scan_fn(content, delta, A, B, C, ssm.D[k], gate, ssm.step_bias[k], True))
        merged = to_raster(torch.stack(outputs, dim=1).transpose(2, 3), spatial_shape, ssm.orders).mean(dim=1)
        return self.block.out_proj(self.block.norm(merged))


def measure(call: Callable[[], object], repeats: int = 20) -> float:
    """Median microseconds of a call, replayed as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    times = []
    for _ in range(repeats):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(1000 * start.elapsed_time(stop))
    return statistics.median(times)


def peak(call: Callable[[], object]) -> float:
    """MiB that a call takes at most, beyond what was there."""
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def compare(scan: str, shape: tuple[int, ...], dtype: torch.dtype, names: list[str]) -> list[list[str]]:
    """A row for each block."""
    torch.manual_seed(0)
    ours = Mamba(DIM, scan_orders(scan, len(shape))).cuda()
    x = torch.randn(1, math.prod(shape), DIM, device="cuda", requires_grad=True)
    grad = torch.randn_like(x)
    parameters = [x, *ours.parameters()]
    rows, outputs = [], []
    for name in names:
        block = ours if name == "ours" else PermutedMamba(ours)

        def run() -> torch.Tensor:
            # weights are cast at each call, as in a step of training
            with torch.autocast("cuda", dtype=dtype, enabled=dtype != torch.float32, cache_enabled=False):
                return block(x, list(shape))

        def forward() -> torch.Tensor:
            with torch.no_grad():
                return run()

        def both() -> object:
            return torch.autograd.grad(run(), parameters, grad.to(outputs[-1].dtype))

        outputs.append(forward())
        # The first one's output is the yardstick.
        difference = float((outputs[-1] - outputs[0]).abs().max() / outputs[0].abs().max())
        figures = [measure(forward), measure(both), peak(forward), peak(both), difference]
        title = [f"{scan} {'x'.join(map(str, shape))}", str(dtype).removeprefix("torch."), name]
        rows.append([*title, *(f"{figure:.1f}" for figure in figures[:4]), f"{difference:.1e}"])
    return rows


def main(output_dir: str) -> None:
    """
    Args:
        output_dir: folder for the table.
    """
    if not torch.cuda.is_available():
        sys.exit("The blocks are compared on a GPU, and there is none.")
    os.environ[BACKEND_VARIABLE] = "triton"
    names = ["ours"]
    notes = [f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, {time.strftime('%Y-%m-%d')}"]
    try:
        import causal_conv1d  # noqa: F401
        import selective_scan_cuda  # noqa: F401
    except ImportError as missing:
        notes.append(f"Left out: the block built from mamba-ssm's kernels ({missing})")
    else:
        names.append("mamba-ssm")
    head = ["scan and tokens", "dtype", "block", "forward µs", "forward + backward µs"]
    head += ["forward peak MiB", "forward + backward peak MiB", "difference"]
    lines = [head, ["---"] * len(head)]
    for dtype in (torch.bfloat16, torch.float32):
        for scan, shape in tqdm(CASES, desc=str(dtype)):
            lines += compare(scan, shape, dtype, names)
    text = "\n\n".join(notes) + "\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "scan_block.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    fire.Fire(main)

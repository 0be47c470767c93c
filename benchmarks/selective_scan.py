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
How fast is the selective scan, and how exact?

On a GPU, every back end that is there, forward and backward, beside the floor of its memory traffic; their error
against float64 first. On a CPU, the compiled and the PyTorch back end against a loop over the tokens, and what longer
sequences take. Writes `selective_scan.md` and prints it:

    python benchmarks/selective_scan.py --output_dir eval/scan
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import fire
import torch
import torch.nn.functional as F
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from custom_nets.ops import BACKEND_VARIABLE, scan_backend, selective_scan, selective_scan_channels_last  # noqa: E402

# batch, channels, tokens, states
SHAPES = [
    (1, 256, 1024, 8),
    (1, 256, 4096, 8),
    (2, 256, 4096, 8),
    (6, 256, 4096, 8),
    (1, 256, 18000, 8),
    (1, 256, 32768, 8),
    (1, 96, 262144, 16),
    (1, 64, 2097152, 8),
]
CPU_SHAPE = (1, 256, 4096, 8)
CPU_LENGTHS = (4096, 16384, 65536, 262144)
# The largest cache that a card has: inputs that take turns should not fit.
CACHE = 64 << 20

Inputs = list[torch.Tensor]
Table = tuple[list[str], list[list[str]]]
Scan = Callable[..., torch.Tensor]


def make_inputs(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, channels_first: bool) -> Inputs:
    """u, delta, A, B, C, D and bias of one sequence each (K = 1), steps around 1e-3 to 1e-1 as in a fresh network."""
    batch, channels, length, states = shape
    u, delta = torch.randn(2, batch, 1, length, channels, device=device, dtype=dtype)
    A = -torch.arange(1.0, states + 1, device=device).repeat(1, channels, 1)
    # one projection holds both, as in a block
    _, B, C = torch.randn(batch, 1, length, 8 + 2 * states, device=device, dtype=dtype).split([8, states, states], -1)
    D, bias = torch.ones(1, channels, device=device), torch.empty(1, channels, device=device).uniform_(-7, -2)
    inputs = [u, 0.1 * delta, A, B, C, D, bias]
    if channels_first:
        inputs = [x.transpose(2, 3).squeeze(1) if x.ndim == 4 else x.squeeze(0) for x in inputs]
        inputs = [x.contiguous() for x in inputs]
    return [x.requires_grad_() for x in inputs]


def bytes_moved(inputs: Inputs) -> tuple[int, int]:
    """What forward and backward have to read and write at least, each once."""
    tokens = sum(x.nbytes for x in inputs if x.ndim > 2)
    sequence = inputs[0].nbytes
    return tokens + sequence, 2 * tokens + sequence


def channels_last(u, delta, A, B, C, D, bias):
    return selective_scan_channels_last(u, delta, A, B, C, D, bias, True)


def channels_first(u, delta, A, B, C, D, bias):
    return selective_scan(u, delta, A, B, C, D=D, delta_bias=bias, delta_softplus=True)


def loop(u, delta, A, B, C, D, bias):
    """mamba-ssm's `selective_scan_ref`, one token after the other, channels first.

    All decays and drives come first. It differs in `unbind`, where the original indexes each token: nearly the same
    forward, but a backward of minutes becomes one of a second.
    """
    step = F.softplus(delta + bias.unsqueeze(-1))
    decays = torch.exp(torch.einsum("bdl,dn->bdln", step, A))
    drives = torch.einsum("bdl,bnl,bdl->bdln", step, B, u)
    x = u.new_zeros(u.shape[0], *A.shape)
    outputs = []
    for decay, drive, C_t in zip(decays.unbind(2), drives.unbind(2), C.unbind(2)):
        x = decay * x + drive
        outputs.append(torch.einsum("bdn,bn->bd", x, C_t))
    return torch.stack(outputs, dim=2) + u * D.unsqueeze(-1)


def both_ways(scan: Scan, inputs: Inputs, grad: torch.Tensor) -> Inputs:
    """Output and all gradients."""
    y = scan(*inputs)
    return [y.detach(), *torch.autograd.grad(y, inputs, grad)]


def error(scan: Scan, inputs: Inputs) -> tuple[float, float]:
    """Relative error of the output, and the largest one of a gradient, against the PyTorch back end in float64."""
    grad = torch.randn_like(inputs[0])
    actual = both_ways(scan, inputs, grad)
    # float64 goes to PyTorch unless another back end is forced
    forced = os.environ.pop(BACKEND_VARIABLE)
    exact = both_ways(scan, [x.detach().double().requires_grad_() for x in inputs], grad.double())
    os.environ[BACKEND_VARIABLE] = forced
    errors = [float(torch.linalg.norm(a.double() - e) / torch.linalg.norm(e)) for a, e in zip(actual, exact)]
    return errors[0], max(errors[1:])


def measure(call: Callable[[Inputs], object], sets: list[Inputs], graph: bool, budget: float = 0.2) -> float:
    """Median microseconds of a call, over inputs that take turns and repeats that fill ``budget`` seconds."""

    def turn() -> None:
        for inputs in sets:
            call(inputs)

    run: Callable[[], object] = turn
    if graph:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            turn()
        torch.cuda.current_stream().wait_stream(stream)
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            turn()
        run = captured.replay
    run()
    torch.cuda.synchronize()
    times: list[float] = []
    while len(times) < 3 or (sum(times) < budget * 1e6 and len(times) < 50):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) * 1000)
    return statistics.median(times) / len(sets)


def measure_on_gpu(shape: tuple[int, ...], dtype: torch.dtype, backend: str) -> list[str]:
    """One row of the table."""
    device = torch.device("cuda")
    official = backend == "mamba_ssm"
    scan = channels_first if official else channels_last
    inputs = make_inputs(shape, dtype, device, official)
    forward_bytes, backward_bytes = bytes_moved(inputs)
    errors = error(scan, inputs)
    count = min(64, max(2, -(-CACHE // forward_bytes)))
    # PyTorch's is thousands of launches: a graph of them takes longer to make than it is worth
    graph = backend != "torch"
    sets = [make_inputs(shape, dtype, device, official) for _ in range(count if graph else 1)]
    grads = {id(x): torch.randn_like(x[0]) for x in sets}

    def forward(x: Inputs) -> None:
        with torch.no_grad():
            scan(*x)

    forward_time = measure(forward, sets, graph)
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    both_ways(scan, sets[0], grads[id(sets[0])])
    peak = torch.cuda.max_memory_allocated() - held
    backward_time = measure(lambda x: both_ways(scan, x, grads[id(x)]), sets, graph) - forward_time
    return [
        str(shape),
        str(dtype).removeprefix("torch."),
        backend,
        *(f"{e:.1e}" for e in errors),
        f"{forward_time:.1f}",
        f"{backward_time:.1f}",
        f"{forward_bytes / forward_time / 1e3:.0f}",
        f"{backward_bytes / backward_time / 1e3:.0f}",
        f"{peak / 2**20:.0f}",
    ]


def gpu_table(backends: list[str]) -> Table:
    head = ["(batch, channels, tokens, states)", "dtype", "back end", "error", "gradient error"]
    head += ["forward µs", "backward µs", "forward GB/s", "backward GB/s", "peak MiB"]
    rows = []
    cases = [(s, d, b) for s in SHAPES for d in (torch.bfloat16, torch.float32) for b in backends]
    for shape, dtype, backend in tqdm(cases, desc="scan"):
        os.environ[BACKEND_VARIABLE] = backend
        rows.append(measure_on_gpu(shape, dtype, backend))
        torch.cuda.empty_cache()
    return head, rows


def cpu_backends() -> list[str]:
    """Those that can be had here, the fastest first."""
    os.environ.pop(BACKEND_VARIABLE, None)
    return sorted({scan_backend(torch.device("cpu"), torch.float32), "torch"})


def on_cpu(backend: str, inputs: Inputs, grad: torch.Tensor | None) -> float:
    """Milliseconds of one call, with the backward if there is a gradient; the back end "loop" is :py:func:`loop`."""
    scan = loop
    if backend != "loop":
        os.environ[BACKEND_VARIABLE], scan = backend, channels_first
    start = time.perf_counter()
    if grad is None:
        with torch.no_grad():
            scan(*inputs)
    else:
        both_ways(scan, inputs, grad)
    return 1000 * (time.perf_counter() - start)


def cpu_times(backends: list[str], backward: bool) -> dict[str, float]:
    """Milliseconds of the loop and of back ends, in turn: the fastest of 3 and of 30 calls."""
    inputs = make_inputs(CPU_SHAPE, torch.float32, torch.device("cpu"), True)
    grad = torch.randn_like(inputs[0]) if backward else None
    times: dict[str, list[float]] = {backend: [] for backend in ("loop", *backends)}
    for backend in 3 * ["loop", *(10 * backends)]:
        times[backend].append(on_cpu(backend, inputs, grad))
    return {backend: min(calls) for backend, calls in times.items()}


def cpu_table() -> Table:
    """Back ends against a loop, with all threads and with one."""
    head = ["(batch, channels, tokens, states)", "threads", "back end", "", "ms", "loop ms", "times as fast"]
    rows = []
    backends, default = cpu_backends(), torch.get_num_threads()
    for threads in sorted({1, default}):
        torch.set_num_threads(threads)
        for name, backward in (("forward", False), ("forward and backward", True)):
            times = cpu_times(backends, backward)
            for backend in backends:
                row = [str(CPU_SHAPE), str(threads), backend, name, f"{times[backend]:.1f}", f"{times['loop']:.1f}"]
                rows.append([*row, f"{times['loop'] / times[backend]:.1f}"])
    torch.set_num_threads(default)
    return head, rows


def memory(field: str) -> int:
    """Bytes that this process holds (``VmRSS``) or has held at most (``VmHWM``), on Linux."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])


def measure_length(case: tuple[int, str]) -> list[str]:
    """One row of :py:func:`length_table`."""
    length, backend = case
    shape = (*CPU_SHAPE[:2], length, CPU_SHAPE[3])
    inputs = make_inputs(shape, torch.float32, torch.device("cpu"), True)
    grad = torch.randn_like(inputs[0])
    first = [x[..., :64] if x.ndim == 3 else x for x in inputs]
    on_cpu(backend, first, grad[..., :64])
    held = memory("VmRSS")
    both = on_cpu(backend, inputs, grad)
    # well above what making the inputs took for a moment
    peak = memory("VmHWM") - held
    forward = min(on_cpu(backend, inputs, None) for _ in range(5))
    both = min(both, *(on_cpu(backend, inputs, grad) for _ in range(4)))
    row = [str(shape), backend, f"{forward:.1f}", f"{both:.1f}", f"{1e6 * both / grad.numel():.2f}"]
    return [*row, f"{peak / 2**20:.0f}", f"{peak / grad.nbytes:.1f}"]


def length_table() -> Table:
    """Time and memory of longer and longer sequences, the fastest of 5 calls, each length in its own process."""
    head = ["(batch, channels, tokens, states)", "back end", "forward ms", "forward and backward ms"]
    head += ["ns for a token's channel", "peak MiB", "peak / u"]
    cases = [(length, backend) for backend in cpu_backends() for length in CPU_LENGTHS]
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        rows = list(tqdm(pool.imap(measure_length, cases), total=len(cases), desc="lengths"))
    return head, rows


def main(output_dir: str, backends: str | tuple[str, ...] = ("triton", "mamba_ssm", "torch")) -> None:
    """
    Args:
        output_dir: folder for the table.
        backends: which to measure on a GPU, separated by commas; those that are missing are left out with a message.
    """
    notes = [f"PyTorch {torch.__version__}, {time.strftime('%Y-%m-%d')}"]
    if torch.cuda.is_available():
        notes[0] = f"{torch.cuda.get_device_name()}, {notes[0]}, backward = forward and backward - forward"
        available = []
        for backend in [backends] if isinstance(backends, str) else backends:
            os.environ[BACKEND_VARIABLE] = backend
            try:
                available.append(scan_backend(torch.device("cuda"), torch.float32))
            except RuntimeError as missing:
                notes.append(f"Left out: {missing}")
        tables = [gpu_table(available)]
    else:
        notes[0] = f"CPU with {torch.get_num_threads()} threads, {notes[0]}, fastest calls"
        tables = [cpu_table(), length_table()]
    for head, rows in tables:
        notes.append("\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *rows]))
    text = "\n\n".join(notes) + "\n"
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "selective_scan.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    fire.Fire(main)

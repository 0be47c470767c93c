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

"""Selective scan in C++ on a CPU. Importing builds it once for each machine, so it is imported where a scan wants it.

The compiler (``CXX``, else ``c++``) is called directly: ``torch.utils.cpp_extension`` would take ninja, a lock that
outlives a process that was killed, and PyTorch's headers, which take four times as long as the kernels themselves. The
library is in ``TORCH_EXTENSIONS_DIR``, by default ``torch_extensions`` in the user's cache. Where it can not be built,
:py:data:`OBSTACLE` says why.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import logging
import os
import platform
import shlex
import subprocess
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

import torch
from torch import Tensor

from custom_nets.ops.scan_orders import flatten_orders, scan_places

__all__ = ["CHUNK", "DTYPES", "OBSTACLE", "call_library", "channel_groups", "selective_scan_cpp"]

# Tokens between two states that are kept for the backward.
CHUNK = 64
# Their places are the numbers that the library knows them by.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_SOURCE = Path(__file__).parent / "csrc" / "selective_scan.cpp"
_FLAGS = ["-std=c++17", "-O3", "-ffp-contract=fast", "-fPIC", f"-DCHUNK={CHUNK}"]
# The best first. OpenMP is for the compiler, not for the linker: the runtime has to be the one that PyTorch has loaded,
# as two pools of threads keep each other waiting. Where its symbols are not found there, one thread has to do.
_CHOICES: tuple[list[str], ...] = (["-march=native", "-fopenmp"], ["-fopenmp"], [])


def _library_path() -> Path:
    """Where the library for this source and this machine is: several may share a home."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU "))})
    except OSError:
        cpu = [platform.processor()]
    description = [_SOURCE.read_text(), str(_FLAGS), str(_CHOICES), platform.machine(), *cpu]
    digest = hashlib.sha256("\n".join(description).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "torch_extensions"
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cache) / "custom_nets" / f"selective_scan_{digest}.so"


def _build(path: Path, flags: list[str]) -> ctypes.CDLL:
    """Builds beside ``path`` and renames, so that processes that build at once do not disturb each other."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        object_file, library = (str(Path(folder) / name) for name in ("scan.o", path.name))
        for command in (
            [*compiler, *_FLAGS, *flags, "-c", str(_SOURCE), "-o", object_file],
            [*compiler, "-shared", object_file, "-o", library],
        ):
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=600)
        loaded = ctypes.CDLL(library)
        os.replace(library, path)
    return loaded


def _load() -> tuple[ctypes.CDLL | None, str]:
    """The library, or None and why there is none."""
    log = logging.getLogger(__name__)
    causes = []
    try:
        path = _library_path()
        with contextlib.suppress(OSError):
            return ctypes.CDLL(str(path)), ""
        log.warning("Building the selective scan for this CPU, once, in a few seconds: %s", path)
        for flags in _CHOICES:
            try:
                library = _build(path, flags)
            except (subprocess.CalledProcessError, OSError) as error:
                output = getattr(error, "stderr", "").strip() or str(error)
                causes.append(output.splitlines()[0])
                continue
            if "-fopenmp" not in flags:
                log.warning("It will use one thread only: %s", causes[-1])
            return library, ""
    except (OSError, RuntimeError, ValueError, subprocess.TimeoutExpired) as error:
        causes.append(str(error))
    return None, f"its C++ library could not be built ({causes[0]})"


_LIBRARY, OBSTACLE = _load()
if OBSTACLE:
    warnings.warn(f"the selective scan will be several times slower on this CPU: {OBSTACLE}.", stacklevel=2)


_SIZES = ("batch", "directions", "length", "channels", "states", "groups", "softplus", "threads", "width")
_SEQUENCES = ("u", "delta", "out", "grad", "grad_u", "grad_delta")
_MATRICES = ("B", "C")
_ARRAYS = (
    *("A", "D", "bias", "borders", "grad_A", "grad_D", "grad_bias", "grad_B", "grad_C"),
    *("taps", "grad_taps", "places"),
)


class _Sequence(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("strides", ctypes.c_int64 * 4), ("type", ctypes.c_int64)]


class _Matrix(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("strides", ctypes.c_int64 * 3)]


class _Arguments(ctypes.Structure):
    """The structures of the same names in the source, field by field."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in _SIZES),
        *((name, _Sequence) for name in _SEQUENCES),
        *((name, _Matrix) for name in _MATRICES),
        *((name, ctypes.c_void_p) for name in _ARRAYS),
    ]


def _inputs(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Optional[Tensor],
    bias: Optional[Tensor],
    orders: Sequence[int],
    spatial_shape: Sequence[int],
) -> dict[str, Tensor]:
    """Inputs as the library takes them, by the names of its arguments; the tokens lie in order without ``orders``."""
    B, C = (x.float() for x in (B, C))
    B, C = (x if x.stride(3) == 1 else x.contiguous() for x in (B, C))
    delta = delta if delta.dtype in DTYPES else delta.float()
    arrays = {name: x.float().contiguous() for name, x in (("A", A), ("D", D), ("bias", bias)) if x is not None}
    if orders:
        arrays["places"] = scan_places(tuple(orders), tuple(spatial_shape))
    return {"u": u, "delta": delta, "B": B, "C": C, **arrays}


def call_library(name: str, tensors: dict[str, Tensor], **sizes: int) -> None:
    """Calls a function of the library with tensors and sizes by the names of its arguments.

    Raises:
        RuntimeError: if the library could not be built.
    """
    if _LIBRARY is None:
        raise RuntimeError(OBSTACLE)
    shape = dict(zip(_SIZES, tensors["u"].shape))
    # Asking for the number of threads makes the calling thread use it, too.
    arguments = _Arguments(**shape, threads=torch.get_num_threads(), **sizes)
    for key, x in tensors.items():
        value: Any = x.data_ptr()
        if key in _SEQUENCES:
            value = _Sequence(value, x.stride(), DTYPES.index(x.dtype))
        elif key in _MATRICES:
            value = _Matrix(value, x.stride()[:3])
        setattr(arguments, key, value)
    getattr(_LIBRARY, name)(ctypes.byref(arguments))


def channel_blocks(channels: int) -> int:
    """Blocks of channels, of which a task takes one or several."""
    if _LIBRARY is None:
        raise RuntimeError(OBSTACLE)
    return -(-channels // _LIBRARY.selective_scan_lanes())


def channel_groups(channels: int, sequences: int, tasks: int) -> int:
    """Groups of blocks of channels, each a task: as many as make ``tasks`` of the sequences, and no more, since
    neighbouring channels share the pages that a task reads."""
    return min(channel_blocks(channels), -(-tasks // max(1, sequences)))


_ARGUMENTS = "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? delta_bias"
_ORDERS = "int[] orders=[], SymInt[] spatial_shape=[]"
_FORWARD, _BACKWARD = (f"custom_nets::selective_scan_cpu_{name}" for name in ("forward", "backward"))
# torch.library.custom_op would do the same, but its first call imports all of torch.compile: a second or more.
torch.library.define(
    _FORWARD, f"({_ARGUMENTS}, bool delta_softplus, {_ORDERS}) -> (Tensor, Tensor)", tags=torch.Tag.pt2_compliant_tag
)
torch.library.define(
    _BACKWARD,
    f"(Tensor grad, {_ARGUMENTS}, Tensor borders, bool delta_softplus, {_ORDERS})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.impl(_FORWARD, "CPU")
def _forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Optional[Tensor],
    delta_bias: Optional[Tensor],
    delta_softplus: bool,
    orders: Sequence[int] = (),
    spatial_shape: Sequence[int] = (),
) -> tuple[Tensor, Tensor]:
    """Outputs ``(B, K, L, D)``, laid out as u, and states at the borders of chunks, ``(B, K, chunks + 1, N, D)``."""
    groups = channel_groups(u.shape[3], u.shape[0] * u.shape[1], 4 * torch.get_num_threads())
    y, borders = _fake_forward(u, delta, A, B, C, D, delta_bias, delta_softplus)
    tensors = {**_inputs(u, delta, A, B, C, D, delta_bias, orders, spatial_shape), "out": y, "borders": borders}
    call_library("selective_scan_forward", tensors, states=A.shape[2], groups=groups, softplus=delta_softplus)
    return y, borders


@torch.library.register_fake(_FORWARD)
def _fake_forward(u, delta, A, B, C, D, delta_bias, delta_softplus, orders=(), spatial_shape=()):
    borders = (u.shape[2] + 2 * CHUNK - 1) // CHUNK
    shape = (u.shape[0], u.shape[1], borders, A.shape[2], u.shape[3])
    return torch.empty_like(u), u.new_empty(shape, dtype=torch.float32)


@torch.library.impl(_BACKWARD, "CPU")
def _backward(
    grad: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Optional[Tensor],
    delta_bias: Optional[Tensor],
    borders: Tensor,
    delta_softplus: bool,
    orders: Sequence[int] = (),
    spatial_shape: Sequence[int] = (),
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, delta, A, B, C, D and the bias, the last two also where there are none."""
    batch, directions, length, channels = u.shape
    states = A.shape[2]
    # A group of blocks has its own sums for B and C, which take as much memory as u and delta, or as eight groups need.
    groups = min(channel_blocks(channels), max(8, channels // states))

    def buffer(*shape: int) -> Tensor:
        return u.new_empty(shape, dtype=torch.float32)

    inputs = _inputs(u, delta, A, B, C, D, delta_bias, orders, spatial_shape)
    grad_u, grad_delta = (torch.empty_like(inputs[name]) for name in ("u", "delta"))
    sums = {
        "grad_A": buffer(batch, directions, channels, states),
        "grad_B": buffer(groups, batch, directions, length, states),
        "grad_C": buffer(groups, batch, directions, length, states),
        "grad_D": buffer(batch, directions, channels),
        "grad_bias": buffer(batch, directions, channels),
    }
    tensors = {"grad": grad, "grad_u": grad_u, "grad_delta": grad_delta, "borders": borders}
    sizes = {"states": states, "groups": groups, "softplus": delta_softplus}
    call_library("selective_scan_backward", {**inputs, **sums, **tensors}, **sizes)
    grad_A, grad_B, grad_C, grad_D, grad_bias = (x.sum(0) for x in sums.values())
    return (
        grad_u,
        grad_delta.to(delta.dtype),
        grad_A.to(A.dtype),
        grad_B.to(B.dtype),
        grad_C.to(C.dtype),
        grad_D,
        grad_bias,
    )


@torch.library.register_fake(_BACKWARD)
def _(grad, u, delta, A, B, C, D, delta_bias, borders, delta_softplus, orders=(), spatial_shape=()):
    matrices = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (A, B, C)]
    vectors = [u.new_empty((u.shape[1], u.shape[3]), dtype=torch.float32) for _ in range(2)]
    return torch.empty_like(u), torch.empty_like(delta), *matrices, *vectors


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.delta_softplus, ctx.orders, ctx.spatial_shape = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Optional[Tensor], _: None) -> tuple[Optional[Tensor], ...]:
    *tensors, borders = ctx.saved_tensors
    constants = (ctx.delta_softplus, ctx.orders, ctx.spatial_shape)
    grads = torch.ops.custom_nets.selective_scan_cpu_backward(grad, *tensors, borders, *constants)
    return *(None if x is None else g for x, g in zip(tensors, grads)), None, None, None


torch.library.register_autograd(_FORWARD, _differentiate, setup_context=_setup_context)


def selective_scan_cpp(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Optional[Tensor] = None,
    delta_bias: Optional[Tensor] = None,
    delta_softplus: bool = False,
    orders: Sequence[tuple[Sequence[int], bool]] = (),
    spatial_shape: Sequence[int] = (),
) -> Tensor:
    """:py:func:`custom_nets.ops.selective_scan_channels_last` for float32, bfloat16 and float16 on a CPU.

    Threads share the sequences, their directions and groups of 4, 8 or 16 channels (a vector of the CPU), never the
    tokens of one. The results do not depend on how many there are. With N states, forward and backward keep N / 64
    numbers for each channel and token, and the backward takes up to two more, or 16 N for each token if that is more.

    Args:
        u, delta: input and step, ``(B, K, L, D)``, read in any layout.
        A: ``(K, D, N)``.
        B, C: ``(B, K, L, N)``; views whose states lie side by side are read where they are.
        D, delta_bias: ``(K, D)``.
        orders: if given, all tensors are in raster order of ``spatial_shape``, and each direction walks them by itself,
            see :py:func:`custom_nets.ops.scan_orders`.

    Returns:
        ``(B, K, L, D)`` in dtype and layout of ``u``; once differentiable.
    """
    flat = flatten_orders(orders)
    return torch.ops.custom_nets.selective_scan_cpu_forward(
        u, delta, A, B, C, D, delta_bias, delta_softplus, flat, spatial_shape
    )[0]

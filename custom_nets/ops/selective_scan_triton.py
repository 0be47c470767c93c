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

"""Selective scan in Triton, parallel over the sequence too. Imported only where Triton is there and a GPU wants it.

The sequence is cut into chunks. A first pass runs every chunk from a zero state and keeps the state at its end; the
decay of a whole chunk is ``exp(A * sum of steps)``, so one number per channel is enough for it. A small pass carries
the states over the chunks. A last pass runs every chunk again from the state that enters it and writes the outputs. The
backward does the same in reverse: what the tokens of a chunk add to the gradient of the state that enters it is
``sum of (decay up to t) C_t dy_t``, which a walk *forward* gives as well, together with the states that the last pass
starts from again. That pass goes backward through segments of a chunk, and within one through groups of tokens whose
states stay in registers. Sums over programs go through buffers, never through atomics, so that results repeat exactly.

In the forward of short scans, a pass starts while the one before it runs: its programs find their place and load what
they read of the inputs, then wait for what it writes (programmatic dependent launch).

Directions cost no copies: tensors stay in raster order, and a program finds the next token of its direction by index
arithmetic (:py:mod:`custom_nets.ops.scan_paths`).

A program has one warp and a tile of states x channels; a thread owns one or two channels, so that loads are coalesced
(channels last) and the sum over states needs no exchange. Special functions are the scarce resource: the forward takes
two exponentials for each channel, state and token, the backward three.

Bytes, for each channel and token, with e of them in an element and chunks of T tokens: the forward reads 4e, writes e
and keeps 4N / T for the backward; the backward reads 6e (and 2e from a cache), writes 2e, and takes N / 8 for states
and N / 8 for partial sums of the gradients of B and C while it runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Optional

import torch
import triton
import triton.language as tl
from torch import Tensor

from custom_nets.ops.scan_orders import flatten_orders
from custom_nets.ops.scan_paths import paths_of
from custom_nets.ops.selective_scan_gradient_kernels import collect_kernel, gradient_kernel, retrace_kernel
from custom_nets.ops.selective_scan_kernels import carry_kernel, end_kernel, output_kernel

__all__ = ["selective_scan_triton"]

# At most as many tokens between two states that the backward keeps while it runs; chunks are made of whole segments.
SEGMENT = 32
# Of a chunk, in tokens. Longer ones do not pay, since the cache holds what the next pass reads again.
SHORTEST, LONGEST = 16, 256
# Chunk up to which the passes of the forward overlap: launches and first loads take a large share of short ones. On an
# H100, 256 channels of 8 states in bfloat16 went from 10.9 to 9.4 us (1024 tokens), from 17.3 to 15.8 (4096), from 26.7
# to 25.7 (2 x 4096), but, with chunks of 64, from 59 to 65 (6 x 4096) and from 58 to 65 (18000): programs that wait
# take the place of those that work. It is no matter of their number, which longer chunks keep about the same. The
# backward lost 1 to 4 us of 46 to 90, but for the shortest scan, and so does not overlap.
LONGEST_OVERLAPPED = SHORTEST

# Programs that keep an H100 busy: 16 for each multiprocessor. Other GPUs are near enough.
PROGRAMS = 2112


def _tiling(sequences: int, length: int, channels: int, states: int) -> tuple[int, int, int]:
    """States padded to a power of two, channels of a program, and tokens that are loaded together."""
    padded = triton.next_power_of_2(states)
    few = sequences * length * channels < PROGRAMS * SHORTEST * 16
    block = min(32 if channels <= 32 or few else 64, 512 // padded)
    return padded, block, 4 if block >= 32 else 2


def chunk_length(sequences: int, length: int, channels: int, states: int) -> int:
    """Tokens of one chunk, for ``sequences`` sequences and directions: as long as there are programs for the GPU."""
    block = _tiling(sequences, length, channels, states)[1]
    chunk = triton.cdiv(length * sequences * triton.cdiv(channels, block), PROGRAMS)
    if chunk <= SHORTEST:
        return SHORTEST
    return min(LONGEST, triton.cdiv(chunk, SEGMENT) * SEGMENT)


def _overlaps(chunk: int, device: torch.device) -> bool:
    """Whether a pass of the forward is launched while the one before still runs, and waits for it inside."""
    # Hopper and later can.
    if chunk > LONGEST_OVERLAPPED or torch.version.hip is not None or not hasattr(tl.extra.cuda, "gdc_wait"):
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)


def _readable(x: Tensor) -> Tensor:
    """B or C with the states side by side."""
    return x if x.stride(3) == 1 else x.contiguous()


def _packed(states: int, *matrices: Tensor) -> int:
    """How many states of B and C can be loaded at once."""
    pack = 8 // matrices[0].element_size()
    whole = states % pack == 0 and states == triton.next_power_of_2(states)
    aligned = all(x.data_ptr() % 8 == 0 and all(n % pack == 0 for n in x.stride()[:3]) for x in matrices)
    return pack if whole and aligned and all(x.dtype == matrices[0].dtype for x in matrices) else 1


class _Launch:
    """What all kernels of one scan are launched with."""

    def __init__(
        self,
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Optional[Tensor],
        bias: Optional[Tensor],
        softplus: bool,
        chunk: int,
        orders: Sequence[int],
        spatial_shape: Sequence[int],
    ) -> None:
        self.u, self.delta, self.A = u.contiguous(), delta.contiguous(), A.contiguous()
        self.B, self.C = _readable(B), _readable(C)
        self.D, self.bias = (None if x is None else x.contiguous() for x in (D, bias))
        self.paths = paths_of(tuple(orders), tuple(spatial_shape), u.device) if orders else None
        self.batch, self.directions, self.length, self.channels = u.shape
        self.states = A.shape[2]
        self.chunks = triton.cdiv(self.length, chunk)
        padded, self.block, group = _tiling(self.batch * self.directions, self.length, self.channels, self.states)
        self.programs = self.batch * self.directions * self.chunks * triton.cdiv(self.channels, self.block)
        self.sizes = {"K": self.directions, "D": self.channels, "N": self.states}
        self.options = {
            **self.sizes,
            **{"length": self.length, "chunk": chunk, "chunks": self.chunks, "SOFTPLUS": softplus},
            **{"BLOCK": self.block, "STATES": padded, "GROUP": group, "num_warps": 1},
            "PACK": _packed(self.states, self.B, self.C),
            **{"B_batch": self.B.stride(0), "B_row": self.B.stride(1), "B_token": self.B.stride(2)},
        }
        # for the kernels that read C too
        strides = {"C_batch": self.C.stride(0), "C_row": self.C.stride(1), "C_token": self.C.stride(2)}
        self.all_options = {**self.options, **strides}

    def buffer(self, *shape: int) -> Tensor:
        return self.u.new_empty((self.batch, self.directions, *shape), dtype=torch.float32)

    def borders(self) -> Tensor:
        """For what crosses from chunk to chunk."""
        return self.buffer(self.chunks - 1, self.states, self.channels)

    def ends(self) -> tuple[Tensor, Tensor]:
        """For what each chunk ends with, and for the sums of its steps."""
        return self.buffer(self.chunks, self.states, self.channels), self.buffer(self.chunks, self.channels)

    def carry(self, ends: Tensor, spans: Tensor, reverse: bool, **launch: Any) -> Tensor:
        """From what each chunk ends with, if it begins at zero, to what crosses its border."""
        borders = self.borders()
        grid = (self.batch * self.directions * self.states * triton.cdiv(self.channels, 8),)
        window = min(512, max(16, triton.next_power_of_2(self.chunks)))
        split = {"BLOCK": 8, "WINDOW": window, "num_warps": 4 if window > 32 else 1}
        carry_kernel[grid](ends, spans, self.A, borders, self.chunks, REVERSED=reverse, **split, **self.sizes, **launch)
        return borders


@torch.library.custom_op("custom_nets::selective_scan_forward", mutates_args=())
def _forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Optional[Tensor],
    delta_bias: Optional[Tensor],
    delta_softplus: bool,
    chunk: int,
    orders: Sequence[int],
    spatial_shape: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """Outputs ``(B, K, L, D)`` and the states that enter each chunk but the first, ``(B, K, chunks - 1, N, D)``."""
    run = _Launch(u, delta, A, B, C, D, delta_bias, delta_softplus, chunk, orders, spatial_shape)
    y = torch.empty_like(run.u)
    inputs = (run.u, run.delta, run.A, run.B)
    with torch.cuda.device_of(u):
        # launched early only behind a kernel of this scan: others may let it start before they have written
        overlap = run.chunks > 1 and _overlaps(chunk, u.device)
        behind = {"OVERLAP": True, "launch_pdl": True} if overlap else {"OVERLAP": False}
        if run.chunks > 1:
            ends, spans = run.ends()
            end_kernel[(run.programs,)](*inputs, run.bias, run.paths, ends, spans, **run.options, OVERLAP=overlap)
            entering = run.carry(ends, spans, reverse=False, **behind)
        else:
            entering = run.borders()
        output_kernel[(run.programs,)](
            *inputs, run.C, run.D, run.bias, run.paths, entering, y, **run.all_options, **behind
        )
    return y, entering


@_forward.register_fake
def _(u, delta, A, B, C, D, delta_bias, delta_softplus, chunk, orders, spatial_shape):
    shape = (u.shape[0], u.shape[1], (u.shape[2] + chunk - 1) // chunk - 1, A.shape[2], u.shape[3])
    return torch.empty_like(u, memory_format=torch.contiguous_format), u.new_empty(shape, dtype=torch.float32)


@torch.library.custom_op("custom_nets::selective_scan_backward", mutates_args=())
def _backward(
    grad: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Optional[Tensor],
    delta_bias: Optional[Tensor],
    entering: Tensor,
    delta_softplus: bool,
    chunk: int,
    orders: Sequence[int],
    spatial_shape: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, delta, B and C side by side ``(B, K, L, 2 N)``, and A, D and the bias ``(K, N + 2, D)``."""
    run = _Launch(u, delta, A, B, C, D, delta_bias, delta_softplus, chunk, orders, spatial_shape)
    if grad.stride(3) != 1 or grad.stride(2) != run.channels:
        grad = grad.contiguous()
    inputs = (run.u, run.delta, run.A, run.B, run.C)
    grad_strides = {"grad_batch": grad.stride(0), "grad_row": grad.stride(1)}
    segment = min(SEGMENT, chunk)
    options = {**run.all_options, **grad_strides, "SEGMENT": segment, "GROUP": 2}
    # The last pass needs the registers of a tile several times: smaller ones, and a limit so that more programs fit.
    block, group = min(32, run.block), 2
    blocks = triton.cdiv(run.channels, block)
    last = {**options, "BLOCK": block, "GROUP": group}
    programs = run.batch * run.directions * run.chunks * blocks
    if torch.version.hip is None:
        last["maxnreg"] = 128 if block * last["STATES"] <= 256 else 168
    with torch.cuda.device_of(u):
        checkpoints = run.buffer(triton.cdiv(run.length, segment), run.states, run.channels)
        ends, spans = run.ends()
        retrace_kernel[(run.programs,)](
            *inputs, run.bias, run.paths, entering, grad, checkpoints, ends, spans, **options
        )
        later = run.carry(ends, spans, reverse=True, OVERLAP=False) if run.chunks > 1 else run.borders()
        scratch = u.new_empty((programs, segment // group, last["STATES"] * block), dtype=torch.float32)
        grad_u, grad_delta = torch.empty_like(run.u), torch.empty_like(run.delta)
        grad_BC = B.new_empty((run.batch, run.directions, run.length, 2 * run.states))
        parts = grad_BC if blocks == 1 else grad_BC.new_empty((blocks, *grad_BC.shape), dtype=torch.float32)
        parameters = run.buffer(run.chunks, run.states + 2, run.channels)
        gradient_kernel[(programs,)](
            *(*inputs, run.D, run.bias, run.paths, grad, checkpoints, later, scratch),
            *(grad_u, grad_delta, parts, parameters),
            rows=run.batch * run.directions,
            **last,
        )
        if blocks > 1:
            size = grad_BC.numel()
            collect_kernel[(triton.cdiv(size, 256),)](parts, grad_BC, blocks, size, BLOCK=256, num_warps=4)
    return grad_u, grad_delta, grad_BC, parameters.sum((0, 2))


@_backward.register_fake
def _(
    grad, u, delta, A, B, C, D, delta_bias, entering, delta_softplus, chunk, orders, spatial_shape
):  # fmt: skip
    like = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (u, delta)]
    parameters = u.new_empty((u.shape[1], A.shape[2] + 2, u.shape[3]), dtype=torch.float32)
    return like[0], like[1], B.new_empty((*u.shape[:3], 2 * A.shape[2])), parameters


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.delta_softplus, ctx.chunk, ctx.orders, ctx.spatial_shape = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor, _: None) -> tuple[Optional[Tensor], ...]:
    *tensors, entering = ctx.saved_tensors
    A, C = tensors[2], tensors[4]
    constants = (ctx.delta_softplus, ctx.chunk, ctx.orders, ctx.spatial_shape)
    grad_u, grad_delta, grad_BC, parameters = _backward(grad, *tensors, entering, *constants)
    states = A.shape[2]
    grad_B, grad_C = grad_BC.split(states, dim=-1)
    grad_A, grad_D, grad_bias = parameters[:, :states].transpose(1, 2), parameters[:, states], parameters[:, states + 1]
    grads = (grad_u, grad_delta, grad_A.to(A.dtype), grad_B, grad_C.to(C.dtype), grad_D, grad_bias)
    return *(None if x is None else g for x, g in zip(tensors, grads)), None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_setup_context)


def selective_scan_triton(
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
    """:py:func:`custom_nets.ops.selective_scan_channels_last` for float32, bfloat16 and float16 on a GPU.

    Args:
        u, delta: input and step, ``(B, K, L, D)``.
        A: ``(K, D, N)`` with N up to 64.
        B, C: ``(B, K, L, N)``; views whose states lie side by side are read where they are.
        D, delta_bias: ``(K, D)``.
        orders: if given, all tensors are in raster order of ``spatial_shape``, and each direction walks them by itself,
            see :py:func:`custom_nets.ops.scan_orders`.

    Returns:
        ``(B, K, L, D)`` in the dtype of ``u``; once differentiable, with repeatable gradients.
    """
    chunk = chunk_length(u.shape[0] * u.shape[1], u.shape[2], u.shape[3], A.shape[2])
    flat = flatten_orders(orders)
    return _forward(u, delta, A, B, C, D, delta_bias, delta_softplus, chunk, flat, spatial_shape)[0]

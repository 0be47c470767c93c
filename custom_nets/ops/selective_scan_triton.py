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

A program has one warp and a tile of states x channels; a thread owns a channel, so that loads are coalesced (channels
last) and the sum over states needs no exchange. Special functions are the scarce resource: the forward takes two
exponentials for each channel, state and token, the backward three.

Bytes, for each channel and token, with e of them in an element and chunks of T tokens: the forward reads 4e, writes e
and keeps 4N / T for the backward; the backward reads 6e (and 2e from a cache), writes 2e, and takes N / 8 for states
and N / 4 for partial sums of the gradients of B and C while it runs.
"""

from __future__ import annotations

from typing import Any, Optional

import torch
import triton
from torch import Tensor

from custom_nets.ops.selective_scan_kernels import (
    carry_kernel,
    end_kernel,
    gradient_kernel,
    output_kernel,
    retrace_kernel,
)

__all__ = ["selective_scan_triton"]

# Tokens between two states that the backward keeps while it runs; chunks are made of whole segments.
SEGMENT = 32


def _tiling(states: int) -> tuple[int, int, int]:
    """States padded to a power of two, channels of a program, and tokens whose loads are in flight at once."""
    padded = triton.next_power_of_2(states)
    block = min(32, 512 // padded)
    return padded, block, min(8, 1024 // (padded * block))


def chunk_length(sequences: int, length: int, channels: int, states: int) -> int:
    """Tokens of one chunk, for ``sequences`` sequences and directions: as long as there are programs for the GPU."""
    programs = sequences * triton.cdiv(channels, _tiling(states)[1])
    # 16 for each multiprocessor of an H100; other GPUs are near enough.
    chunks = 2112 // programs
    if chunks < 2 or length <= 2 * SEGMENT:
        chunks = 1
    return triton.cdiv(triton.cdiv(length, chunks), SEGMENT) * SEGMENT


def _arguments(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Optional[Tensor], bias: Optional[Tensor]
) -> tuple[list[Any], dict[str, Any], dict[str, Any]]:
    """Tensors as the kernels take them, arguments of all kernels, and those of kernels that read C too."""
    u, delta, A = u.contiguous(), delta.contiguous(), A.contiguous()
    B, C = (x if x.stride(3) == 1 else x.contiguous() for x in (B, C))
    D, bias = (None if x is None else x.contiguous() for x in (D, bias))
    padded, block, group = _tiling(A.shape[2])
    sizes = {"K": u.shape[1], "D": u.shape[3], "N": A.shape[2], "BLOCK": block, "STATES": padded, "GROUP": group}
    one = {"B_batch": B.stride(0), "B_row": B.stride(1), "B_token": B.stride(2), "num_warps": 1, **sizes}
    two = {"C_batch": C.stride(0), "C_row": C.stride(1), "C_token": C.stride(2), **one}
    return [u, delta, A, B, C, D, bias], one, two


def _carry(ends: Tensor, spans: Tensor, A: Tensor, reverse: bool) -> None:
    batch, directions, chunks, states, channels = ends.shape
    grid = (batch * directions * states * triton.cdiv(channels, 32),)
    carry_kernel[grid](
        ends, spans, A, chunks, K=directions, D=channels, N=states, REVERSED=reverse, BLOCK=32, GROUP=16, num_warps=1
    )


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
) -> tuple[Tensor, Tensor]:
    """Outputs ``(B, K, L, D)`` and the states that enter each chunk but the first, ``(B, K, chunks, N, D)``."""
    batch, directions, length, channels = u.shape
    states, chunks = A.shape[2], triton.cdiv(length, chunk)
    entering = u.new_empty((batch, directions, chunks, states, channels), dtype=torch.float32)
    y = torch.empty_like(u, memory_format=torch.contiguous_format)
    (u, delta, A, B, C, D, delta_bias), one, two = _arguments(u, delta, A, B, C, D, delta_bias)
    split = {"length": length, "chunk": chunk, "chunks": chunks, "SOFTPLUS": delta_softplus}
    grid = (batch * directions * chunks * triton.cdiv(channels, one["BLOCK"]),)
    with torch.cuda.device_of(u):
        if chunks > 1:
            spans = u.new_empty((batch, directions, chunks, channels), dtype=torch.float32)
            end_kernel[grid](u, delta, A, B, delta_bias, entering, spans, **split, **one)
            _carry(entering, spans, A, reverse=False)
        output_kernel[grid](u, delta, A, B, C, D, delta_bias, entering, y, **split, **two)
    return y, entering


@_forward.register_fake
def _(u, delta, A, B, C, D, delta_bias, delta_softplus, chunk):
    shape = (u.shape[0], u.shape[1], (u.shape[2] + chunk - 1) // chunk, A.shape[2], u.shape[3])
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, delta, A, B, C, D and the bias, the last two also where there are none."""
    batch, directions, length, channels = u.shape
    states, chunks = A.shape[2], triton.cdiv(length, chunk)
    dtypes = [x.dtype for x in (A, B, C)]
    (u, delta, A, B, C, D, delta_bias), one, two = _arguments(u, delta, A, B, C, D, delta_bias)
    grad = grad.contiguous()
    blocks = triton.cdiv(channels, one["BLOCK"])
    split = {"length": length, "chunk": chunk, "chunks": chunks, "SOFTPLUS": delta_softplus, "SEGMENT": SEGMENT}
    # States of a group and their gradients take many registers: shorter groups, and a limit so that more programs fit.
    last = {**two, "GROUP": max(1, two["GROUP"] // 2)}
    if torch.version.hip is None:
        last["maxnreg"] = 128 if two["STATES"] <= 8 else 168
    programs = batch * directions * chunks * blocks

    def buffer(*shape: int) -> Tensor:
        return u.new_empty(shape, dtype=torch.float32)

    checkpoints = buffer(batch, directions, triton.cdiv(length, SEGMENT), states, channels)
    later, spans = torch.empty_like(entering), buffer(batch, directions, chunks, channels)
    scratch = buffer(programs, SEGMENT // last["GROUP"], last["STATES"], last["BLOCK"])
    grad_u, grad_delta, grad_A = torch.empty_like(u), torch.empty_like(delta), torch.empty_like(entering)
    grad_B, grad_C = (buffer(blocks, batch, directions, length, states) for _ in range(2))
    grad_D, grad_bias = torch.empty_like(spans), torch.empty_like(spans)
    with torch.cuda.device_of(u):
        retrace_kernel[(programs,)](
            u, delta, A, B, C, delta_bias, entering, grad, checkpoints, later, spans, **split, **two
        )
        if chunks > 1:
            _carry(later, spans, A, reverse=True)
        gradient_kernel[(programs,)](
            *(u, delta, A, B, C, D, delta_bias, grad, checkpoints, later, scratch),
            *(grad_u, grad_delta, grad_A, grad_B, grad_C, grad_D, grad_bias),
            rows=batch * directions,
            **split,
            **last,
        )
    grad_A = grad_A.sum((0, 2)).transpose(1, 2)
    grads = [x.to(dtype) for x, dtype in zip((grad_A, grad_B.sum(0), grad_C.sum(0)), dtypes)]
    return grad_u, grad_delta, grads[0], grads[1], grads[2], grad_D.sum((0, 2)), grad_bias.sum((0, 2))


@_backward.register_fake
def _(grad, u, delta, A, B, C, D, delta_bias, entering, delta_softplus, chunk):
    like = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (u, delta, B, C)]
    vectors = [u.new_empty((u.shape[1], u.shape[3]), dtype=torch.float32) for _ in range(2)]
    grad_A = A.new_empty((A.shape[0], A.shape[2], A.shape[1])).transpose(1, 2)
    return like[0], like[1], grad_A, like[2], like[3], vectors[0], vectors[1]


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.delta_softplus, ctx.chunk = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor, _: None) -> tuple[Optional[Tensor], ...]:
    *tensors, entering = ctx.saved_tensors
    grads = list(_backward(grad, *tensors, entering, ctx.delta_softplus, ctx.chunk))
    return *(None if x is None else g for x, g in zip(tensors, grads)), None, None


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
) -> Tensor:
    """:py:func:`custom_nets.ops.selective_scan_channels_last` for float32, bfloat16 and float16 on a GPU.

    Args:
        u, delta: input and step, ``(B, K, L, D)``.
        A: ``(K, D, N)`` with N up to 64.
        B, C: ``(B, K, L, N)``; views whose states lie side by side are read where they are.
        D, delta_bias: ``(K, D)``.

    Returns:
        ``(B, K, L, D)`` in the dtype of ``u``; once differentiable, with repeatable gradients.
    """
    chunk = chunk_length(u.shape[0] * u.shape[1], u.shape[2], u.shape[3], A.shape[2])
    return _forward(u, delta, A, B, C, D, delta_bias, delta_softplus, chunk)[0]

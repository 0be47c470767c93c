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

"""Selective scan in plain PyTorch: exact, differentiable, chunked, on any device, and scriptable for export.

A first-order recurrence looks serial, but it is linear. A block of tokens is cut into chunks: all chunks run at once
from a zero state, which is only to know the state that each would end in; those ends, carried from chunk to chunk,
are the states that enter them, and all chunks run again from there. Carrying takes the product of the decays of a
chunk, the exponential of one sum. It lies in ``(0, 1]`` in a stable system, so nothing is ever divided and nothing
overflows. No buffer of ``length x channels x states`` exists for a long sequence, and a block's buffers are written
again and again, since fresh memory would cost a CPU more than the arithmetic.
"""

from __future__ import annotations

import math
from typing import Any, List, Optional

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from custom_nets.ops.selective_scan_loop import is_exporting, selective_scan_loop

__all__ = ["selective_scan_torch"]


def _block_length(sequences: int, states: int, length: int, on_cpu: bool) -> int:
    """Tokens of one block, where a token of all sequences has ``sequences`` channels with ``states`` states each."""
    # A CPU's blocks should stay within its cache, a GPU wants few launches.
    elements = 1 << 19 if on_cpu else 1 << 26
    return min(length, max(64, elements // (sequences * states) // 64 * 64))


def _chunk_length(tokens: int) -> int:
    """A power of two near the square root of half the tokens: few launches, as a step takes two and a chunk one."""
    chunk = 1
    while 2 * chunk * chunk <= tokens:
        chunk *= 2
    return chunk


def _buffers(x: Tensor, count: int, tokens: int, states: int) -> List[Tensor]:
    """Flat buffers that hold ``states`` values for each channel of a block, padded to whole chunks.

    They are one allocation, which a CPU's allocator keeps for the next call where it would give back several.
    """
    size = x.shape[0] * x.shape[1] * x.shape[3] * (tokens + _chunk_length(tokens)) * states
    return list(x.new_empty(count, size).unbind(0))


def _chunked(x: Tensor, chunk: int) -> Tensor:
    """``(B, K, size, D)`` as ``(B, K, chunks, chunk, D)``, padded with zeros.

    A padded token has a step of zero and leaves the state as it is.
    """
    padding = -x.shape[2] % chunk
    if padding > 0:
        x = F.pad(x, [0, 0, 0, padding])
    return x.unflatten(2, [-1, chunk])


def _step(delta: Tensor, bias: Optional[Tensor], softplus: bool) -> Tensor:
    """Steps of a block, ``(B, K, size, D)``."""
    if bias is not None:
        delta = delta + bias.unsqueeze(1)
    return F.softplus(delta) if softplus else delta


def _tokens(x: Tensor, size: int) -> Tensor:
    """Inverse of :py:func:`_chunked`: ``(B, K, chunks, chunk, ...)`` to ``(B, K, size, ...)``."""
    return x.flatten(2, 3)[:, :, :size]


def _multiply(x: Tensor, y: Tensor, out: Tensor) -> Tensor:
    """``x * y`` of chunks, broadcast to ``(B, K, chunks, chunk, N, D)``, in the flat buffer ``out``.

    ``x`` is ``(B, K, chunks, chunk, D)``; ``y`` has states.
    """
    shape = list(x.shape[:4]) + [y.shape[-2], x.shape[-1]]
    return torch.mul(x.unsqueeze(-2), y, out=out[: x.numel() * y.shape[-2]].view(shape))


def _sum_states(x: Tensor, y: Tensor, out: Tensor) -> Tensor:
    """Sum of ``x * y`` over the states, ``(..., N, D)`` to ``(..., D)``, state by state as a CPU is fastest."""
    xs, ys = x.unbind(-2), y.unbind(-2)
    torch.mul(xs[0], ys[0], out=out)
    for n in range(1, len(xs)):
        out.addcmul_(xs[n], ys[n])
    return out


def _states(
    step: Tensor, drive: Tensor, A: Tensor, B: Tensor, entering: Tensor, buffers: List[Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """States of one block after each of its tokens.

    Args:
        step, drive: step, and step times input, ``(B, K, chunks, chunk, D)``.
        A: ``(K, 1, 1, N, D)``.
        B: ``(B, K, chunks, chunk, N, 1)``.
        entering: state before the first token, ``(B, K, N, D)``.
        buffers: for decay and state.

    Returns:
        decay by each token and state after it, both ``(B, K, chunks, chunk, N, D)``, the decay by each chunk,
        ``(B, K, chunks, N, D)``, and the state after the last token.
    """
    # A CPU computes exp2 several times as fast as exp, more so where it underflows.
    A = A * (1 / math.log(2.0))
    decay = _multiply(step, A, buffers[0]).exp2_()
    state = _multiply(drive, B, buffers[1])
    total = (step.sum(3).unsqueeze(-2) * A.squeeze(2)).exp2_()
    decays, states, totals = decay.unbind(3), state.unbind(3), total.unbind(2)

    # the state that enters each chunk, and the one that leaves the last
    borders = torch.cat([entering.unsqueeze(2), states[0]], dim=2)
    ends = borders[:, :, 1:]
    for t in range(1, len(states)):
        torch.addcmul(states[t], decays[t], ends, out=ends)
    border = borders.unbind(2)
    for c in range(len(totals)):
        border[c + 1].addcmul_(totals[c], border[c])

    states[0].addcmul_(decays[0], borders[:, :, :-1])
    for t in range(1, len(states)):
        states[t].addcmul_(decays[t], states[t - 1])
    return decay, state, total, border[-1].clone()


def _contiguous(x: Tensor) -> Tensor:
    """Contiguous ``(B, K, L, D)``. A CPU transposes single matrices several times as fast as a batch of them."""
    if x.is_contiguous() or x.device.type != "cpu" or x.shape[0] * x.shape[1] > 64:
        return x.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    for b in range(x.shape[0]):
        for k in range(x.shape[1]):
            out[b, k].copy_(x[b, k])
    return out


def _laid_out_as(x: Tensor, like: Tensor) -> Tensor:
    """Contiguous ``(B, K, L, D)`` with the tokens innermost in memory where they are so in ``like``."""
    tokens_innermost = like.stride(2) == 1 and like.stride(3) != 1
    return _contiguous(x.transpose(2, 3)).transpose(2, 3) if tokens_innermost else x


def _forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Optional[Tensor],
    delta_bias: Optional[Tensor],
    delta_softplus: bool,
) -> tuple[Tensor, Tensor]:
    """Outputs ``(B, K, L, D)`` and the states that enter each block, ``(blocks, B, K, N, D)``."""
    batch, directions, length, channels = u.shape
    tokens = _block_length(batch * directions * channels, A.shape[-1], length, u.device.type == "cpu")
    buffers = _buffers(u, 2, tokens, A.shape[-1])
    state = u.new_zeros(batch, directions, A.shape[-1], channels)
    A = A.transpose(1, 2).contiguous()[:, None, None]
    y = torch.empty_like(u)
    entering = []
    for start in range(0, length, tokens):
        stop = min(start + tokens, length)
        chunk = _chunk_length(stop - start)
        u_block = u[:, :, start:stop]
        step = _chunked(_step(delta[:, :, start:stop], delta_bias, delta_softplus), chunk)
        B_block = _chunked(B[:, :, start:stop], chunk).unsqueeze(-1)
        entering.append(state)
        _, x, _, state = _states(step, step * _chunked(u_block, chunk), A, B_block, state, buffers)
        out = y[:, :, start:stop]
        _sum_states(_tokens(x, stop - start), C[:, :, start:stop].unsqueeze(-1), out)
        if D is not None:
            out.addcmul_(u_block, D.unsqueeze(1))
    return y, torch.stack(entering)


class _SelectiveScan(torch.autograd.Function):
    """Keeps the inputs and one state per block, and recomputes the states of a block in the backward."""

    @staticmethod
    def forward(
        ctx: Any,
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        delta_bias: Tensor | None,
        delta_softplus: bool,
    ) -> Tensor:
        content, step = _contiguous(u), _contiguous(delta)
        y, entering = _forward(content, step, A, B, C, D, delta_bias, delta_softplus)
        ctx.save_for_backward(content, step, A, B, C, D, delta_bias, entering)
        ctx.delta_softplus = delta_softplus
        return _laid_out_as(y, u)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        u, delta, A, B, C, D, delta_bias, entering = ctx.saved_tensors
        out_grad = _contiguous(grad)
        batch, directions, length, channels = u.shape
        tokens = _block_length(batch * directions * channels, A.shape[-1], length, u.device.type == "cpu")
        buffers = _buffers(u, 4, tokens, A.shape[-1])
        # What the tokens behind a block add to the gradient of the state that leaves it.
        later = torch.zeros_like(entering[0])
        grad_u, grad_delta, grad_A = torch.empty_like(u), torch.empty_like(delta), torch.zeros_like(A)
        grad_B, grad_C = torch.empty_like(B), torch.empty_like(C)
        grad_D, grad_bias = (None if x is None else torch.zeros_like(x) for x in (D, delta_bias))
        A = A.transpose(1, 2).contiguous()[:, None, None]
        for block in range(entering.shape[0] - 1, -1, -1):
            start, stop = block * tokens, min((block + 1) * tokens, length)
            size, span = stop - start, slice(start, stop)
            chunk = _chunk_length(size)
            step = _chunked(_step(delta[:, :, span], delta_bias, ctx.delta_softplus), chunk)
            value, out, B_block, C_block = (_chunked(x[:, :, span], chunk) for x in (u, out_grad, B, C))
            B_block, C_block = B_block.unsqueeze(-1), C_block.unsqueeze(-1)
            drive = step * value
            decay, x, total, _ = _states(step, drive, A, B_block, entering[block], buffers)
            grad_C[:, :, span] = _tokens(_multiply(out, x, buffers[2]).sum(-1), size)

            # The same two runs as for the states, from the last token to the first.
            g = _multiply(out, C_block, buffers[3])
            decays, gs, totals = decay.unbind(3), g.unbind(3), total.unbind(2)
            borders = torch.cat([gs[-1], later.unsqueeze(2)], dim=2)
            starts = borders[:, :, :-1]
            for t in range(chunk - 2, -1, -1):
                torch.addcmul(gs[t], decays[t + 1], starts, out=starts)
            starts.mul_(decays[0])
            border = borders.unbind(2)
            for c in range(len(totals) - 1, -1, -1):
                border[c].addcmul_(totals[c], border[c + 1])
            later = border[0]
            gs[-1].add_(borders[:, :, 1:])
            for t in range(chunk - 2, -1, -1):
                gs[t].addcmul_(decays[t + 1], gs[t + 1])

            grad_B[:, :, span] = _tokens(_multiply(drive, g, buffers[2]).sum(-1), size)
            grad_drive = _sum_states(g, B_block, torch.empty_like(drive))
            # What is left of the state before a token: the gradient of the exponent.
            g.mul_(decay)
            g_tokens = g.flatten(2, 3)
            g_tokens[:, :, 1:].mul_(x.flatten(2, 3)[:, :, :-1])
            g_tokens[:, :, 0].mul_(entering[block])
            grad_step = _sum_states(g, A, torch.empty_like(step)).addcmul_(grad_drive, value)
            grad_A += _multiply(step, g, buffers[2]).sum(dim=(0, 2, 3)).transpose(1, 2)
            if ctx.delta_softplus:
                # softplus has the slope 1 - exp(-softplus)
                grad_step.mul_(torch.expm1(-step).neg_())
            grad_value = grad_drive.mul_(step)
            if grad_D is not None:
                grad_value.addcmul_(out, D[:, None, None])
                grad_D += (out * value).sum(dim=(0, 2, 3))
            grad_u[:, :, span] = _tokens(grad_value, size)
            grad_delta[:, :, span] = _tokens(grad_step, size)
            if grad_bias is not None:
                grad_bias += grad_delta[:, :, span].sum(dim=(0, 2))
        grad_u, grad_delta = _laid_out_as(grad_u, grad), _laid_out_as(grad_delta, grad)
        return grad_u, grad_delta, grad_A, grad_B, grad_C, grad_D, grad_bias, None


def selective_scan_torch(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Optional[Tensor] = None,
    delta_bias: Optional[Tensor] = None,
    delta_softplus: bool = False,
) -> Tensor:
    """Selective scan, channels last: ``x_t = exp(delta_t A) x_{t-1} + delta_t B_t u_t``, ``y_t = C_t x_t + D u_t``.

    Computes in float32, or in float64 when ``u`` is float64. Differentiable in eager mode; scripted or traced modules
    run the forward only.

    Args:
        u, delta: input and step, ``(B, K, L, D)`` for K directions of L tokens with D channels.
        A: state matrix (negative), ``(K, D, N)``.
        B, C: input and output matrices, ``(B, K, L, N)``.
        D: skip connection, ``(K, D)``.
        delta_bias: added to ``delta``, ``(K, D)``.
        delta_softplus: whether ``delta`` goes through softplus; without, it must not be negative.

    Returns:
        ``(B, K, L, D)`` in the computing precision.
    """
    dtype = torch.float64 if u.dtype == torch.float64 else torch.float32
    u, delta, A, B, C = (x.to(dtype) for x in (u, delta, A, B, C))
    if D is not None:
        D = D.to(dtype)
    if delta_bias is not None:
        delta_bias = delta_bias.to(dtype)
    if not torch.jit.is_scripting():
        if is_exporting():
            return selective_scan_loop(u, delta, A, B, C, D, delta_bias, delta_softplus)
        if not torch.jit.is_tracing():
            return _SelectiveScan.apply(u, delta, A, B, C, D, delta_bias, delta_softplus)
    with torch.no_grad():
        y = _forward(_contiguous(u), _contiguous(delta), A, B, C, D, delta_bias, delta_softplus)[0]
        return _laid_out_as(y, u)

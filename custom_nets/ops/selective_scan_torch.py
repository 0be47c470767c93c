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

A first-order recurrence looks serial, but it is linear: every chunk can run from a zero state at once, and the state
that enters a chunk reaches each of its tokens through one factor, the product of the decays up to there. A factor of a
stable system lies in ``(0, 1]``, so nothing is ever divided by it and nothing overflows. Work goes block by block of
tokens, so that no buffer of ``length x channels x states`` exists for a long sequence; a block's buffers are written
again and again, since fresh memory would cost a CPU more than the arithmetic.
"""

from __future__ import annotations

import math
from typing import Any, List

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["selective_scan_torch"]


def _block_length(sequences: int, states: int, length: int, on_cpu: bool) -> int:
    """Tokens of one block, where a token of all sequences has ``sequences`` channels with ``states`` states each."""
    # A CPU's blocks should stay within its cache, a GPU wants few launches.
    elements = 1 << 19 if on_cpu else 1 << 26
    return min(length, max(64, elements // (sequences * states)))


def _chunk_length(tokens: int) -> int:
    """As many steps within a chunk as there are chunks: the fewest serial operations."""
    return int(math.ceil(math.sqrt(float(tokens))))


def _buffers(x: Tensor, count: int, tokens: int, states: int) -> List[Tensor]:
    """Flat buffers that hold ``states`` values for each channel of a block, padded to whole chunks."""
    size = x.shape[0] * x.shape[1] * x.shape[3] * (tokens + _chunk_length(tokens)) * states
    return [x.new_empty(size) for _ in range(count)]


def _chunked(x: Tensor, start: int, stop: int, chunk: int) -> Tensor:
    """Tokens ``start`` to ``stop`` of ``(..., L, D)`` as ``(..., chunks, chunk, D)``, padded with zeros.

    A padded token has a step of zero and leaves the state as it is.
    """
    block = x[..., start:stop, :]
    padding = -(stop - start) % chunk
    if padding > 0:
        block = torch.nn.functional.pad(block, [0, 0, 0, padding])
    return block.unflatten(-2, [-1, chunk])


def _tokens(x: Tensor, size: int) -> Tensor:
    """Inverse of :py:func:`_chunked`: ``(..., chunks, chunk, D)`` to ``(..., size, D)``."""
    return x.flatten(-3, -2)[..., :size, :]


def _channel_sum(x: Tensor, size: int) -> Tensor:
    """Sum over the channels of ``(N, B, K, chunks, chunk, D)``, as ``(B, K, size, N)``."""
    return x.sum(-1).flatten(-2)[..., :size].movedim(0, -1)


def _multiply(x: Tensor, y: Tensor, out: Tensor) -> Tensor:
    """``x (...) * y (n, ...)`` as ``(n, ...)`` in the flat buffer ``out``."""
    return torch.mul(x, y, out=out[: y.shape[0] * x.numel()].view([y.shape[0]] + list(x.shape)))


def _states(
    step: Tensor, drive: Tensor, A: Tensor, B: Tensor, entering: Tensor, buffers: List[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """States of one block after each of its tokens.

    Args:
        step, drive: step, and step times input, ``(B, K, chunks, chunk, D)``.
        A: ``(N, 1, K, 1, 1, D)``.
        B: ``(N, B, K, chunks, chunk, 1)``.
        entering: state before the first token, ``(N, B, K, D)``.
        buffers: for decay, state and reach. Decay and reach may share theirs where decay is not used afterwards.

    Returns:
        decay by each token and state after it, both ``(N, B, K, chunks, chunk, D)``, and the state after the last one.
    """
    # A CPU computes exp2 several times as fast as exp, more so where it underflows.
    decay = _multiply(step, A * (1 / math.log(2.0)), buffers[0]).exp2_()
    state = _multiply(drive, B, buffers[1])
    reach = buffers[2][: state.numel()].view_as(state)
    decays, states, reaches = decay.unbind(-2), state.unbind(-2), reach.unbind(-2)
    reaches[0].copy_(decays[0])
    for t in range(1, len(states)):
        states[t].addcmul_(decays[t], states[t - 1])
        torch.mul(decays[t], reaches[t - 1], out=reaches[t])

    ends, totals = states[-1].unbind(-2), reaches[-1].unbind(-2)
    carries = [entering]
    for c in range(len(ends)):
        carries.append(torch.addcmul(ends[c], totals[c], carries[c]))
    leaving = carries.pop()
    state.addcmul_(reach, torch.stack(carries, dim=-2).unsqueeze(-2))
    return decay, state, leaving


def _states_first(A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``A (K, D, N)``, ``B`` and ``C (B, K, L, N)`` with the states as outermost dimension, ready to broadcast."""
    B, C = (x.permute(3, 0, 1, 2).unsqueeze(-1).contiguous() for x in (B, C))
    return A.permute(2, 0, 1).contiguous()[:, None, :, None, None, :], B, C


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


def _forward(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs ``(B, K, L, D)`` and the states that enter each block, ``(blocks, N, B, K, D)``."""
    batch, directions, length, channels = u.shape
    tokens = _block_length(batch * directions * channels, A.shape[-1], length, u.device.type == "cpu")
    decay_buffer, state_buffer = _buffers(u, 2, tokens, A.shape[-1])
    drive_buffer = _buffers(u, 1, tokens, 1)[0]
    state = u.new_zeros(A.shape[-1], batch, directions, channels)
    A, B, C = _states_first(A, B, C)
    y = torch.empty_like(u)
    entering = []
    for start in range(0, length, tokens):
        stop = min(start + tokens, length)
        chunk = _chunk_length(stop - start)
        step = _chunked(delta, start, stop, chunk)
        drive = _multiply(step, _chunked(u, start, stop, chunk).unsqueeze(0), drive_buffer)[0]
        entering.append(state)
        buffers = [decay_buffer, state_buffer, decay_buffer]
        _, x, state = _states(step, drive, A, _chunked(B, start, stop, chunk), state, buffers)
        x = _tokens(x, stop - start)
        y_block = y[:, :, start:stop]
        torch.mul(x[0], C[0, :, :, start:stop], out=y_block)
        for n in range(1, x.shape[0]):
            y_block.addcmul_(x[n], C[n, :, :, start:stop])
    return y, torch.stack(entering)


class _SelectiveScan(torch.autograd.Function):
    """Keeps the inputs and one state per block, and recomputes the states of a block in the backward."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
        content, step = _contiguous(u), _contiguous(delta)
        y, entering = _forward(content, step, A, B, C)
        ctx.save_for_backward(content, step, A, B, C, entering)
        return _laid_out_as(y, u)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        u, delta, A, B, C, entering = ctx.saved_tensors
        out_grad = _contiguous(grad)
        batch, directions, length, channels = u.shape
        tokens = _block_length(batch * directions * channels, A.shape[-1], length, u.device.type == "cpu")
        buffers = _buffers(u, 4, tokens, A.shape[-1])
        # What the tokens behind a block add to the gradient of the state that leaves it.
        later = u.new_zeros(A.shape[-1], batch, directions, channels)
        grad_u, grad_delta, grad_A = torch.empty_like(u), torch.empty_like(delta), torch.zeros_like(A)
        grad_B, grad_C = torch.empty_like(B), torch.empty_like(C)
        A, B, C = _states_first(A, B, C)
        for block in range(entering.shape[0] - 1, -1, -1):
            start, stop = block * tokens, min((block + 1) * tokens, length)
            size, span = stop - start, slice(start, stop)
            chunk = _chunk_length(size)
            step, value, out, B_block, C_block = (_chunked(x, start, stop, chunk) for x in (delta, u, out_grad, B, C))
            drive = step * value
            decay, x, _ = _states(step, drive, A, B_block, entering[block], buffers)
            grad_C[:, :, span] = _channel_sum(_multiply(out, x, buffers[2]), size)

            g = _multiply(out, C_block, buffers[3])
            reach = buffers[2][: g.numel()].view_as(g)
            decays, gs, reaches = decay.unbind(-2), g.unbind(-2), reach.unbind(-2)
            reaches[-1].fill_(1.0)
            for t in range(chunk - 2, -1, -1):
                gs[t].addcmul_(decays[t + 1], gs[t + 1])
                torch.mul(decays[t + 1], reaches[t + 1], out=reaches[t])
            firsts, first_reach, first_decay = (v.unbind(-2) for v in (gs[0], reaches[0], decays[0]))
            carries = [later]
            for c in range(len(firsts) - 1, -1, -1):
                carries.append(torch.addcmul(firsts[c], first_reach[c], carries[-1]).mul_(first_decay[c]))
            later = carries.pop()
            g.addcmul_(reach, torch.stack(carries[::-1], dim=-2).unsqueeze(-2))

            grad_B[:, :, span] = _channel_sum(_multiply(drive, g, buffers[2]), size)
            grad_drive, grad_step = torch.zeros_like(drive), torch.zeros_like(step)
            for n in range(g.shape[0]):
                grad_drive.addcmul_(g[n], B_block[n])
            before = torch.cat([entering[block].unsqueeze(-2), x.flatten(-3, -2)[..., :-1, :]], dim=-2)
            g.mul_(before.unflatten(-2, [-1, chunk])).mul_(decay)
            for n in range(g.shape[0]):
                grad_step.addcmul_(g[n], A[n])
            grad_A += _multiply(step, g, buffers[2]).sum(dim=(1, 3, 4)).permute(1, 2, 0)
            grad_u[:, :, span] = _tokens(grad_drive * step, size)
            grad_delta[:, :, span] = _tokens(grad_step.addcmul_(grad_drive, value), size)
        return _laid_out_as(grad_u, grad), _laid_out_as(grad_delta, grad), grad_A, grad_B, grad_C


def selective_scan_torch(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """Core of the selective scan, channels last: ``x_t = exp(delta_t A) x_{t-1} + delta_t B_t u_t``, ``y_t = C_t x_t``.

    Computes in float32, or in float64 when ``u`` is float64. Differentiable in eager mode; scripted or traced modules
    run the forward only.

    Args:
        u, delta: input and step (not negative), ``(B, K, L, D)`` for K directions of L tokens with D channels.
        A: state matrix (negative), ``(K, D, N)``.
        B, C: input and output matrices, ``(B, K, L, N)``.

    Returns:
        ``(B, K, L, D)`` in the computing precision.
    """
    dtype = torch.float64 if u.dtype == torch.float64 else torch.float32
    u, delta, A, B, C = (x.to(dtype) for x in (u, delta, A, B, C))
    if not torch.jit.is_scripting():
        if not torch.jit.is_tracing():
            return _SelectiveScan.apply(u, delta, A, B, C)
    with torch.no_grad():
        return _laid_out_as(_forward(_contiguous(u), _contiguous(delta), A, B, C)[0], u)

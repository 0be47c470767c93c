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

"""Triton kernels of the selective scan; :py:mod:`custom_nets.ops.selective_scan_triton` says how they work together."""

# mypy: disable-error-code="assignment"
# (the tuples below grow while a kernel is traced)

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["carry_kernel", "end_kernel", "gradient_kernel", "output_kernel", "retrace_kernel"]

_LOG2E = tl.constexpr(1.4426950408889634)
# One binary for all values of these.
_UNKNOWN = ["rows", "length", "chunk", "chunks"]


@triton.jit
def _log1p_over(e):
    """``log(1 + e)`` for e in [0, 1] as ``2 atanh(e / (2 + e))``: a hardware logarithm is off by 1e-4 at small e."""
    s = e / (2.0 + e)
    z = s * s
    p = 0.28157779 * z + 0.27965158
    p = p * z + 0.40024596
    p = p * z + 0.66666323
    return s * (p * z + 2.0)


@triton.jit
def _softplus(x):
    return tl.maximum(x, 0.0) + _log1p_over(tl.exp2(-tl.abs(x) * _LOG2E))


@triton.jit
def _softplus_slope(x):
    e = tl.exp2(-tl.abs(x) * _LOG2E)
    return tl.where(x >= 0, 1.0, e) / (1.0 + e)


@triton.jit
def _place(length, chunk, chunks, D: tl.constexpr, BLOCK: tl.constexpr, STATES: tl.constexpr):
    """Row (sequence and direction), chunk, its first token, tokens there are, channels and states of a program."""
    blocks: tl.constexpr = (D + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    block, c, row = program % blocks, (program // blocks) % chunks, program // (blocks * chunks)
    start = c * chunk
    channel = block * BLOCK + tl.arange(0, BLOCK)[None, :]
    state = tl.arange(0, STATES)[:, None]
    return row.to(tl.int64), c, start, tl.minimum(chunk, length - start), channel, state


@triton.jit
def _tile(row, c, chunks, channel, state, D: tl.constexpr, N: tl.constexpr):
    """Offsets into a buffer ``(rows, chunks, N, D)``."""
    return ((row * chunks + c) * N + state) * D + channel


@triton.jit
def _vector(pointer, k, channel, D: tl.constexpr):
    """A parameter ``(K, D)`` for one direction, ``(1, BLOCK)``; zeros if there is none."""
    if pointer is None:
        value = tl.zeros_like(channel).to(tl.float32)
    else:
        value = tl.load(pointer + k * D + channel, mask=channel < D, other=0.0).to(tl.float32)
    return value


@triton.jit
def _matrix(A, k, channel, state, D: tl.constexpr, N: tl.constexpr):
    """``A (K, D, N)`` for one direction, ``(STATES, BLOCK)``."""
    mask = (channel < D) & (state < N)
    return tl.load(A + (k * D + channel) * N + state, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _channels(pointer, first, stop, channel, D: tl.constexpr, GROUP: tl.constexpr):
    """Tokens ``first`` to ``first + GROUP`` of ``(tokens, D)``, zero from ``stop`` on, as a tuple of ``(1, BLOCK)``."""
    values = ()
    for t in tl.static_range(GROUP):
        mask = (channel < D) & (first + t < stop)
        values = values + (tl.load(pointer + (first + t) * D + channel, mask=mask, other=0.0),)
    return values


@triton.jit
def _states(pointer, first, stop, state, N: tl.constexpr, STRIDE: tl.constexpr, GROUP: tl.constexpr):
    """The same of ``(tokens, N)`` as a tuple of ``(STATES, 1)``."""
    values = ()
    for t in tl.static_range(GROUP):
        mask = (state < N) & (first + t < stop)
        values = values + (tl.load(pointer + (first + t) * STRIDE + state, mask=mask, other=0.0),)
    return values


@triton.jit
def _step(delta, bias, valid, SOFTPLUS: tl.constexpr):
    """Step in float32; zero where there is no token, which leaves the state as it is."""
    step = delta.to(tl.float32) + bias
    if SOFTPLUS:
        step = _softplus(step)
    return tl.where(valid, step, 0.0)


@triton.jit(do_not_specialize=_UNKNOWN)
def end_kernel(
    u, delta, A, B, bias, ends, spans,
    B_batch, B_row, length, chunk, chunks,
    K: tl.constexpr, D: tl.constexpr, N: tl.constexpr, B_token: tl.constexpr, SOFTPLUS: tl.constexpr,
    BLOCK: tl.constexpr, STATES: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """State at the end of each chunk if it began at zero, and the sum of its steps."""
    row, c, start, tokens, channel, state = _place(length, chunk, chunks, D, BLOCK, STATES)
    k = (row % K).to(tl.int32)
    u += (row * length + start) * D
    delta += (row * length + start) * D
    B += (row // K) * B_batch + k * B_row + start.to(tl.int64) * B_token
    rate = _matrix(A, k, channel, state, D, N) * _LOG2E
    offset = _vector(bias, k, channel, D)
    x = tl.zeros([STATES, BLOCK], tl.float32)
    span = tl.zeros([1, BLOCK], tl.float32)
    for first in range(0, tokens, GROUP):
        us = _channels(u, first, tokens, channel, D, GROUP)
        deltas = _channels(delta, first, tokens, channel, D, GROUP)
        Bs = _states(B, first, tokens, state, N, B_token, GROUP)
        for t in tl.static_range(GROUP):
            step = _step(deltas[t], offset, first + t < tokens, SOFTPLUS)
            span += step
            x = tl.exp2(step * rate) * x + step * us[t].to(tl.float32) * Bs[t].to(tl.float32)
    tl.store(ends + _tile(row, c, chunks, channel, state, D, N), x, mask=(channel < D) & (state < N))
    tl.store(spans + (row * chunks + c) * D + channel, span, mask=channel < D)


@triton.jit(do_not_specialize=["chunks"])
def carry_kernel(
    ends, spans, A, chunks,
    K: tl.constexpr, D: tl.constexpr, N: tl.constexpr, REVERSED: tl.constexpr,
    BLOCK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Turns what each chunk ends with from zero, ``(rows, chunks, N, D)``, into what enters it, in its place."""
    blocks: tl.constexpr = (D + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    channel = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    n, row = (program // blocks) % N, (program // (blocks * N)).to(tl.int64)
    k = (row % K).to(tl.int32)
    rate = tl.load(A + (k * D + channel) * N + n, mask=channel < D, other=0.0).to(tl.float32) * _LOG2E
    carry = tl.zeros([BLOCK], tl.float32)
    for first in range(0, chunks, GROUP):
        values, totals = (), ()
        for i in tl.static_range(GROUP):
            c = chunks - 1 - first - i if REVERSED else first + i
            mask = (channel < D) & (first + i < chunks)
            values = values + (tl.load(ends + ((row * chunks + c) * N + n) * D + channel, mask=mask, other=0.0),)
            totals = totals + (tl.load(spans + (row * chunks + c) * D + channel, mask=mask, other=0.0),)
        for i in tl.static_range(GROUP):
            c = chunks - 1 - first - i if REVERSED else first + i
            mask = (channel < D) & (first + i < chunks)
            tl.store(ends + ((row * chunks + c) * N + n) * D + channel, carry, mask=mask)
            carry = tl.exp2(totals[i] * rate) * carry + values[i]


@triton.jit(do_not_specialize=_UNKNOWN)
def output_kernel(
    u, delta, A, B, C, skip, bias, entering, y,
    B_batch, B_row, C_batch, C_row, length, chunk, chunks,
    K: tl.constexpr, D: tl.constexpr, N: tl.constexpr, B_token: tl.constexpr, C_token: tl.constexpr,
    SOFTPLUS: tl.constexpr, BLOCK: tl.constexpr, STATES: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Outputs of each chunk from the state that enters it."""
    row, c, start, tokens, channel, state = _place(length, chunk, chunks, D, BLOCK, STATES)
    k = (row % K).to(tl.int32)
    u += (row * length + start) * D
    delta += (row * length + start) * D
    y += (row * length + start) * D
    B += (row // K) * B_batch + k * B_row + start.to(tl.int64) * B_token
    C += (row // K) * C_batch + k * C_row + start.to(tl.int64) * C_token
    rate = _matrix(A, k, channel, state, D, N) * _LOG2E
    offset, gain = _vector(bias, k, channel, D), _vector(skip, k, channel, D)
    mask = (channel < D) & (state < N) & (c > 0)
    x = tl.load(entering + _tile(row, c, chunks, channel, state, D, N), mask=mask, other=0.0)
    for first in range(0, tokens, GROUP):
        us = _channels(u, first, tokens, channel, D, GROUP)
        deltas = _channels(delta, first, tokens, channel, D, GROUP)
        Bs = _states(B, first, tokens, state, N, B_token, GROUP)
        Cs = _states(C, first, tokens, state, N, C_token, GROUP)
        for t in tl.static_range(GROUP):
            value = us[t].to(tl.float32)
            step = _step(deltas[t], offset, first + t < tokens, SOFTPLUS)
            x = tl.exp2(step * rate) * x + step * value * Bs[t].to(tl.float32)
            out = tl.sum(x * Cs[t].to(tl.float32), axis=0, keep_dims=True) + gain * value
            tl.store(y + (first + t) * D + channel, out, mask=(channel < D) & (first + t < tokens))


@triton.jit(do_not_specialize=_UNKNOWN)
def retrace_kernel(
    u, delta, A, B, C, bias, entering, grad, checkpoints, ends, spans,
    B_batch, B_row, C_batch, C_row, length, chunk, chunks,
    K: tl.constexpr, D: tl.constexpr, N: tl.constexpr, B_token: tl.constexpr, C_token: tl.constexpr,
    SOFTPLUS: tl.constexpr, BLOCK: tl.constexpr, STATES: tl.constexpr, GROUP: tl.constexpr, SEGMENT: tl.constexpr,
):  # fmt: skip
    """State at the start of each segment, and what each chunk adds to the gradient of the state that enters it."""
    row, c, start, tokens, channel, state = _place(length, chunk, chunks, D, BLOCK, STATES)
    k = (row % K).to(tl.int32)
    u += (row * length + start) * D
    delta += (row * length + start) * D
    grad += (row * length + start) * D
    B += (row // K) * B_batch + k * B_row + start.to(tl.int64) * B_token
    C += (row // K) * C_batch + k * C_row + start.to(tl.int64) * C_token
    rate = _matrix(A, k, channel, state, D, N) * _LOG2E
    offset = _vector(bias, k, channel, D)
    inside = (channel < D) & (state < N)
    tile = _tile(row, c, chunks, channel, state, D, N)
    x = tl.load(entering + tile, mask=inside & (c > 0), other=0.0)
    reach = tl.full([STATES, BLOCK], 1.0, tl.float32)
    end = tl.zeros([STATES, BLOCK], tl.float32)
    span = tl.zeros([1, BLOCK], tl.float32)
    segments = (length + SEGMENT - 1) // SEGMENT
    for origin in range(0, tokens, SEGMENT):
        segment = (start + origin) // SEGMENT
        tl.store(checkpoints + _tile(row, segment, segments, channel, state, D, N), x, mask=inside)
        for first in range(origin, tl.minimum(origin + SEGMENT, tokens), GROUP):
            us = _channels(u, first, tokens, channel, D, GROUP)
            deltas = _channels(delta, first, tokens, channel, D, GROUP)
            grads = _channels(grad, first, tokens, channel, D, GROUP)
            Bs = _states(B, first, tokens, state, N, B_token, GROUP)
            Cs = _states(C, first, tokens, state, N, C_token, GROUP)
            for t in tl.static_range(GROUP):
                step = _step(deltas[t], offset, first + t < tokens, SOFTPLUS)
                span += step
                decay = tl.exp2(step * rate)
                x = decay * x + step * us[t].to(tl.float32) * Bs[t].to(tl.float32)
                reach *= decay
                end += reach * (grads[t].to(tl.float32) * Cs[t].to(tl.float32))
    tl.store(ends + tile, end, mask=inside)
    tl.store(spans + (row * chunks + c) * D + channel, span, mask=channel < D)


@triton.jit(do_not_specialize=_UNKNOWN)
def gradient_kernel(
    u, delta, A, B, C, skip, bias, grad, checkpoints, later, scratch,
    grad_u, grad_delta, grad_A, grad_B, grad_C, grad_skip, grad_bias,
    B_batch, B_row, C_batch, C_row, rows, length, chunk, chunks,
    K: tl.constexpr, D: tl.constexpr, N: tl.constexpr, B_token: tl.constexpr, C_token: tl.constexpr,
    SOFTPLUS: tl.constexpr, BLOCK: tl.constexpr, STATES: tl.constexpr, GROUP: tl.constexpr, SEGMENT: tl.constexpr,
):  # fmt: skip
    """All gradients; those of B and C for each block of channels, those of parameters for each chunk."""
    row, c, start, tokens, channel, state = _place(length, chunk, chunks, D, BLOCK, STATES)
    k = (row % K).to(tl.int32)
    u += (row * length + start) * D
    delta += (row * length + start) * D
    grad += (row * length + start) * D
    grad_u += (row * length + start) * D
    grad_delta += (row * length + start) * D
    B += (row // K) * B_batch + k * B_row + start.to(tl.int64) * B_token
    C += (row // K) * C_batch + k * C_row + start.to(tl.int64) * C_token
    block = tl.program_id(0) % ((D + BLOCK - 1) // BLOCK)
    grad_B += ((block * rows + row) * length + start) * N
    grad_C += ((block * rows + row) * length + start) * N
    scratch += tl.program_id(0).to(tl.int64) * (SEGMENT // GROUP * STATES * BLOCK)
    own = state * BLOCK + tl.arange(0, BLOCK)[None, :]

    matrix = _matrix(A, k, channel, state, D, N)
    rate = matrix * _LOG2E
    offset, gain = _vector(bias, k, channel, D), _vector(skip, k, channel, D)
    inside = (channel < D) & (state < N)
    tile = _tile(row, c, chunks, channel, state, D, N)
    # Gradient of the state after a token that comes from the tokens behind it.
    carry = tl.load(later + tile, mask=inside & (c < chunks - 1), other=0.0)
    sum_A = tl.zeros([STATES, BLOCK], tl.float32)
    sum_skip = tl.zeros([1, BLOCK], tl.float32)
    sum_bias = tl.zeros([1, BLOCK], tl.float32)
    segments = (length + SEGMENT - 1) // SEGMENT
    count = (tokens + SEGMENT - 1) // SEGMENT
    for i in range(0, count):
        origin = (count - 1 - i) * SEGMENT
        groups = (tl.minimum(tokens - origin, SEGMENT) + GROUP - 1) // GROUP
        segment = (start + origin) // SEGMENT
        x = tl.load(checkpoints + _tile(row, segment, segments, channel, state, D, N), mask=inside, other=0.0)
        for j in range(0, groups):
            first = origin + j * GROUP
            tl.store(scratch + j * (STATES * BLOCK) + own, x)
            us = _channels(u, first, tokens, channel, D, GROUP)
            deltas = _channels(delta, first, tokens, channel, D, GROUP)
            Bs = _states(B, first, tokens, state, N, B_token, GROUP)
            for t in tl.static_range(GROUP):
                step = _step(deltas[t], offset, first + t < tokens, SOFTPLUS)
                x = tl.exp2(step * rate) * x + step * us[t].to(tl.float32) * Bs[t].to(tl.float32)
        tl.debug_barrier()
        for j in range(0, groups):
            first = origin + (groups - 1 - j) * GROUP
            x = tl.load(scratch + (groups - 1 - j) * (STATES * BLOCK) + own)
            us = _channels(u, first, tokens, channel, D, GROUP)
            deltas = _channels(delta, first, tokens, channel, D, GROUP)
            grads = _channels(grad, first, tokens, channel, D, GROUP)
            Bs = _states(B, first, tokens, state, N, B_token, GROUP)
            Cs = _states(C, first, tokens, state, N, C_token, GROUP)
            steps, decays, xs = (), (), (x,)
            for t in tl.static_range(GROUP):
                step = _step(deltas[t], offset, first + t < tokens, SOFTPLUS)
                decay = tl.exp2(step * rate)
                x = decay * x + step * us[t].to(tl.float32) * Bs[t].to(tl.float32)
                steps, decays, xs = steps + (step,), decays + (decay,), xs + (x,)
            for t in tl.static_range(GROUP - 1, -1, -1):
                value, out, step = us[t].to(tl.float32), grads[t].to(tl.float32), steps[t]
                g = carry + out * Cs[t].to(tl.float32)
                carry = decays[t] * g
                memory = carry * xs[t]
                sum_A += memory * step
                drive = tl.sum(g * Bs[t].to(tl.float32), axis=0, keep_dims=True)
                slope = tl.sum(memory * matrix, axis=0, keep_dims=True) + drive * value
                if SOFTPLUS:
                    slope *= _softplus_slope(deltas[t].to(tl.float32) + offset)
                valid = first + t < tokens
                slope = tl.where(valid, slope, 0.0)
                sum_bias += slope
                sum_skip += out * value
                mask = (channel < D) & valid
                tl.store(grad_u + (first + t) * D + channel, drive * step + out * gain, mask=mask)
                tl.store(grad_delta + (first + t) * D + channel, slope, mask=mask)
                mask = (state < N) & valid
                at = (first + t) * N + state
                tl.store(grad_B + at, tl.sum(g * (step * value), axis=1, keep_dims=True), mask=mask)
                tl.store(grad_C + at, tl.sum(xs[t + 1] * out, axis=1, keep_dims=True), mask=mask)
        tl.debug_barrier()
    tl.store(grad_A + tile, sum_A, mask=inside)
    tl.store(grad_skip + (row * chunks + c) * D + channel, sum_skip, mask=channel < D)
    tl.store(grad_bias + (row * chunks + c) * D + channel, sum_bias, mask=channel < D)

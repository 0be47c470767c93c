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

"""Triton kernels of the selective scan's backward."""

# mypy: disable-error-code="assignment,misc"
# (the tuples below grow while a kernel is traced)

from __future__ import annotations

import triton
import triton.language as tl

from custom_nets.ops.scan_paths import find_path
from custom_nets.ops.selective_scan_tiles import (
    LOG2E,
    UNKNOWN,
    fetch,
    load_channels,
    load_matrix,
    load_states,
    load_vector,
    places_of,
    position,
    softplus_slope,
    step_of,
    tile_of,
    unpack,
)

__all__ = ["collect_kernel", "gradient_kernel", "retrace_kernel"]


@triton.jit(do_not_specialize=UNKNOWN)
def retrace_kernel(
    u, delta, A, B, C, bias, paths, entering, grad, checkpoints, ends, spans,
    B_batch, B_row, C_batch, C_row, grad_batch, grad_row, length, chunk, chunks,
    K: tl.constexpr, D: tl.constexpr, N: tl.constexpr, B_token: tl.constexpr, C_token: tl.constexpr,
    SOFTPLUS: tl.constexpr, BLOCK: tl.constexpr, STATES: tl.constexpr, GROUP: tl.constexpr, SEGMENT: tl.constexpr,
    PACK: tl.constexpr,
):  # fmt: skip
    """State at the start of each segment, and what each chunk adds to the gradient of the state that enters it."""
    row, c, start, tokens, channel, state = position(length, chunk, chunks, D, BLOCK, STATES)
    k = (row % K).to(tl.int32)
    path = find_path(paths, k)
    u += row * length * D
    delta += row * length * D
    grad += (row // K) * grad_batch + k * grad_row
    B += (row // K) * B_batch + k * B_row
    C += (row // K) * C_batch + k * C_row
    rate = load_matrix(A, k, channel, state, D, N) * LOG2E
    offset = load_vector(bias, k, channel, D)
    inside = (channel < D) & (state < N)
    x = tl.load(entering + tile_of(row, c - 1, chunks - 1, channel, state, D, N), mask=inside & (c > 0), other=0.0)
    reach = tl.full([STATES, BLOCK], 1.0, tl.float32)
    end = tl.zeros([STATES, BLOCK], tl.float32)
    span = tl.zeros([1, BLOCK], tl.float32)
    segments = (length + SEGMENT - 1) // SEGMENT
    last = start + tokens - 1
    places = places_of(path, start, last, GROUP)
    next_us, next_deltas, next_Bs = fetch(
        u, delta, B, places, channel, state, D, N, B_token, BLOCK, STATES, GROUP, PACK
    )
    next_grads = load_channels(grad, places, channel, D, BLOCK, GROUP)
    next_Cs = load_states(C, places, state, N, STATES, C_token, GROUP, PACK)
    for first in range(0, tokens, GROUP):
        us, deltas, grads, Bs, Cs, left = next_us, next_deltas, next_grads, next_Bs, next_Cs, tokens - first
        places = places_of(path, start + first + GROUP, last, GROUP)
        next_us, next_deltas, next_Bs = fetch(
            u, delta, B, places, channel, state, D, N, B_token, BLOCK, STATES, GROUP, PACK
        )
        next_grads = load_channels(grad, places, channel, D, BLOCK, GROUP)
        next_Cs = load_states(C, places, state, N, STATES, C_token, GROUP, PACK)
        if first % SEGMENT == 0:
            segment = (start + first) // SEGMENT
            tl.store(checkpoints + tile_of(row, segment, segments, channel, state, D, N), x, mask=inside)
        for t in tl.static_range(GROUP):
            step = step_of(deltas[t], offset, t < left, SOFTPLUS)
            span += step
            decay = tl.exp2(step * rate)
            x = decay * x + step * us[t].to(tl.float32) * unpack(Bs[t], B, STATES, PACK)
            reach *= decay
            out = tl.where(t < left, grads[t].to(tl.float32), 0.0)
            end += reach * (out * unpack(Cs[t], C, STATES, PACK))
    tl.store(ends + tile_of(row, c, chunks, channel, state, D, N), end, mask=inside)
    tl.store(spans + (row * chunks + c) * D + channel, span, mask=channel < D)


@triton.jit
def _swap(kept, given, lane, BIT: tl.constexpr):
    """Sums over pairs of lanes that differ in one bit: of ``kept`` where it is clear, of ``given`` where it is set."""
    clear = (lane & BIT) == 0
    own, other = tl.where(clear, kept, given), tl.where(clear, given, kept)
    return own + tl.gather(other, lane ^ BIT, axis=1)


@triton.jit(do_not_specialize=UNKNOWN)
def gradient_kernel(
    u, delta, A, B, C, skip, bias, paths, grad, checkpoints, later, scratch,
    grad_u, grad_delta, grad_BC, grad_parameters,
    B_batch, B_row, C_batch, C_row, grad_batch, grad_row, rows, length, chunk, chunks,
    K: tl.constexpr, D: tl.constexpr, N: tl.constexpr, B_token: tl.constexpr, C_token: tl.constexpr,
    SOFTPLUS: tl.constexpr, BLOCK: tl.constexpr, STATES: tl.constexpr, GROUP: tl.constexpr, SEGMENT: tl.constexpr,
    PACK: tl.constexpr,
):  # fmt: skip
    """All gradients; those of B and C for each block of channels, those of parameters for each chunk."""
    row, c, start, tokens, channel, state = position(length, chunk, chunks, D, BLOCK, STATES)
    k = (row % K).to(tl.int32)
    path = find_path(paths, k)
    u += row * length * D
    delta += row * length * D
    grad += (row // K) * grad_batch + k * grad_row
    grad_u += row * length * D
    grad_delta += row * length * D
    B += (row // K) * B_batch + k * B_row
    C += (row // K) * C_batch + k * C_row
    block = tl.program_id(0) % ((D + BLOCK - 1) // BLOCK)
    grad_BC += (block * rows + row) * length * (2 * N)
    scratch += tl.program_id(0).to(tl.int64) * (SEGMENT // GROUP * STATES * BLOCK)
    own = state * BLOCK + tl.arange(0, BLOCK)[None, :]

    matrix = load_matrix(A, k, channel, state, D, N)
    rate = matrix * LOG2E
    offset, gain = load_vector(bias, k, channel, D), load_vector(skip, k, channel, D)
    inside = (channel < D) & (state < N)
    # Gradient of the state after a token that comes from the tokens behind it.
    tile = tile_of(row, c, chunks - 1, channel, state, D, N)
    carry = tl.load(later + tile, mask=inside & (c < chunks - 1), other=0.0)
    sum_A = tl.zeros([STATES, BLOCK], tl.float32)
    sum_skip = tl.zeros([1, BLOCK], tl.float32)
    sum_bias = tl.zeros([1, BLOCK], tl.float32)
    segments = (length + SEGMENT - 1) // SEGMENT
    count = (tokens + SEGMENT - 1) // SEGMENT
    last = start + tokens - 1
    for i in range(0, count):
        origin = (count - 1 - i) * SEGMENT
        groups = (tl.minimum(tokens - origin, SEGMENT) + GROUP - 1) // GROUP
        segment = (start + origin) // SEGMENT
        x = tl.load(checkpoints + tile_of(row, segment, segments, channel, state, D, N), mask=inside, other=0.0)
        places = places_of(path, start + origin, last, GROUP)
        next_us, next_deltas, next_Bs = fetch(
            u, delta, B, places, channel, state, D, N, B_token, BLOCK, STATES, GROUP, PACK
        )
        # the last group's states are computed below
        for j in range(0, groups - 1):
            us, deltas, Bs = next_us, next_deltas, next_Bs
            places = places_of(path, start + origin + (j + 1) * GROUP, last, GROUP)
            next_us, next_deltas, next_Bs = fetch(
                u, delta, B, places, channel, state, D, N, B_token, BLOCK, STATES, GROUP, PACK
            )
            tl.store(scratch + j * (STATES * BLOCK) + own, x)
            for t in tl.static_range(GROUP):
                step = step_of(deltas[t], offset, True, SOFTPLUS)
                x = tl.exp2(step * rate) * x + step * us[t].to(tl.float32) * unpack(Bs[t], B, STATES, PACK)
        tl.store(scratch + (groups - 1) * (STATES * BLOCK) + own, x)
        tl.debug_barrier()
        next_first = origin + (groups - 1) * GROUP
        next_places = places_of(path, start + next_first, last, GROUP)
        next_us, next_deltas, next_Bs = fetch(
            u, delta, B, next_places, channel, state, D, N, B_token, BLOCK, STATES, GROUP, PACK
        )
        next_grads = load_channels(grad, next_places, channel, D, BLOCK, GROUP)
        next_Cs = load_states(C, next_places, state, N, STATES, C_token, GROUP, PACK)
        for j in range(0, groups):
            us, deltas, grads, Bs, Cs = next_us, next_deltas, next_grads, next_Bs, next_Cs
            places, left = next_places, tokens - next_first
            x = tl.load(scratch + (groups - 1 - j) * (STATES * BLOCK) + own)
            next_first = tl.maximum(next_first - GROUP, origin)
            next_places = places_of(path, start + next_first, last, GROUP)
            next_us, next_deltas, next_Bs = fetch(
                u, delta, B, next_places, channel, state, D, N, B_token, BLOCK, STATES, GROUP, PACK
            )
            next_grads = load_channels(grad, next_places, channel, D, BLOCK, GROUP)
            next_Cs = load_states(C, next_places, state, N, STATES, C_token, GROUP, PACK)
            steps, decays, xs = (), (), (x,)
            for t in tl.static_range(GROUP):
                step = step_of(deltas[t], offset, t < left, SOFTPLUS)
                decay = tl.exp2(step * rate)
                x = decay * x + step * us[t].to(tl.float32) * unpack(Bs[t], B, STATES, PACK)
                steps, decays, xs = steps + (step,), decays + (decay,), xs + (x,)
            for_B, for_C = (), ()
            for t in tl.static_range(GROUP - 1, -1, -1):
                value, step = us[t].to(tl.float32), steps[t]
                out = tl.where(t < left, grads[t].to(tl.float32), 0.0)
                g = carry + out * unpack(Cs[t], C, STATES, PACK)
                carry = decays[t] * g
                memory = carry * xs[t]
                sum_A += memory * step
                drive = tl.sum(g * unpack(Bs[t], B, STATES, PACK), axis=0, keep_dims=True)
                slope = tl.sum(memory * matrix, axis=0, keep_dims=True) + drive * value
                if SOFTPLUS:
                    slope *= softplus_slope(deltas[t].to(tl.float32) + offset)
                slope = tl.where(t < left, slope, 0.0)
                sum_bias += slope
                sum_skip += out * value
                mask = (channel < D) & (t < left)
                tl.store(grad_u + places[t] * D + channel, drive * step + out * gain, mask=mask)
                tl.store(grad_delta + places[t] * D + channel, slope, mask=mask)
                for_B = (g * (step * value),) + for_B
                for_C = (xs[t + 1] * out,) + for_C
            _add_channels(grad_BC, for_B, for_C, places, left, state, N, BLOCK, STATES, GROUP)
        tl.debug_barrier()
    grad_parameters += (row * chunks + c) * ((N + 2) * D) + channel
    tl.store(grad_parameters + state * D, sum_A, mask=inside)
    tl.store(grad_parameters + N * D, sum_skip, mask=channel < D)
    tl.store(grad_parameters + (N + 1) * D, sum_bias, mask=channel < D)


@triton.jit
def _add_channels(
    pointer, for_B, for_C, places, left, state,
    N: tl.constexpr, BLOCK: tl.constexpr, STATES: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Sums of a group's ``(STATES, BLOCK)`` tiles over the channels, to ``(tokens, 2, N)``.

    A sum over 32 lanes takes five exchanges. Here lanes divide the tiles between them instead: half of them goes on
    with B, half with C, half of those with one token, half with the next, and so on, so that an exchange serves two.
    """
    if BLOCK < 32:
        for t in tl.static_range(GROUP):
            at = pointer + places[t] * (2 * N) + state
            mask = (state < N) & (t < left)
            tl.store(at, tl.sum(for_B[t], axis=1, keep_dims=True), mask=mask)
            tl.store(at + N, tl.sum(for_C[t], axis=1, keep_dims=True), mask=mask)
    else:
        lane = tl.broadcast_to(tl.arange(0, 32)[None, :], [STATES, 32])
        sums = ()
        for t in tl.static_range(GROUP):
            b, c = for_B[t], for_C[t]
            if BLOCK > 32:
                b = tl.sum(tl.reshape(b, [STATES, BLOCK // 32, 32]), axis=1)
                c = tl.sum(tl.reshape(c, [STATES, BLOCK // 32, 32]), axis=1)
            sums = sums + (_swap(b, c, lane, 1),)
        if GROUP == 1:
            total = sums[0]
            total += tl.gather(total, lane ^ 2, axis=1)
            total += tl.gather(total, lane ^ 4, axis=1)
            token = 0 * lane
        elif GROUP == 2:
            total = _swap(sums[0], sums[1], lane, 2)
            total += tl.gather(total, lane ^ 4, axis=1)
            token = (lane >> 1) & 1
        else:
            total = _swap(_swap(sums[0], sums[1], lane, 2), _swap(sums[2], sums[3], lane, 2), lane, 4)
            token = (lane >> 1) & 3
        total += tl.gather(total, lane ^ 8, axis=1)
        total += tl.gather(total, lane ^ 16, axis=1)
        place = tl.where(token == 0, places[0], 0)
        for t in tl.static_range(1, GROUP):
            place = tl.where(token == t, places[t], place)
        mask = (lane < 2 * GROUP) & (state < N) & (token < left)
        tl.store(pointer + place * (2 * N) + (lane & 1) * N + state, total, mask=mask)


@triton.jit(do_not_specialize=["blocks", "size"])
def collect_kernel(parts, out, blocks, size, BLOCK: tl.constexpr):
    """Sum of ``(blocks, size)`` over the blocks."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for _ in range(0, blocks):
        total += tl.load(parts + at, mask=at < size, other=0.0)
        parts += size
    tl.store(out + at, total, mask=at < size)

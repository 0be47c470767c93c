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

"""Triton kernels of the selective scan's forward."""

# mypy: disable-error-code="assignment"
# (the tuples below grow while a kernel is traced)

from __future__ import annotations

import triton
import triton.language as tl

from custom_nets.ops.scan_paths import find_path
from custom_nets.ops.selective_scan_tiles import (
    LOG2E,
    UNKNOWN,
    fetch,
    let_next_start,
    load_matrix,
    load_states,
    load_vector,
    places_of,
    position,
    step_of,
    tile_of,
    unpack,
    wait_for_previous,
)

__all__ = ["carry_kernel", "end_kernel", "output_kernel"]


@triton.jit(do_not_specialize=UNKNOWN)
def end_kernel(
    u, delta, A, B, bias, paths, ends, spans,
    B_batch, B_row, length, chunk, chunks,
    K: tl.constexpr, D: tl.constexpr, N: tl.constexpr, B_token: tl.constexpr, SOFTPLUS: tl.constexpr,
    BLOCK: tl.constexpr, STATES: tl.constexpr, GROUP: tl.constexpr, PACK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """State at the end of each chunk if it began at zero, and the sum of its steps."""
    let_next_start(OVERLAP)
    row, c, start, tokens, channel, state = position(length, chunk, chunks, D, BLOCK, STATES)
    k = (row % K).to(tl.int32)
    path = find_path(paths, k)
    u += row * length * D
    delta += row * length * D
    B += (row // K) * B_batch + k * B_row
    rate = load_matrix(A, k, channel, state, D, N) * LOG2E
    offset = load_vector(bias, k, channel, D)
    x = tl.zeros([STATES, BLOCK], tl.float32)
    span = tl.zeros([1, BLOCK], tl.float32)
    last = start + tokens - 1
    places = places_of(path, start, last, GROUP)
    next_us, next_deltas, next_Bs = fetch(
        u, delta, B, places, channel, state, D, N, B_token, BLOCK, STATES, GROUP, PACK
    )
    for first in range(0, tokens, GROUP):
        us, deltas, Bs, left = next_us, next_deltas, next_Bs, tokens - first
        places = places_of(path, start + first + GROUP, last, GROUP)
        next_us, next_deltas, next_Bs = fetch(
            u, delta, B, places, channel, state, D, N, B_token, BLOCK, STATES, GROUP, PACK
        )
        for t in tl.static_range(GROUP):
            step = step_of(deltas[t], offset, t < left, SOFTPLUS)
            span += step
            x = tl.exp2(step * rate) * x + step * us[t].to(tl.float32) * unpack(Bs[t], B, STATES, PACK)
    tl.store(ends + tile_of(row, c, chunks, channel, state, D, N), x, mask=(channel < D) & (state < N))
    tl.store(spans + (row * chunks + c) * D + channel, span, mask=channel < D)


@triton.jit
def _follow(decay, value, next_decay, next_value):
    """Two steps of the recurrence as one."""
    return decay * next_decay, value * next_decay + next_value


@triton.jit(do_not_specialize=["chunks"])
def carry_kernel(
    ends, spans, A, borders, chunks,
    K: tl.constexpr, D: tl.constexpr, N: tl.constexpr, REVERSED: tl.constexpr,
    BLOCK: tl.constexpr, WINDOW: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """From what each chunk ends with if it begins at zero, ``(rows, chunks, N, D)``, to what crosses from chunk to
    chunk, ``(rows, chunks - 1, N, D)``."""
    let_next_start(OVERLAP)
    blocks: tl.constexpr = (D + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    channel = (program % blocks) * BLOCK + tl.arange(0, BLOCK)[None, :]
    n, row = (program // blocks) % N, (program // (blocks * N)).to(tl.int64)
    k = (row % K).to(tl.int32)
    rate = tl.load(A + (k * D + channel) * N + n, mask=channel < D, other=0.0).to(tl.float32) * LOG2E
    carry = tl.zeros([1, BLOCK], tl.float32)
    window = tl.arange(0, WINDOW)[:, None]
    wait_for_previous(OVERLAP)
    for first in range(0, chunks, WINDOW):
        at = first + window
        c = chunks - 1 - at if REVERSED else at
        mask = (channel < D) & (at < chunks)
        value = tl.load(ends + ((row * chunks + c) * N + n) * D + channel, mask=mask, other=0.0)
        decay = tl.exp2(tl.load(spans + (row * chunks + c) * D + channel, mask=mask, other=0.0) * rate)
        decay, value = tl.associative_scan((decay, value), 0, _follow)
        value += decay * carry
        border = c - 1 if REVERSED else c
        mask &= (border >= 0) & (border < chunks - 1)
        tl.store(borders + ((row * (chunks - 1) + border) * N + n) * D + channel, value, mask=mask)
        carry = tl.sum(tl.where(window == WINDOW - 1, value, 0.0), axis=0, keep_dims=True)


@triton.jit(do_not_specialize=UNKNOWN)
def output_kernel(
    u, delta, A, B, C, skip, bias, paths, entering, y,
    B_batch, B_row, C_batch, C_row, length, chunk, chunks,
    K: tl.constexpr, D: tl.constexpr, N: tl.constexpr, B_token: tl.constexpr, C_token: tl.constexpr,
    SOFTPLUS: tl.constexpr, BLOCK: tl.constexpr, STATES: tl.constexpr, GROUP: tl.constexpr, PACK: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Outputs of each chunk from the state that enters it."""
    row, c, start, tokens, channel, state = position(length, chunk, chunks, D, BLOCK, STATES)
    k = (row % K).to(tl.int32)
    path = find_path(paths, k)
    u += row * length * D
    delta += row * length * D
    y += row * length * D
    B += (row // K) * B_batch + k * B_row
    C += (row // K) * C_batch + k * C_row
    rate = load_matrix(A, k, channel, state, D, N) * LOG2E
    offset, gain = load_vector(bias, k, channel, D), load_vector(skip, k, channel, D)
    last = start + tokens - 1
    next_places = places_of(path, start, last, GROUP)
    next_us, next_deltas, next_Bs = fetch(
        u, delta, B, next_places, channel, state, D, N, B_token, BLOCK, STATES, GROUP, PACK
    )
    next_Cs = load_states(C, next_places, state, N, STATES, C_token, GROUP, PACK)
    wait_for_previous(OVERLAP)
    mask = (channel < D) & (state < N) & (c > 0)
    x = tl.load(entering + tile_of(row, c - 1, chunks - 1, channel, state, D, N), mask=mask, other=0.0)
    for first in range(0, tokens, GROUP):
        us, deltas, Bs, Cs, places, left = next_us, next_deltas, next_Bs, next_Cs, next_places, tokens - first
        next_places = places_of(path, start + first + GROUP, last, GROUP)
        next_us, next_deltas, next_Bs = fetch(
            u, delta, B, next_places, channel, state, D, N, B_token, BLOCK, STATES, GROUP, PACK
        )
        next_Cs = load_states(C, next_places, state, N, STATES, C_token, GROUP, PACK)
        for t in tl.static_range(GROUP):
            value = us[t].to(tl.float32)
            step = step_of(deltas[t], offset, t < left, SOFTPLUS)
            x = tl.exp2(step * rate) * x + step * value * unpack(Bs[t], B, STATES, PACK)
            out = tl.sum(x * unpack(Cs[t], C, STATES, PACK), axis=0, keep_dims=True) + gain * value
            tl.store(y + places[t] * D + channel, out, mask=(channel < D) & (t < left))

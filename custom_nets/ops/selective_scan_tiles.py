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

"""What the kernels of the selective scan are made of: which tile is a program's, its loads, and its arithmetic.

:py:mod:`custom_nets.ops.selective_scan_triton` says how the kernels work together.
"""

# mypy: disable-error-code="assignment"
# (the tuples below grow while a kernel is traced)

from __future__ import annotations

import triton
import triton.language as tl

from custom_nets.ops.scan_paths import place_of

__all__ = [
    "LOG2E",
    "UNKNOWN",
    "fetch",
    "let_next_start",
    "load_channels",
    "load_matrix",
    "load_states",
    "load_vector",
    "places_of",
    "position",
    "softplus_slope",
    "step_of",
    "tile_of",
    "unpack",
    "wait_for_previous",
]

LOG2E = tl.constexpr(1.4426950408889634)
# One binary for all values of these.
UNKNOWN = ["rows", "length", "chunk", "chunks"]


@triton.jit
def _log1p(e):
    """``log(1 + e)`` for e in [0, 1], to 3e-7 of itself: a hardware logarithm is off by 1e-4 at small e.

    Interpolates ``log(1 + e) / e`` at Chebyshev nodes, which takes no division: special functions are scarce.
    """
    p = 0.0051261019 * e - 0.0290740654
    p = p * e + 0.0775160864
    p = p * e - 0.136022478
    p = p * e + 0.190768808
    p = p * e - 0.248353988
    p = p * e + 0.333181202
    p = p * e - 0.499994457
    p = p * e + 1.0
    return e * p


@triton.jit
def _softplus(x):
    return tl.maximum(x, 0.0) + _log1p(tl.exp2(-tl.abs(x) * LOG2E))


@triton.jit
def softplus_slope(x):
    e = tl.exp2(-tl.abs(x) * LOG2E)
    return tl.where(x >= 0, 1.0, e) / (1.0 + e)


@triton.jit
def let_next_start(OVERLAP: tl.constexpr):
    """The next kernel may begin, up to where it waits, once all programs of this one have come here."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait_for_previous(OVERLAP: tl.constexpr):
    """What the kernels before have written is there from here on."""
    if OVERLAP:
        tl.extra.cuda.gdc_wait()


@triton.jit
def position(length, chunk, chunks, D: tl.constexpr, BLOCK: tl.constexpr, STATES: tl.constexpr):
    """Row (sequence and direction), chunk, its first token, tokens there are, channels and states of a program."""
    blocks: tl.constexpr = (D + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    block, c, row = program % blocks, (program // blocks) % chunks, program // (blocks * chunks)
    start = c * chunk
    channel = block * BLOCK + tl.arange(0, BLOCK)[None, :]
    state = tl.arange(0, STATES)[:, None]
    return row.to(tl.int64), c, start, tl.minimum(chunk, length - start), channel, state


@triton.jit
def tile_of(row, c, chunks, channel, state, D: tl.constexpr, N: tl.constexpr):
    """Offsets into a buffer ``(rows, chunks, N, D)``."""
    return ((row * chunks + c) * N + state) * D + channel


@triton.jit
def load_vector(pointer, k, channel, D: tl.constexpr):
    """A parameter ``(K, D)`` for one direction, ``(1, BLOCK)``; zeros if there is none."""
    if pointer is None:
        value = tl.zeros_like(channel).to(tl.float32)
    else:
        value = tl.load(pointer + k * D + channel, mask=channel < D, other=0.0).to(tl.float32)
    return value


@triton.jit
def load_matrix(A, k, channel, state, D: tl.constexpr, N: tl.constexpr):
    """``A (K, D, N)`` for one direction, ``(STATES, BLOCK)``."""
    mask = (channel < D) & (state < N)
    return tl.load(A + (k * D + channel) * N + state, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def places_of(path, first, last, GROUP: tl.constexpr):
    """Where tokens ``first`` to ``first + GROUP`` of a sequence lie; beyond the ``last`` one, where that one lies."""
    places = ()
    for t in tl.static_range(GROUP):
        places = places + (place_of(tl.minimum(first + t, last), path).to(tl.int64),)
    return places


@triton.jit
def _load(pointer, index, SIZE: tl.constexpr, PADDED: tl.constexpr):
    """Loads at ``index`` up to ``SIZE``, of which a whole number of ``PADDED`` fit or are padded with zeros."""
    if SIZE % PADDED == 0:
        value = tl.load(pointer + index)
    else:
        value = tl.load(pointer + index, mask=index < SIZE, other=0.0)
    return value


@triton.jit
def load_channels(pointer, places, channel, D: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr):
    """A group of tokens of ``(tokens, D)`` as a tuple of ``(1, BLOCK)``."""
    values = ()
    for t in tl.static_range(GROUP):
        values = values + (_load(pointer + places[t] * D, channel, D, BLOCK),)
    return values


@triton.jit
def load_states(
    pointer, places, state, N: tl.constexpr, STATES: tl.constexpr, STRIDE: tl.constexpr, GROUP: tl.constexpr,
    PACK: tl.constexpr,
):  # fmt: skip
    """A group of tokens of ``(tokens, N)``, for :py:func:`unpack`: several states in a word if ``PACK`` is not 1."""
    values = ()
    for t in tl.static_range(GROUP):
        if PACK == 1:
            value = _load(pointer + places[t] * STRIDE, state, N, STATES)
        else:
            words = (pointer + places[t] * STRIDE).to(tl.pointer_type(tl.int64))
            value = tl.load(words + tl.arange(0, STATES // PACK)[:, None])
        values = values + (value,)
    return values


@triton.jit
def unpack(value, like, STATES: tl.constexpr, PACK: tl.constexpr):
    """States of a token in float32, ``(STATES, 1)``, as elements of the pointer ``like``."""
    if PACK == 1:
        states = value.to(tl.float32)
    elif PACK == 2:
        pair = tl.join(value.to(tl.int32), (value >> 32).to(tl.int32)).to(tl.float32, bitcast=True)
        states = tl.reshape(tl.permute(pair, (0, 2, 1)), [STATES, 1])
    else:
        halves = tl.join(value.to(tl.int32), (value >> 32).to(tl.int32))
        if like.dtype.element_ty == tl.bfloat16:
            four = tl.join(halves << 16, halves & -65536).to(tl.float32, bitcast=True)
        else:
            four = tl.join(halves.to(tl.int16), (halves >> 16).to(tl.int16))
            four = four.to(like.dtype.element_ty, bitcast=True).to(tl.float32)
        states = tl.reshape(tl.permute(four, (0, 2, 3, 1)), [STATES, 1])
    return states


@triton.jit
def fetch(
    u, delta, B, places, channel, state,
    D: tl.constexpr, N: tl.constexpr, B_token: tl.constexpr,
    BLOCK: tl.constexpr, STATES: tl.constexpr, GROUP: tl.constexpr, PACK: tl.constexpr,
):  # fmt: skip
    """What the next states need of a group of tokens; asked for one group ahead, since memory is slow to answer."""
    us, deltas = load_channels(u, places, channel, D, BLOCK, GROUP), load_channels(
        delta, places, channel, D, BLOCK, GROUP
    )
    return us, deltas, load_states(B, places, state, N, STATES, B_token, GROUP, PACK)


@triton.jit
def step_of(delta, bias, valid, SOFTPLUS: tl.constexpr):
    """Step in float32; zero where there is no token, which leaves the state as it is."""
    step = delta.to(tl.float32) + bias
    if SOFTPLUS:
        step = _softplus(step)
    return tl.where(valid, step, 0.0)

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

"""Causal depthwise convolution of every direction of a scan in Triton, without a copy in the direction's order.

Imported only where Triton is there and a GPU wants it. A program holds the tokens of its chunk in registers, so the
forward reads each token of the image once per direction (and a few again at the start of a chunk, from a cache) and
writes its output once: with e bytes in an element, (1 + K) e to 2K e for each channel and token of an image. The
backward computes the outputs before SiLU again, which is cheaper than to keep them, reads 2K e and writes K e.
"""

# mypy: disable-error-code="assignment"
# (the tuples below grow while a kernel is traced)

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Optional

import torch
import triton
import triton.language as tl
from torch import Tensor

from custom_nets.ops.scan_orders import flatten_orders
from custom_nets.ops.scan_paths import find_path, paths_of, place_of

__all__ = ["directional_conv_triton"]

# Tokens and channels of a program.
CHUNK = 16
BLOCK = 64


@triton.jit
def _position(length, K: tl.constexpr, D: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """Batch item, direction, chunk, chunks there are, and channels of a program."""
    blocks: tl.constexpr = (D + BLOCK - 1) // BLOCK
    chunks = (length + CHUNK - 1) // CHUNK
    program = tl.program_id(0)
    row = program // (blocks * chunks)
    channel = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    return row // K, row % K, (program // blocks) % chunks, chunks, channel


@triton.jit
def _tokens(pointer, path, first, length, channel, D: tl.constexpr, COUNT: tl.constexpr):
    """``COUNT`` tokens of a sequence in float32, zeros outside of it."""
    values = ()
    for i in tl.static_range(COUNT):
        inside = (first + i >= 0) & (first + i < length) & (channel < D)
        place = place_of(tl.minimum(tl.maximum(first + i, 0), length - 1), path).to(tl.int64)
        values = values + (tl.load(pointer + place * D + channel, mask=inside, other=0.0).to(tl.float32),)
    return values


@triton.jit
def _convolve(xs, taps, bias, i: tl.constexpr, WIDTH: tl.constexpr):
    total = bias
    for j in tl.static_range(WIDTH):
        total += xs[i + j] * taps[j]
    return total


@triton.jit
def _weights(weight, bias, k, channel, D: tl.constexpr, WIDTH: tl.constexpr):
    taps = ()
    for j in tl.static_range(WIDTH):
        taps = taps + (tl.load(weight + (k * WIDTH + j) * D + channel, mask=channel < D, other=0.0).to(tl.float32),)
    return taps, tl.load(bias + k * D + channel, mask=channel < D, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["length"])
def conv_kernel(
    x, weight, bias, paths, y, length,
    K: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    batch, k, c, chunks, channel = _position(length, K, D, CHUNK, BLOCK)
    path = find_path(paths, k)
    taps, offset = _weights(weight, bias, k, channel, D, WIDTH)
    first = c * CHUNK
    xs = _tokens(x + batch.to(tl.int64) * length * D, path, first - (WIDTH - 1), length, channel, D, CHUNK + WIDTH - 1)
    y += (batch * K + k).to(tl.int64) * length * D
    for i in tl.static_range(CHUNK):
        value = _convolve(xs, taps, offset, i, WIDTH)
        inside = (first + i < length) & (channel < D)
        place = place_of(tl.minimum(first + i, length - 1), path).to(tl.int64)
        tl.store(y + place * D + channel, value * tl.sigmoid(value), mask=inside)


@triton.jit(do_not_specialize=["length"])
def conv_gradient_kernel(
    x, weight, bias, paths, grad, grad_x, grad_weights, length,
    K: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradient of the tokens for each direction, and of its taps and bias for each chunk."""
    batch, k, c, chunks, channel = _position(length, K, D, CHUNK, BLOCK)
    path = find_path(paths, k)
    taps, offset = _weights(weight, bias, k, channel, D, WIDTH)
    first, row = c * CHUNK, (batch * K + k).to(tl.int64)
    # A token's gradient comes from outputs up to WIDTH - 1 behind it.
    count: tl.constexpr = CHUNK + WIDTH - 1
    xs = _tokens(x + batch.to(tl.int64) * length * D, path, first - (WIDTH - 1), length, channel, D, count + WIDTH - 1)
    outs = _tokens(grad + row * length * D, path, first, length, channel, D, count)
    grads = ()
    for i in tl.static_range(count):
        value = _convolve(xs, taps, offset, i, WIDTH)
        gate = tl.sigmoid(value)
        grads = grads + (outs[i] * gate * (1.0 + value * (1.0 - gate)),)
    grad_x += row * length * D
    for i in tl.static_range(CHUNK):
        total = tl.zeros([BLOCK], tl.float32)
        for j in tl.static_range(WIDTH):
            total += grads[i + j] * taps[WIDTH - 1 - j]
        inside = (first + i < length) & (channel < D)
        place = place_of(tl.minimum(first + i, length - 1), path).to(tl.int64)
        tl.store(grad_x + place * D + channel, total, mask=inside)
    grad_weights += (row * chunks + c) * ((WIDTH + 1) * D) + channel
    for j in tl.static_range(WIDTH + 1):
        total = tl.zeros([BLOCK], tl.float32)
        for i in tl.static_range(CHUNK):
            if j < WIDTH:
                total += grads[i] * xs[i + j]
            else:
                total += grads[i]
        tl.store(grad_weights + j * D, total, mask=channel < D)


def _launch(x: Tensor, weight: Tensor) -> tuple[tuple[int], dict[str, int]]:
    batch, length, channels = x.shape
    directions, width = weight.shape[:2]
    programs = batch * directions * triton.cdiv(length, CHUNK) * triton.cdiv(channels, BLOCK)
    sizes = {"K": directions, "D": channels, "WIDTH": width, "CHUNK": CHUNK, "BLOCK": BLOCK}
    return (programs,), {"length": length, "num_warps": 1, **sizes}


@torch.library.custom_op("custom_nets::directional_conv_forward", mutates_args=())
def _forward(x: Tensor, weight: Tensor, bias: Tensor, orders: Sequence[int], spatial_shape: Sequence[int]) -> Tensor:
    x, weight, bias = x.contiguous(), weight.contiguous(), bias.contiguous()
    grid, options = _launch(x, weight)
    y = x.new_empty((x.shape[0], weight.shape[0], *x.shape[1:]))
    with torch.cuda.device_of(x):
        paths = paths_of(tuple(orders), tuple(spatial_shape), x.device)
        conv_kernel[grid](x, weight, bias, paths, y, **options)
    return y


@_forward.register_fake
def _(x, weight, bias, orders, spatial_shape):
    return x.new_empty((x.shape[0], weight.shape[0], *x.shape[1:]))


@torch.library.custom_op("custom_nets::directional_conv_backward", mutates_args=())
def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, orders: Sequence[int], spatial_shape: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Gradients of x, and of the taps and the bias ``(K, width + 1, C)``."""
    grad, x, weight, bias = (t.contiguous() for t in (grad, x, weight, bias))
    grid, options = _launch(x, weight)
    grad_x = torch.empty_like(grad)
    chunks = triton.cdiv(x.shape[1], CHUNK)
    shape = (x.shape[0], weight.shape[0], chunks, weight.shape[1] + 1, x.shape[2])
    grad_weights = x.new_empty(shape, dtype=torch.float32)
    with torch.cuda.device_of(x):
        paths = paths_of(tuple(orders), tuple(spatial_shape), x.device)
        conv_gradient_kernel[grid](x, weight, bias, paths, grad, grad_x, grad_weights, **options)
    return grad_x.sum(1), grad_weights.sum((0, 2))


@_backward.register_fake
def _(grad, x, weight, bias, orders, spatial_shape):
    shape = (weight.shape[0], weight.shape[1] + 1, x.shape[2])
    return torch.empty_like(x, memory_format=torch.contiguous_format), x.new_empty(shape, dtype=torch.float32)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.orders, ctx.spatial_shape = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Optional[Tensor], ...]:
    x, weight, bias = ctx.saved_tensors
    grad_x, grad_weights = _backward(grad, x, weight, bias, ctx.orders, ctx.spatial_shape)
    return grad_x, grad_weights[:, :-1].to(weight.dtype), grad_weights[:, -1].to(bias.dtype), None, None


_forward.register_autograd(_differentiate, setup_context=_setup_context)


def directional_conv_triton(
    x: Tensor, weight: Tensor, bias: Tensor, orders: Sequence[tuple[Sequence[int], bool]], spatial_shape: Sequence[int]
) -> Tensor:
    """SiLU of the causal depthwise convolution of every direction.

    Args:
        x: tokens in raster order, ``(B, L, C)``.
        weight: taps, the last one for the token itself, ``(K, width, C)``.
        bias: ``(K, C)``.
        orders: directions, see :py:func:`custom_nets.ops.scan_orders`.
        spatial_shape: ``[H, W]`` or ``[H, W, D]`` with product L.

    Returns:
        ``(B, K, L, C)`` in raster order, in the dtype of ``x``; computed in float32; once differentiable.
    """
    flat = flatten_orders(orders)
    return _forward(x, weight, bias, flat, spatial_shape)

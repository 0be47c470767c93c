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

"""Causal depthwise convolution of every direction of a scan in C++ on a CPU, without copies in its order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Optional

import torch
from torch import Tensor

from custom_nets.ops.scan_orders import flatten_orders, scan_places
from custom_nets.ops.selective_scan_cpp import CHUNK, call_library, channel_groups

__all__ = ["directional_conv_cpp"]

_ARGUMENTS = "Tensor x, Tensor weight, Tensor bias, int[] orders, SymInt[] spatial_shape"
_FORWARD, _BACKWARD = (f"custom_nets::directional_conv_cpu_{name}" for name in ("forward", "backward"))
# not torch.library.custom_op, see selective_scan_cpp
torch.library.define(_FORWARD, f"({_ARGUMENTS}) -> Tensor", tags=torch.Tag.pt2_compliant_tag)
torch.library.define(
    _BACKWARD, f"(Tensor grad, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor)", tags=torch.Tag.pt2_compliant_tag
)


def _inputs(
    x: Tensor, weight: Tensor, bias: Tensor, orders: Sequence[int], spatial_shape: Sequence[int]
) -> dict[str, Tensor]:
    """Inputs as the library takes them, by the names of its arguments."""
    return {
        "u": x.unsqueeze(1).expand(-1, weight.shape[0], -1, -1),
        "taps": weight.float().contiguous(),
        "bias": bias.float().contiguous(),
        "places": scan_places(tuple(orders), tuple(spatial_shape)),
    }


def _sizes(x: Tensor, weight: Tensor) -> dict[str, int]:
    groups = channel_groups(x.shape[2], x.shape[0], torch.get_num_threads())
    return {"width": weight.shape[1], "groups": groups}


@torch.library.impl(_FORWARD, "CPU")
def _forward(x: Tensor, weight: Tensor, bias: Tensor, orders: Sequence[int], spatial_shape: Sequence[int]) -> Tensor:
    y = _fake_forward(x, weight, bias, orders, spatial_shape)
    inputs = _inputs(x, weight, bias, orders, spatial_shape)
    call_library("directional_conv_forward", {**inputs, "out": y}, **_sizes(x, weight))
    return y


@torch.library.register_fake(_FORWARD)
def _fake_forward(x, weight, bias, orders, spatial_shape):
    return x.new_empty((x.shape[0], weight.shape[0], *x.shape[1:]))


@torch.library.impl(_BACKWARD, "CPU")
def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, orders: Sequence[int], spatial_shape: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, the taps and the bias."""
    inputs = _inputs(x, weight, bias, orders, spatial_shape)
    grad_x = x.new_empty(x.shape, dtype=torch.float32)
    grad_taps = grad_x.new_empty((x.shape[0], *weight.shape))
    grad_bias = grad_x.new_empty((x.shape[0], *bias.shape))
    # the gradients of all directions are added up in the same place
    outputs = {"grad_u": grad_x.unsqueeze(1).expand_as(inputs["u"]), "grad_taps": grad_taps, "grad_bias": grad_bias}
    call_library("directional_conv_backward", {**inputs, **outputs, "grad": grad}, **_sizes(x, weight))
    return grad_x.to(x.dtype), grad_taps.sum(0).to(weight.dtype), grad_bias.sum(0).to(bias.dtype)


@torch.library.register_fake(_BACKWARD)
def _(grad, x, weight, bias, orders, spatial_shape):
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, weight, bias))


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.orders, ctx.spatial_shape = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Optional[Tensor], ...]:
    constants = (ctx.orders, ctx.spatial_shape)
    return *torch.ops.custom_nets.directional_conv_cpu_backward(grad, *ctx.saved_tensors, *constants), None, None


torch.library.register_autograd(_FORWARD, _differentiate, setup_context=_setup_context)


def directional_conv_cpp(
    x: Tensor, weight: Tensor, bias: Tensor, orders: Sequence[tuple[Sequence[int], bool]], spatial_shape: Sequence[int]
) -> Tensor:
    """:py:func:`custom_nets.ops.directional_conv` for float32, bfloat16 and float16 on a CPU.

    Threads share batch items and blocks of channels; the results do not depend on how many there are.

    Raises:
        ValueError: if there are more taps than the kernel's tile has room for.
    """
    if weight.shape[1] > CHUNK + 1:
        raise ValueError(f"at most {CHUNK + 1} taps are supported on a CPU, got {weight.shape[1]}.")
    flat = flatten_orders(orders)
    return torch.ops.custom_nets.directional_conv_cpu_forward(x, weight, bias, flat, spatial_shape)

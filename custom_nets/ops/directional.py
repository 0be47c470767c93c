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

"""Convolution and scan that walk raster tokens in the order of each direction, behind one call for GPU and CPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from custom_nets.ops.selective_scan import scan_backend

__all__ = ["directional_conv", "directional_scan", "walks_in_place"]

Orders = Sequence[tuple[Sequence[int], bool]]


def walks_in_place(x: Tensor) -> bool:
    """Whether the back end for ``x`` has kernels that walk in place; elsewhere copies in sequence order are needed.

    A traced module and an ONNX graph are to run without this package's CPU kernels.
    """
    backend = scan_backend(x.device, x.dtype)
    if backend == "cpp":
        return not torch.jit.is_tracing() and not torch.onnx.is_in_onnx_export()
    return backend == "triton"


def directional_conv(x: Tensor, weight: Tensor, bias: Tensor, orders: Orders, spatial_shape: Sequence[int]) -> Tensor:
    """SiLU of the causal depthwise convolution of every direction, where :py:func:`walks_in_place` says so.

    Args:
        x: tokens in raster order, ``(B, L, C)``.
        weight: taps, the last one for the token itself, ``(K, width, C)``.
        bias: ``(K, C)``.
        orders: directions, see :py:func:`custom_nets.ops.scan_orders`.
        spatial_shape: ``[H, W]`` or ``[H, W, D]`` with product L.

    Returns:
        ``(B, K, L, C)`` in raster order, in the dtype of ``x``; computed in float32; once differentiable.
    """
    if x.is_cuda:
        from custom_nets.ops.directional_conv_triton import directional_conv_triton

        return directional_conv_triton(x, weight, bias, orders, spatial_shape)
    from custom_nets.ops.directional_conv_cpp import directional_conv_cpp

    return directional_conv_cpp(x, weight, bias, orders, spatial_shape)


def directional_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    delta_bias: Tensor,
    orders: Orders,
    spatial_shape: Sequence[int],
) -> Tensor:
    """:py:func:`custom_nets.ops.selective_scan_channels_last` with softplus, of tensors that are all in raster order.

    Shapes are those of that function, and each direction walks the tokens by itself, where :py:func:`walks_in_place`
    says so.
    """
    if u.is_cuda:
        from custom_nets.ops.selective_scan_triton import selective_scan_triton

        return selective_scan_triton(u, delta, A, B, C, D, delta_bias, True, orders, spatial_shape)
    from custom_nets.ops.selective_scan_cpp import selective_scan_cpp

    return selective_scan_cpp(u, delta, A, B, C, D, delta_bias, True, orders, spatial_shape)

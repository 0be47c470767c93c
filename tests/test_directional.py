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

"""Compiled kernels that walk raster tokens in place against PyTorch on copies in the order of each direction."""

from __future__ import annotations

import math

import pytest
import torch

from custom_nets.blocks import selective_ssm
from custom_nets.blocks.selective_ssm import DirectionalSSM
from custom_nets.ops import BACKEND_VARIABLE, directional_conv, scan_orders, walks_in_place
from custom_nets.ops.scan_orders import flatten_orders

SHAPES = [("cross", [7, 11]), ("raster", [1, 3]), ("tri_plane", [3, 5, 9]), ("tri_plane", [1, 1, 2])]

pytestmark = pytest.mark.skipif(not walks_in_place(torch.ones(1)), reason="the C++ library could not be built")


def results(block, x, shape, condition):
    """Output and the gradients of inputs and parameters, x being half of a wider tensor as in a block."""
    content = x.chunk(2, dim=-1)[0]
    y = block(content, shape, condition)
    inputs = [x, *([] if condition is None else [condition]), *block.parameters()]
    return [y, *torch.autograd.grad(y.square().sum(), inputs)]


@pytest.mark.parametrize("conditioned", [False, True])
@pytest.mark.parametrize("channels", [5, 40])
@pytest.mark.parametrize("scan, shape", SHAPES)
def test_block_in_place_equals_copies_in_float64(scan, shape, channels, conditioned, monkeypatch):
    monkeypatch.delenv(BACKEND_VARIABLE, raising=False)
    torch.manual_seed(0)
    orders = scan_orders(scan, len(shape))
    block = DirectionalSSM(channels, orders)
    x = torch.randn(2, math.prod(shape), 2 * channels, requires_grad=True)
    condition = torch.randn(2, math.prod(shape), channels, requires_grad=True) if conditioned else None
    assert walks_in_place(x)
    walked = results(block, x, shape, condition)
    x, condition = (None if t is None else t.detach().double().requires_grad_() for t in (x, condition))
    copied = results(block.double(), x, shape, condition)
    for actual, wanted in zip(walked, copied):
        assert torch.linalg.norm(actual.double() - wanted) <= 2e-5 * torch.linalg.norm(wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_place_equals_copies_of_the_same_kernels(dtype, monkeypatch):
    """More than one tile, in a dtype of autocast."""
    shape, orders = [6, 5, 7], scan_orders("tri_plane", 3)
    block = DirectionalSSM(18, orders)
    x = torch.randn(1, 210, 18)
    with torch.no_grad(), torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        walked = block(x.to(dtype), shape)
        monkeypatch.setattr(selective_ssm, "walks_in_place", lambda x: False)
        copied = block(x.to(dtype), shape)
    assert torch.linalg.norm(walked.float() - copied.float()) <= 4 * torch.finfo(dtype).eps * torch.linalg.norm(copied)


@pytest.mark.parametrize("conditioned", [False, True])
@pytest.mark.parametrize("elements, groups", [(0, 6 * [1]), (2 * 7560, 3 * [2]), (3 * 7560, 2 * [3])])
def test_groups_of_directions_without_gradients(elements, groups, conditioned, monkeypatch):
    """Large images: the same outputs, and never more directions at once than have so many elements."""
    shape, block = [6, 5, 7], DirectionalSSM(18, scan_orders("tri_plane", 3))
    x, walked = torch.randn(2, 210, 18), []
    condition = torch.randn(2, 210, 18) if conditioned else None
    scan = selective_ssm.directional_scan
    monkeypatch.setattr(selective_ssm, "directional_scan", lambda u, *args: walked.append(u.shape[1]) or scan(u, *args))
    with torch.no_grad():
        expected = block(x, shape, condition)
        monkeypatch.setattr(selective_ssm, "AT_ONCE", elements)
        torch.testing.assert_close(block(x, shape, condition), expected)
    assert walked == [6, *groups]
    block(x, shape, condition)
    assert walked[-1] == 6, "gradients want all of them"


@pytest.mark.parametrize("width", [1, 2, 70])
def test_operator(width):
    shape, orders = [5, 14], scan_orders("cross", 2)
    if width > 65:
        with pytest.raises(ValueError, match="at most 65 taps"):
            directional_conv(torch.ones(1, 70, 3), torch.ones(4, width, 3), torch.ones(4, 3), orders, shape)
        return
    sizes = [(2, 70, 3), (4, width, 3), (4, 3)]
    leaves = [torch.randn(size, requires_grad=True) for size in sizes]
    flat = flatten_orders(orders)
    torch.library.opcheck(torch.ops.custom_nets.directional_conv_cpu_forward, (*leaves, flat, shape))
    y = torch.ops.custom_nets.directional_conv_cpu_forward(*leaves, flat, shape).detach()
    inputs = [x.detach() for x in leaves]
    torch.library.opcheck(torch.ops.custom_nets.directional_conv_cpu_backward, (y, *inputs, flat, shape))

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

"""The Triton kernels on a GPU, or under Triton's interpreter, which has to be chosen before Triton is imported."""

from __future__ import annotations

import functools
import importlib.util
import math
import os
import random
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from custom_nets.blocks import DirectionalSSM
from custom_nets.nets.clinicalfmamba import ClinicalFMamba
from custom_nets.ops import (
    BACKEND_VARIABLE,
    scan_backend,
    scan_orders,
    selective_scan,
    selective_scan_channels_last,
    to_raster,
    to_sequences,
)

HAS_TRITON = importlib.util.find_spec("triton") is not None
HAS_GPU = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cuda" if HAS_GPU and not INTERPRETED else "cpu")

runs_kernels = pytest.mark.skipif(not HAS_TRITON or not (HAS_GPU or INTERPRETED), reason="no GPU, or no Triton")
needs_gpu = pytest.mark.skipif(not HAS_TRITON or DEVICE.type != "cuda", reason="no GPU, or no Triton")

if INTERPRETED:
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_with_index(tensor, scope):
        """NumPy 2.4 no longer turns an array of one element into a number, which the interpreter relies on."""
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_with_index


@pytest.fixture(autouse=True)
def no_forced_back_end(monkeypatch):
    monkeypatch.delenv(BACKEND_VARIABLE, raising=False)


def reference(u, delta, A, B, C, D, delta_bias, softplus):
    """The recurrence, one token after the other, channels last."""
    step = delta if delta_bias is None else delta + delta_bias.unsqueeze(1)
    step = torch.logaddexp(step, torch.zeros_like(step)) if softplus else step
    x = u.new_zeros(*u.shape[:2], *A.shape[1:])
    outputs = []
    for t in range(u.shape[2]):
        drive = (step[:, :, t] * u[:, :, t]).unsqueeze(-1) * B[:, :, t].unsqueeze(2)
        x = torch.exp(step[:, :, t].unsqueeze(-1) * A) * x + drive
        outputs.append((x * C[:, :, t].unsqueeze(2)).sum(-1))
    y = torch.stack(outputs, dim=2)
    return y if D is None else y + u * D.unsqueeze(1)


def arguments(shape, dtype=torch.float32, softplus=True, optional=True, seed=0, rank=3):
    """Random leaves u, delta, A, projection of step, B and C, D, bias; steps spread over 1e-6 to 50."""
    batch, directions, length, channels, states = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(size, generator=generator)

    step = 1e-6 * 5e7 ** torch.rand((batch, directions, length, channels), generator=generator, dtype=torch.float64)
    delta = torch.log(torch.expm1(step)) if softplus else step
    leaves = [normal(batch, directions, length, channels).to(dtype), delta.to(dtype)]
    leaves += [-torch.exp(normal(directions, channels, states)), normal(batch, directions, length, rank + 2 * states)]
    leaves[3] = leaves[3].to(dtype)
    # without softplus, a bias could make a step negative
    vectors = [normal(directions, channels), 0.1 * normal(directions, channels).abs()]
    leaves += vectors if optional else [None, None]
    return [None if x is None else x.to(DEVICE).requires_grad_() for x in leaves]


def with_gradients(scan, leaves):
    """Output of a scan and the gradients of its leaves for one fixed weighting of the output."""
    u, delta, A, projection, D, bias = leaves
    states = A.shape[-1]
    _, B, C = projection.split([projection.shape[-1] - 2 * states, states, states], dim=-1)
    y = scan(u, delta, A, B, C, D, bias)
    weights = torch.sin(torch.arange(y.numel(), device=y.device).double()).view(y.shape)
    weights = weights.to(torch.bfloat16).to(y.dtype)
    inputs = [x for x in leaves if x is not None]
    return [y.detach(), *torch.autograd.grad(y, inputs, weights)]


def kernels(u, delta, A, B, C, D, bias, softplus, chunk):
    import custom_nets.ops.selective_scan_triton  # noqa: F401

    return torch.ops.custom_nets.selective_scan_forward(u, delta, A, B, C, D, bias, softplus, chunk, [], [])[0]


def check(scan, leaves, softplus, tolerance):
    exact = [None if x is None else x.detach().double().requires_grad_() for x in leaves]
    expected = with_gradients(functools.partial(reference, softplus=softplus), exact)
    inputs = [x for x in leaves if x is not None]
    for actual, wanted, source in zip(with_gradients(scan, leaves), expected, [leaves[0], *inputs]):
        assert actual.dtype == source.dtype
        assert torch.linalg.norm(actual.double() - wanted) <= tolerance * torch.linalg.norm(wanted)


@pytest.mark.slow
@pytest.mark.skipif(HAS_GPU or INTERPRETED, reason="the kernels run without this already")
def test_under_the_interpreter():
    if not HAS_TRITON:
        pytest.skip("Triton is not installed")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    run = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


@runs_kernels
@pytest.mark.parametrize(
    "shape, chunk",
    [
        ((1, 1, 1, 1, 1), 32),
        ((2, 1, 33, 5, 3), 32),
        ((1, 2, 97, 33, 8), 32),
        ((1, 2, 97, 7, 8), 64),
        ((1, 1, 70, 18, 16), 96),
        ((1, 1, 35, 9, 64), 32),
    ],
)
@pytest.mark.parametrize("softplus", [True, False])
def test_against_reference(shape, chunk, softplus):
    scan = functools.partial(kernels, softplus=softplus, chunk=chunk)
    check(scan, arguments(shape, softplus=softplus), softplus, 1e-5)


@runs_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    leaves = arguments((1, 2, 41, 6, 8), dtype)
    check(functools.partial(kernels, softplus=True, chunk=32), leaves, True, 2 * torch.finfo(dtype).eps)


@runs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_states_loaded_in_words(dtype):
    """B and C that begin at multiples of eight bytes."""
    leaves = arguments((1, 2, 21, 33, 8), dtype, rank=4)
    check(functools.partial(kernels, softplus=True, chunk=16), leaves, True, 2 * torch.finfo(dtype).eps + 1e-6)


@needs_gpu
@pytest.mark.parametrize("seed", range(40))
def test_random_shapes(seed):
    """Relative errors against float64 by PyTorch, which tests of its own compare with the recurrence."""
    generator = random.Random(seed)
    # few of these: each takes kernels of its own, which are compiled for seconds
    directions, channels, states = [(1, 40, 8), (3, 256, 8), (2, 96, 16), (1, 5, 3), (1, 64, 64)][seed % 5]
    batch, length = generator.randint(1, 3), int(2 ** generator.uniform(0, 16))
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        leaves = arguments(
            (batch, directions, length, channels, states), dtype, seed=seed, rank=generator.randint(1, 9)
        )
        exact = [x.detach().double().requires_grad_() for x in leaves]
        scan = functools.partial(selective_scan_channels_last, delta_softplus=True)
        for actual, wanted in zip(with_gradients(scan, leaves), with_gradients(scan, exact)):
            assert torch.isfinite(actual).all()
            assert torch.linalg.norm(actual.double() - wanted) <= tolerance * torch.linalg.norm(wanted)


@needs_gpu
@pytest.mark.parametrize("size", [(72, 56), (40, 32, 24)])
def test_network_on_both_back_ends(size, monkeypatch):
    torch.manual_seed(0)
    network = ClinicalFMamba(spatial_dims=len(size)).to(DEVICE).eval()
    x = torch.rand(2, 2, *size, device=DEVICE)
    outputs = []
    for backend in ("triton", "torch"):
        monkeypatch.setenv(BACKEND_VARIABLE, backend)
        with torch.no_grad(), torch.backends.cudnn.flags(allow_tf32=False):
            outputs.append(network(x))
    assert (outputs[0] - outputs[1]).abs().max() < 1e-4


@runs_kernels
def test_optional_arguments():
    leaves = arguments((1, 2, 40, 3, 4), optional=False)
    check(functools.partial(kernels, softplus=True, chunk=32), leaves, True, 1e-5)


@runs_kernels
def test_non_contiguous_inputs():
    u, delta, *rest = arguments((1, 2, 40, 3, 4))
    u, delta = (x.detach().transpose(2, 3).contiguous().transpose(2, 3).requires_grad_() for x in (u, delta))
    check(functools.partial(kernels, softplus=True, chunk=32), [u, delta, *rest], True, 1e-5)


@runs_kernels
@pytest.mark.parametrize("scan, shape", [("cross", (7, 11)), ("raster", (5, 9)), ("tri_plane", (3, 5, 4))])
def test_directions_without_copies(scan, shape):
    """Walking raster tokens in place is the same as scanning copies in sequence order."""
    from custom_nets.ops.selective_scan_triton import selective_scan_triton

    orders = scan_orders(scan, len(shape))
    leaves = arguments((2, len(orders), math.prod(shape), 6, 4))

    def copied(u, delta, A, B, C, D, bias):
        def sequences(x):
            return torch.stack([to_sequences(x[:, k], shape, [order])[:, 0] for k, order in enumerate(orders)], dim=1)

        y = reference(*map(sequences, (u, delta)), A, *map(sequences, (B, C)), D, bias, True)
        return to_raster(y, shape, orders)

    def walked(u, delta, A, B, C, D, bias):
        return selective_scan_triton(u, delta, A, B, C, D, bias, True, orders=orders, spatial_shape=shape)

    exact = [x.detach().double().requires_grad_() for x in leaves]
    for actual, wanted in zip(with_gradients(walked, leaves), with_gradients(copied, exact)):
        assert torch.linalg.norm(actual.double() - wanted) <= 1e-5 * torch.linalg.norm(wanted)


@runs_kernels
@pytest.mark.parametrize("scan, shape", [("cross", (7, 11)), ("raster", (1, 3)), ("tri_plane", (3, 5, 4))])
def test_directional_conv(scan, shape):
    from custom_nets.ops.directional_conv_triton import directional_conv_triton

    orders, width = scan_orders(scan, len(shape)), 4
    sizes = [(2, math.prod(shape), 6), (len(orders), width, 6), (len(orders), 6)]
    leaves = [torch.randn(size, device=DEVICE, requires_grad=True) for size in sizes]

    def copied(x, weight, bias):
        sequences = F.pad(to_sequences(x, list(shape), orders), [0, 0, width - 1, 0])
        taps = [sequences[:, :, j : j + x.shape[1]] * weight[:, None, j] for j in range(width)]
        return to_raster(F.silu(sum(taps) + bias[:, None]), list(shape), orders)

    y = directional_conv_triton(*leaves, orders, shape)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    expected = copied(*exact)
    grad = torch.randn_like(expected)
    gradients = torch.autograd.grad(y, leaves, grad.float()), torch.autograd.grad(expected, exact, grad)
    for actual, wanted in zip([y, *gradients[0]], [expected, *gradients[1]]):
        assert torch.linalg.norm(actual.double() - wanted) <= 1e-5 * torch.linalg.norm(wanted)
    inputs = [x.detach() for x in leaves]
    flat = [number for axes, backward in orders for number in (*axes, int(backward))]
    torch.library.opcheck(torch.ops.custom_nets.directional_conv_forward, (*leaves, flat, list(shape)))
    torch.library.opcheck(torch.ops.custom_nets.directional_conv_backward, (y.detach(), *inputs, flat, list(shape)))


@needs_gpu
@pytest.mark.parametrize("conditioned", [False, True])
def test_block_with_and_without_copies(conditioned, monkeypatch):
    """The block on kernels that walk in place, and the same on PyTorch with copies."""
    shape, orders = [9, 10, 11], scan_orders("tri_plane", 3)
    block = DirectionalSSM(24, orders).to(DEVICE)
    x, condition = (torch.randn(2, 990, 24, device=DEVICE, requires_grad=True) for _ in range(2))
    inputs = [x, *([condition] if conditioned else []), *block.parameters()]
    results = []
    for backend in ("triton", "torch"):
        monkeypatch.setenv(BACKEND_VARIABLE, backend)
        y = block(x, shape, condition if conditioned else None)
        results.append([y, *torch.autograd.grad(y.square().sum(), inputs)])
    for walked, copied in zip(*results):
        assert torch.linalg.norm(walked - copied) <= 1e-5 * torch.linalg.norm(copied)


@runs_kernels
def test_operator():
    """Schema, fake kernels and gradients as torch.compile needs them."""
    u, delta, A, projection, D, bias = arguments((1, 2, 40, 3, 4))
    _, B, C = projection.split([3, 4, 4], dim=-1)
    inputs = [x.detach().requires_grad_() for x in (u, delta, A, B, C)]
    y = kernels(*inputs, D, bias, True, 32)
    torch.library.opcheck(torch.ops.custom_nets.selective_scan_forward, (*inputs, D, None, True, 32, [], []))
    entering = torch.ops.custom_nets.selective_scan_forward(*inputs, None, bias, True, 32, [], [])[1]
    inputs = [x.detach() for x in (y, *inputs, D, bias, entering)]
    orders = [1, 0, 1, 0, 1, 0]
    torch.library.opcheck(torch.ops.custom_nets.selective_scan_backward, (*inputs, True, 32, orders, [8, 5]))


@runs_kernels
def test_chunk_length():
    from custom_nets.ops.selective_scan_triton import SEGMENT, chunk_length

    for sequences, length, channels, states in [(1, 32768, 256, 8), (12, 30 * 30 * 20, 256, 8), (1, 2097152, 64, 8)]:
        chunk = chunk_length(sequences, length, channels, states)
        assert chunk % SEGMENT == 0
        assert sequences * (channels // 64) * (length / chunk) > 1000, "this is what fills a GPU"
    assert chunk_length(1, 1024, 256, 8) == 16, "else there are too few programs"
    assert chunk_length(4096, 4096, 256, 8) == 256, "there are programs enough"


def test_import_without_triton():
    code = "import sys, custom_nets.ops; sys.exit('triton' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_cpu_tensors_are_refused(monkeypatch):
    monkeypatch.setenv(BACKEND_VARIABLE, "triton")
    with pytest.raises(RuntimeError, match="triton can not serve this call: it needs CUDA tensors, these are on cpu"):
        scan_backend(torch.device("cpu"), torch.float32)


def test_missing_triton_is_said(monkeypatch):
    monkeypatch.setattr(sys.modules[scan_backend.__module__], "_HAS_TRITON", False)
    monkeypatch.setenv(BACKEND_VARIABLE, "triton")
    with pytest.raises(RuntimeError, match="it needs Triton 3.3"):
        scan_backend(torch.device("cuda"), torch.float32)


@needs_gpu
def test_choice():
    assert scan_backend(DEVICE, torch.float32) == scan_backend(DEVICE, torch.bfloat16) == "triton"
    assert scan_backend(DEVICE, torch.float64) == "torch"


@needs_gpu
@pytest.mark.parametrize("length", [40, 700, 5000])
def test_channels_first_with_groups_and_gate(length):
    def leaf(*shape):
        return torch.randn(shape, device=DEVICE, requires_grad=True)

    tensors = [leaf(2, 6, length), leaf(2, 6, length), leaf(6, 5), leaf(2, 2, 5, length), leaf(2, 2, 5, length)]
    tensors += [leaf(6), leaf(2, 6, length), leaf(6)]

    def scan(u, delta, A, B, C, D, z, bias):
        y = selective_scan(u, delta, -torch.exp(A), B, C, D, z, bias, True)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), tensors_of[0])]

    tensors_of = [tensors]
    actual = scan(*tensors)
    tensors_of[0] = [x.detach().double().requires_grad_() for x in tensors]
    for got, wanted in zip(actual, scan(*tensors_of[0])):
        assert torch.linalg.norm(got - wanted) <= 1e-5 * torch.linalg.norm(wanted)


@needs_gpu
@pytest.mark.parametrize("shape", [(2, 6, 900, 40, 8), (1, 1, 20000, 33, 16), (3, 700, 100, 64, 2)])
def test_chosen_chunks(shape):
    """Against the PyTorch back end in float64, which is exact, at lengths that a loop over tokens is too slow for."""
    scan = functools.partial(selective_scan_channels_last, delta_softplus=True)
    leaves = arguments(shape)
    expected = with_gradients(scan, [x.detach().double().requires_grad_() for x in leaves])
    for actual, wanted in zip(with_gradients(scan, leaves), expected):
        assert torch.linalg.norm(actual - wanted) <= 1e-5 * torch.linalg.norm(wanted)


@needs_gpu
def test_repeats_exactly_also_checkpointed_and_compiled():
    scan = functools.partial(selective_scan_channels_last, delta_softplus=True)
    leaves = arguments((2, 2, 3000, 64, 8), torch.bfloat16)
    first = with_gradients(scan, leaves)
    others = [scan, functools.partial(checkpoint, scan, use_reentrant=False), torch.compile(scan, fullgraph=True)]
    for other in others:
        for a, b in zip(first, with_gradients(other, leaves)):
            assert torch.equal(a, b)


@needs_gpu
def test_cuda_graph():
    leaves = arguments((1, 2, 3000, 64, 8))
    u, delta, A, projection, D, bias = leaves
    _, B, C = projection.split([3, 8, 8], dim=-1)
    with torch.no_grad():
        selective_scan_channels_last(u, delta, A, B, C, D, bias, True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = selective_scan_channels_last(u, delta, A, B, C, D, bias, True)
        u.neg_()
        graph.replay()
        assert torch.equal(y, selective_scan_channels_last(u, delta, A, B, C, D, bias, True))


@needs_gpu
def test_autocast():
    """Half precision from layers before it, float32 parameters."""
    u, delta, A, projection, D, bias = arguments((1, 2, 300, 32, 8))
    weight = torch.eye(19, device=DEVICE, requires_grad=True)
    with torch.autocast("cuda", torch.bfloat16):
        _, B, C = F.linear(projection, weight).split([3, 8, 8], dim=-1)
        assert B.dtype == torch.bfloat16
        y = selective_scan_channels_last(u.bfloat16(), delta, A, B, C, D, bias, True)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert A.grad.dtype == torch.float32 and weight.grad.isfinite().all() and weight.grad.any()

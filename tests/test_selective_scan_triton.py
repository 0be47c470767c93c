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
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from custom_nets.ops import BACKEND_VARIABLE, scan_backend, selective_scan, selective_scan_channels_last

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


def arguments(shape, dtype=torch.float32, softplus=True, optional=True, seed=0):
    """Random leaves u, delta, A, projection of B and C, D, bias; steps spread over 1e-6 to 50."""
    batch, directions, length, channels, states = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(size, generator=generator)

    step = 1e-6 * 5e7 ** torch.rand((batch, directions, length, channels), generator=generator, dtype=torch.float64)
    delta = torch.log(torch.expm1(step)) if softplus else step
    leaves = [normal(batch, directions, length, channels).to(dtype), delta.to(dtype)]
    leaves += [-torch.exp(normal(directions, channels, states)), normal(batch, directions, length, 3 + 2 * states)]
    leaves[3] = leaves[3].to(dtype)
    # without softplus, a bias could make a step negative
    vectors = [normal(directions, channels), 0.1 * normal(directions, channels).abs()]
    leaves += vectors if optional else [None, None]
    return [None if x is None else x.to(DEVICE).requires_grad_() for x in leaves]


def with_gradients(scan, leaves):
    """Output of a scan and the gradients of its leaves for one fixed weighting of the output."""
    u, delta, A, projection, D, bias = leaves
    _, B, C = projection.split([3, A.shape[-1], A.shape[-1]], dim=-1)
    y = scan(u, delta, A, B, C, D, bias)
    weights = torch.sin(torch.arange(y.numel(), device=y.device).double()).view(y.shape)
    weights = weights.to(torch.bfloat16).to(y.dtype)
    inputs = [x for x in leaves if x is not None]
    return [y.detach(), *torch.autograd.grad(y, inputs, weights)]


def kernels(u, delta, A, B, C, D, bias, softplus, chunk):
    import custom_nets.ops.selective_scan_triton  # noqa: F401

    return torch.ops.custom_nets.selective_scan_forward(u, delta, A, B, C, D, bias, softplus, chunk)[0]


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
def test_optional_arguments():
    leaves = arguments((1, 2, 40, 3, 4), optional=False)
    check(functools.partial(kernels, softplus=True, chunk=32), leaves, True, 1e-5)


@runs_kernels
def test_non_contiguous_inputs():
    u, delta, *rest = arguments((1, 2, 40, 3, 4))
    u, delta = (x.detach().transpose(2, 3).contiguous().transpose(2, 3).requires_grad_() for x in (u, delta))
    check(functools.partial(kernels, softplus=True, chunk=32), [u, delta, *rest], True, 1e-5)


@runs_kernels
def test_operator():
    """Schema, fake kernels and gradients as torch.compile needs them."""
    u, delta, A, projection, D, bias = arguments((1, 2, 40, 3, 4))
    _, B, C = projection.split([3, 4, 4], dim=-1)
    inputs = [x.detach().requires_grad_() for x in (u, delta, A, B, C)]
    y = kernels(*inputs, D, bias, True, 32)
    torch.library.opcheck(torch.ops.custom_nets.selective_scan_forward, (*inputs, D, None, True, 32))
    entering = torch.ops.custom_nets.selective_scan_forward(*inputs, None, bias, True, 32)[1]
    inputs = [x.detach() for x in (y, *inputs, D, bias, entering)]
    torch.library.opcheck(torch.ops.custom_nets.selective_scan_backward, (*inputs, True, 32))


@runs_kernels
def test_chunk_length():
    from custom_nets.ops.selective_scan_triton import SEGMENT, chunk_length

    for sequences, length, channels, states in [(1, 4096, 256, 8), (12, 30 * 30 * 20, 256, 8), (1, 2097152, 64, 8)]:
        chunk = chunk_length(sequences, length, channels, states)
        assert chunk % SEGMENT == 0
        assert 1000 < sequences * (channels // 32) * (length / chunk) < 2200, "this is what fills a GPU"
    assert chunk_length(1, 60, 256, 8) >= 60
    assert chunk_length(4096, 4096, 256, 8) == 4096, "there are programs enough"


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

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

"""The compiled back end against PyTorch's in float64, which tests/test_selective_scan.py proves."""

from __future__ import annotations

import functools
import importlib
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from custom_nets.ops import BACKEND_VARIABLE, scan_backend, selective_scan, selective_scan_channels_last

cpp = importlib.import_module("custom_nets.ops.selective_scan_cpp")

CPU = torch.device("cpu")
NAMES = ("y", "u", "delta", "A", "B and C", "D", "bias")

needs_library = pytest.mark.skipif(bool(cpp.OBSTACLE), reason=cpp.OBSTACLE or "built")


@pytest.fixture(autouse=True)
def no_forced_back_end(monkeypatch):
    monkeypatch.delenv(BACKEND_VARIABLE, raising=False)


def arguments(shape, dtype=torch.float32, softplus=True, optional=True, tokens_innermost=False):
    """Random leaves u, delta, A, projection of B and C, D, bias; steps spread over 1e-6 to 50."""
    batch, directions, length, channels, states = shape
    generator = torch.Generator().manual_seed(sum(shape))

    def normal(*size):
        return torch.randn(size, generator=generator)

    step = 1e-6 * 5e7 ** torch.rand((batch, directions, length, channels), generator=generator, dtype=torch.float64)
    step[0, 0, 0, 0], step[-1, -1, -1, -1] = 1e-6, 50
    sequences = [normal(*step.shape), torch.log(torch.expm1(step)) if softplus else step]
    if tokens_innermost:
        sequences = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in sequences]
    leaves = [*sequences, normal(batch, directions, length, 3 + 2 * states)]
    leaves = [x.to(dtype) for x in leaves]
    leaves.insert(2, -torch.exp(normal(directions, channels, states)))
    # without softplus, a bias could make a step negative
    vectors = [normal(directions, channels), 0.1 * normal(directions, channels).abs()]
    leaves += vectors if optional else [None, None]
    return [None if x is None else x.requires_grad_() for x in leaves]


def with_gradients(scan, leaves, softplus=True):
    """Output of a scan and the gradients of its leaves for one fixed weighting of the output."""
    u, delta, A, projection, D, bias = leaves
    _, B, C = projection.split([3, A.shape[-1], A.shape[-1]], dim=-1)
    y = scan(u, delta, A, B, C, D, bias, softplus)
    weights = torch.cos(torch.arange(y.numel(), dtype=torch.float64)).view(y.shape).to(torch.bfloat16).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, [x for x in leaves if x is not None], weights)]


def check(leaves, tolerance=1e-5, softplus=True):
    assert scan_backend(CPU, leaves[0].dtype) == "cpp"
    exact = [None if x is None else x.detach().double().requires_grad_() for x in leaves]
    expected = with_gradients(selective_scan_channels_last, exact, softplus)
    actual = with_gradients(selective_scan_channels_last, leaves, softplus)
    inputs = [x for x in leaves if x is not None]
    for name, x, wanted, source in zip(NAMES, actual, expected, [leaves[0], *inputs]):
        assert x.dtype == source.dtype, name
        error, scale = torch.linalg.norm(x.double() - wanted), torch.linalg.norm(wanted)
        assert error <= tolerance * scale, f"{name} is off by {error:.1e}, its norm is {scale:.1e}"


@needs_library
@pytest.mark.parametrize("tokens_innermost", [False, True])
@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, 1, 1, 1),
        (2, 3, 33, 5, 3),
        (1, 2, 129, 33, 8),
        (2, 1, 257, 48, 16),
        (1, 1, 67, 20, 64),
        (1, 1, 65, 16, 7),
        (1, 1, 40, 8, 70),
    ],
)
@pytest.mark.parametrize("softplus", [True, False])
def test_against_float64(shape, softplus, tokens_innermost):
    check(arguments(shape, softplus=softplus, tokens_innermost=tokens_innermost), softplus=softplus)


@needs_library
@pytest.mark.parametrize("tokens_innermost", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, tokens_innermost):
    check(arguments((1, 2, 41, 18, 8), dtype, tokens_innermost=tokens_innermost), 2 * torch.finfo(dtype).eps)


@needs_library
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_as_pytorch_does(dtype):
    """Through the skip alone every number comes out as it went in, or rounded once more."""
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    u = numbers[numbers.isfinite()].view(1, 1, -1, 1)
    zero = torch.zeros(u.shape, dtype=dtype)
    for factor in (1.0, 0.3, 3.0, 1e-4):
        y = selective_scan_channels_last(u, zero, -torch.ones(1, 1, 1), zero, zero, torch.full((1, 1), factor))
        torch.testing.assert_close(y, (u.float() * factor).to(dtype), rtol=0, atol=0)
    nan = torch.full((1, 1, 1, 1), torch.nan, dtype=dtype)
    assert selective_scan_channels_last(nan, nan, -torch.ones(1, 1, 1), nan, nan).isnan()


@needs_library
@pytest.mark.parametrize("softplus", [True, False])
def test_without_optional_arguments(softplus):
    check(arguments((1, 2, 70, 19, 4), softplus=softplus, optional=False), softplus=softplus)


@needs_library
def test_mixed_dtypes():
    """As under autocast: projections in half precision, or a step in double precision."""
    leaves = arguments((1, 2, 40, 9, 4))
    leaves[3] = leaves[3].detach().bfloat16().requires_grad_()
    leaves[1] = leaves[1].detach().double().requires_grad_()
    expected = with_gradients(selective_scan_channels_last, [x.detach().double().requires_grad_() for x in leaves])
    for x, wanted in zip(with_gradients(selective_scan_channels_last, leaves), expected):
        assert torch.linalg.norm(x.double() - wanted) <= 4e-3 * torch.linalg.norm(wanted)


@needs_library
def test_extreme_steps():
    """Numbers that under- or overflow become 0 or infinite, as in PyTorch, and NaN stays NaN."""
    delta = torch.tensor([-1e30, -200, -90, -50, -1e-6, 0, 1e-6, 19, 21, 200, 1e30])
    u = torch.ones(1, 1, len(delta), 1)
    A, one = torch.full((1, 1, 1), -1.0), torch.ones_like(u)
    inputs = [u, delta.view_as(u).clone().requires_grad_(), A, one, one, None, None, True]
    actual = selective_scan_channels_last(*inputs)
    expected = selective_scan_channels_last(
        *[x.detach().double() if isinstance(x, torch.Tensor) else x for x in inputs]
    )
    torch.testing.assert_close(actual.double(), expected, rtol=1e-6, atol=1e-38)
    (grad,) = torch.autograd.grad(actual.sum(), inputs[1])
    assert grad.isfinite().all()
    for step, expected in ((60, torch.inf), (100, torch.nan)):
        inputs[1] = torch.full_like(u, step)
        y = selective_scan_channels_last(*inputs[:2], -A, *inputs[3:])[0, 0, 2:]
        assert y.allclose(torch.full_like(y, expected), equal_nan=True), "an unstable system"
    inputs[1] = torch.full_like(u, torch.nan)
    assert selective_scan_channels_last(*inputs).isnan().all()


@needs_library
def test_long_memory():
    """Rounding may not add up over many tokens of nearly no decay."""
    leaves = arguments((1, 1, 20000, 16, 2))
    leaves[1] = (leaves[1].detach() * 0.1 - 10).requires_grad_()
    check(leaves)


@needs_library
def test_layout_is_kept_and_views_are_read_in_place():
    u, delta, A, projection, D, bias = (x.detach() for x in arguments((2, 2, 70, 20, 4), tokens_innermost=True))
    B, C = projection[..., 3:7], projection[..., 7:]
    scan = functools.partial(selective_scan_channels_last, delta_softplus=True)
    y = scan(u, delta, A, B, C, D, bias)
    assert y.stride() == u.stride()
    views = [x.contiguous() for x in (u, delta)] + [A.transpose(1, 2).contiguous().transpose(1, 2)]
    views += [x.transpose(2, 3).contiguous().transpose(2, 3) for x in (B, C)]
    assert torch.equal(scan(*views, D, bias), y)
    spread = torch.stack([u, u], dim=-1)[..., 0]
    assert torch.equal(scan(spread, delta.expand_as(u), A, B, C, D, bias), y)


@needs_library
def test_empty():
    for shape in [(0, 1, 5, 3, 2), (1, 2, 0, 3, 2)]:
        u, A, B = torch.ones(shape[:4]), torch.ones(shape[1], 3, 2), torch.ones(*shape[:3], 2)
        inputs = [x.requires_grad_() for x in (u, u.clone(), A, B, B.clone())]
        y = selective_scan_channels_last(*inputs)
        grads = torch.autograd.grad(y.sum(), inputs)
        assert y.shape == u.shape and not any(g.any() for g in grads)


@needs_library
def test_threads_and_repeats_change_nothing():
    leaves = arguments((1, 2, 300, 70, 8))
    default = torch.get_num_threads()
    results = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        results.append(with_gradients(selective_scan_channels_last, leaves))
    torch.set_num_threads(default)
    for others in zip(*results):
        assert all(torch.equal(others[0], x) for x in others)


@needs_library
def test_checkpointed_and_compiled():
    leaves = arguments((2, 2, 100, 20, 8))
    first = with_gradients(selective_scan_channels_last, leaves)
    others = [
        functools.partial(checkpoint, selective_scan_channels_last, use_reentrant=False),
        torch.compile(selective_scan_channels_last, fullgraph=True, backend="aot_eager"),
    ]
    for other in others:
        for a, b in zip(first, with_gradients(other, leaves)):
            assert torch.equal(a, b)


@needs_library
def test_operators():
    """Schema, fake kernels and gradients as torch.compile needs them."""
    operators = torch.ops.custom_nets
    for tokens_innermost in (False, True):
        leaves = arguments((1, 2, 70, 5, 4), tokens_innermost=tokens_innermost)
        u, delta, A, projection, D, bias = (x.detach() for x in leaves)
        inputs = [x.requires_grad_() for x in (u, delta, A, projection[..., 3:7], projection[..., 7:].bfloat16())]
        torch.library.opcheck(operators.selective_scan_cpu_forward, (*inputs, D, None, True))
        y, entering = operators.selective_scan_cpu_forward(*inputs, None, bias, True)
        inputs = [x.detach() for x in (y, *inputs, D, bias, entering)]
        torch.library.opcheck(operators.selective_scan_cpu_backward, (*inputs, True))


class Scan(torch.nn.Module):
    def forward(self, u, delta, A, B, C):
        return selective_scan(u, delta, A, B, C, delta_softplus=True)


def sequences(length):
    return [*torch.randn(2, 2, 6, length), -torch.rand(6, 3), *torch.randn(2, 2, 3, length)]


@needs_library
def test_export_keeps_the_operator():
    length = torch.export.Dim("length", min=2)
    shapes = [{2: length}, {2: length}, None, {2: length}, {2: length}]
    program = torch.export.export(Scan(), tuple(sequences(80)), dynamic_shapes=shapes)
    assert "selective_scan_cpu_forward" in program.graph_module.code
    other = sequences(133)
    torch.testing.assert_close(program.module()(*other), Scan()(*other))


@needs_library
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*legacy TorchScript-based ONNX")
def test_scripted_and_traced_modules_do_without_the_operator():
    inputs = sequences(40)
    for module in (torch.jit.script(Scan()), torch.jit.trace(Scan(), inputs)):
        assert "selective_scan_cpu" not in str(module.inlined_graph)
        torch.testing.assert_close(module(*inputs), Scan()(*inputs), rtol=1e-4, atol=1e-5)


@needs_library
def test_choice(monkeypatch):
    assert scan_backend(CPU, torch.float32) == scan_backend(CPU, torch.bfloat16) == "cpp"
    assert scan_backend(CPU, torch.float64) == "torch"
    monkeypatch.setenv(BACKEND_VARIABLE, "cpp")
    with pytest.raises(RuntimeError, match="cpp can not serve this call: it has no float64 kernel"):
        scan_backend(CPU, torch.float64)
    with pytest.raises(RuntimeError, match="cpp can not serve this call: it needs CPU tensors, these are on cuda"):
        scan_backend(torch.device("cuda"), torch.float32)


def test_import_builds_nothing():
    code = "import sys, custom_nets.ops; sys.exit('custom_nets.ops.selective_scan_cpp' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_a_compiler_pytorch_computes(tmp_path):
    code = """
import os, torch
from custom_nets.ops import scan_backend, selective_scan
for _ in range(2):
    y = selective_scan(torch.ones(1, 4, 9), torch.ones(1, 4, 9), -torch.ones(4, 2), *2 * [torch.ones(1, 2, 9)])
assert y.isfinite().all() and scan_backend(y.device, y.dtype) == "torch"
os.environ["CUSTOM_NETS_SCAN"] = "cpp"
scan_backend(y.device, y.dtype)
"""
    environment = {**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path), "CXX": "/bin/false"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    first, *others, last = result.stderr.strip().splitlines()
    assert first.startswith("Building the selective scan for this CPU, once")
    assert "the selective scan will be several times slower on this CPU: its C++ library could not be" in others[0]
    assert sum("several times slower" in line for line in others) == 1
    assert last.startswith("RuntimeError: the scan back end cpp can not serve this call: its C++ library could not be")
    assert "/bin/false" in last and "non-zero exit status" in last


@pytest.mark.parametrize(
    "variable, value, cause",
    [("CXX", "no-such-compiler", "no-such-compiler"), ("CXX", "'", "quot"), ("TORCH_EXTENSIONS_DIR", "file", "file")],
)
def test_cause_is_named(variable, value, cause, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv(variable, value)
    library, obstacle = cpp._load()
    assert library is None and "could not be built" in obstacle and cause in obstacle
    assert [path.name for path in tmp_path.rglob("*.*")] == []


@needs_library
def test_a_compiler_that_fails_is_quoted(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(cpp, "_FLAGS", ["--no-such-flag"])
    library, obstacle = cpp._load()
    assert library is None and "no-such-flag" in obstacle and "\n" not in obstacle


@needs_library
def test_built_once_even_if_several_want_it(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    path = cpp._library_path()
    path.parent.mkdir()
    path.write_bytes(b"not a library")
    with ThreadPoolExecutor(2) as pool:
        loaded = [future.result() for future in [pool.submit(cpp._load) for _ in range(2)]]
    assert [obstacle for _, obstacle in loaded] == ["", ""]
    assert list(path.parent.iterdir()) == [path]
    caplog.clear()
    assert cpp._load()[1] == "" and not caplog.records, "it is there now"


@needs_library
@pytest.mark.parametrize("flags", [["-fopenmp"], []])
def test_lesser_builds(flags, tmp_path, monkeypatch):
    """What other machines may fall back to: the smallest vectors, no threads."""
    library = cpp._build(tmp_path / "scan.so", flags)
    monkeypatch.setattr(cpp, "_LIBRARY", library)
    check(arguments((2, 2, 130, 37, 13)))
    check(arguments((1, 2, 66, 21, 8), torch.bfloat16, tokens_innermost=True), 2 * torch.finfo(torch.bfloat16).eps)

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

from __future__ import annotations

import importlib.util
import itertools
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from custom_nets.ops import BACKEND_VARIABLE, scan_backend, selective_scan, selective_scan_channels_last

torch_scan = importlib.import_module("custom_nets.ops.selective_scan_torch")
OPTIONS = ("D", "z", "delta_bias")


def reference(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False):
    """The recurrence as the paper states it, one token after the other, in the precision of its arguments."""
    if delta_bias is not None:
        delta = delta + delta_bias.unsqueeze(-1)
    if delta_softplus:
        delta = torch.logaddexp(delta, torch.zeros_like(delta))
    B, C = (x if x.dim() == 4 else x.unsqueeze(1) for x in (B, C))
    B, C = (x.repeat_interleave(u.shape[1] // x.shape[1], dim=1) for x in (B, C))
    x = u.new_zeros(u.shape[0], *A.shape)
    outputs = []
    for u_t, step, B_t, C_t in zip(
        u.unsqueeze(2).unbind(-1), delta.unsqueeze(2).unbind(-1), B.unbind(-1), C.unbind(-1)
    ):
        x = torch.exp(step * A) * x + step * B_t * u_t
        outputs.append((x * C_t).sum(-1))
    y = torch.stack(outputs, dim=-1)
    if D is not None:
        y = y + D.unsqueeze(-1) * u
    return y if z is None else y * z * torch.sigmoid(z)


def arguments(length, states, groups=1, softplus=False, options=OPTIONS, batch=2, channels=4, dtype=torch.float64):
    """Random arguments whose steps, after bias and softplus, spread over 1e-6 to 50."""
    generator = torch.Generator().manual_seed(length * 100 + states)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    exponent = torch.rand((batch, channels, length), generator=generator, dtype=torch.float64)
    delta = 1e-6 * 5e7**exponent
    delta[0, 0, 0], delta[-1, -1, -1] = 1e-6, 50
    grouped = (batch, groups, states, length) if groups > 1 else (batch, states, length)
    values = {
        "u": normal(batch, channels, length),
        "delta": delta,
        "A": -torch.exp(normal(channels, states)),
        "B": normal(*grouped),
        "C": normal(*grouped),
        "D": normal(channels),
        "z": normal(batch, channels, length),
        "delta_bias": 0.1 * normal(channels).abs(),
    }
    if softplus:
        values["delta"] = torch.log(torch.expm1(delta))
    if "delta_bias" in options:
        values["delta"] = values["delta"] - values["delta_bias"].unsqueeze(-1) if softplus else values["delta"]
    values = {name: x.to(dtype) for name, x in values.items() if name in options or name not in OPTIONS}
    return {name: x.requires_grad_() for name, x in values.items()}


def with_gradients(scan, inputs, softplus):
    """Output of ``scan`` and the gradients of all its inputs for one fixed weighting of the output."""
    y = scan(**inputs, delta_softplus=softplus)
    weights = torch.sin(torch.arange(y.numel(), dtype=torch.float64)).view(y.shape).to(y.dtype)
    gradients = torch.autograd.grad((y * weights).sum(), list(inputs.values()))
    return {"y": y.detach(), **dict(zip(inputs, gradients))}


def check(inputs, softplus, tolerance):
    """Output and every gradient against the float64 reference, relative to the largest value of each."""
    exact = {name: x.detach().double().requires_grad_() for name, x in inputs.items()}
    expected = with_gradients(reference, exact, softplus)
    for name, actual in with_gradients(selective_scan, inputs, softplus).items():
        assert actual.dtype == inputs["u" if name == "y" else name].dtype, name
        error, scale = (actual.double() - expected[name]).abs().max(), expected[name].abs().max()
        assert error <= tolerance * scale, f"{name} is off by {error:.1e}, its values reach {scale:.1e}"


@pytest.fixture(autouse=True)
def pytorch(monkeypatch):
    """Other back ends have their own tests."""
    monkeypatch.setenv(BACKEND_VARIABLE, "torch")


@pytest.fixture
def small_blocks(monkeypatch):
    """Lets the scan cross many block borders on short sequences; returns how often it asked for a length."""
    calls = []

    def block_length(sequences, states, length, on_cpu):
        calls.append(length)
        return min(length, 20)

    monkeypatch.setattr(torch_scan, "_block_length", block_length)
    return calls


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-8), (torch.float32, 2e-5)])
@pytest.mark.parametrize("softplus", [False, True])
@pytest.mark.parametrize("states", [1, 8, 16])
@pytest.mark.parametrize("length", [1, 7, 63, 257])
def test_against_reference(length, states, softplus, dtype, tolerance):
    check(arguments(length, states, softplus=softplus, dtype=dtype), softplus, tolerance)


@pytest.mark.parametrize("length", [19, 20, 21, 257])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_blocks_and_groups(length, groups, small_blocks):
    check(arguments(length, 8, groups, softplus=True), True, 1e-8)
    assert small_blocks == [length, length], "forward and backward should both have asked"


@pytest.mark.parametrize("softplus", [False, True])
@pytest.mark.parametrize("options", [o for n in range(3) for o in itertools.combinations(OPTIONS, n)])
def test_optional_arguments(options, softplus):
    check(arguments(23, 3, groups=2, softplus=softplus, options=options), softplus, 1e-8)


def test_gradcheck(monkeypatch):
    monkeypatch.setattr(torch_scan, "_block_length", lambda sequences, states, length, on_cpu: 4)
    inputs = arguments(9, 2, groups=2, softplus=True)
    inputs["delta"] = torch.linspace(-3, 2, inputs["delta"].numel(), dtype=torch.float64).view_as(inputs["delta"])
    inputs["delta"].requires_grad_()
    assert torch.autograd.gradcheck(lambda *x: selective_scan(*x, delta_softplus=True), tuple(inputs.values()))


def test_long_sequence_in_its_own_blocks():
    shape = {"batch": 1, "channels": 64}
    assert torch_scan._block_length(64, 16, 3001, True) < 3001
    check(arguments(3001, 16, softplus=True, dtype=torch.float32, **shape), True, 1e-4)


def test_no_buffer_holds_all_states():
    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(x, torch.Tensor):
                    self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
            return out

    inputs = arguments(12000, 16, softplus=True, batch=1, channels=64, dtype=torch.float32)
    with Largest() as largest:
        with_gradients(selective_scan, inputs, True)
    assert 0 < largest.elements < 12000 * 64 * 16 / 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_kept_and_computed_in_float32(dtype):
    inputs = arguments(63, 8, softplus=True, dtype=dtype)
    for name in ("A", "D", "delta_bias"):
        inputs[name] = inputs[name].detach().float().requires_grad_()
    check(inputs, True, 3 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("gate", [torch.bfloat16, torch.float32, torch.float64])
def test_gate_of_another_dtype(gate, dtype):
    inputs = arguments(23, 3, softplus=True, dtype=dtype)
    inputs["z"] = inputs["z"].detach().to(gate)
    y = selective_scan(**inputs, delta_softplus=True)
    expected = reference(**{name: x.double() for name, x in inputs.items()}, delta_softplus=True)
    assert y.dtype == dtype
    assert (y.double() - expected).abs().max() <= 3 * max(torch.finfo(dtype).eps, 5e-6) * expected.abs().max()


@pytest.mark.parametrize("softplus", [False, True])
def test_channels_last_equals_channels_first(softplus, small_blocks):
    """K directions, channels last, are K groups."""
    inputs = arguments(41, 3, groups=2, softplus=softplus, options=("D", "delta_bias"))
    expected = with_gradients(selective_scan, inputs, softplus)

    def channels_last(u, delta, A, B, C, D, delta_bias, delta_softplus):
        u, delta = (x.unflatten(1, (2, 2)).transpose(2, 3) for x in (u, delta))
        A, D, delta_bias = (x.unflatten(0, (2, 2)) for x in (A, D, delta_bias))
        B, C = B.transpose(2, 3), C.transpose(2, 3)
        y = selective_scan_channels_last(u, delta, A, B, C, D, delta_bias, delta_softplus)
        return y.transpose(2, 3).flatten(1, 2)

    for name, actual in with_gradients(channels_last, inputs, softplus).items():
        torch.testing.assert_close(actual, expected[name], atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize(
    "name, shape",
    [("delta", (2, 4, 6)), ("A", (3, 2)), ("B", (2, 3, 5)), ("C", (2, 2, 6)), ("B", (2, 3, 2, 5)), ("u", (1, 4, 5))],
)
def test_shapes_are_checked(name, shape):
    inputs = {**arguments(5, 2, options=()), name: torch.rand(shape, dtype=torch.float64)}
    with pytest.raises(ValueError, match="do not fit together|should both be"):
        selective_scan(**inputs)


def test_back_end_variable(monkeypatch):
    inputs = arguments(5, 2)
    monkeypatch.delenv(BACKEND_VARIABLE)
    assert BACKEND_VARIABLE == "CUSTOM_NETS_SCAN"
    assert scan_backend(torch.device("cpu"), torch.float64) == "torch"
    expected = selective_scan(**inputs)
    monkeypatch.setenv(BACKEND_VARIABLE, "torch")
    assert torch.equal(selective_scan(**inputs), expected)
    monkeypatch.setenv(BACKEND_VARIABLE, "cudnn")
    with pytest.raises(ValueError, match="CUSTOM_NETS_SCAN=cudnn names no back end, choose one of .*torch"):
        selective_scan(**inputs)
    monkeypatch.setenv(BACKEND_VARIABLE, "mamba_ssm")
    with pytest.raises(RuntimeError, match="mamba_ssm can not serve this call: .*cpu"):
        selective_scan(**inputs)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_script_and_trace():
    example = [x.detach() for x in arguments(25, 3, groups=2, softplus=True).values()]
    other = [x.detach() for x in arguments(38, 3, groups=2, softplus=True).values()]
    scripted = torch.jit.script(selective_scan)
    for inputs in (example, other):
        torch.testing.assert_close(scripted(*inputs, delta_softplus=True), selective_scan(*inputs, delta_softplus=True))
    torch.testing.assert_close(scripted(*example[:5]), selective_scan(*example[:5]), equal_nan=True)
    traced = torch.jit.trace(lambda *x: selective_scan(*x, delta_softplus=True), example)
    torch.testing.assert_close(traced(*example), selective_scan(*example, delta_softplus=True))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("groups", [1, 2])
def test_against_mamba_ssm(groups, dtype, tolerance, monkeypatch):
    if not torch.cuda.is_available():
        pytest.skip("mamba-ssm's kernel needs CUDA")
    pytest.importorskip("selective_scan_cuda", reason="mamba-ssm is not installed with its kernel")
    inputs = arguments(257, 8, groups, softplus=True, dtype=dtype)
    for name in inputs:
        value = inputs[name].detach().cuda()
        inputs[name] = (value.float() if name in ("A", "D", "delta_bias") else value).requires_grad_()
    results = {}
    for back_end in ("torch", "mamba_ssm"):
        monkeypatch.setenv(BACKEND_VARIABLE, back_end)
        results[back_end] = with_gradients(selective_scan, inputs, True)
    for name, expected in results["torch"].items():
        error = (results["mamba_ssm"][name].float() - expected.float()).abs().max() / expected.float().abs().max()
        assert error < tolerance, f"{name} is off by {error:.1e}"


@pytest.mark.slow
@pytest.mark.parametrize("backward, factor", [(False, 20), (True, 40)])
def test_many_times_as_fast_as_a_loop(backward, factor):
    """With one thread or with all, since a busy machine prefers one; the loop may use either, too."""
    pytest.importorskip("fire")
    path = Path(__file__).parents[1] / "benchmarks" / "selective_scan.py"
    spec = importlib.util.spec_from_file_location("scan_benchmark", path)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    if "cpp" not in benchmark.cpu_backends():
        pytest.skip("the compiled back end is what is this fast")
    threads = torch.get_num_threads()
    times = []
    for number in {1, threads}:
        torch.set_num_threads(number)
        times.append(benchmark.cpu_times(["cpp"], backward))
    torch.set_num_threads(threads)
    loop, scan = (min(t[name] for t in times) for name in ("loop", "cpp"))
    assert loop / scan >= factor, f"{loop:.1f} ms and {scan:.1f} ms"

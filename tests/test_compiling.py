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

import copy
import functools
import logging
from collections.abc import Callable

import pytest
import torch

from custom_nets.blocks import CrossMambaBlock, DilatedGatedConvBlock, DirectionalSSM, MambaBlock, TokenExchange
from custom_nets.nets import ClinicalFMamba, build_network, prepare_for_inference
from scripts.compiling import BlockCompiler, CompiledForward, prepare_network

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def network() -> ClinicalFMamba:
    torch.manual_seed(0)
    return ClinicalFMamba(2, channels=(8, 16, 32), latent_depth=1).eval()


def image(*size: int) -> torch.Tensor:
    return torch.rand(1, 2, *size, generator=torch.Generator().manual_seed(1))


def replace_compiler(monkeypatch: pytest.MonkeyPatch, compiler: Callable) -> list[Callable]:
    """By one that takes no minutes; returns what has been compiled."""
    compiled: list[Callable] = []

    def compile_(function: Callable, **_kwargs: object) -> Callable:
        def call(*args: object, **kwargs: object) -> torch.Tensor:
            compiled.append(function)
            return compiler(function)(*args, **kwargs)

        return call

    monkeypatch.setattr(torch, "compile", compile_)
    return compiled


def without_compiler(_function: Callable) -> Callable:
    raise RuntimeError("no C++\ncompiler")


def test_weights_keep_their_names_and_may_be_loaded_afterwards(monkeypatch):
    compiled = replace_compiler(monkeypatch, lambda function: function)
    plain, other = network(), prepare_network(ClinicalFMamba(2, channels=(8, 16, 32), latent_depth=1), "cpu", True)
    other.eval().load_state_dict(plain.state_dict())
    torch.testing.assert_close(other(image(32, 24)), plain(image(32, 24)), rtol=0, atol=0)
    assert len(compiled) == 1


def test_it_trains(monkeypatch):
    replace_compiler(monkeypatch, lambda function: function)
    grads = []
    for net in (network(), prepare_network(network(), "cpu", True)):
        net.train()(image(32, 24)).mean().backward()
        grads.append(net.stem.weight.grad)
    torch.testing.assert_close(*grads, rtol=0, atol=0)


def test_without_a_compiler_one_warning_says_so(monkeypatch, caplog):
    replace_compiler(monkeypatch, without_compiler)
    net = prepare_network(network(), "cpu", compile=True)
    for size in ((32, 24), (16, 16)):
        torch.testing.assert_close(net(image(*size)), network()(image(*size)), rtol=0, atol=0)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage() == "Not compiled, which is slower: RuntimeError: no C++ compiler"


def test_what_the_network_refuses_it_still_refuses(monkeypatch):
    replace_compiler(monkeypatch, lambda function: function)
    with pytest.raises(ValueError, match="a batch of 2D images with 2 channels"):
        prepare_network(network(), "cpu", compile=True)(torch.rand(1, 3, 16, 16))


def test_too_little_memory_is_no_missing_compiler(monkeypatch, caplog):
    def too_large(_function: Callable) -> Callable:
        raise torch.cuda.OutOfMemoryError

    replace_compiler(monkeypatch, too_large)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        prepare_network(network(), "cpu", compile=True)(image(16, 16))
    assert not caplog.records


def test_only_the_outermost_blocks_are_compiled_while_a_function_runs(monkeypatch, caplog):
    compiled = replace_compiler(monkeypatch, lambda function: function)
    net = network()
    blocks = (MambaBlock, CrossMambaBlock, DilatedGatedConvBlock, TokenExchange)
    expected = {module for module in net.modules() if isinstance(module, blocks)}
    assert torch.equal(BlockCompiler(net)(net, image(32, 24)), network()(image(32, 24)))
    assert {function.__self__ for function in compiled} == expected
    assert {function.__name__ for function in compiled if function.__self__ is not net.exchange} == {"_forward"}

    monkeypatch.undo()
    replace_compiler(monkeypatch, without_compiler)
    call = BlockCompiler(net)
    for _ in range(2):
        assert torch.equal(call(net, image(32, 24)), network()(image(32, 24)))
    assert len(caplog.records) == 1
    assert not any({"forward", "_forward"} & vars(module).keys() for module in net.modules())


def test_scans_outside_of_blocks_are_compiled_too(monkeypatch):
    compiled = replace_compiler(monkeypatch, lambda function: function)
    net = build_network("mambadfuse", spatial_dims=2).eval()
    with torch.no_grad():
        BlockCompiler(net)(net, image(8, 8))
    scans = {module for fusion in net.fusion for module in fusion.modules() if isinstance(module, DirectionalSSM)}
    assert scans and {f.__self__ for f in compiled if isinstance(f.__self__, DirectionalSSM)} == scans


def graphs_of(monkeypatch: pytest.MonkeyPatch, net: torch.nn.Module, function: Callable[[], None]) -> int:
    """How many graphs are made of its blocks while the function runs twice."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
        call = BlockCompiler(net)
        for _ in range(2):
            call(function)
    assert call._works and not torch._dynamo.utils.counters["graph_break"]
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("amp, use_checkpoint", [(False, False), (True, True)])
# not 16^3: PyTorch 2.13's bfloat16 gradient of a 3D convolution's weight over 2^3 voxels reads what nobody wrote
@pytest.mark.parametrize("size, graphs", [((16, 16), 7), ((24, 24, 24), 5)])
def test_blocks_of_a_kind_share_a_graph_and_train_alike(monkeypatch, size, graphs, amp, use_checkpoint):
    torch.manual_seed(0)
    options = {"channels": (8, 16, 32), "latent_depth": 3, "use_checkpoint": use_checkpoint}
    plain = ClinicalFMamba(len(size), **options)
    net = copy.deepcopy(plain)
    x = torch.cat([image(*size), image(*size).flip(-1)])

    def step(trained: ClinicalFMamba) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            trained(x).square().mean().backward()

    for _ in range(2):
        step(plain)
    assert graphs_of(monkeypatch, net, lambda: step(net)) == graphs
    gradients = [torch.cat([weight.grad.flatten() for weight in n.parameters()]) for n in (net, plain)]
    assert (gradients[0] - gradients[1]).norm() <= (0.05 if amp else 1e-4) * gradients[1].norm()
    for buffer, expected in zip(net.buffers(), plain.buffers()):
        torch.testing.assert_close(buffer, expected)


def test_blocks_of_a_prepared_network(monkeypatch):
    net = prepare_for_inference(network(), torch.bfloat16)
    outputs = []
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = net(image(32, 24))
        graphs_of(monkeypatch, net, lambda: outputs.append(net(image(32, 24))))
    torch.testing.assert_close(outputs, [expected, expected], rtol=0, atol=1e-2)


@pytest.mark.slow
def test_with_a_compiler(caplog):
    layers = torch.nn.Sequential(torch.nn.Conv2d(2, 4, 3, padding=1), torch.nn.Sigmoid()).eval()
    x = image(12, 8)
    expected = layers(x)
    torch.testing.assert_close(prepare_network(layers, "cpu", compile=True)(x), expected)
    assert not [record for record in caplog.records if record.name == "scripts.compiling"]


@needs_gpu
@pytest.mark.parametrize("amp", [False, True])
def test_recorded_shapes(amp):
    plain = prepare_network(network(), "cuda")
    net = prepare_network(network(), "cuda", compile=True)
    forward = net.forward
    assert isinstance(forward, CompiledForward)
    forward.MAX_SHAPES = 2
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, enabled=amp):
        for weight in (None, 0.5):
            if weight is not None:
                for module in (plain, net):
                    module.head.weight.mul_(weight)
            for size in ((32, 24), (16, 16), (32, 24), (40, 40)):
                x = image(*size).cuda()
                torch.testing.assert_close(net(x), plain(x), rtol=0, atol=1e-2 if amp else 1e-5)
    assert len(forward._recorded) == 2


@needs_gpu
def test_results_of_a_graph_stay():
    net = prepare_network(network(), "cuda", compile=True)
    with torch.no_grad():
        first = net(image(32, 24).cuda())
        kept = first.clone()
        net(torch.zeros(1, 2, 32, 24, device="cuda"))
    assert torch.equal(first, kept)

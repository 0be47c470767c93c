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
"""The switch ``compile`` of the configs: networks that are compiled, and recorded as CUDA graphs, where that works."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from custom_nets.blocks import (
    CrossMambaBlock,
    DilatedGatedConvBlock,
    DirectionalSSM,
    MambaBlock,
    SourceRefinement,
    TokenExchange,
)

__all__ = ["BlockCompiler", "CompiledForward", "channels_last", "prepare_network"]

CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}

RECOMPILE_LIMIT = 64

# What is compiled: this method of the outermost such modules. It lies inside of what activation checkpointing repeats.
BLOCKS: dict[type[torch.nn.Module], str] = {
    MambaBlock: "_forward",
    CrossMambaBlock: "_forward",
    DilatedGatedConvBlock: "_forward",
    TokenExchange: "forward",
    SourceRefinement: "forward",
    DirectionalSSM: "forward",
}

Call = Callable[..., torch.Tensor]


def prepare_network(network: torch.nn.Module, device: torch.device | str, compile: bool = False) -> torch.nn.Module:
    """
    Bring a network to its device, on a GPU with channels last, in which its convolutions are fastest.

    Args:
        network: changed in place; the names of its weights stay as they are, and weights may be loaded afterwards.
        device: where it shall run.
        compile: see :class:`CompiledForward`.

    Returns:
        ``network``.
    """
    network.to(device)
    if torch.device(device).type == "cuda":
        channels_last(network)
    if compile:
        network.forward = CompiledForward(network)  # type: ignore[method-assign]
    return network


def channels_last(network: torch.nn.Module) -> None:
    """Lay the weights of convolutions out so, which their results then follow."""
    for weight in network.parameters():
        if weight.ndim in CHANNELS_LAST:
            weight.data = weight.data.to(memory_format=CHANNELS_LAST[weight.ndim])


class CompiledForward:
    """
    Forward pass of a network, faster for shapes that come again.

    On a GPU, evaluation is recorded as one CUDA graph for each shape of the input, with its blocks compiled, since the
    networks here launch thousands of small kernels. From the 9th shape on, and with gradients, it runs kernel by
    kernel: a training step is recorded as a whole, see `CUDAGraphTrainer`. Elsewhere, `torch.compile` makes one pass
    for all shapes, which takes minutes.

    Where a compiler is missing or fails, one warning says so and the network runs as it is.

    Args:
        network: its ``forward`` may be replaced by this afterwards.
        whole: on a GPU, compile the whole network, not only its blocks; that takes a minute for each shape.
    """

    MAX_SHAPES = 8
    WARM_UP = 3

    def __init__(self, network: torch.nn.Module, whole: bool = False) -> None:
        self.network = network
        self.whole = whole
        self._plain: Call = network.forward
        self._compiled: Call | None = None
        self._with_compiled_blocks = BlockCompiler(network)
        self._recorded: dict[tuple, Call] = {}
        self._pool: Any = None
        self._failed = False

    def __call__(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """
        Args:
            x: input of the network, as are ``args`` and ``kwargs``; with the latter two it runs as it is.

        Returns:
            its output.
        """
        if self._failed or args or kwargs:
            return self._plain(x, *args, **kwargs)
        if x.is_cuda and (torch.is_grad_enabled() or self.network.training):
            return self._plain(x)
        try:
            return self._replay(x) if x.is_cuda else self._compile(x)
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:  # a missing or failing compiler raises many kinds
            self._failed = True
            _warn(error)
            return self._plain(x)

    def _compile(self, x: torch.Tensor) -> torch.Tensor:
        if self._compiled is None:
            self._compiled = torch.compile(self._plain)
        return self._compiled(x)

    def _replay(self, x: torch.Tensor) -> torch.Tensor:
        autocast = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
        key = (x.shape, x.dtype, x.device, *autocast)
        if key not in self._recorded:
            if len(self._recorded) == self.MAX_SHAPES:
                return self._plain(x)
            self._recorded[key] = self._record(x, *autocast)
        return self._recorded[key](x)

    def _record(self, x: torch.Tensor, autocast: bool, dtype: torch.dtype) -> Call:
        static = x.clone(memory_format=torch.contiguous_format)
        forward = torch.compile(self._plain, dynamic=False) if self.whole else self._plain

        def run() -> torch.Tensor:
            # cached casts of weights would be recorded as they were at that moment
            with torch.autocast("cuda", dtype=dtype, enabled=autocast, cache_enabled=False):
                return forward(static)

        for _ in range(self.WARM_UP):
            on_another_stream(run if self.whole else lambda: self._with_compiled_blocks(run))
        if self._pool is None:
            # the graphs run one after the other, and so may share their memory
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # other threads pin what comes next meanwhile
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            output = run() if self.whole else self._with_compiled_blocks(run)

        def replay(x: torch.Tensor) -> torch.Tensor:
            static.copy_(x)
            graph.replay()
            return output.clone()

        return replay


class BlockCompiler:
    """
    Calls a function while the blocks of a network are compiled, see `BLOCKS`. Once that has failed, with a warning, it
    calls the function as it is.

    Args:
        network: the network that the function runs.
    """

    def __init__(self, network: torch.nn.Module) -> None:
        self.network = network
        self._works = True

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        """
        Returns:
            ``function(*args)``.
        """
        if self._works:
            try:
                with _compiled(self.network):
                    return function(*args)
            except torch.cuda.OutOfMemoryError:
                raise
            except Exception as error:  # a missing or failing compiler raises many kinds
                self._works = False
                _warn(error)
        return function(*args)


def on_another_stream(function: Callable[[], Any]) -> Any:
    """Call a function that is to be recorded later, which happens on another stream than the default one."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        result = function()
    torch.cuda.current_stream().wait_stream(stream)
    return result


@contextmanager
def _compiled(network: torch.nn.Module) -> Iterator[None]:
    """Compiles the blocks of a network, for calls of this shape, until the context is left."""
    blocks = dict(_outermost(network))
    for module, method in blocks.items():
        setattr(module, method, torch.compile(getattr(module, method), dynamic=False))
    try:
        # modules of a kind share one limit, and each shape that is recorded takes up to three of it, one a dilation
        with torch._dynamo.config.patch(cache_size_limit=RECOMPILE_LIMIT):
            yield
    finally:
        for module, method in blocks.items():
            delattr(module, method)


def _outermost(module: torch.nn.Module) -> Iterator[tuple[torch.nn.Module, str]]:
    """Blocks in a module that are in no other one, and the method to compile."""
    for kind, method in BLOCKS.items():
        if isinstance(module, kind):
            yield module, method
            return
    for child in module.children():
        yield from _outermost(child)


def _warn(error: Exception) -> None:
    text = " ".join(str(error).split())
    logging.getLogger(__name__).warning(f"Not compiled, which is slower: {type(error).__name__}: {text[:300]}")

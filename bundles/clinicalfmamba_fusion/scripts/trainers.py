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

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from monai.engines import SupervisedTrainer
from monai.engines.utils import IterationEvents
from monai.utils import CommonKeys as Keys
from monai.utils import convert_to_tensor

from custom_nets.blocks import DirectionalSSM

__all__ = ["CUDAGraphTrainer"]


class CUDAGraphTrainer(SupervisedTrainer):
    """
    `monai.engines.SupervisedTrainer` that replays a whole training step as one CUDA graph. The networks here launch
    thousands of small kernels a step, which keeps the processor busy and the GPU waiting. What surrounds the selective
    scans is compiled into a few kernels first, where a compiler is there.

    The first steps run one by one, as a warm-up, then one is recorded. Batches of another shape than the recorded one
    (the last of an epoch, unless the loader drops it), and all batches on a CPU, run step by step. The optimizer must
    keep its state and learning rate on the GPU: ``capturable=True`` and ``lr`` as a tensor. Accumulation of gradients
    and batches with further arguments are not served.

    Args:
        args, kwargs: those of `SupervisedTrainer`.

    Raises:
        ValueError: when gradients would have to be scaled or accumulated, which a graph can not decide on.
    """

    WARM_UP = 3

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.amp and self.amp_kwargs.get("dtype") != torch.bfloat16:
            raise ValueError(
                "a CUDA graph trains in bfloat16 or float32: set amp_dtype to torch.bfloat16 or amp to false."
            )
        if self.accumulation_steps > 1:
            raise ValueError("a CUDA graph does not accumulate gradients: raise batch_size instead.")
        self._graph: torch.cuda.CUDAGraph | None = None
        self._batch: list[torch.Tensor] = []
        self._output: tuple[torch.Tensor, torch.Tensor] | None = None
        self._steps = 0
        self._compile = True

    def _iteration(self, engine: SupervisedTrainer, batchdata: dict[str, torch.Tensor]) -> dict:
        device = torch.device(engine.state.device)
        if device.type != "cuda":
            return super()._iteration(engine, batchdata)
        batch = engine.prepare_batch(batchdata, device, engine.non_blocking, **engine.to_kwargs)
        inputs, targets = (convert_to_tensor(x, track_meta=False) for x in batch)
        if not engine.network.training:
            engine.network.train()
        pred, loss = self._run(inputs, targets)
        engine.state.output = {Keys.IMAGE: inputs, Keys.LABEL: targets, Keys.PRED: pred, Keys.LOSS: loss}
        for event in (
            IterationEvents.FORWARD_COMPLETED,
            IterationEvents.LOSS_COMPLETED,
            IterationEvents.BACKWARD_COMPLETED,
            IterationEvents.MODEL_COMPLETED,
        ):
            engine.fire_event(event)
        return engine.state.output

    def _run(self, inputs: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Prediction and loss of one training step."""
        self._steps += 1
        if self._steps <= self.WARM_UP:
            # recorded later on another stream: what is allocated before must not belong to the default one
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                result = self._compiled_step(inputs, targets)
            torch.cuda.current_stream().wait_stream(stream)
            return result
        if self._graph is None:
            self._batch = [inputs.clone(), targets.clone()]
            graph = torch.cuda.CUDAGraph()
            self.optimizer.zero_grad(set_to_none=True)
            with torch.cuda.graph(graph):
                self._output = self._compiled_step(*self._batch)
            self._graph = graph
        if self._output is None or inputs.shape != self._batch[0].shape:
            return self._step(inputs, targets)
        self._batch[0].copy_(inputs)
        self._batch[1].copy_(targets)
        self._graph.replay()
        return self._output

    def _step(self, inputs: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.optimizer.zero_grad(set_to_none=True)
        # cached casts of weights would be recorded as they were at that moment
        with torch.autocast("cuda", enabled=self.amp, cache_enabled=False, **self.amp_kwargs):
            pred = self.inferer(inputs, self.network)
            loss = self.loss_function(pred, targets).mean()
        loss.backward()
        self.optimizer.step()
        return pred.detach(), loss.detach()

    def _compiled_step(self, inputs: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self._compile:
            try:
                with _compiled(self.network):
                    return self._step(inputs, targets)
            except Exception as error:  # a missing or failing compiler raises many kinds
                self._compile = False
                logging.getLogger(__name__).warning(
                    f"Not compiled, which trains slower: {type(error).__name__}: {error}"
                )
        return self._step(inputs, targets)


@contextmanager
def _compiled(network: torch.nn.Module) -> Iterator[None]:
    """Compiles the selective state space models of a network, for calls of this shape, until the block is left."""
    modules = [module for module in network.modules() if isinstance(module, DirectionalSSM)]
    for module in modules:
        module.forward = torch.compile(module.forward, dynamic=False)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for module in modules:
            del module.forward

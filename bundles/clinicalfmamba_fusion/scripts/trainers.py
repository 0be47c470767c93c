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
from typing import Any

import torch
from monai.engines import SupervisedTrainer
from monai.engines.utils import IterationEvents
from monai.utils import CommonKeys as Keys
from monai.utils import convert_to_tensor

from scripts.compiling import BlockCompiler, on_another_stream

__all__ = ["CUDAGraphTrainer"]


class CUDAGraphTrainer(SupervisedTrainer):
    """
    `monai.engines.SupervisedTrainer` that replays a whole training step as one CUDA graph. The networks here launch
    thousands of small kernels a step, which keeps the processor busy and the GPU waiting. Their blocks are compiled
    first, where a compiler is there: norms, gates, casts and sums then take a few kernels.

    The first steps run one by one, as a warm-up, then one is recorded. Batches of another shape than the recorded one
    (the last of an epoch), and all batches on a CPU and of several processes, run step by step. The optimizer must keep
    its state and learning rate on the GPU: ``capturable=True`` and ``lr`` as a tensor. Accumulation of gradients and
    batches with further arguments are not served.

    Args:
        args, kwargs: those of `SupervisedTrainer`.
        compile: whether to do so; without it, this is a `SupervisedTrainer`.

    Raises:
        ValueError: when gradients would have to be scaled or accumulated, which a graph can not decide on.
    """

    WARM_UP = 3

    def __init__(self, *args: Any, compile: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._records = compile and torch.device(self.state.device).type == "cuda"
        if self._records and isinstance(self.network, torch.nn.parallel.DistributedDataParallel):
            self._records = False
            logging.getLogger(__name__).warning("Not compiled: each of several processes launches its own kernels.")
        if not compile:
            return
        if self.amp and self.amp_kwargs.get("dtype") != torch.bfloat16:
            raise ValueError(
                "a CUDA graph trains in bfloat16 or float32: set amp_dtype to torch.bfloat16 or amp to false."
            )
        if self.accumulation_steps > 1:
            raise ValueError("a CUDA graph does not accumulate gradients: raise batch_size instead.")
        self._compiled_blocks = BlockCompiler(self.network)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._batch: list[torch.Tensor] = []
        self._output: tuple[torch.Tensor, torch.Tensor] | None = None
        self._steps = 0

    def _iteration(self, engine: SupervisedTrainer, batchdata: dict[str, torch.Tensor]) -> dict:
        if not self._records:
            return super()._iteration(engine, batchdata)
        batch = engine.prepare_batch(batchdata, engine.state.device, engine.non_blocking, **engine.to_kwargs)
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
            # what is allocated before must not belong to the default stream
            return on_another_stream(lambda: self._compiled_blocks(self._step, inputs, targets))
        if self._graph is None:
            self._batch = [inputs.clone(), targets.clone()]
            graph = torch.cuda.CUDAGraph()
            self.optimizer.zero_grad(set_to_none=True)
            # other threads pin what comes next meanwhile
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._output = self._compiled_blocks(self._step, *self._batch)
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

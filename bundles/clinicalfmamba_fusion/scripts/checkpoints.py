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
"""Checkpoints of a training run: the best weights, and all that a stopped run needs to go on."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events

from scripts.data import replacing

__all__ = ["BestModelSaver", "LastEpochSaver", "check_file", "load_parts", "load_weights", "read_weights"]


def check_file(path: str | os.PathLike) -> None:
    """
    Raises:
        FileNotFoundError: when the checkpoint ``path`` is not a file, so that this is known before data are loaded.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"Checkpoint {path} does not exist: name the file that a training run has written.")


def read_weights(path: str | os.PathLike) -> dict[str, torch.Tensor]:
    """
    State dict in a file, which may be a checkpoint with the network as ``model``; on the CPU.

    Raises:
        FileNotFoundError: when ``path`` is not a file.
        ValueError: when it can not be read.
    """
    check_file(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # each kind of damage raises another
        raise ValueError(
            f"Checkpoint {path} can not be read: if it is no more than a pointer that Git LFS left, or shorter than "
            "it was, fetch it again; else name a file that a training run has written."
        ) from error
    return content.get("model", content)


def load_weights(network: torch.nn.Module, path: str | os.PathLike) -> torch.nn.Module:
    """
    Load all weights of a network. `monai.handlers.CheckpointLoader` does so, too, but a file of another network it
    answers with hundreds of lines that do not name it.

    Args:
        network: the network to load into, on any device.
        path: see `read_weights`.

    Returns:
        ``network``.

    Raises:
        FileNotFoundError: as `read_weights`.
        ValueError: as `read_weights`, and when the weights are of another network.
    """
    try:
        _unwrap(network).load_state_dict(read_weights(path))
    except RuntimeError as error:
        difference = textwrap.shorten(" ".join(str(error).splitlines()[1:]), 160, placeholder=" ...")
        raise ValueError(
            f"Checkpoint {path} is of another network than the {type(_unwrap(network)).__name__} of these configs "
            f"({difference}): name the one that was trained with them, or give the configs that it was trained with, "
            "such as configs/volume.json for volumes."
        ) from error
    return network


def load_parts(network: torch.nn.Module, path: str | os.PathLike, parts: Sequence[str]) -> torch.nn.Module:
    """
    Load what an earlier stage of training has made of some parts of a network; its other parts stay as they are.

    Args:
        network: the network to load into.
        path: weights of the whole network, as a run saves them (``model.pt``).
        parts: names of the submodules to load.

    Returns:
        ``network``.

    Raises:
        FileNotFoundError: as `read_weights`.
        ValueError: as `read_weights`, and when the file does not hold the parts' weights.
    """
    weights = read_weights(path)
    for part in parts:
        names = {f"{part}.{name}": name for name in network.get_submodule(part).state_dict()}
        try:
            network.get_submodule(part).load_state_dict({names[key]: weights[key] for key in names})
        except (KeyError, RuntimeError) as error:
            raise ValueError(
                f"Checkpoint {path} does not hold the weights of {part} of {type(network).__name__}: name the model.pt "
                "of its earlier stage of training, of the same size and number of dimensions."
            ) from error
    return network


class LastEpochSaver:
    """
    Ignite handler that keeps the state after the last whole epoch in one file. `monai.handlers.CheckpointSaver` also
    saves the middle of an epoch when a run is interrupted, from where it can not be repeated exactly, and loses its
    file when it is killed while it writes; here the old file stays until the new one is complete.

    Args:
        items: objects with a ``state_dict``, by the names that they get in the file.
        path: file to write.
        interval: number of epochs between two savings.
    """

    def __init__(self, items: Mapping[str, Any], path: str | os.PathLike, interval: int = 1) -> None:
        self.items = items
        self.path = Path(path)
        self.interval = interval

    def attach(self, engine: Engine) -> None:
        """
        Args:
            engine: a trainer, its other handlers attached before.
        """
        engine.add_event_handler(Events.EPOCH_COMPLETED(every=self.interval), self)

    def __call__(self, _engine: Engine) -> None:
        if idist.get_rank() == 0:
            _save({name: _unwrap(item).state_dict() for name, item in self.items.items()}, self.path)


class BestModelSaver:
    """
    Ignite handler that keeps the weights of the epoch with the best key metric in one file, a plain state dict. Its own
    state is the best value so far: as an item of a checkpoint, it keeps a resumed run from replacing a better model
    that was saved before the interruption, which `monai.handlers.CheckpointSaver` does.

    Args:
        network: the network to save.
        path: file to write.
    """

    def __init__(self, network: torch.nn.Module, path: str | os.PathLike) -> None:
        self.network = network
        self.path = Path(path)
        self._engine: Engine | None = None

    def attach(self, engine: Engine) -> None:
        """
        Args:
            engine: a validator with a key metric, one of MONAI's evaluators.
        """
        self._engine = engine
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        # MONAI's evaluators compare before any handler is called
        if engine.state.best_metric_epoch == engine.state.epoch and idist.get_rank() == 0:
            # on the CPU, so that the file loads on machines without this one's GPU
            _save({name: value.cpu() for name, value in _unwrap(self.network).state_dict().items()}, self.path)

    def state_dict(self) -> dict[str, float]:
        state = self._attached().state
        return {"best_metric": float(state.best_metric), "best_metric_epoch": int(state.best_metric_epoch)}

    def load_state_dict(self, state_dict: Mapping[str, float]) -> None:
        for name, value in state_dict.items():
            setattr(self._attached().state, name, value)

    def _attached(self) -> Engine:
        if self._engine is None:
            raise RuntimeError("BestModelSaver has no state before it is attached to an evaluator.")
        return self._engine


def _unwrap(item: Any) -> Any:
    return item.module if isinstance(item, torch.nn.parallel.DistributedDataParallel) else item


def _save(content: Mapping[str, Any], path: Path) -> None:
    with replacing(path) as temporary:
        torch.save(content, temporary)

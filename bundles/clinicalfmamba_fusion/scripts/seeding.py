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

import torch
from ignite.engine import Engine, Events
from monai.data.utils import set_rnd
from torch.utils.data import Dataset

__all__ = ["EpochSeedHandler"]


class EpochSeedHandler:
    """
    Ignite handler that makes an epoch's order of cases and their augmentation a function of the seed and the epoch
    alone, so that a resumed run sees what the uninterrupted one would have seen.

    Args:
        dataset: the training dataset; its random transforms are seeded here, those of worker processes by PyTorch.
        seed: the run's seed.
        rank: number of this process, so that processes augment differently.
    """

    def __init__(self, dataset: Dataset, seed: int, rank: int = 0) -> None:
        self.dataset = dataset
        self.seed = seed
        self.rank = rank

    def attach(self, engine: Engine) -> None:
        """
        Args:
            engine: a trainer.
        """
        engine.add_event_handler(Events.EPOCH_STARTED, self)

    def __call__(self, engine: Engine) -> None:
        # far apart, since PyTorch gives worker w the seed + w
        seed = self.seed + 1000003 * engine.state.epoch + 1009 * self.rank
        torch.manual_seed(seed)
        set_rnd(self.dataset, seed % 2**32)

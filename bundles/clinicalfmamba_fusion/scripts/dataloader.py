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

"""Loading of cases that begins before the network is there, and never keeps it waiting for long."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from monai.data import DataLoader
from monai.data.utils import worker_init_fn

from scripts.memory import forking, keep_freed_memory

__all__ = ["EarlyDataLoader"]


class EarlyDataLoader(DataLoader):
    """
    DataLoader whose processes load the first cases while the network is built and a GPU is made ready.

    A thread receives the next batch from them while the last one is used. (MONAI's ``ThreadBuffer`` takes an error in
    its source for the end.) Batches stay in the memory that they share with the process that loaded them, from where
    `CaseWriters` passes them on: to pin them takes longer than to copy them to the GPU as they are.

    Args:
        args: as `monai.data.DataLoader`, as is ``kwargs``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"worker_init_fn": _begin, **kwargs})
        self._early: Iterator | None = None

    def start(self) -> None:
        """Begin the pass that is asked for next."""
        self._early = self._batches()

    def __iter__(self) -> Iterator:  # type: ignore[override]
        early, self._early = self._early, None
        batches = self._batches() if early is None else early
        return _ahead(batches) if self.num_workers else batches

    def _batches(self) -> Iterator:
        with forking():
            return super().__iter__()


def _begin(worker_id: int) -> None:
    worker_init_fn(worker_id)
    keep_freed_memory()


def _ahead(batches: Iterator) -> Iterator:
    end = object()
    with ThreadPoolExecutor(1) as thread:
        batch = thread.submit(next, batches, end)
        while (this := batch.result()) is not end:
            batch = thread.submit(next, batches, end)
            yield this

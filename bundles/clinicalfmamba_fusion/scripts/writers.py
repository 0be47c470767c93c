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
"""Postprocessing and writing of cases in other processes, while the network runs on the next ones."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import torch
import torch.multiprocessing as mp

from scripts.errors import reason_of
from scripts.memory import forking, keep_freed_memory

__all__ = ["CaseWriters"]

Failures = list[tuple[str, str]]

# of this process, if it is one that writes
_postprocessing: Callable[[Mapping[Hashable, Any]], Any] | None = None


class CaseWriters:
    """
    Processes that each take a case, apply the postprocessing to it, and drop what comes out: the last transforms save
    it. Threads would hold up the one that launches the network's kernels.

    Args:
        postprocessing: transform of an item, on the CPU.
        count: number of processes; while each has a case and more than one waits, :meth:`submit` waits, too.
    """

    def __init__(self, postprocessing: Callable[[Mapping[Hashable, Any]], Any], count: int) -> None:
        self.postprocessing = postprocessing
        self.count = count
        self._pool: ProcessPoolExecutor | None = None
        self._cases: dict[Future, str] = {}

    def start(self) -> None:
        """Start the processes, as :meth:`submit` does if they are not there."""
        if self._pool is None:
            self._pool = ProcessPoolExecutor(self.count, mp.get_context(), _begin, (self.postprocessing,))
            with forking():
                wait([self._pool.submit(os.getpid)])

    def submit(self, case: str, item: Mapping[Hashable, Any]) -> Failures:
        """
        Hand an item over.

        Args:
            case: its name.
            item: tensors on any device, which are copied to the CPU, and anything that can be pickled.

        Returns:
            the cases that have failed since the last call, each with the reason.
        """
        item = {key: _on_cpu(value) if isinstance(value, torch.Tensor) else value for key, value in item.items()}
        self.start()
        assert self._pool is not None
        try:
            self._cases[self._pool.submit(_write, item)] = case
        except BrokenProcessPool:
            # a process was killed, which the cases that it took with it are told of: others take the rest
            self._pool = None
            self.start()
            self._cases[self._pool.submit(_write, item)] = case  # type: ignore[attr-defined]
        if len(self._cases) > self.count + 1:
            wait(self._cases, return_when=FIRST_COMPLETED)
        return self._finished()

    def wait(self) -> Failures:
        """
        Wait until all is written.

        Returns:
            as :meth:`submit`.
        """
        wait(self._cases)
        return self._finished()

    def close(self) -> Failures:
        """
        End the processes. What they have begun they finish, what has not begun is dropped.

        Returns:
            as :meth:`submit`.
        """
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None
        return self._finished()

    def _finished(self) -> Failures:
        failures = []
        for future in [future for future in self._cases if future.done()]:
            case = self._cases.pop(future)
            if not future.cancelled():
                error = future.exception()
                reason = reason_of(error) if error is not None else future.result()
                if reason:
                    failures.append((case, reason))
        return failures


def _on_cpu(image: torch.Tensor) -> torch.Tensor:
    if not image.is_cuda:
        return image.cpu()
    # pinned memory, which is used again and again, takes a volume of 36 MB in 1 ms, memory that is new in 30 ms
    return torch.empty_like(image, device="cpu", pin_memory=True).copy_(image)


def _begin(postprocessing: Callable[[Mapping[Hashable, Any]], Any]) -> None:
    global _postprocessing
    _postprocessing = postprocessing
    # as in a loader's workers: the processes share the cores, and OpenMP's threads do not survive a fork
    torch.set_num_threads(1)
    keep_freed_memory()
    # an interruption is the parent's affair, which lets them finish
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = mp.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _write(item: Mapping[Hashable, Any]) -> str:
    """Reason of a failure, or nothing; not the exception, which may not survive the way back."""
    assert _postprocessing is not None
    try:
        _postprocessing(item)
    except Exception as error:
        return reason_of(error)
    return ""

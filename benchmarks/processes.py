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
"""Processes that each train networks, side by side on one device."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch

__all__ = ["in_new_process", "process_pool"]


def process_pool(jobs: int) -> ProcessPoolExecutor:
    """So many processes, started anew, since one that has used CUDA can not be copied; each with two threads."""
    default = multiprocessing.get_start_method()
    return ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), initializer=_begin, initargs=(default,))


def in_new_process(function: Callable[..., Any], *args: Any) -> Any:
    """
    Call a function in a process of its own, which takes all of its GPU memory with it when it ends: what CUDA graphs
    and libraries hold there is not given back otherwise.

    Returns:
        ``function(*args)``.

    Raises:
        concurrent.futures.process.BrokenProcessPool: when the process died.
    """
    with process_pool(1) as pool:
        return pool.submit(function, *args).result()


def _begin(start_method: str) -> None:
    # else the workers of its data loaders would be started anew, too, and import everything in every epoch
    multiprocessing.set_start_method(start_method, force=True)
    torch.set_num_threads(2)

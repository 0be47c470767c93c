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
"""Decoded images that are kept: in memory for a run, or in a folder for many."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from monai.data import CacheDataset, Dataset, PersistentDataset
from monai.data.utils import pickle_hashing

__all__ = ["cached_dataset", "hash_case"]


def cached_dataset(
    data: Sequence[Mapping[str, Any]],
    transform: Callable,
    cache_rate: float = 1.0,
    num_workers: int = 1,
    cache_dir: str | os.PathLike | None = None,
    progress: bool = True,
) -> Dataset:
    """
    Dataset that runs the transforms before the first random one only once.

    Args:
        data: items with their files as ``image``.
        transform: a MONAI ``Compose``.
        cache_rate: share of the items that are kept in memory.
        num_workers: threads that fill the memory at the start.
        cache_dir: folder that keeps all items instead, without metadata, for later runs too. Items whose files or
            transforms have changed are made anew; what is no longer needed stays until the folder is deleted.
        progress: show a progress bar while the memory fills.

    Returns:
        a `monai.data.CacheDataset`, or a `monai.data.PersistentDataset` if there is a folder.
    """
    if cache_dir is None:
        return CacheDataset(data, transform, cache_rate=cache_rate, num_workers=num_workers, progress=progress)
    return PersistentDataset(data, transform, cache_dir, hash_func=hash_case, hash_transform=pickle_hashing)


def hash_case(case: Mapping[str, Any]) -> bytes:
    """Key of a case for `monai.data.PersistentDataset`: all that the item holds, and size and time of its files."""
    files = [case["image"]] if isinstance(case["image"], str) else case["image"]
    stats = [(status.st_size, status.st_mtime_ns) for status in map(os.stat, files)]
    text = json.dumps([dict(case), stats], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest().encode()

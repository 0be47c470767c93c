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

"""How processes keep and share memory."""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["forking", "keep_freed_memory"]

# of malloc.h
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """
    Let the C library keep freed memory for the next allocation instead of giving it back to the system. A network on a
    CPU frees and asks for hundreds of megabytes at every layer, transforms of volumes at every step, and clearing their
    pages anew takes up to as long as the arithmetic. The peak of a network grows by about half, since freed memory may
    not fit what is asked for.

    Returns:
        whether it is so now: not where the C library is not glibc, or the user's environment says how it allocates.
    """
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(
        mallopt(option, value) for option, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1))
    )


@contextmanager
def forking() -> Iterator[None]:
    """
    For the time in which processes are forked: what this one holds now, their garbage collectors leave alone. They
    would walk over all of it again and again, and so copy every page of it, which takes longer than to write a case.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()

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

from collections.abc import Sequence

import torch
import torch.nn.functional as F

__all__ = ["crop_to_size", "pad_to_multiple"]


def pad_to_multiple(x: torch.Tensor, multiple: int) -> torch.Tensor:
    """Repeats the last row of every spatial axis of ``(B, C, H, W[, D])`` until its length is a multiple."""
    padding: list[int] = []
    for length in reversed(x.shape[2:]):
        padding += [0, -length % multiple]
    return F.pad(x, padding, mode="replicate") if any(padding) else x


def crop_to_size(x: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Inverse of :py:func:`pad_to_multiple`: keeps the first ``size`` of ``(B, C, H, W[, D])``."""
    for axis, length in enumerate(size, start=2):
        x = x.narrow(axis, 0, length)
    return x

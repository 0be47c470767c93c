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

__all__ = ["correlation", "sum_of_correlation_differences"]


def correlation(a: torch.Tensor, b: torch.Tensor, floor: float = 1e-6) -> torch.Tensor:
    """
    Pearson's correlation over the last axis, differentiable everywhere; 0 with a constant.

    Args:
        a: `(..., N)`, of a magnitude of about 1.
        b: `(..., N)`, broadcast with ``a``.
        floor: a standard deviation below it counts as ``floor``, so that the gradient is at most in the order of its
            inverse. The default changes nothing that rounding has not changed.

    Returns:
        `(...)`, in [-1, 1].
    """
    a, b = (i - i.mean(dim=-1, keepdim=True) for i in (a, b))
    variance_a, variance_b = (i.square().mean(dim=-1) for i in (a, b))
    # below 1e-6 a standard deviation is the rounding of a constant in [0, 1]
    constant = torch.minimum(variance_a, variance_b) < 1e-12
    norm_a, norm_b = (i.clamp_min(floor**2).sqrt() for i in (variance_a, variance_b))
    return ((a * b).mean(dim=-1) / (norm_a * norm_b)).masked_fill(constant, 0.0)


def sum_of_correlation_differences(fused: torch.Tensor, sources: torch.Tensor, floor: float = 1e-6) -> torch.Tensor:
    """
    Sum of the correlations of differences, SCD (Aslantas and Bendes, AEU 69(12), 2015): r(F - B, A) + r(F - A, B),
    that is, how much each source gave to what the fused image has beyond the other one. Differentiable.

    Args:
        fused: `(B, 1, H, W[, D])`.
        sources: `(B, 2, H, W[, D])`.
        floor: see `correlation`.

    Returns:
        `(B,)`, in [-2, 2].
    """
    given = (fused - sources.flip(1)).flatten(2)
    return correlation(given, sources.flatten(2), floor).sum(dim=1)

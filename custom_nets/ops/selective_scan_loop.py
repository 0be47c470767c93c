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

"""Selective scan as one loop of a graph, for `torch.export`, AOTInductor and ONNX.

The other forms are either operators of this package, which an exported program would need to run, or loops in Python,
which an exporter unrolls for the length of its example. This one is a single node, ``scan`` of PyTorch and `Scan` of
ONNX, for sequences of any length; it walks token by token and keeps one state.
"""

from __future__ import annotations

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["is_exporting", "selective_scan_loop"]


def is_exporting() -> bool:
    """Whether `torch.export`, or an exporter that is built on it, looks at the call."""
    # PyTorch 2.7 or newer
    return hasattr(torch.compiler, "is_exporting") and torch.compiler.is_exporting()


def _next_token(state: Tensor, step: Tensor, drive: Tensor, B: Tensor, C: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """State ``(B, K, N, D)`` and output ``(B, K, D)`` after one token."""
    state = torch.exp(step.unsqueeze(-2) * A) * state + drive.unsqueeze(-2) * B.unsqueeze(-1)
    return state, (state * C.unsqueeze(-1)).sum(-2)


def selective_scan_loop(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Optional[Tensor] = None,
    delta_bias: Optional[Tensor] = None,
    delta_softplus: bool = False,
) -> Tensor:
    """:py:func:`custom_nets.ops.selective_scan_channels_last` while a graph is exported; slow in eager mode.

    Args:
        u, delta: input and step, ``(B, K, L, D)``.
        A: ``(K, D, N)``.
        B, C: ``(B, K, L, N)``.
        D, delta_bias: ``(K, D)``.

    Returns:
        ``(B, K, L, D)``, computed in the dtype of the inputs, which all have the same.
    """
    if delta_bias is not None:
        delta = delta + delta_bias.unsqueeze(1)
    step = F.softplus(delta) if delta_softplus else delta
    tokens = [x.movedim(2, 0) for x in (step, step * u, B, C)]
    # an exporter wants the state to have the same strides before and after a token
    A = A.transpose(1, 2).contiguous()
    state = u.new_zeros(u.shape[0], u.shape[1], A.shape[1], u.shape[3])
    # not `torch._higher_order_ops.scan`, which checks and traces the same function a second time
    y = torch.ops.higher_order.scan(_next_token, [state], tokens, (A,))[1].movedim(0, 2)
    return y if D is None else y + u * D.unsqueeze(1)

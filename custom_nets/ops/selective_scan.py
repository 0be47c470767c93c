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

"""The selective scan of Mamba (Gu and Dao, 2023, arXiv 2312.00752, Algorithm 2) behind one call for every back end."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from functools import cache
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.torch_version import TorchVersion

from custom_nets.ops.selective_scan_torch import selective_scan_torch

__all__ = ["selective_scan", "selective_scan_channels_last", "scan_backend", "BACKEND_VARIABLE"]

BACKEND_VARIABLE = "CUSTOM_NETS_SCAN"
_BACKENDS = ("torch", "cpp", "triton", "mamba_ssm")
# Looked for, not imported: that takes a while. The kernels hold tuples, which Triton before 3.3 can not.
_HAS_TRITON = importlib.util.find_spec("triton") is not None and TorchVersion(torch.__version__) >= "2.7"


def _triton_scan(*args: Any) -> Tensor:
    from custom_nets.ops.selective_scan_triton import selective_scan_triton

    return selective_scan_triton(*args)


def _cpp_scan(*args: Any) -> Tensor:
    from custom_nets.ops.selective_scan_cpp import selective_scan_cpp

    return selective_scan_cpp(*args)


@cache
def _mamba_ssm_scan() -> Callable | None:
    """mamba-ssm's function, or None: the package installs without its compiled kernel, so that is what counts."""
    if importlib.util.find_spec("mamba_ssm") is None or importlib.util.find_spec("selective_scan_cuda") is None:
        return None
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    return selective_scan_fn


def _cpp_obstacle(dtype: torch.dtype) -> str:
    from custom_nets.ops.selective_scan_cpp import DTYPES, OBSTACLE

    return OBSTACLE if dtype in DTYPES else f"it has no {dtype} kernel"


def _obstacle(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """Why a back end can not serve tensors of ``dtype`` on ``device``; empty if it can."""
    if backend == "torch":
        return ""
    wanted = "cpu" if backend == "cpp" else "cuda"
    if device.type != wanted:
        return f"it needs {wanted.upper()} tensors, these are on {device.type}"
    if dtype == torch.float64:
        return "it has no float64 kernel"
    if backend == "cpp":
        return _cpp_obstacle(dtype)
    if backend == "triton" and not _HAS_TRITON:
        return "it needs Triton 3.3, which comes with PyTorch 2.7, or a newer one"
    if backend == "mamba_ssm" and _mamba_ssm_scan() is None:
        return "mamba-ssm or its compiled module selective_scan_cuda is not installed"
    return ""


def scan_backend(device: torch.device, dtype: torch.dtype) -> str:
    """Name of the back end that serves tensors of ``dtype`` on ``device``.

    On CUDA ``triton``, else ``mamba_ssm``, whichever is installed; on a CPU ``cpp`` if it can be built, which the first
    call waits for; ``torch`` everywhere else. The environment variable ``CUSTOM_NETS_SCAN`` (``torch``, ``cpp``,
    ``triton`` or ``mamba_ssm``) forces one.

    Raises:
        ValueError: if the variable names no back end.
        RuntimeError: if the forced back end can not serve the call, saying why.
    """
    forced = os.environ.get(BACKEND_VARIABLE, "")
    if not forced:
        return next(name for name in ("triton", "mamba_ssm", "cpp", "torch") if not _obstacle(name, device, dtype))
    if forced not in _BACKENDS:
        raise ValueError(f"{BACKEND_VARIABLE}={forced} names no back end, choose one of {', '.join(_BACKENDS)}.")
    obstacle = _obstacle(forced, device, dtype)
    if obstacle:
        raise RuntimeError(f"the scan back end {forced} can not serve this call: {obstacle}.")
    return forced


def selective_scan_channels_last(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Optional[Tensor] = None,
    delta_bias: Optional[Tensor] = None,
    delta_softplus: bool = False,
) -> Tensor:
    """Selective scan of K directions at once, channels last, as the networks of this package hold their tokens.

    Args:
        u: input, ``(B, K, L, D)``.
        delta: step before bias and softplus, ``(B, K, L, D)``.
        A: real state matrix (negative), ``(K, D, N)``.
        B: input matrix of each token, ``(B, K, L, N)``.
        C: output matrix of each token, ``(B, K, L, N)``.
        D: skip connection, ``(K, D)``.
        delta_bias: added to ``delta``, ``(K, D)``.
        delta_softplus: whether ``delta`` goes through softplus.

    Returns:
        ``(B, K, L, D)`` in the dtype of ``u``; computed in float32, in float64 if ``u`` is float64.
    """
    if not torch.jit.is_scripting():
        backend = scan_backend(u.device, u.dtype)
        if backend == "triton":
            return _triton_scan(u, delta, A, B, C, D, delta_bias, delta_softplus)
        # a traced module and an ONNX graph are to run without this package
        if backend == "cpp" and not torch.jit.is_tracing() and not torch.onnx.is_in_onnx_export():
            return _cpp_scan(u, delta, A, B, C, D, delta_bias, delta_softplus)
        if backend == "mamba_ssm":
            sequence = [x.transpose(2, 3) for x in (u, delta, B, C)]
            skip, bias = (None if x is None else x.flatten(0, 1) for x in (D, delta_bias))
            y = selective_scan(
                sequence[0].flatten(1, 2),
                sequence[1].flatten(1, 2),
                A.flatten(0, 1),
                sequence[2],
                sequence[3],
                D=skip,
                delta_bias=bias,
                delta_softplus=delta_softplus,
            )
            return y.unflatten(1, u.shape[1::2]).transpose(2, 3)
    return selective_scan_torch(u, delta, A, B, C, D, delta_bias, delta_softplus).to(u.dtype)


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Optional[Tensor] = None,
    z: Optional[Tensor] = None,
    delta_bias: Optional[Tensor] = None,
    delta_softplus: bool = False,
) -> Tensor:
    """Selective scan with the shapes and the meaning of mamba-ssm's ``selective_scan_fn``.

    Args:
        u: input, ``(B, D, L)``.
        delta: step before bias and softplus, ``(B, D, L)``.
        A: real state matrix (negative), ``(D, N)``.
        B: input matrix of each token, ``(B, N, L)``, or ``(B, G, N, L)`` for G groups of D / G channels.
        C: output matrix of each token, shaped as ``B``.
        D: skip connection, ``(D,)``.
        z: gate, ``(B, D, L)``; the output is multiplied by ``silu(z)``.
        delta_bias: added to ``delta``, ``(D,)``.
        delta_softplus: whether ``delta`` goes through softplus.

    Returns:
        ``(B, D, L)`` in the dtype of ``u``; computed in float32, in float64 if ``u`` is float64.

    Raises:
        ValueError: if the shapes do not fit together.
    """
    if B.dim() == 3:
        B = B.unsqueeze(1)
    if C.dim() == 3:
        C = C.unsqueeze(1)
    batch, channels, length = u.shape
    groups = B.shape[1]
    expected = (batch, groups, A.shape[-1], length)
    if u.shape != delta.shape or A.shape[0] != channels or channels % groups != 0:
        raise ValueError(f"u {u.shape}, delta {delta.shape}, A {A.shape} and {groups} groups do not fit together.")
    if B.shape != expected or C.shape != expected:
        raise ValueError(f"B {B.shape} and C {C.shape} should both be {expected} for u {u.shape} and A {A.shape}.")
    if not torch.jit.is_scripting():
        if scan_backend(u.device, u.dtype) == "mamba_ssm":
            scan = _mamba_ssm_scan()
            assert scan is not None
            delta, B, C = (x.to(u.dtype) for x in (delta, B, C))
            D, delta_bias = (None if x is None else x.float() for x in (D, delta_bias))
            return scan(u, delta, A.float(), B, C, D, z, delta_bias, delta_softplus)
    shape = [groups, channels // groups]
    y = selective_scan_channels_last(
        u.unflatten(1, shape).transpose(2, 3),
        delta.unflatten(1, shape).transpose(2, 3),
        A.unflatten(0, shape),
        B.transpose(2, 3),
        C.transpose(2, 3),
        D=None if D is None else D.unflatten(0, shape),
        delta_bias=None if delta_bias is None else delta_bias.unflatten(0, shape),
        delta_softplus=delta_softplus,
    )
    y = y.transpose(2, 3).flatten(1, 2)
    if z is not None:
        precision = y.dtype if y.dtype == torch.float64 else torch.float32
        y = (y.to(precision) * F.silu(z.to(precision))).to(u.dtype)
    return y

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

"""Rules without parameters that fuse the features of two images, by name."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

__all__ = ["fusion_rule", "register_rule", "rule_names"]

Rule = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

_RULES: dict[str, Rule] = {}


def register_rule(name: str) -> Callable[[Rule], Rule]:
    """Decorator that makes a rule known as ``name``.

    A rule takes the features of two images, each ``(B, C, H, W[, D])``, and gives the fused ones of the same shape and
    dtype. It is computed in float32 at least: squares and ratios of half precision features would over- or underflow.
    """

    def register(rule: Rule) -> Rule:
        if name in _RULES:
            raise ValueError(f"a fusion rule named {name!r} is registered already.")

        @functools.wraps(rule)
        def widened(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            dtype = torch.promote_types(a.dtype, torch.float32)
            return rule(a.to(dtype), b.to(dtype)).to(a.dtype)

        _RULES[name] = widened
        return widened

    return register


def rule_names() -> list[str]:
    """Names that :py:func:`fusion_rule` knows."""
    return sorted(_RULES)


def fusion_rule(name: str) -> Rule:
    """The rule called ``name``: a function of the features of two images, each ``(B, C, H, W[, D])``.

    Raises:
        ValueError: if there is no such rule.
    """
    if name not in _RULES:
        raise ValueError(f"no fusion rule named {name!r}, choose one of {rule_names()}.")
    return _RULES[name]


def _share(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``a / (a + b)`` of two that are not negative; one half where both are 0."""
    total = a + b
    # divided by 1 there, so that no gradient becomes NaN
    return torch.where(total == 0, 0.5, a / total.masked_fill(total == 0, 1))


def _mean_magnitude(x: torch.Tensor) -> torch.Tensor:
    """Mean absolute feature of each image, ``(B, 1, 1, 1[, 1])``."""
    return x.abs().mean(dim=list(range(1, x.dim())), keepdim=True)


@register_rule("average")
def average(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``(a + b) / 2``."""
    return (a + b) / 2


@register_rule("addition")
def addition(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``a + b``. From: Li and Wu, "DenseFuse", IEEE Transactions on Image Processing 28(5), 2019."""
    return a + b


@register_rule("maximum")
def maximum(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The larger of both at every element."""
    return torch.maximum(a, b)


@register_rule("fer")
def feature_energy_ratio(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Feature energy ratio: ``k a + (1 - k) b`` with ``k = a^2 / (a^2 + b^2)`` at every element, 0 where both are 0.
    From: Fu et al., "A multiscale residual pyramid attention network for medical image fusion", Biomedical Signal
    Processing and Control 66, 2021."""
    share = _share(a.square(), b.square())
    return share * a + (1 - share) * b


@register_rule("fl1n")
def l1_norm_ratio(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Feature L1 norms as weights: ``k a + (1 - k) b`` with one ``k = |a|_1 / (|a|_1 + |b|_1)`` for a whole image, one
    half where both images' features are 0. From: Li et al., "Multiscale double-branch residual attention network for
    anatomical-functional medical image fusion", Computers in Biology and Medicine 141, 2022, as the next three."""
    share = _share(_mean_magnitude(a), _mean_magnitude(b))
    return share * a + (1 - share) * b


@register_rule("l1nw")
def l1_norm_weighted(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """L1 norms as factors that do not add up to 1: ``a |a|_1 + b |b|_1``. The norm here is the mean over a whole image
    instead of the sum, with which the features would grow with the number of pixels, beyond any decoder's range."""
    return a * _mean_magnitude(a) + b * _mean_magnitude(b)


@register_rule("al1nw")
def averaged_l1_norm_weighted(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Half of ``"l1nw"``: ``(a |a|_1 + b |b|_1) / 2``."""
    return l1_norm_weighted(a, b) / 2


@register_rule("abs_ratio")
def absolute_ratio(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Absolute ratios as weights (weighted L1): ``|a / (a + b)| a + |b / (a + b)| b`` at every element, 0 where
    ``a + b`` is 0. Each term has a pole at ``a = -b``, their sum has not: it is ``(a^2 + b^2) / (a + b)`` where the
    signs are equal, and ``|a| + |b|`` with the sign of ``a + b`` where they are not."""
    total = a + b
    equal_signs = (a.square() + b.square()) / total.masked_fill(total == 0, 1)
    return torch.where(a.sign() * b.sign() < 0, total.sign() * (a.abs() + b.abs()), equal_signs)


@register_rule("sfnn")
def softmax_nuclear_norm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Softmax feature weighted nuclear norm: ``w a + (1 - w) b`` with one ``w = m_a^2 / (m_a^2 + m_b^2)`` for a whole
    image, ``m`` being the largest nuclear norm among the channels' maps after a softmax over channels. From: Zhou et
    al., "Edge-enhanced dilated residual attention network for multimodal medical image fusion", BIBM 2024.

    Of a volume, a channel's norm is the mean of the nuclear norms of its three unfoldings into a matrix (Liu et al.,
    "Tensor completion for estimating missing values in visual data", 2013). A matrix and its transpose have the same
    norm, so this is the usual one in 2D. No gradient passes through ``w``.
    """
    with torch.no_grad():
        share = _share(_largest_nuclear_norm(a).square(), _largest_nuclear_norm(b).square())
    share = share.reshape(-1, *[1] * (a.dim() - 1))
    return share * a + (1 - share) * b


def _largest_nuclear_norm(features: torch.Tensor) -> torch.Tensor:
    """``(B, C, H, W[, D])`` to ``(B,)``."""
    maps = features.softmax(dim=1)
    shape = maps.shape[2:]
    # both unfoldings of a matrix have the same norm: the cheaper one will do
    axes = [min(range(2), key=lambda axis: shape[axis])] if len(shape) == 2 else range(len(shape))
    norms = [_nuclear_norms(maps.movedim(axis + 2, 2).flatten(3)) for axis in axes]
    return torch.stack(norms).mean(dim=0).amax(dim=1)


def _nuclear_norms(matrices: torch.Tensor) -> torch.Tensor:
    """Sum of the singular values of each matrix, ``(B, C, N, M)`` to ``(B, C)``.

    They are the square roots of the eigenvalues of an N x N matrix, however long M is. Squaring costs half of the
    digits, hence float64; one channel at a time, since that doubles the memory.
    """
    flat = matrices.flatten(0, 1)
    gram = torch.stack([matrix.double() @ matrix.double().mT for matrix in flat])
    # a GPU finds the eigenvalues of one matrix after the other, 15 ms each, and not while a CUDA graph is recorded
    norms = _root_traces(gram) if gram.is_cuda else torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().sum(dim=-1)
    return norms.unflatten(0, matrices.shape[:2]).to(matrices.dtype)


def _root_traces(matrices: torch.Tensor, steps: int = 40) -> torch.Tensor:
    """Traces of the roots of positive semidefinite matrices, ``(B, N, N)`` to ``(B,)``, by matrix products alone.

    Coupled Newton-Schulz iteration (Higham, "Functions of Matrices", SIAM 2008, chapter 6). The root of a small
    eigenvalue grows by one half in each step until it is there: what is missing after 40 is below 1e-7 of the largest.
    """
    scale = torch.linalg.matrix_norm(matrices, keepdim=True)
    root = matrices / scale.masked_fill(scale == 0, 1)
    identity = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
    inverse = identity.expand_as(root)
    for _ in range(steps):
        factor = 1.5 * identity - 0.5 * inverse @ root
        root, inverse = root @ factor, factor @ inverse
    return root.diagonal(dim1=-2, dim2=-1).sum(dim=-1) * scale.flatten().sqrt()

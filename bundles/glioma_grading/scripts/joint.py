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
"""Fusion and grading as one network, trained end to end; what a grading network takes over from a fusion network."""

from __future__ import annotations

import os

import torch
from monai.utils import convert_to_tensor
from torch.nn.modules.loss import _Loss

from custom_nets.nets import ClinicalFMambaClassifier
from scripts.checkpoints import load_weights, read_weights
from scripts.fusion import FusionBundle

__all__ = ["JointLoss", "JointNetwork", "load_encoder", "load_parts"]


class JointNetwork(torch.nn.Module):
    """
    A fusion network and behind it a network that grades the fused image.

    Args:
        fusion: ``(B, 2, H, W[, D])`` in [0, 1] to ``(B, 1, H, W[, D])`` in [0, 1].
        grader: ``(B, 1, H, W[, D])`` to logits ``(B, 2)``.
    """

    def __init__(self, fusion: torch.nn.Module, grader: torch.nn.Module) -> None:
        super().__init__()
        self.fusion = fusion
        self.grader = grader

    def forward(self, x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Args:
            x: the two images ``(B, 2, H, W[, D])`` in [0, 1].

        Returns:
            logits ``(B, 2)``; in training, for `JointLoss`, logits, fused images and ``x``.
        """
        # augmentation leaves noise below 0 and above 1, where no fused image can follow
        x = x.clamp(0, 1)
        fused = self.fusion(x)
        logits = self.grader(fused)
        return (logits, fused, x) if self.training else logits


class JointLoss(_Loss):
    """
    Classification loss of the grade plus ``fusion_weight`` times the loss of the fused image against its sources.

    Args:
        fusion_loss: of fused images and sources, a scalar.
        grading_loss: of logits and labels, a scalar.
        fusion_weight: weight of the first; 0 leaves it out, and the fused image is then whatever serves the grade.
    """

    def __init__(self, fusion_loss: torch.nn.Module, grading_loss: torch.nn.Module, fusion_weight: float = 0.1) -> None:
        super().__init__()
        self.fusion_loss = fusion_loss
        self.grading_loss = grading_loss
        self.fusion_weight = fusion_weight

    def forward(self, input: tuple[torch.Tensor, torch.Tensor, torch.Tensor], target: torch.Tensor) -> torch.Tensor:
        """
        Args:
            input: what `JointNetwork` gives in training.
            target: labels ``(B,)``.
        """
        logits, fused, sources = (convert_to_tensor(i, track_meta=False) for i in input)
        loss = self.grading_loss(logits, target)
        return loss + self.fusion_weight * self.fusion_loss(fused, sources) if self.fusion_weight else loss


def load_encoder(network: ClinicalFMambaClassifier, fusion: FusionBundle) -> None:
    """
    Take encoder and Mamba blocks over from the fusion network's weights.

    Raises:
        ValueError: when they are of another network.
    """
    try:
        network.load_fusion_weights(read_weights(fusion.weights))
    except ValueError as error:
        raise ValueError(f"{fusion.weights}: {error} Set fusion_weights, or encoder to 'scratch'.") from error


def load_parts(network: JointNetwork, fusion: FusionBundle, grader_weights: str | os.PathLike | None = None) -> None:
    """Start a joint network from a trained fusion network and, if given, from a network trained on fused images."""
    load_weights(network.fusion, fusion.weights)
    if grader_weights is not None:
        load_weights(network.grader, grader_weights)

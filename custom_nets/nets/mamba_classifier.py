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
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from monai.networks.layers.factories import Pool

from custom_nets.nets.clinicalfmamba import ClinicalFMamba

__all__ = ["ClinicalFMambaClassifier"]


class ClinicalFMambaClassifier(nn.Module):
    """
    Classifier of one or several co-registered images of a brain that looks at each as :py:class:`ClinicalFMamba` does:
    its convolutional encoder and its Mamba blocks on the latent tokens, here the same for all images; then mean and
    standard deviation of the tokens in the brain (statistics pooling), of all images side by side, and one linear
    layer.

    The parts keep their names, so that the weights of a trained fusion network fit (:py:meth:`load_fusion_weights`).

    Args:
        spatial_dims: 2 or 3.
        in_channels: images, a channel each.
        num_classes: classes.
        frozen: whether the encoder's weights stay as they are; its batch norms then stay in evaluation mode, too.
        dropout: probability that a feature is left out before the linear layer, in training.
        kwargs: further arguments of :py:class:`ClinicalFMamba`: ``channels``, ``strides``, ``dilations``,
            ``latent_depth``, ``state_dim``, ``scan``.

    Examples::

        # a fused slice of any size
        net = ClinicalFMambaClassifier(spatial_dims=2)
        logits = net(torch.rand(4, 1, 160, 192))  # (4, 2)
    """

    def __init__(
        self,
        spatial_dims: int = 2,
        in_channels: int = 1,
        num_classes: int = 2,
        frozen: bool = False,
        dropout: float = 0.0,
        channels: Sequence[int] = (32, 64, 128),
        **kwargs: Any,
    ) -> None:
        super().__init__()
        fusion = ClinicalFMamba(spatial_dims, channels=channels, **kwargs)
        self.spatial_dims = spatial_dims
        self.in_channels = in_channels
        self.stride = fusion.stride
        self.frozen = frozen
        self.stem = fusion.stem
        self.encoder = fusion.encoder
        self.latent_x = fusion.latent_x
        self.norm = nn.LayerNorm(channels[-1])
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(in_channels * 2 * channels[-1], num_classes)
        self.share = Pool[Pool.AVG, spatial_dims](fusion.stride)
        for part in (self.stem, self.encoder):
            part.requires_grad_(not frozen)

    def load_fusion_weights(self, state_dict: dict[str, torch.Tensor]) -> None:
        """
        Take over encoder and Mamba blocks from a fusion network's state dict.

        Raises:
            ValueError: if it is not of a network with the same encoder.
        """
        shared = ("stem.", "encoder.", "latent_x.")
        taken = {name: value for name, value in state_dict.items() if name.startswith(shared)}
        own = {name: value for name, value in self.state_dict().items() if name.startswith(shared)}
        if {name: value.shape for name, value in taken.items()} != {name: value.shape for name, value in own.items()}:
            raise ValueError("the weights are not of a ClinicalFMamba with the same encoder and Mamba blocks.")
        self.load_state_dict(taken, strict=False)

    def train(self, mode: bool = True) -> ClinicalFMambaClassifier:
        super().train(mode)
        if self.frozen:
            self.stem.eval()
            self.encoder.eval()
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """
        Args:
            x: ``(B, in_channels, H, W[, D])`` with values in [0, 1], of any spatial size; 0 is background.

        Returns:
            logits ``(B, num_classes)``.

        Raises:
            ValueError: if ``x`` has another number of dimensions or channels.
        """
        if x.dim() != self.spatial_dims + 2 or x.shape[1] != self.in_channels:
            wanted = f"a batch of {self.spatial_dims}D images with {self.in_channels} channels"
            raise ValueError(f"expected {wanted}, got a tensor of shape {list(x.shape)}.")
        padding: list[int] = []
        for length in x.shape[2:][::-1]:
            padding += [0, -length % self.stride]
        x = F.pad(x, padding, mode="replicate")

        # All images pass the shared encoder as one batch.
        images = x.flatten(0, 1).unsqueeze(1)
        features = self.encoder(self.stem(images))
        spatial_shape = list(features.shape[2:])
        tokens = features.flatten(2).transpose(1, 2)
        for block in self.latent_x:
            tokens = block(tokens, spatial_shape)
        tokens = self.norm(tokens)
        # in an empty image, all tokens count alike
        weight = self.share((images > 0).to(tokens.dtype)).flatten(2).transpose(1, 2) + 1e-6
        weight = weight / weight.sum(dim=1, keepdim=True)
        mean = (weight * tokens).sum(dim=1, keepdim=True)
        deviation = ((weight * (tokens - mean).square()).sum(dim=1) + 1e-6).sqrt()
        pooled = torch.cat([mean.squeeze(1), deviation], dim=1).unflatten(0, (-1, self.in_channels))
        return self.head(self.dropout(pooled.flatten(1)))

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

import math
from collections.abc import Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from monai.networks.layers.factories import Conv, Norm

from custom_nets.blocks import (
    CrossMambaBlock,
    CrossModalChannelAttention,
    DilatedGatedConvBlock,
    MambaBlock,
    SourceRefinement,
    TokenExchange,
    UpsampledConv,
    recomputed,
)
from custom_nets.nets.registry import register_network
from custom_nets.ops import scan_orders

__all__ = ["ClinicalFMamba"]


@register_network("clinicalfmamba")
class ClinicalFMamba(nn.Module):
    """ClinicalFMamba fuses two co-registered images of one brain into one image.

    A convolutional encoder with shared weights, multi-directional Mamba on each modality's latent tokens, cross-modal
    latent fusion, and a convolutional decoder that takes up the sources' full-resolution features through cross-modal
    channel attention. From: Zhou and Khalvati, "ClinicalFMamba: Advancing Clinical Assessment using Mamba-based
    Multimodal Neuroimaging Fusion", MICCAI MLMI 2025 (arXiv 2508.03008).

    What differs between the published 2D and 3D networks follows ``spatial_dims``: the 2D one exchanges tokens before
    the cross Mamba, has plain Mamba blocks before its decoder, convolution pyramids in its encoder and ReLU instead of
    leaky ReLU in its decoder.

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of both images together, the first half being the first image's.
        out_channels: channels of the fused image.
        channels: channels of the encoder's stages.
        strides: stride (1 or 2) of each stage. The paper uses (1, 2, 2) for 128 x 128 slices. A stage that changes
            neither resolution nor channels has no convolution before its gated block.
        dilations: dilation of each stage's gated block.
        latent_depth: Mamba blocks on each modality's tokens.
        state_dim: states per channel of the multi-directional scans.
        scan: ``"cross"`` (2D), ``"tri_plane"`` (3D) or ``"raster"`` (one direction, the paper's ablation); by default
            the one of the paper.
        cross_mamba: whether the modalities' tokens are fused by cross Mamba; without it they are averaged.
        cross_modal_attention: whether the sources' full-resolution features are added through channel attention.
        refinement: residual units of a :class:`custom_nets.blocks.SourceRefinement` in the place of the paper's head;
            with 0, the paper's. Up to its sigmoid, the paper's path at full resolution is linear and the same for both
            images, so that which of them shows can not depend on what is at a pixel.
        use_checkpoint: whether training computes the activations of encoder, Mamba blocks and decoder again in its
            backward instead of keeping them, which takes less memory and more time.

    Raises:
        ValueError: if the arguments do not fit together.

    Examples::

        # two co-registered slices of any size
        net = ClinicalFMamba(spatial_dims=2)
        fused = net(torch.rand(4, 2, 256, 256))  # (4, 1, 256, 256), in [0, 1]

        # two co-registered volumes
        net = ClinicalFMamba(spatial_dims=3)
        fused = net(torch.rand(1, 2, 96, 96, 64))  # (1, 1, 96, 96, 64)
    """

    def __init__(
        self,
        spatial_dims: int = 2,
        in_channels: int = 2,
        out_channels: int = 1,
        channels: Sequence[int] = (32, 64, 128),
        strides: Sequence[int] = (2, 2, 2),
        dilations: Sequence[int] = (1, 3, 5),
        latent_depth: int = 5,
        state_dim: int = 8,
        scan: str | None = None,
        cross_mamba: bool = True,
        cross_modal_attention: bool = True,
        refinement: int = 0,
        use_checkpoint: bool = False,
    ) -> None:
        super().__init__()
        if spatial_dims not in (2, 3):
            raise ValueError(f"spatial_dims should be 2 or 3, got {spatial_dims}.")
        if in_channels < 2 or in_channels % 2 != 0:
            raise ValueError(f"in_channels should be even, half of them for each image, got {in_channels}.")
        if not len(channels) == len(strides) == len(dilations):
            raise ValueError("channels, strides and dilations should have one entry for each stage of the encoder.")
        if any(stride not in (1, 2) for stride in strides) or 2 not in strides:
            raise ValueError(f"strides should be 1 or 2, at least one of them 2, got {tuple(strides)}.")
        if refinement and out_channels != in_channels // 2:
            raise ValueError(
                f"refinement gives the fused image the channels of a source, {in_channels // 2}, not {out_channels}."
            )
        published_2d = spatial_dims == 2
        conv = Conv[Conv.CONV, spatial_dims]
        self.stride = math.prod(strides)
        self.spatial_dims = spatial_dims
        self.in_channels = in_channels
        self.use_checkpoint = use_checkpoint
        features, latent = channels[0], channels[-1]

        self.stem = conv(in_channels // 2, features, 3, padding=1)
        self.encoder = nn.Sequential()
        for incoming, outgoing, stride, dilation in zip([features, *channels], channels, strides, dilations):
            if stride == 2:
                self.encoder.append(conv(incoming, outgoing, 2, stride))
            elif incoming != outgoing:
                self.encoder.append(conv(incoming, outgoing, 3, padding=1))
            self.encoder.append(
                DilatedGatedConvBlock(
                    spatial_dims, outgoing, dilation, pyramid=published_2d, use_checkpoint=use_checkpoint
                )
            )

        raster = scan_orders("raster", spatial_dims)
        directions = scan_orders(scan or ("cross" if published_2d else "tri_plane"), spatial_dims)

        def latent_blocks() -> nn.ModuleList:
            return nn.ModuleList(
                MambaBlock(latent, directions, state_dim, use_checkpoint=use_checkpoint) for _ in range(latent_depth)
            )

        def cross_block() -> CrossMambaBlock | None:
            return CrossMambaBlock(latent, directions, state_dim, use_checkpoint) if cross_mamba else None

        self.latent_x, self.latent_y = latent_blocks(), latent_blocks()
        self.exchange = TokenExchange(latent, raster) if published_2d else None
        self.cross_x, self.cross_y = cross_block(), cross_block()
        self.merge = nn.Linear(latent, latent)

        self.refine = nn.ModuleList()
        if published_2d:
            self.refine.extend(
                MambaBlock(latent, raster, state_dim, normalise=False, use_checkpoint=use_checkpoint) for _ in range(3)
            )
        self.refine_norm = nn.LayerNorm(latent) if published_2d else nn.Identity()

        self.decoder = nn.Sequential()
        halvings = [i for i, stride in enumerate(strides) if stride == 2]
        incoming = latent
        for stage, i in enumerate(reversed(halvings)):
            outgoing = features if i == halvings[0] else channels[i - 1]
            # The batch norm would cancel a bias of the convolution, and no gradient would reach it.
            parts: list[nn.Module] = [
                UpsampledConv(spatial_dims, incoming, outgoing),
                Norm[Norm.BATCH, spatial_dims](outgoing),
            ]
            if i != halvings[0]:
                parts.append(nn.ReLU() if published_2d else nn.LeakyReLU(0.2))
            # Named as in the weights that ship, where the upsampling was a module of its own.
            for number, part in enumerate(parts, start=4 * stage + 1):
                self.decoder.add_module(str(number), part)
            incoming = outgoing

        self.skip = CrossModalChannelAttention(spatial_dims, features) if cross_modal_attention else None
        self.refinement = SourceRefinement(spatial_dims, features, out_channels, refinement) if refinement else None
        self.head = None if refinement else conv(features, out_channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """
        Args:
            x: the two images, ``(B, in_channels, H, W[, D])`` with values in [0, 1], of any spatial size.

        Returns:
            the fused image, ``(B, out_channels, H, W[, D])`` with values in [0, 1].

        Raises:
            ValueError: if ``x`` has another number of dimensions or channels.
        """
        if x.dim() != self.spatial_dims + 2 or x.shape[1] != self.in_channels:
            wanted = f"a batch of {self.spatial_dims}D images with {self.in_channels} channels"
            raise ValueError(f"expected {wanted}, got a tensor of shape {list(x.shape)}.")
        padding: list[int] = []
        for length in x.shape[:1:-1]:
            # not the equal `-length % stride`, with which a compiler can not tell what follows for symbolic sizes
            padding += [0, (length + self.stride - 1) // self.stride * self.stride - length]
        x = F.pad(x, padding, mode="replicate")

        # Both images pass the shared encoder as one batch.
        stem = self.stem(torch.cat(x.chunk(2, dim=1)))
        features = self.encoder(stem)
        spatial_shape = list(features.shape[2:])
        encoded_x, encoded_y = features.flatten(2).transpose(1, 2).contiguous().unflatten(0, [2, -1]).unbind(0)
        tokens_x, tokens_y = encoded_x, encoded_y
        for block_x, block_y in zip(self.latent_x, self.latent_y):
            tokens_x, tokens_y = block_x(tokens_x, spatial_shape), block_y(tokens_y, spatial_shape)
        if self.exchange is not None:
            tokens_x, tokens_y = self.exchange(tokens_x, tokens_y, encoded_x, encoded_y, spatial_shape)
        tokens = self._fuse(tokens_x, tokens_y, spatial_shape)

        fused = self._decode(tokens.unflatten(1, spatial_shape).movedim(-1, 1), stem, x)
        # a view would tie an exported program to sizes that need padding, or to ones that do not
        return F.pad(fused, [-extent for extent in padding])

    def _decode(self, features: torch.Tensor, stem: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        """Fused features ``(B, C, H', W'[, D'])``, both images' at full resolution and the images to the fused one."""
        if not torch.jit.is_scripting():
            if self.use_checkpoint:
                return recomputed(self, self._image, features, stem, images)
        return self._image(features, stem, images)

    def _image(self, features: torch.Tensor, stem: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        fused = self.decoder(features)
        if self.skip is not None:
            # With voxels as rows, the gradients of both images are put together as they come, channels last; those of
            # an image or a volume would not be, since nothing tells the layout of a single one.
            rows = stem.flatten(2).transpose(1, 2).split([images.shape[0], images.shape[0]])
            stem_x, stem_y = [part.transpose(1, 2).unflatten(2, stem.shape[2:]) for part in rows]
            fused = self.skip(stem_x, stem_y, fused)
        if self.refinement is not None:
            return self.refinement(fused, images)
        assert self.head is not None
        # Under autocast the head gives half precision, in which a sigmoid would leave fewer than 256 grey values.
        return torch.sigmoid(self.head(fused).to(images.dtype))

    def _fuse(self, x: torch.Tensor, y: torch.Tensor, spatial_shape: list[int]) -> torch.Tensor:
        """Latent tokens of the two images, each ``(B, L, C)``, to those of the fused one."""
        if self.cross_x is not None and self.cross_y is not None:
            x, y = self.cross_x(x, y, spatial_shape), self.cross_y(y, x, spatial_shape)
        tokens = self.merge((x + y) / 2)
        for block in self.refine:
            tokens = block(tokens, spatial_shape)
        return self.refine_norm(tokens)

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
"""Inference over a whole image where it fits, over windows where it does not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from monai.data import MetaTensor
from monai.inferers import Inferer, SlidingWindowInferer
from monai.utils import fall_back_tuple

__all__ = ["FusionInferer", "ReconstructionInferer"]


class FusionInferer(Inferer):
    """
    Run a fusion network on the whole image up to ``max_voxels``, above that on overlapping windows that are blended
    with Gaussian weights. The result keeps the metadata of the input, so that every fused image of a batch is saved
    with its own affine and name.

    Args:
        roi_size: window size; -1 takes the whole axis. An axis shorter than its window is taken whole, not padded.
        max_voxels: largest spatial size, in pixels or voxels, that the network is run on at once.
        overlap: share of a window that it has in common with the next.
        sw_batch_size: number of windows per run of the network.
        device: where the result of windows is put together, e.g. ``"cpu"`` to save GPU memory; by default where the
            input is.
        progress: show a progress bar over the windows.
    """

    def __init__(
        self,
        roi_size: Sequence[int] | int,
        max_voxels: int,
        overlap: float = 0.25,
        sw_batch_size: int = 1,
        device: torch.device | str | None = None,
        progress: bool = False,
    ) -> None:
        super().__init__()
        self.roi_size = roi_size
        self.max_voxels = max_voxels
        self.overlap = overlap
        self.sw_batch_size = sw_batch_size
        self.device = device
        self.progress = progress

    def __call__(
        self, inputs: torch.Tensor, network: Callable[..., torch.Tensor], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """
        Args:
            inputs: sources, ``(B, 2, H, W[, D])``.
            network: called with a plain tensor of that shape or a window of it, and ``args`` and ``kwargs``.

        Returns:
            fused images ``(B, 1, H, W[, D])`` in the dtype of ``inputs``, a ``MetaTensor`` if ``inputs`` is one.
        """
        # every operation of a network on a MetaTensor costs a dispatch in Python
        plain = inputs.as_tensor() if isinstance(inputs, MetaTensor) else inputs
        size = plain.shape[2:]
        if size.numel() <= self.max_voxels:
            fused = network(plain, *args, **kwargs)
        else:
            windows = SlidingWindowInferer(
                roi_size=[min(roi, full) for roi, full in zip(fall_back_tuple(self.roi_size, size), size)],
                sw_batch_size=self.sw_batch_size,
                overlap=self.overlap,
                mode="gaussian",
                device=self.device,
                progress=self.progress,
            )
            fused = windows(plain, network, *args, **kwargs)  # type: ignore[assignment]
        # half precision is the network's affair, what is measured and saved is not rounded to it
        fused = fused.to(plain.dtype)
        return MetaTensor(fused).copy_meta_from(inputs) if isinstance(inputs, MetaTensor) else fused


class ReconstructionInferer(Inferer):
    """Run an autoencoder on each source alone, for the first of two stages of training."""

    def __call__(
        self, inputs: torch.Tensor, network: Callable[..., torch.Tensor], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """
        Args:
            inputs: sources, ``(B, 2, H, W[, D])``.
            network: called with ``inputs``, ``reconstruct=True``, and ``args`` and ``kwargs``.

        Returns:
            the reconstructed sources, ``(B, 2, H, W[, D])``.
        """
        return network(inputs, *args, reconstruct=True, **kwargs)

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

import logging
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from monai.data import MetaTensor
from monai.inferers import Inferer, SlidingWindowInferer
from monai.utils import fall_back_tuple

__all__ = ["FusionInferer", "ReconstructionInferer"]

# what a network halves three times without a rest
GRID = 8
MARGIN = 16
# width of the Gaussian weights, as a share of a window: with MONAI's 0.125, its clipping of low weights makes seams
SIGMA = 0.18


class FusionInferer(Inferer):
    """
    Run a fusion network on the whole image up to ``max_voxels``. Above that, and where a GPU's memory ends, run it on
    overlapping windows that are blended with Gaussian weights, and only on the box that holds anything. Where all
    sources are 0, so is the fused image. The result keeps the metadata of the input, so that every fused image of a
    batch is saved with its own affine and name.

    A network for slices fuses volumes slice by slice along their last axis; all sizes are then those of a slice.

    Args:
        roi_size: largest window size; -1 takes the whole axis. An axis shorter than its window is taken whole, not
            padded, and a longer one is divided into even windows.
        max_voxels: largest spatial size, in pixels or voxels, that it is tried to run the network on at once.
        overlap: share of a window that it has in common with the next.
        sw_batch_size: number of windows per run of the network.
        device: where the result of windows is put together, e.g. ``"cpu"`` to save GPU memory; by default where the
            input is.
        progress: show a progress bar over the windows.
        spatial_dims: of the network, 2 or 3; without it, inputs are taken to have as many.
        slice_batch: number of a volume's slices that the network takes at once.
        amp_dtype: half precision in which the network runs by autocast, on any kind of device (MONAI's engines know
            that of GPUs only); without it, it runs as its surroundings say.
    """

    def __init__(
        self,
        roi_size: Sequence[int] | int,
        max_voxels: int,
        overlap: float = 0.25,
        sw_batch_size: int = 1,
        device: torch.device | str | None = None,
        progress: bool = False,
        spatial_dims: int | None = None,
        slice_batch: int = 16,
        amp_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.roi_size = roi_size
        self.max_voxels = max_voxels
        self.overlap = overlap
        self.sw_batch_size = sw_batch_size
        self.device = device
        self.progress = progress
        self.spatial_dims = spatial_dims
        self.slice_batch = slice_batch
        self.amp_dtype = amp_dtype

    def __call__(
        self, inputs: torch.Tensor, network: Callable[..., torch.Tensor], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """
        Args:
            inputs: sources, ``(B, 2, H, W[, D])``.
            network: called with a plain tensor of that shape, a slice or a window of it, and ``args`` and ``kwargs``.

        Returns:
            fused images ``(B, 1, H, W[, D])`` in the dtype of ``inputs`` and clipped to [0, 1], which a network with a
            linear output may leave; a ``MetaTensor`` if ``inputs`` is one.
        """
        # every operation of a network on a MetaTensor costs a dispatch in Python
        plain = inputs.as_tensor() if isinstance(inputs, MetaTensor) else inputs
        with torch.autocast(plain.device.type, self.amp_dtype) if self.amp_dtype else nullcontext():
            if self.spatial_dims is not None and plain.ndim == self.spatial_dims + 3:
                slices = plain.movedim(-1, 1).flatten(0, 1).split(self.slice_batch)
                joined = torch.cat([self._fuse(batch, network, *args, **kwargs) for batch in slices])
                fused = joined.unflatten(0, (len(plain), -1)).movedim(1, -1)
            else:
                fused = self._fuse(plain, network, *args, **kwargs)
        # half precision is the network's affair, what is measured and saved is not rounded to it
        fused = fused.to(plain.dtype).clamp(0, 1)
        # a sigmoid leaves a trace where there is nothing to show, which SSIM takes for structure
        fused = fused.masked_fill((plain <= 0).all(1, keepdim=True), 0)
        return MetaTensor(fused).copy_meta_from(inputs) if isinstance(inputs, MetaTensor) else fused

    def _fuse(
        self, plain: torch.Tensor, network: Callable[..., torch.Tensor], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        size = plain.shape[2:]
        if size.numel() <= self.max_voxels:
            try:
                return network(plain, *args, **kwargs)
            except torch.cuda.OutOfMemoryError:
                shape = " x ".join(map(str, size))
                logging.getLogger(__name__).warning(
                    f"The GPU's memory does not hold {shape} at once: fusing windows. A lower max_voxels spares it."
                )
        # not in the except block, which keeps what the try has allocated
        box = _content(plain)
        content = plain[box]
        windows = SlidingWindowInferer(
            roi_size=self._window(content.shape[2:]),
            sw_batch_size=self.sw_batch_size,
            overlap=self.overlap,
            mode="gaussian",
            sigma_scale=SIGMA,
            device=self.device,
            progress=self.progress,
        )
        inside: torch.Tensor = windows(content, network, *args, **kwargs)  # type: ignore[assignment]
        fused = inside.new_zeros(plain.shape[0], 1, *size)
        fused[box] = inside
        return fused

    def _window(self, size: torch.Size) -> list[int]:
        """As many windows as `roi_size` needs, but no larger than they have to be."""
        window = []
        for roi, full in zip(fall_back_tuple(self.roi_size, size), size):
            count = max(1, math.ceil((full - self.overlap * roi) / ((1 - self.overlap) * roi)))
            even = math.ceil(full / (count - (count - 1) * self.overlap))
            window.append(min(roi, full, GRID * math.ceil(even / GRID)))
        return window


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


def _content(image: torch.Tensor) -> tuple[slice, ...]:
    """Batch, channels and the box of all that is above the lowest value, with a margin, which a network may need."""
    occupied = (image > image.amin()).any(0).any(0)
    box = [slice(None), slice(None)]
    for axis, full in enumerate(occupied.shape):
        others = [other for other in range(occupied.ndim) if other != axis]
        found = occupied.amax(others).nonzero()
        if len(found) == 0:
            return (slice(None),) * image.ndim
        box.append(slice(max(0, int(found[0]) - MARGIN), min(full, int(found[-1]) + 1 + MARGIN)))
    return tuple(box)

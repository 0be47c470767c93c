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
import torch.nn.functional as F
from monai.utils import convert_to_tensor
from torch.nn.modules.loss import _Loss

from scripts.correlation import sum_of_correlation_differences
from scripts.gradients import edge_preservation, sobel
from scripts.ssim import ssim

__all__ = [
    "FusionIntensityLoss",
    "FusionGradientLoss",
    "FusionSSIMLoss",
    "EdgePreservationLoss",
    "SumOfCorrelationDifferencesLoss",
    "ClinicalFMambaLoss",
    "JointFusionLoss",
]


class FusionLoss(_Loss):
    """
    Base of the losses between a fused image and its sources: checks shapes and computes in float32, also under
    autocast. Subclasses define `compute`, which returns a scalar.
    """

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """
        Args:
            input: fused images `(B, 1, H, W[, D])` in [0, 1].
            target: their sources `(B, S, H, W[, D])` in [0, 1].

        Raises:
            ValueError: when the shapes do not belong together.
        """
        if input.ndim not in (4, 5) or input.shape[1] != 1 or input.shape[2:] != target.shape[2:]:
            raise ValueError(
                "expected fused images (B, 1, H, W[, D]) and sources (B, S, H, W[, D]) of the same size, "
                f"got {tuple(input.shape)} and {tuple(target.shape)}."
            )
        # plain tensors: MetaTensor's bookkeeping would be paid on every small operation
        fused, sources = (convert_to_tensor(i, dtype=torch.float32, track_meta=False) for i in (input, target))
        return self.compute(fused, sources)

    def compute(self, fused: torch.Tensor, sources: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError(f"Subclass {self.__class__.__name__} must implement this method.")


class FusionIntensityLoss(FusionLoss):
    """Mean absolute difference between the fused image and the elementwise maximum of the sources."""

    def compute(self, fused: torch.Tensor, sources: torch.Tensor) -> torch.Tensor:
        return F.l1_loss(fused, sources.amax(dim=1, keepdim=True))


class FusionGradientLoss(FusionLoss):
    """
    Distance between the Sobel gradients of the fused image and the strongest ones among its sources.

    Args:
        form: what is compared, and how.

            - ``"magnitude"``: L1 of the sums of absolute components, against the largest sum among the sources
              (the paper's 2D loss).
            - ``"vector"``: mean squared difference of the components, against the gradient of that source which has
              the largest magnitude. Unlike a signed maximum it keeps edges towards dark (the 3D loss).
            - ``"slices"``: Euclidean length of the difference of the in-plane gradients, against the strongest ones,
              on each slice along the last axis of a volume (the 3D loss as printed in the paper).

    Raises:
        ValueError: when ``form`` is none of these.
    """

    FORMS = ("magnitude", "vector", "slices")

    def __init__(self, form: str = "magnitude") -> None:
        super().__init__()
        if form not in self.FORMS:
            raise ValueError(f"form must be one of {self.FORMS}, got {form!r}.")
        self.form = form

    def compute(self, fused: torch.Tensor, sources: torch.Tensor) -> torch.Tensor:
        if self.form == "slices" and fused.ndim == 5:
            fused, sources = (i.movedim(-1, 1).flatten(0, 1) for i in (fused, sources))
        grad_fused, grad_sources = sobel(fused), sobel(sources)
        if self.form == "magnitude":
            strongest = grad_sources.abs().sum(dim=2).amax(dim=1, keepdim=True)
            return F.l1_loss(grad_fused.abs().sum(dim=2), strongest)

        # pairwise: argmax and gather over an axis of two are several times as slow on a CPU
        strongest, *others = grad_sources.split(1, dim=1)
        for other in others:
            stronger = other.square().sum(dim=2, keepdim=True) > strongest.square().sum(dim=2, keepdim=True)
            strongest = torch.where(stronger, other, strongest)
        difference = grad_fused - strongest
        if self.form == "vector":
            return difference.square().mean()
        return torch.linalg.vector_norm(difference, dim=2).mean()


class FusionSSIMLoss(FusionLoss):
    """One minus the structural similarity to the sources, averaged over them (see `scripts.ssim.ssim`)."""

    def compute(self, fused: torch.Tensor, sources: torch.Tensor) -> torch.Tensor:
        return 1 - ssim(fused, sources).mean()


class EdgePreservationLoss(FusionLoss):
    """
    The negative edge preservation Q^AB/F, in [-1, 0] (see `scripts.gradients.edge_preservation`).

    Args:
        smoothing: strength of a Sobel gradient below which its orientation counts less and less. It bounds the
            derivative where the fused image is flat; a step of one grey level in 255 is 16 times as strong.
    """

    def __init__(self, smoothing: float = 1e-3) -> None:
        super().__init__()
        self.smoothing = smoothing

    def compute(self, fused: torch.Tensor, sources: torch.Tensor) -> torch.Tensor:
        return -edge_preservation(fused, sources, self.smoothing).mean()


class SumOfCorrelationDifferencesLoss(FusionLoss):
    """
    The negative sum of the correlations of differences, SCD, in [-2, 2] (see
    `scripts.correlation.sum_of_correlation_differences`).

    Args:
        floor: a standard deviation below it counts as ``floor``. It bounds the derivative where the fused image
            differs from a source by a constant.
    """

    def __init__(self, floor: float = 1e-3) -> None:
        super().__init__()
        self.floor = floor

    def compute(self, fused: torch.Tensor, sources: torch.Tensor) -> torch.Tensor:
        return -sum_of_correlation_differences(fused, sources, self.floor).mean()


class ClinicalFMambaLoss(FusionLoss):
    """
    Training loss of ClinicalFMamba (Zhou and Khalvati, MICCAI MLMI 2025): the weighted sum of an intensity, a
    gradient and a structural similarity term.

    Args:
        spatial_dims: 2 or 3; chooses the defaults below.
        intensity_weight: weight of `FusionIntensityLoss`.
        gradient_weight: weight of `FusionGradientLoss`.
        ssim_weight: weight of `FusionSSIMLoss`; by default 5 in 2D and 1 in 3D.
        gradient_form: form of `FusionGradientLoss`; by default ``"magnitude"`` in 2D and ``"vector"`` in 3D.

    Raises:
        ValueError: when ``spatial_dims`` is neither 2 nor 3.
    """

    def __init__(
        self,
        spatial_dims: int,
        intensity_weight: float = 2.0,
        gradient_weight: float = 10.0,
        ssim_weight: float | None = None,
        gradient_form: str | None = None,
    ) -> None:
        super().__init__()
        if spatial_dims not in (2, 3):
            raise ValueError(f"spatial_dims must be 2 or 3, got {spatial_dims}.")
        self.intensity_weight = intensity_weight
        self.gradient_weight = gradient_weight
        self.ssim_weight = {2: 5.0, 3: 1.0}[spatial_dims] if ssim_weight is None else ssim_weight
        self.intensity = FusionIntensityLoss()
        self.gradient = FusionGradientLoss(gradient_form or {2: "magnitude", 3: "vector"}[spatial_dims])
        self.ssim = FusionSSIMLoss()

    def compute(self, fused: torch.Tensor, sources: torch.Tensor) -> torch.Tensor:
        return (
            self.intensity_weight * self.intensity.compute(fused, sources)
            + self.gradient_weight * self.gradient.compute(fused, sources)
            + self.ssim_weight * self.ssim.compute(fused, sources)
        )


class JointFusionLoss(FusionLoss):
    """
    ``ssim_weight * (1 - SSIM) - scd_weight * SCD - edge_weight * Q^AB/F``, SSIM the mean over both sources: asks for
    structure, for what each source has beyond the other, and for edges at once. Plain fusion rules are good at one or
    two of them: with the default weights, the image that minimises this loss is above average and maximum in all
    three. At least -7 there, and negative for good fusion.

    Args:
        ssim_weight: weight of `FusionSSIMLoss`. More of it gives up edges for structure.
        scd_weight: weight of `SumOfCorrelationDifferencesLoss`.
        edge_weight: weight of `EdgePreservationLoss`.
    """

    def __init__(self, ssim_weight: float = 20.0, scd_weight: float = 1.0, edge_weight: float = 5.0) -> None:
        super().__init__()
        self.ssim_weight = ssim_weight
        self.scd_weight = scd_weight
        self.edge_weight = edge_weight
        self.ssim = FusionSSIMLoss()
        self.scd = SumOfCorrelationDifferencesLoss()
        self.edges = EdgePreservationLoss()

    def compute(self, fused: torch.Tensor, sources: torch.Tensor) -> torch.Tensor:
        return (
            self.ssim_weight * self.ssim.compute(fused, sources)
            + self.scd_weight * self.scd.compute(fused, sources)
            + self.edge_weight * self.edges.compute(fused, sources)
        )

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
"""Rigid and affine registration of two images of one head, and whether two images fit."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from monai.data import MetaTensor, affine_to_spacing
from monai.transforms import ScaleIntensityRangePercentiles
from monai.utils import optional_import
from scipy.ndimage import map_coordinates
from scipy.spatial.transform import Rotation

from scripts.data import replacing
from scripts.grid import shrink

if TYPE_CHECKING:
    import itk
else:
    # pairs on one grid are fused without it
    itk, _ = optional_import("itk")

__all__ = ["VISIBLE_MISFIT", "Alignment", "misfit", "normalised_mutual_information", "register", "save_transform"]

KINDS = ("rigid", "affine")
# voxel sizes of the levels by dimensions, as a share of the longest side of the fixed image: 8, 4 and 2 mm for a head,
# and half of that for a slice, which has fewer voxels; some ten thousand are compared
LEVELS = {2: (1 / 64, 1 / 128, 1 / 256), 3: (1 / 32, 1 / 64, 1 / 128)}
COMPARED = {2: 1 / 128, 3: 1 / 32}
BINS = 32
ITERATIONS = 100
# of the samples on a level, at most so many are drawn
SAMPLES = 150_000
# first guesses of the rotation about each axis, in degrees, and how many of the best are followed
GUESSES = (-20.0, -10.0, 0.0, 10.0, 20.0)
FOLLOWED = 5
# where the two were tried against each other, in shares of the longest side, and in degrees
SHIFTS = (1 / 32, 1 / 16)
ANGLES = (8.0, 16.0)
# mutual information elsewhere over that here, beyond which images visibly do not fit, and what unrelated images have
VISIBLE_MISFIT = 1.15
UNRELATED = 1.03
# share of the fixed image's foreground that the moving image has to cover
LEAST_COVERED = 0.25
# share of what both cover that they have to cover moved, too, to be compared there
LEAST_COMMON = 0.5


def normalised_mutual_information(a: np.ndarray, b: np.ndarray, bins: int = BINS) -> float:
    """
    (H(a) + H(b)) / H(a, b) of two arrays of one shape, between 1 (independent) and 2 (each tells the other). Studholme
    et al., An overlap invariant entropy measure of 3D medical image alignment, Pattern Recognition 32(1), 1999.
    """
    joint = np.histogram2d(np.ravel(a), np.ravel(b), bins=bins)[0]
    joint /= joint.sum()
    entropies = [-(p[p > 0] * np.log(p[p > 0])).sum() for p in (joint.sum(0), joint.sum(1), joint)]
    return float((entropies[0] + entropies[1]) / entropies[2]) if entropies[2] > 0 else 2.0


@dataclass
class Alignment:
    """
    Result of `register`.

    Args:
        kind: ``"rigid"`` or ``"affine"``.
        affine: the affine (RAS) that puts the voxels of the moving image where those of the fixed image are.
        transform: the ITK transform from points of the fixed to points of the moving image; in 3D in world coordinates
            (LPS), in 2D in mm along the axes of the fixed image.
        translation: length in mm of the move of the fixed image's centre.
        rotation: angle in degrees.
        mutual_information: normalised mutual information before and after.
        overlap: Dice coefficient of what is brighter than the mean in either image, before and after.
    """

    kind: str
    affine: torch.Tensor
    transform: itk.Transform
    translation: float
    rotation: float
    mutual_information: tuple[float, float]
    overlap: tuple[float, float]


class _Pair:
    """
    Two images in one frame of millimetres: the world (LPS) in 3D, the axes of the fixed image in 2D, where a slice of
    any orientation is upright.
    """

    def __init__(self, fixed: MetaTensor, moving: MetaTensor) -> None:
        self.dims = fixed.ndim - 1
        self.to_frame = np.diag([-1.0, -1.0, 1.0, 1.0])
        if self.dims == 2:
            spacing = affine_to_spacing(fixed.affine.double(), 2).tolist()
            self.to_frame = np.diag([*spacing, 1.0, 1.0]) @ np.linalg.inv(fixed.affine.double().numpy())
        self.fixed, self.moving = _prepared(fixed), _prepared(moving)
        self.extent = _extent(fixed)
        coarse = shrink(self.fixed, self.extent * COMPARED[self.dims])
        self.coarse_fixed, self.values = coarse, coarse.numpy().ravel()
        grid = np.indices(coarse.shape[1:], dtype=np.float64).reshape(self.dims, -1)
        grid = np.concatenate([grid, np.zeros((3 - self.dims, grid.shape[1])), np.ones((1, grid.shape[1]))])
        self.points = self.affine_of(coarse) @ grid
        self.coarse_moving = shrink(self.moving, self.extent * COMPARED[self.dims] / 2)
        self.centre = self.points[:3].mean(1)

    def affine_of(self, image: MetaTensor) -> np.ndarray:
        return self.to_frame @ image.affine.double().numpy()

    def moved(self, matrix: np.ndarray) -> np.ndarray:
        """The moving image at ``points``, NaN outside of it, where ``matrix`` (4, 4) leads from the fixed image."""
        voxels = (np.linalg.inv(self.affine_of(self.coarse_moving)) @ matrix @ self.points)[: self.dims]
        return map_coordinates(self.coarse_moving.numpy()[0], voxels, order=1, cval=np.nan)

    def compare(self, matrix: np.ndarray) -> tuple[float, float, float]:
        """
        Put the moving image where ``matrix`` (4, 4), from the fixed to the moving image, says.

        Returns:
            normalised mutual information (1 where the images barely meet), Dice coefficient of the foregrounds, and the
            share of the fixed image's foreground that lies in the field of view of the moving image.
        """
        moved = self.moved(matrix)
        covered = ~np.isnan(moved)
        foreground = self.values > self.values.mean()
        share = float(covered[foreground].mean()) if foreground.any() else 0.0
        if share < LEAST_COVERED:  # a few voxels tell anything
            return 1.0, 0.0, share
        other = covered & (moved > self.coarse_moving.numpy().mean())
        dice = 2 * (foreground & other).sum() / max(foreground.sum() + other.sum(), 1)
        return normalised_mutual_information(self.values[covered], moved[covered]), float(dice), share


def _extent(image: MetaTensor) -> float:
    """The longest side in mm."""
    return float(max(n * s for n, s in zip(image.shape[1:], affine_to_spacing(image.affine, image.ndim - 1).tolist())))


def _prepared(image: MetaTensor) -> MetaTensor:
    """Grey, without outliers, in [0, 1]; on the CPU."""
    grey = MetaTensor(image.as_tensor().detach().cpu().float().mean(0, keepdim=True), affine=image.affine.cpu())
    return ScaleIntensityRangePercentiles(0.5, 99.5, 0, 1, clip=True)(grey)  # type: ignore[return-value]


def _rigid(centre: np.ndarray, shift: Sequence[float], degrees: Sequence[float]) -> np.ndarray:
    """Rotation about ``centre``, then ``shift``, as a matrix (4, 4)."""
    matrix = np.eye(4)
    matrix[:3, :3] = Rotation.from_euler("xyz", degrees, degrees=True).as_matrix()
    matrix[:3, 3] = centre - matrix[:3, :3] @ centre + np.asarray(shift)
    return matrix


def _neighbours(pair: _Pair) -> list[np.ndarray]:
    """Moves about the fixed image's centre, small ones and larger ones, along and about every axis."""
    moves = []
    for axis in range(pair.dims):
        for shift in SHIFTS:
            for sign in (-1, 1):
                moves.append(_rigid(pair.centre, sign * shift * pair.extent * np.eye(3)[axis], (0, 0, 0)))
    for axis in range(3) if pair.dims == 3 else (2,):
        for angle in ANGLES:
            for sign in (-1, 1):
                moves.append(_rigid(pair.centre, (0, 0, 0), sign * angle * np.eye(3)[axis]))
    return moves


def _itk_image(pair: _Pair, image: MetaTensor) -> itk.Image:
    affine, dims = pair.affine_of(image), pair.dims
    spacing = np.linalg.norm(affine[:dims, :dims], axis=0)
    converted = itk.image_from_array(np.ascontiguousarray(image.numpy()[0].T, dtype=np.float32))
    converted.SetSpacing(spacing.tolist())
    converted.SetOrigin(affine[:dims, 3].tolist())
    converted.SetDirection(np.ascontiguousarray(affine[:dims, :dims] / spacing))
    return converted


def _matrix(transform: itk.Transform, dims: int) -> np.ndarray:
    matrix = np.eye(4)
    matrix[:dims, :dims] = itk.array_from_matrix(transform.GetMatrix())
    matrix[:dims, 3] = list(transform.GetOffset())
    return matrix


def _optimise(fixed: itk.Image, moving: itk.Image, transform: itk.Transform, spacing: float, seed: int) -> None:
    """Move ``transform`` to the nearest maximum of the mutual information."""
    types = (type(fixed), type(moving))
    metric = itk.MattesMutualInformationImageToImageMetricv4[types].New(NumberOfHistogramBins=BINS)
    # several threads add up in any order, and small differences lead elsewhere where the maximum is flat
    metric.SetMaximumNumberOfWorkUnits(1)
    optimiser = itk.ConjugateGradientLineSearchOptimizerv4Template[itk.D].New(
        NumberOfIterations=ITERATIONS,
        MinimumConvergenceValue=1e-6,
        ConvergenceWindowSize=10,
        LowerLimit=0,
        UpperLimit=2,
        Epsilon=0.2,
        MaximumLineSearchIterations=3,
        MaximumStepSizeInPhysicalUnits=spacing,
    )
    optimiser.SetScalesEstimator(itk.RegistrationParameterScalesFromPhysicalShift[type(metric)].New(Metric=metric))
    method = itk.ImageRegistrationMethodv4[types].New(
        FixedImage=fixed, MovingImage=moving, Metric=metric, Optimizer=optimiser, NumberOfLevels=1
    )
    method.SetShrinkFactorsPerLevel([1])
    method.SetSmoothingSigmasPerLevel([0])
    voxels = int(np.prod(list(fixed.GetLargestPossibleRegion().GetSize())))
    if voxels > SAMPLES:
        method.SetMetricSamplingStrategy(itk.ImageRegistrationMethodv4Enums.MetricSamplingStrategy_RANDOM)
        method.SetMetricSamplingPercentage(SAMPLES / voxels)
        method.MetricSamplingReinitializeSeed(seed)
    method.SetInitialTransform(transform)
    method.InPlaceOn()
    # ITK says so when a step has led out of the moving image; where that ended is compared with the other guesses
    with suppress(RuntimeError):
        method.Update()


def _centre_of_mass(pair: _Pair, image: MetaTensor) -> np.ndarray:
    weights = image.numpy().ravel().astype(np.float64)
    voxels = np.indices(image.shape[1:]).reshape(pair.dims, -1)
    voxel = np.append(voxels @ weights / max(weights.sum(), 1e-9), [0.0] * (3 - pair.dims) + [1.0])
    return (pair.affine_of(image) @ voxel)[:3]


def _guesses(pair: _Pair) -> list[np.ndarray]:
    """Rotations about the centres of mass, laid on each other or where they are; the likeliest first."""
    fixed, moving = (_centre_of_mass(pair, image) for image in (pair.coarse_fixed, pair.coarse_moving))
    angles = itertools.product(*([GUESSES] * 3 if pair.dims == 3 else [(0.0,), (0.0,), GUESSES]))
    moves = [_rigid(fixed, shift, degrees) for degrees in angles for shift in (moving - fixed, np.zeros(3))]
    likely = sorted(moves, key=lambda move: pair.compare(move)[0], reverse=True)
    return [np.eye(4), *likely[:FOLLOWED]]


def _as_transform(kind: str, matrix: np.ndarray, pair: _Pair) -> itk.Transform:
    dims = pair.dims
    rigid = itk.Euler3DTransform[itk.D] if dims == 3 else itk.Euler2DTransform[itk.D]
    transform = rigid.New() if kind == "rigid" else itk.AffineTransform[itk.D, dims].New()
    transform.SetCenter(pair.centre[:dims].tolist())
    transform.SetMatrix(itk.matrix_from_array(np.ascontiguousarray(matrix[:dims, :dims])))
    transform.SetOffset(matrix[:dims, 3].tolist())
    return transform


def register(fixed: MetaTensor, moving: MetaTensor, kind: str = "rigid", seed: int = 0) -> Alignment:
    """
    Bring ``moving`` onto ``fixed`` by mutual information (Mattes et al., IEEE TMI 22(1), 2003) with ITK, from coarse to
    fine: from where the headers put the images and from rotations about their centres of mass, the best of which is
    followed; an affine registration goes on from the rigid one. The same seed gives the same result.

    Args:
        fixed: ``(C, H, W[, D])``, channels are averaged, of any intensity range.
        moving: ``(C, H', W'[, D'])``, with affines (RAS) that say where both lie. A slice takes its spacing from it.
        kind: ``"rigid"`` or ``"affine"``.
        seed: of the voxels that are drawn where an image has many.

    Raises:
        ValueError: when ``kind`` is none of these, or the registration failed: the images barely meet, have little to
            do with each other, or fit better elsewhere.
    """
    if kind not in KINDS:
        raise ValueError(f"registration must be one of {', '.join(KINDS)}, got '{kind}'.")
    pair = _Pair(fixed, moving)
    guesses = _guesses(pair)
    for number, level in enumerate(LEVELS[pair.dims]):
        images = [_itk_image(pair, shrink(image, pair.extent * level)) for image in (pair.fixed, pair.moving)]
        transforms = [_as_transform(kind if number else "rigid", guess, pair) for guess in guesses]
        for transform in transforms:
            _optimise(*images, transform, pair.extent * level, seed)
        transform = max(transforms, key=lambda t: pair.compare(_matrix(t, pair.dims))[0])
        guesses = [_matrix(transform, pair.dims)]
    matrix, before = guesses[0], pair.compare(np.eye(4))
    after = pair.compare(matrix)
    if after[0] < before[0]:  # they were registered better than this can do
        matrix, after, transform = np.eye(4), before, _as_transform(kind, np.eye(4), pair)
    _refuse_failure(pair, matrix)
    centre = np.append(pair.centre, 1.0)
    rotation = Rotation.from_matrix(np.matmul(*np.linalg.svd(matrix[:3, :3])[::2]))
    to_world = np.linalg.inv(pair.to_frame)
    return Alignment(
        kind=kind,
        affine=torch.as_tensor(to_world @ np.linalg.inv(matrix) @ pair.affine_of(moving)),
        transform=transform,
        translation=float(np.linalg.norm((matrix @ centre - centre)[:3])),
        rotation=float(np.degrees(rotation.magnitude())),
        mutual_information=(before[0], after[0]),
        overlap=(before[1], after[1]),
    )


def misfit(fixed: MetaTensor, moving: MetaTensor) -> float:
    """
    How much better the two would fit if one of them were moved some way: the ratio of what the normalised mutual
    information has above 1, both in the voxels that they cover moved as well as not. Pairs that are registered (AANLIB,
    BraTS, also slabs of 10 mm) were found below 1.09, pairs 20 mm and 10 degrees apart mostly above 1.15
    (`VISIBLE_MISFIT`).

    Args:
        fixed: ``(C, H, W[, D])``.
        moving: ``(C, H', W'[, D'])``, with affines (RAS) that say where both lie.
    """
    # in voxels of about that size it is compared anyway: percentiles of whole volumes took most of the time
    spacing = _extent(fixed) * COMPARED[fixed.ndim - 1] / 2
    return _misfit(_Pair(shrink(fixed, spacing), shrink(moving, spacing)), np.eye(4))


def save_transform(alignment: Alignment, path: str | os.PathLike) -> None:
    """Write the transform as ITK does (``.tfm``): from points of the fixed to points of the moving image, in mm."""
    with replacing(path) as temporary:
        writer = itk.TransformFileWriterTemplate[itk.D].New(FileName=str(temporary))
        writer.SetInput(alignment.transform)
        writer.Update()


def _misfit(pair: _Pair, matrix: np.ndarray) -> float:
    here, ratios = pair.moved(matrix), [0.0]
    for move in _neighbours(pair):
        there = pair.moved(matrix @ move)
        # in the same voxels: the part of a thin slab that is left when it is moved may tell more, or less, anywhere
        common = ~np.isnan(here + there)
        if common.sum() <= LEAST_COMMON * (~np.isnan(here)).sum():
            continue
        values = pair.values[common]
        information = [normalised_mutual_information(values, image[common]) - 1 for image in (there, here)]
        ratios.append(information[0] / max(information[1], 1e-6))
    return max(ratios)


def _refuse_failure(pair: _Pair, matrix: np.ndarray) -> None:
    information, _, covered = pair.compare(matrix)
    reason = None
    if covered < LEAST_COVERED:
        reason = f"only {covered:.0%} of the first image lies in the second"
    elif information < UNRELATED:
        reason = "the images have no more in common than noise"
    elif _misfit(pair, matrix) > VISIBLE_MISFIT:
        reason = "the images fit better some way from where it ended"
    if reason is not None:
        raise ValueError(f"The registration failed, {reason}: check the images, or register them with another tool.")

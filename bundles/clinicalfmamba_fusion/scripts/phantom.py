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

"""A digital brain with a tumour, seen by several scanners: images that anybody may have.

The anatomy is a function of position, made of signed distances and random waves, so a slice is exactly a cut through
the volume of the same seed. Lengths are in half fields of view, axes point to the Right, Anterior and Superior.

    python -m scripts.phantom --output_dir demo/slices --kind slices --subjects 2 --shape 256,256
    python -m scripts.phantom --output_dir demo/volumes --kind volumes --subjects 1 --shape 96,96,96
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import fire
import nibabel as nib
import numpy as np
from numpy.typing import ArrayLike
from PIL import Image
from scipy.ndimage import gaussian_filter
from scipy.spatial import cKDTree

from scripts.data import replacing

__all__ = ["CONTRASTS", "digital_brain", "write"]

CONTRASTS = ("mri", "ct", "pet", "t2", "flair")

# How bright each tissue is in each contrast, in painting order; None: invisible to it, what lies below shows through.
TISSUES: dict[str, tuple[float | None, ...]] = {
    "scalp": (0.48, 0.24, 0.10, None, None),
    "bone": (0.03, 1.00, 0.03, None, None),
    "marrow": (0.14, 0.86, 0.06, None, None),
    "csf": (0.90, 0.14, 0.05, 0.92, 0.22),
    "grey": (0.54, 0.36, 0.70, 0.54, 0.47),
    "white": (0.35, 0.31, 0.25, 0.36, 0.36),
    "nuclei": (0.44, 0.37, 0.76, 0.45, 0.43),
    "ventricles": (0.95, 0.12, 0.03, 0.96, 0.14),
    "oedema": (0.68, 0.24, 0.15, 0.70, 0.90),
    "tumour": (0.54, 0.36, 0.55, 0.56, 0.62),
    "rim": (0.72, 0.41, 1.00, 0.66, 0.76),
    "core": (0.86, 0.19, 0.10, 0.90, 0.25),
    "lacune": (0.88, None, None, 0.92, 0.12),
    "plaque": (None, None, None, None, 0.92),
    "metastasis": (None, None, 1.00, None, None),
    "calcification": (0.12, 1.00, None, 0.14, None),
}

# Point spread (standard deviation) and grain of the noise, both as lengths; noise level; depth of the bias field.
SCANNERS: dict[str, tuple[float, float, float, float]] = {
    "mri": (0.006, 0.004, 0.018, 0.07),
    "ct": (0.006, 0.005, 0.016, 0.0),
    "pet": (0.026, 0.020, 0.025, 0.0),
    "t2": (0.006, 0.004, 0.014, 0.06),
    "flair": (0.007, 0.004, 0.016, 0.06),
}

Noise = Callable[[float], np.ndarray]
Distances = dict[str, np.ndarray]


def _waves(points: np.ndarray, frequency: float, rng: np.random.Generator, count: int = 16) -> np.ndarray:
    """Complex random field of unit power at `points` (3, ...), a sum of plane waves; its real part is smooth noise."""
    directions = rng.normal(size=(count, 3))
    directions *= (frequency * rng.uniform(0.75, 1.25, count) / np.linalg.norm(directions, axis=1))[:, None]
    phases = rng.uniform(0, 2 * np.pi, count)
    field = np.zeros(points.shape[1:], dtype=np.complex64)
    for direction, phase in zip(directions.astype(np.float32), phases.astype(np.float32)):
        angle = np.tensordot(direction, points, 1) + phase
        field += np.cos(angle) + 1j * np.sin(angle)
    return field / np.sqrt(count / 2).astype(np.float32)


def _xyz(values: ArrayLike) -> np.ndarray:
    return np.asarray(values, dtype=np.float32).reshape(3, 1, 1, 1)


def _ellipsoid(points: np.ndarray, centre: ArrayLike, radii: ArrayLike) -> np.ndarray:
    """Signed distance (first order, negative inside) to an ellipsoid."""
    scaled = (points - _xyz(centre)) / _xyz(radii)
    norm = np.sqrt((scaled**2).sum(0)) + 1e-6
    return norm * (norm - 1) / (np.sqrt(((scaled / _xyz(radii)) ** 2).sum(0)) + 1e-6)


def _tube(points: np.ndarray, *knots: Sequence[float]) -> np.ndarray:
    """Signed distance to a tube through `knots` (x, y, z, radius)."""
    distance = np.full(points.shape[1:], np.inf, dtype=np.float32)
    for start, stop in zip(np.asarray(knots, np.float32), np.asarray(knots[1:], np.float32)):
        axis, origin = stop[:3] - start[:3], _xyz(start[:3])
        share = np.clip(np.tensordot(axis, points - origin, 1) / (axis @ axis), 0, 1)
        gap = np.sqrt(((points - origin - share * _xyz(axis)) ** 2).sum(0))
        distance = np.minimum(distance, gap - start[3] - share * (stop[3] - start[3]))
    return distance


def _borders(directions: np.ndarray, rng: np.random.Generator, count: int = 170) -> np.ndarray:
    """Distance of unit vectors (3, ...) to the nearest border between `count` cells, about equal, on the sphere."""
    height = np.linspace(-1, 1, count, dtype=np.float32)
    angle = rng.uniform(0, 2 * np.pi) + np.pi * (3 - np.sqrt(5)) * np.arange(count)  # sunflower
    across = np.sqrt(1 - height**2)
    seeds = np.stack([across * np.cos(angle), across * np.sin(angle), height], axis=1)
    seeds += rng.normal(scale=0.05, size=seeds.shape)
    distances, cells = cKDTree(seeds).query(directions.reshape(3, -1).T, k=2, workers=-1)
    apart = np.linalg.norm(seeds[cells[:, 0]] - seeds[cells[:, 1]], axis=1)
    borders = (distances[:, 1] ** 2 - distances[:, 0] ** 2) / (2 * apart)
    return borders.reshape(directions.shape[1:]).astype(np.float32)


def _head(points: np.ndarray, noise: Noise, rng: np.random.Generator) -> Distances:
    """An egg, narrow in front, cut by the base of the skull, which is lower behind."""
    x, y, z = points
    hull = _ellipsoid(np.stack([x * (1 + 0.12 * y), y, z]), (0, 0, 0.08), (0.63, 0.79, 0.68))
    base = -0.34 - 0.26 / (1 + np.exp(14 * (y + 0.02))) - z
    hull = np.logaddexp(25 * hull, 25 * base) / 25
    skull = rng.uniform(0.065, 0.085)
    return {
        "scalp": hull - skull - 0.05 - 0.01 * noise(4.0),
        "bone": hull - skull,
        "marrow": np.abs(hull - skull * (0.5 + 0.08 * noise(9.0))) - 0.15 * skull,
        "csf": hull,
    }


def _cortex(points: np.ndarray, hull: np.ndarray, noise: Noise, rng: np.random.Generator) -> Distances:
    """Grey matter is a ribbon along all that touches the fluid: the surface, the fissures, the folds between gyri."""
    x, y, z = points
    depth = -hull - 0.012 - 0.006 * noise(7.0)
    fissure = np.hypot(x, np.maximum(-_ellipsoid(points, (0, -0.02, 0.02), (0.30, 0.40, 0.28)), 0))
    lateral = np.abs(x) - 0.42 + 0.6 * (y - 0.04) ** 2
    insula = np.hypot(lateral, np.maximum(np.hypot(y - 0.04, z) - 0.15, 0))
    sylvius = np.hypot(np.hypot(y - 0.06 - 0.3 * z, np.maximum(-lateral, 0)), np.maximum(np.abs(z) - 0.15, 0))
    radius = np.sqrt((points**2).sum(0))
    meander = 0.03 * np.stack([noise(7.0) for _ in range(3)])
    folds = radius * _borders(points / (radius + 1e-3) + meander, rng)
    folds = np.hypot(folds, np.maximum(depth - 0.13 - 0.05 * noise(9.0), 0))

    # The cerebellum's leaves spread like a fan, under the tent and around the brain stem.
    tent = z + 0.22 + 0.25 * (y + 0.45)
    below = (tent < 0) & (y < 0.02)
    reach = np.hypot(y + 0.26, z + 0.36)
    leaves = np.arcsin(np.abs(np.sin(13 * np.arctan2(z + 0.36, y + 0.26)))) / 13 * reach
    folds = np.where(below, np.hypot(leaves, np.maximum(0.13 - reach, 0)), folds)
    stem = _tube(points, (0, -0.10, -0.10, 0.08), (0, -0.18, -0.34, 0.11), (0, -0.24, -0.60, 0.07))

    fluid = np.minimum.reduce([depth, fissure, insula, sylvius, folds, np.where(y < 0.02, np.abs(tent), np.inf)])
    fluid -= rng.uniform(0.004, 0.009)
    ribbon = np.where(below, 0.02, rng.uniform(0.034, 0.042) * (1 + 0.15 * noise(15.0)))
    return {"grey": -fluid, "white": np.minimum(ribbon - fluid, stem)}


def _deep(points: np.ndarray, rng: np.random.Generator) -> Distances:
    """Nuclei and ventricles, alike on both sides but for what the tumour pushes."""
    mirrored = np.stack([np.abs(points[0]), points[1], points[2]])
    wide = rng.uniform(0.8, 1.4)
    lateral = [(0.14, 0.36, 0, 0.03), (0.06, 0.17, 0.03, 0.05), (0.09, -0.06, 0.17, 0.05), (0.19, -0.32, 0.08, 0.06)]
    occipital = [lateral[-1], (0.18, -0.52, 0, 0.03)]
    temporal = [lateral[-1], (0.31, -0.20, -0.12, 0.03), (0.33, 0.02, -0.20, 0.02)]
    horns = [_tube(mirrored, *[(*at, wide * size) for *at, size in horn]) for horn in (lateral, occipital, temporal)]
    third = _ellipsoid(points, (0, -0.04, -0.04), (0.018 * wide, 0.12, 0.10))
    fourth = _ellipsoid(points, (0, -0.34, -0.36), (0.05, 0.05, 0.07))
    caudate = _tube(mirrored, (0.17, 0.30, -0.02, 0.055), (0.13, 0.10, 0.14, 0.045), (0.19, -0.15, 0.18, 0.025))
    lentiform = _ellipsoid(mirrored, (0.27, 0.09, 0), (0.065, 0.16, 0.12))
    thalamus = _ellipsoid(mirrored, (0.11, -0.13, 0.02), (0.09, 0.13, 0.11))
    septum = 0.012 - mirrored[0]
    return {
        "nuclei": np.minimum.reduce([caudate, lentiform, thalamus]),
        "ventricles": np.minimum.reduce([np.maximum(np.minimum.reduce(horns), septum), third, fourth]),
    }


def _tumour(offset: np.ndarray, hull: np.ndarray, noise: Noise, rng: np.random.Generator) -> Distances:
    """A necrotic core in a bright rim, with oedema around it; `offset` is the position from its centre."""
    radii = rng.uniform(0.13, 0.18, 3)
    bulk = _ellipsoid(offset, (0, 0, 0), radii) + 0.022 * noise(9.0) + 0.008 * noise(25.0)
    bulk = np.maximum(bulk, hull + 0.02)
    return {
        "oedema": _ellipsoid(offset, (0, 0, 0), radii + rng.uniform(0.10, 0.16)) + 0.04 * noise(9.0),
        "tumour": bulk,
        "rim": np.abs(bulk + 0.035) - 0.012 - 0.006 * noise(14.0),
        "core": bulk + 0.05,
    }


def _findings(points: np.ndarray, offset: np.ndarray, side: int, rng: np.random.Generator) -> Distances:
    """Small things that only some contrasts show, on the side (-1 left, 1 right) that the tumour leaves alone."""

    def spots(radius: float, centres: ArrayLike, points: np.ndarray = points) -> np.ndarray:
        return np.minimum.reduce([_ellipsoid(points, centre, [radius] * 3) for centre in np.atleast_2d(centres)])

    within = rng.uniform(-0.07, 0.07, (3, 3)) * [1, 1, 0.3]
    glands = [(0, -0.25, 0), (0.2, -0.34, 0.04), (-0.2, -0.34, 0.04)]
    return {
        "lacune": spots(0.022, (side * 0.27, rng.uniform(0.0, 0.15), 0)),
        "plaque": spots(0.028, [(side * rng.uniform(0.24, 0.32), y, 0) for y in (0.34, -0.24, -0.40)]),
        "metastasis": spots(0.05, (side * 0.3, rng.uniform(-0.45, -0.3), 0)),
        "calcification": np.minimum(spots(0.022, glands), spots(0.022, within, offset)),
    }


def _anatomy(points: np.ndarray, width: float, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Share of each voxel that each tissue of `TISSUES` covers, in [0, 1]; `points` (3, X, Y, Z), `width` apart."""

    def noise(frequency: float, points: np.ndarray = points) -> np.ndarray:
        return _waves(points, frequency, rng).real

    points = points / _xyz(rng.uniform(0.96, 1.04, 3)) + 0.01 * np.stack([noise(3.0) for _ in range(3)])
    head = _head(points, noise, rng)

    # The tumour pushes its surroundings away: anatomy is looked up nearer to the tumour's centre.
    side = int(rng.choice([-1, 1]))
    centre = (side * rng.uniform(0.27, 0.36), rng.choice([-1, 1]) * rng.uniform(0.15, 0.36), rng.uniform(-0.04, 0.04))
    offset = points - _xyz(centre)
    points = points - 0.4 * np.exp(-(offset**2).sum(0) / 0.08) * offset
    points = points + 0.012 * np.stack([noise(8.0) for _ in range(3)])

    brain = _cortex(points, head["csf"], noise, rng) | _deep(points, rng)
    lesions = _tumour(offset, head["csf"], noise, rng) | _findings(points, offset, -side, rng)
    distances = head | brain | lesions
    distances["oedema"] *= width / 0.05  # no sharp edge
    shares = {tissue: np.clip(0.5 - distance / width, 0, 1) for tissue, distance in distances.items()}
    for tissue in ("oedema", "plaque"):
        shares[tissue] *= shares["white"] * (1 - shares["nuclei"]) * (1 - shares["ventricles"])
    return shares


def digital_brain(shape: Sequence[int], seed: int = 0, level: float = 0.0) -> dict[str, np.ndarray]:
    """Images of one generated subject, on the same grid.

    Args:
        shape: size of the images, (X, Y) for an axial slice or (X, Y, Z) for a volume; the smaller of X and Y spans
            the field of view, voxels are cubes. Axes increase to the right, to the front and upwards (RAS).
        seed: the subject.
        level: height of the slice or of the volume's middle above the basal ganglia, in half fields of view.

    Returns:
        float32 images in [0, 1] by the names in `CONTRASTS`. "mri" (T2 weighted), "ct" and "pet" show the head in air
        (exactly 0), "t2" and "flair" the brain only, with an exactly black background.

    Raises:
        ValueError: if `shape` has neither two nor three sizes.
    """
    if len(shape) not in (2, 3):
        raise ValueError(f"A digital brain has two or three dimensions, but its shape was {tuple(shape)}.")
    half = min(shape[:2]) / 2
    grid = np.indices((*shape, 1)[:3], dtype=np.float32)
    points = (grid - _xyz([(size - 1) / 2 for size in grid.shape[1:]])) / half + _xyz((0, 0, level))
    shares = _anatomy(points, 1 / half, np.random.default_rng(seed))

    images = {}
    for index, contrast in enumerate(CONTRASTS):
        rng = np.random.default_rng((seed, index))
        image = np.zeros(grid.shape[1:], dtype=np.float32)
        for tissue, levels in TISSUES.items():
            value = levels[index]
            if value is not None:
                image += shares[tissue] * (value - image)
        blur, grain, noise, bias = SCANNERS[contrast]
        image = gaussian_filter(image * (1 + bias * _waves(points, 2.0, rng).real), blur * half)
        speckle = gaussian_filter(rng.normal(size=image.shape).astype(np.float32), grain * half)
        image += noise * speckle / speckle.std()
        body = shares["csf"] if TISSUES["scalp"][index] is None else shares["scalp"]
        images[contrast] = np.where(body > 0.5, np.clip(image, 1 / 255, 1), 0).reshape(shape).astype(np.float32)
    return images


def _picture(image: np.ndarray) -> Image.Image:
    """As radiologists look at it: front at the top, the patient's right side at the left; RGB stays RGB."""
    return Image.fromarray(np.rint(255 * np.swapaxes(image, 0, 1)[::-1, ::-1]).astype(np.uint8))


def _write_slices(folder: Path, subject: int, shape: Sequence[int]) -> None:
    for number, level in enumerate((-0.05, 0.0, 0.05), start=1):
        brain = digital_brain(shape, seed=subject, level=level)
        hot = np.clip(3 * brain["pet"][..., None] - np.arange(3), 0, 1)
        for task, contrast, image in (
            ("MRI-CT", "MRI", brain["mri"]),
            ("MRI-CT", "CT", brain["ct"]),
            ("MRI-PET", "MRI", brain["mri"]),
            ("MRI-PET", "PET", hot),
        ):
            with replacing(folder / task / contrast / f"{subject}{number:03d}.png") as path:
                _picture(image).save(path)


def _write_volumes(folder: Path, subject: int, shape: Sequence[int]) -> None:
    brain = digital_brain(shape, seed=subject)
    case = f"phantom_{subject:03d}"
    for contrast in ("t2", "flair"):
        volume = nib.Nifti1Image(np.rint(255 * brain[contrast]).astype(np.uint8), np.eye(4))
        volume.header.set_xyzt_units("mm")
        with replacing(folder / case / f"{case}_{contrast}.nii.gz") as path:
            nib.save(volume, path)


def write(
    output_dir: str, kind: str = "slices", subjects: int = 2, shape: Sequence[int] | None = None, seed: int = 1
) -> None:
    """Write a data set of generated subjects in the layout that the bundle reads.

    Args:
        output_dir: folder of the data set. Slices go to `MRI-CT/{MRI,CT}/` and `MRI-PET/{MRI,PET}/`, three a subject,
            as `<subject><three-digit slice>.png`, PET as RGB; volumes to `<case>/<case>_{t2,flair}.nii.gz`, 1 mm, RAS.
        kind: "slices" or "volumes".
        subjects: how many subjects.
        shape: size of an image, (256, 256) or (96, 96, 96) by default.
        seed: number of the first subject.

    Raises:
        ValueError: if `kind` is unknown, or `shape` does not fit it.
    """
    kinds: dict[str, tuple[Callable[[Path, int, Sequence[int]], None], tuple[int, ...]]]
    kinds = {"slices": (_write_slices, (256, 256)), "volumes": (_write_volumes, (96, 96, 96))}
    if kind not in kinds:
        raise ValueError(f"kind is '{kind}', but phantoms are written as 'slices' or 'volumes'.")
    write_subject, usual = kinds[kind]
    shape = usual if shape is None else tuple(shape)
    if len(shape) != len(usual):
        raise ValueError(f"{kind} need a shape like {usual}, not {shape}.")
    for subject in range(seed, seed + subjects):
        write_subject(Path(output_dir), subject, shape)
    print(f"{subjects} generated subject(s) written as {kind} to {output_dir}")


if __name__ == "__main__":
    fire.Fire(write)

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

import warnings

import numpy as np
import pytest
import torch
from monai.metrics.regression import compute_ms_ssim, compute_ssim_and_cs
from scipy import ndimage
from sewar.full_ref import vifp
from skimage.measure import shannon_entropy
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from sklearn.metrics import mutual_info_score, normalized_mutual_info_score
from test_metrics import SHAPES, images

from scripts.metrics import (
    AverageGradientMetric,
    CorrelationCoefficientMetric,
    EdgePreservationMetric,
    EntropyMetric,
    FeatureMutualInformationMetric,
    FeatureSimilarityMetric,
    FloatEntropyMetric,
    FusionMultiScaleSSIMMetric,
    FusionPSNRMetric,
    FusionSSIMMetric,
    MutualInformationMetric,
    NormalizedMutualInformationMetric,
    SpatialFrequencyMetric,
    StandardDeviationMetric,
    SumOfCorrelationDifferencesMetric,
    VisualInformationFidelityMetric,
    WorseSourceSSIMMetric,
)
from scripts.metrics.phase_congruency import phase_congruency
from scripts.ssim import multi_scale_ssim

with warnings.catch_warnings():
    # of a faster Fourier transform that is not installed
    warnings.simplefilter("ignore")
    from phasepack import phasecong

# Every metric against an implementation that shares no code with it; f, a and b are float64 arrays in 2D or 3D.


def edge_preservation_numpy(f, a, b):
    """Q^AB/F of Xydeas and Petrovic with arc tangents in 2D and arc cosines in 3D, in float64."""
    gradients = [np.stack([ndimage.sobel(i, axis=k, mode="nearest") for k in range(f.ndim)]) for i in (f, a, b)]
    g_f, g_a, g_b = (np.sqrt((g**2).sum(0)) for g in gradients)
    total = weights = 0.0
    for gradient, g in ((gradients[1], g_a), (gradients[2], g_b)):
        strength = np.divide(np.minimum(g, g_f), np.maximum(g, g_f), out=np.zeros_like(g), where=np.maximum(g, g_f) > 0)
        with np.errstate(divide="ignore", invalid="ignore"):
            if f.ndim == 2:
                alpha, alpha_f = (np.arctan(i[1] / i[0]) for i in (gradient, gradients[0]))
                orientation = np.abs(np.abs(alpha - alpha_f) - np.pi / 2) / (np.pi / 2)
            else:
                cosine = np.abs((gradient * gradients[0]).sum(0)) / (g * g_f)
                orientation = 1 - np.arccos(np.clip(cosine, 0, 1)) / (np.pi / 2)
        q = 0.9994 / (1 + np.exp(-15 * (strength - 0.5))) * 0.9879 / (1 + np.exp(-22 * (orientation - 0.8)))
        total += np.nansum(q * g)
        weights += g.sum()
    return total / weights


def scd_numpy(f, a, b):
    return np.corrcoef((f - b).ravel(), a.ravel())[0, 1] + np.corrcoef((f - a).ravel(), b.ravel())[0, 1]


def correlation_numpy(f, a, b):
    return np.mean([np.corrcoef(f.ravel(), i.ravel())[0, 1] for i in (a, b)])


def psnr_skimage(f, a, b):
    return np.mean([peak_signal_noise_ratio(i, f, data_range=1) for i in (a, b)])


def ssims_skimage(f, a, b):
    if min(f.shape) < 11:
        pytest.skip("skimage has one window for all axes; test_losses.py compares thin slabs with MONAI")
    settings = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1}
    return [structural_similarity(i, f, **settings) for i in (a, b)]


def grey_levels(*arrays):
    return [np.round(255 * i).astype(np.uint8) for i in arrays]


def entropy_skimage(f, a, b):
    return shannon_entropy(*grey_levels(f), base=2)


def mutual_information_sklearn(f, a, b):
    f, *sources = (i.ravel() for i in grey_levels(f, a, b))
    return sum(mutual_info_score(f, i) for i in sources) / np.log(2)


def normalised_mutual_information_sklearn(f, a, b):
    f, *sources = (i.ravel() for i in grey_levels(f, a, b))
    return sum(normalized_mutual_info_score(f, i, average_method="arithmetic") for i in sources)


def spatial_frequency_numpy(f, a, b):
    return 255 * np.sqrt(sum((np.diff(f, axis=k) ** 2).mean() for k in range(f.ndim)))


def average_gradient_numpy(f, a, b):
    return 255 * np.sqrt(sum(g**2 for g in np.gradient(f)) / 2).mean()


def vif_sewar(f, a, b):
    if f.ndim == 3 or min(f.shape) < 41:
        pytest.skip("sewar has planes of at least 41 pixels a side")
    return np.mean([vifp(255 * i, 255 * f) for i in (a, b)])


def edges_numpy(image):
    """MATLAB's edge(image, 'sobel')."""
    down, right = (np.abs(ndimage.sobel(image, axis=k, mode="nearest")) for k in range(2))
    strength = down**2 + right**2
    padded = np.pad(strength, 1)
    edges = np.zeros_like(image)
    for i, j in np.argwhere(strength > 4 * strength.mean()):
        left_of, right_of, above, below = padded[i + 1, j], padded[i + 1, j + 2], padded[i, j + 1], padded[i + 2, j + 1]
        vertical = right[i, j] >= down[i, j] and left_of <= strength[i, j] > right_of
        horizontal = down[i, j] >= right[i, j] and above <= strength[i, j] > below
        edges[i, j] = vertical or horizontal
    return edges


def fmi_of_a_window(a, b):
    if (a == b).all():
        return 1.0
    p, q = (np.ones(i.size) if np.ptp(i) == 0 else (i - i.min()).T.ravel() for i in (a, b))
    p, q = p / p.sum(), q / q.sum()
    positions = np.arange(p.size)
    spread = np.prod([np.sqrt((i * positions**2).sum() - (i * positions).sum() ** 2) for i in (p, q)])
    correlation = 0 if np.ptp(p) == 0 or np.ptp(q) == 0 else np.corrcoef(p, q)[0, 1]
    joint = np.outer(p, q)
    if correlation != 0 and spread > 1e-9:
        x, y = np.cumsum(p)[:, None], np.cumsum(q)[None]
        bound = np.minimum(x, y) if correlation > 0 else np.maximum(x + y - 1, 0)
        steps = np.diff(np.diff(np.pad(bound, ((1, 0), (1, 0))), axis=0), axis=1)
        share = correlation * spread / (positions[:, None] * positions * (steps - joint)).sum()
        joint = share * steps + (1 - share) * joint
    marginal = sum(-(i[i > 0] * np.log2(i[i > 0])).sum() for i in (p, q))
    joint = joint[np.abs(joint) > 1e-12]
    return 2 * (marginal + (joint * np.log2(np.abs(joint))).sum()) / marginal if marginal > 0 else 0.0


def fmi_numpy(feature, window_size):
    """Window by window, after the paper and the authors' code."""

    def fmi(f, a, b):
        if f.ndim == 3:
            return np.mean([fmi(f[..., k], a[..., k], b[..., k]) for k in range(f.shape[2])])
        extract = {"pixel": lambda i: i, "gradient": lambda i: np.hypot(*np.gradient(i)), "edge": edges_numpy}[feature]
        f, a, b = (extract(i) for i in (f, a, b))
        scores = []
        for i, j in np.ndindex(*(side - window_size + 1 for side in f.shape)):
            window = slice(i, i + window_size), slice(j, j + window_size)
            scores += [fmi_of_a_window(source[window], f[window]) for source in (a, b)]
        return np.mean(scores)

    return fmi


def published_fsim_phasepack(f, a, b):
    """Slices are pooled by their phase congruency."""
    stacks = [i[..., None] if i.ndim == 2 else i for i in (f, a, b)]
    sums = np.zeros((2, 2))
    for k in range(stacks[0].shape[2]):
        planes = [i[..., k] for i in stacks]
        settings = {"nscale": 4, "minWaveLength": 6, "mult": 2, "sigmaOnf": 0.5978}
        congruencies = [sum(phasecong(i, **settings)[4]) for i in planes]
        kernel = np.outer([3, 10, 3], [-1, 0, 1])
        gradients = [np.hypot(*(ndimage.correlate(i, w, mode="constant") for w in (kernel, kernel.T))) for i in planes]
        for s in (1, 2):
            similarity = 1.0
            for x, constant in ((congruencies, 0.85), (gradients, 160)):
                similarity = similarity * (2 * x[0] * x[s] + constant) / (x[0] ** 2 + x[s] ** 2 + constant)
            weight = np.maximum(congruencies[0], congruencies[s])
            sums[:, s - 1] += (similarity * weight).sum(), weight.sum()
    return (sums[0] / sums[1]).mean()


REFERENCES = {
    "psnr": (FusionPSNRMetric(), psnr_skimage, 1e-4),
    "ssim": (FusionSSIMMetric(), lambda *i: np.mean(ssims_skimage(*i)), 1e-4),
    "ssim_worse": (WorseSourceSSIMMetric(), lambda *i: min(ssims_skimage(*i)), 1e-4),
    "qabf": (EdgePreservationMetric(), edge_preservation_numpy, 1e-4),
    "scd": (SumOfCorrelationDifferencesMetric(), scd_numpy, 1e-4),
    "cc": (CorrelationCoefficientMetric(), correlation_numpy, 1e-5),
    "entropy": (EntropyMetric(), entropy_skimage, 1e-5),
    "entropy_float": (FloatEntropyMetric(), lambda f, a, b: shannon_entropy(f, base=2), 1e-5),
    "mi": (MutualInformationMetric(), mutual_information_sklearn, 1e-4),
    "nmi": (NormalizedMutualInformationMetric(), normalised_mutual_information_sklearn, 1e-5),
    "sf": (SpatialFrequencyMetric(), spatial_frequency_numpy, 1e-4),
    "ag": (AverageGradientMetric(), average_gradient_numpy, 1e-4),
    "sd": (StandardDeviationMetric(), lambda f, a, b: 255 * f.std(), 1e-4),
    "vif": (VisualInformationFidelityMetric(), vif_sewar, 1e-4),
    "fmi_pixel": (FeatureMutualInformationMetric("pixel"), fmi_numpy("pixel", 3), 1e-4),
    "fmi_gradient": (FeatureMutualInformationMetric("gradient"), fmi_numpy("gradient", 3), 1e-4),
    "fmi_edge": (FeatureMutualInformationMetric("edge"), fmi_numpy("edge", 3), 1e-4),
    "fmi_wide": (FeatureMutualInformationMetric("pixel", window_size=5), fmi_numpy("pixel", 5), 1e-4),
    # of an even number, torch has the lower median, and numpy the mean of both
    "fsim_published": (FeatureSimilarityMetric("published"), published_fsim_phasepack, 3e-4),
}


@pytest.mark.parametrize("shape", [(2, 1, 44, 47), *SHAPES[1:]])
@pytest.mark.parametrize("name", REFERENCES)
def test_against_reference(name, shape):
    metric, reference, tolerance = REFERENCES[name]
    if name.startswith("fmi"):
        shape = (1, 1, 13, 16) if len(shape) == 4 else (1, 1, 11, 12, 2)
    fused, sources = images(shape)
    actual = metric(fused, sources)
    assert actual.shape == (shape[0], 1)
    for b in range(shape[0]):
        arrays = (i.numpy().astype(np.float64) for i in (fused[b, 0], *sources[b]))
        assert actual[b].item() == pytest.approx(reference(*arrays), abs=tolerance)


@pytest.mark.parametrize(
    "crop, repeats, expected", [(0, 1, (0.72325, 0.69970)), (1, 1, (0.72118, 0.69879)), (0, 5, (0.84546, 0.85692))]
)
def test_fsim_is_that_of_piq(crop, repeats, expected):
    """
    Values of piq 0.8.0, `fsim(f, a, chromatic=False)`: an even, an odd and a large size. It can not be installed
    beside the CPU's PyTorch from PyPI, since it imports torchvision.
    """
    y, x = np.mgrid[: 96 - crop, : 80 - crop]
    waves = 0.5 + 0.5 * np.sin(x / 5) * np.cos(y / 7)
    disc = 0.8 * ((x - 45) ** 2 + (y - 50) ** 2 < 30**2) + 0.1 * (1 + np.sin(x * y / 300))
    sources = np.kron(np.stack([waves, disc]), np.ones((1, repeats, repeats)))
    sources = torch.from_numpy(sources).float().unsqueeze(0)
    scores = FeatureSimilarityMetric().scores(sources.mean(dim=1, keepdim=True), sources)
    assert scores.flatten().tolist() == pytest.approx(expected, abs=1e-4)


def test_phase_congruency_is_that_of_phasepack():
    image = images((1, 1, 45, 52))[0]
    expected = sum(phasecong(image[0, 0].double().numpy(), nscale=4, minWaveLength=6, mult=2, sigmaOnf=0.5978)[4])
    assert expected.max() > 0.3
    np.testing.assert_allclose(phase_congruency(image, form="published")[0, 0].numpy(), expected, atol=1e-3)


@pytest.mark.parametrize("shape", [(2, 1, 176, 180), (1, 1, 24, 26, 25)])
def test_multi_scale_ssim_is_that_of_monai(shape):
    fused, sources = images(shape)
    weights = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
    # what 24 voxels have room for
    weights = weights if len(shape) == 4 else tuple(w / sum(weights[:2]) for w in weights[:2])
    expected = [compute_ms_ssim(fused, s, len(shape) - 2, weights=weights) for s in sources.split(1, dim=1)]
    torch.testing.assert_close(
        FusionMultiScaleSSIMMetric()(fused, sources), torch.stack(expected).mean(0), atol=1e-4, rtol=0
    )


def test_multi_scale_ssim_of_a_slab_is_halved_in_its_plane():
    fused, sources = images((1, 1, 30, 48, 10))
    source, terms = sources[:, :1], []
    # 30 x 48, 15 x 24, 15 x 12: a side stays once its half would be below 11
    for pool in ((2, 2, 1), (1, 2, 1), None):
        ssim, contrast = compute_ssim_and_cs(fused, source, 3, [11, 11, 9], [1.5] * 3)
        terms.append(contrast.mean())
        if pool is not None:
            fused, source = (torch.nn.functional.avg_pool3d(i, pool) for i in (fused, source))
    terms[-1] = ssim.mean()
    weights = torch.tensor([0.0448, 0.2856, 0.3001])
    expected = (torch.stack(terms).clamp_min(0) ** (weights / weights.sum())).prod()
    actual = multi_scale_ssim(*images((1, 1, 30, 48, 10)))[0, 0]
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)
    assert multi_scale_ssim(torch.rand(1, 1, 5, 4), torch.rand(1, 2, 5, 4)).isfinite().all()

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

import numpy as np
import pytest
import torch
from scipy import ndimage
from skimage.measure import shannon_entropy
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from scripts.metrics import (
    EdgePreservationMetric,
    EntropyMetric,
    FusionPSNRMetric,
    FusionSSIMMetric,
    SumOfCorrelationDifferencesMetric,
)

ALL = [FusionPSNRMetric, FusionSSIMMetric, EdgePreservationMetric, SumOfCorrelationDifferencesMetric, EntropyMetric]
SHAPES = [(3, 1, 32, 27), (2, 1, 16, 20, 14), (2, 1, 24, 24, 10)]


def images(shape, seed=0):
    """Random 8-bit fused images and sources with structure, in [0, 1]."""
    rng = np.random.default_rng(seed)
    x = rng.random((shape[0], 3, *shape[2:]))
    x = ndimage.gaussian_filter(x, (0, 0) + (1.0,) * (len(shape) - 2))
    axes = tuple(range(2, x.ndim))
    x -= x.min(axis=axes, keepdims=True)
    x /= x.max(axis=axes, keepdims=True)
    x = torch.from_numpy(np.round(255 * x) / 255).float()
    return x[:, :1], x[:, 1:]


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


def psnr_skimage(f, a, b):
    return np.mean([peak_signal_noise_ratio(i, f, data_range=1) for i in (a, b)])


def ssim_skimage(f, a, b):
    settings = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1}
    return np.mean([structural_similarity(i, f, **settings) for i in (a, b)])


def entropy_skimage(f, a, b):
    return shannon_entropy(np.round(f * 255).astype(np.uint8), base=2)


REFERENCES = [
    (FusionPSNRMetric, psnr_skimage, 1e-4),
    (FusionSSIMMetric, ssim_skimage, 1e-4),
    (EdgePreservationMetric, edge_preservation_numpy, 1e-4),
    (SumOfCorrelationDifferencesMetric, scd_numpy, 1e-4),
    (EntropyMetric, entropy_skimage, 1e-5),
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("metric, reference, tolerance", REFERENCES)
def test_against_reference(metric, reference, tolerance, shape):
    if metric is FusionSSIMMetric and min(shape[2:]) < 11:
        pytest.skip("skimage has one window for all axes; test_losses.py compares thin slabs with MONAI")
    fused, sources = images(shape)
    actual = metric()(fused, sources)
    assert actual.shape == (shape[0], 1)
    for b in range(shape[0]):
        arrays = (i.numpy().astype(np.float64) for i in (fused[b, 0], *sources[b]))
        assert actual[b].item() == pytest.approx(reference(*arrays), abs=tolerance)


@pytest.mark.parametrize("metric", ALL)
def test_monai_interface(metric):
    fused, sources = images(SHAPES[0])
    whole = metric()
    values = whole(y_pred=fused, y=sources)
    single = metric(reduction="mean_batch", get_not_nans=True)
    for f, s in zip(fused, sources):
        single([f], [s])
    mean, count = single.aggregate()
    torch.testing.assert_close(whole.aggregate(), values.mean(dim=0))
    torch.testing.assert_close(mean, values.mean(dim=0))
    assert count.item() == len(fused)
    torch.testing.assert_close(single.aggregate(reduction="none")[0], values)


@pytest.mark.parametrize("metric", ALL)
def test_order_of_the_sources_does_not_matter(metric):
    fused, sources = images(SHAPES[1])
    torch.testing.assert_close(metric()(fused, sources), metric()(fused, sources.flip(1)))


@pytest.mark.parametrize("metric", ALL)
def test_a_volume_constant_along_an_axis_scores_as_its_slice(metric):
    fused, sources = images(SHAPES[0])
    volume = metric()(*(i.unsqueeze(-1).expand(*i.shape, 12) for i in (fused, sources)))
    torch.testing.assert_close(volume, metric()(fused, sources), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("metric", ALL)
@pytest.mark.parametrize("level", [0.0, 0.3])
def test_constant_images_give_no_nan(metric, level):
    flat = torch.full((1, 1, 16, 16), level)
    sources = torch.cat([flat, flat], dim=1)
    other = torch.full_like(flat, 0.7)
    for fused in (flat, other):
        assert not metric()(fused, sources).isnan().any()
    assert EdgePreservationMetric()(other, sources).item() == 0
    assert SumOfCorrelationDifferencesMetric()(other, sources).item() == 0


def test_copies_of_a_source():
    _, sources = images(SHAPES[0])
    copy = sources[:, :1]
    twice = torch.cat([copy, copy], dim=1)
    assert FusionPSNRMetric()(copy, sources).isposinf().all()
    torch.testing.assert_close(FusionSSIMMetric()(copy, twice), torch.ones(3, 1))
    best = 0.9994 / (1 + np.exp(-7.5)) * 0.9879 / (1 + np.exp(-4.4))
    torch.testing.assert_close(EdgePreservationMetric()(copy, twice), torch.full((3, 1), best), atol=1e-5, rtol=0)
    torch.testing.assert_close(EdgePreservationMetric()(1 - copy, twice), torch.full((3, 1), best), atol=1e-4, rtol=0)


def test_edges_turned_by_a_right_angle_are_not_preserved():
    ramp = torch.linspace(0, 1, 16).repeat(16, 1).view(1, 1, 16, 16)
    assert EdgePreservationMetric()(ramp.transpose(2, 3), torch.cat([ramp, ramp], dim=1)).item() < 0.02


def test_sum_of_correlations_of_the_sum_is_two():
    _, sources = images(SHAPES[0])
    total = SumOfCorrelationDifferencesMetric()(sources.sum(dim=1, keepdim=True), sources)
    torch.testing.assert_close(total, torch.full((3, 1), 2.0))


def test_entropy_by_hand():
    fused = torch.zeros(3, 1, 16, 16)
    fused[1, :, :8] = 1
    fused[2] = torch.arange(256).view(1, 16, 16) / 255
    assert EntropyMetric()(fused, torch.zeros(3, 2, 16, 16)).flatten().tolist() == pytest.approx([0, 1, 8])


@pytest.mark.parametrize("metric", ALL)
def test_half_precision_is_scored_in_float32(metric):
    fused, sources = (i.half() for i in images(SHAPES[0]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = metric()(fused, sources)
    torch.testing.assert_close(actual, metric()(fused.float(), sources.float()))


@pytest.mark.parametrize(
    "fused, sources", [((1, 1, 8, 8), (1, 1, 8, 8)), ((2, 1, 8, 8), (1, 2, 8, 8)), ((1, 1, 8), (1, 2, 8))]
)
def test_shapes_are_checked(fused, sources):
    with pytest.raises(ValueError, match="expected fused images"):
        EntropyMetric()(torch.rand(fused), torch.rand(sources))

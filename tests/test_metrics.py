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

import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from monai.metrics import SSIMMetric
from scipy import ndimage

from scripts.metrics import (
    AverageGradientMetric,
    EdgePreservationMetric,
    EntropyMetric,
    FeatureMutualInformationMetric,
    FeatureSimilarityMetric,
    FloatEntropyMetric,
    FusionMetric,
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
from scripts.ssim import ssim

SHAPES = [(3, 1, 32, 27), (2, 1, 16, 20, 14), (2, 1, 24, 24, 10)]
CONFIG = Path(__file__).resolve().parents[1] / "bundles" / "clinicalfmamba_fusion" / "configs" / "evaluate.json"


def declared():
    """The metrics of evaluate.json, by name: the key metric and the additional ones."""
    config = json.loads(CONFIG.read_text())
    handlers = config["validate#key_metric"] | config["validate#additional_metrics"]
    return {name: handler["metric_fn"] for name, handler in handlers.items()}


@pytest.fixture(params=declared())
def metric(request):
    return ConfigParser({"metric": declared()[request.param]}).get_parsed_content("metric")


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


def test_all_are_declared():
    import scripts.metrics

    classes = {m for m in vars(scripts.metrics).values() if isinstance(m, type) and not m.__name__.startswith("_")}
    concrete = {f"scripts.metrics.{m.__name__}" for m in classes if not m.__abstractmethods__}
    assert {metric["_target_"] for metric in declared().values()} == concrete


def test_monai_interface(metric):
    fused, sources = images(SHAPES[0])
    values = metric(y_pred=fused, y=sources)
    assert values.shape == (len(fused), 1) and isinstance(metric, FusionMetric)
    torch.testing.assert_close(metric.aggregate(), values.mean(dim=0))
    metric.reset()
    metric.get_not_nans = True
    for f, s in zip(fused, sources):
        metric([f], [s])
    mean, count = metric.aggregate(reduction="mean_batch")
    torch.testing.assert_close(mean, values.mean(dim=0))
    assert count.item() == len(fused)
    torch.testing.assert_close(metric.aggregate(reduction="none")[0], values)


def test_order_of_the_sources_does_not_matter(metric):
    fused, sources = images(SHAPES[1])
    torch.testing.assert_close(metric(fused, sources), metric(fused, sources.flip(1)))


def test_a_volume_constant_along_an_axis_scores_as_its_slice(metric):
    fused, sources = images(SHAPES[0])
    volume = metric(*(i.unsqueeze(-1).expand(*i.shape, 12) for i in (fused, sources)))
    torch.testing.assert_close(volume, metric(fused, sources), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("level", [0.0, 0.3])
def test_constant_images_give_no_nan(metric, level):
    flat = torch.full((1, 1, 16, 16), level)
    sources = torch.cat([flat, flat], dim=1)
    for fused in (flat, torch.full_like(flat, 0.7), images((1, 1, 16, 16))[0]):
        assert not metric(fused, sources).isnan().any()
        assert not metric(flat, torch.cat([fused, flat], dim=1)).isnan().any()


def test_any_size(metric):
    for shape in [(1, 1, 3, 5), (1, 1, 7, 3, 1), (1, 1, 16, 12, 2)]:
        fused, sources = (torch.rand(1, n, *shape[2:]) for n in (1, 2))
        assert metric(fused, sources).isfinite().all()


def test_half_precision_is_scored_in_float32(metric):
    fused, sources = (i.half() for i in images(SHAPES[0]))
    expected = metric(fused.float(), sources.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = metric(fused, sources)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(
    "fused, sources", [((1, 1, 8, 8), (1, 1, 8, 8)), ((2, 1, 8, 8), (1, 2, 8, 8)), ((1, 1, 8), (1, 2, 8))]
)
def test_shapes_are_checked(fused, sources):
    with pytest.raises(ValueError, match="expected fused images"):
        EntropyMetric()(torch.rand(fused), torch.rand(sources))


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="feature must be one of"):
        FeatureMutualInformationMetric("wavelet")
    with pytest.raises(ValueError, match="window_size must be an odd number"):
        FeatureMutualInformationMetric(window_size=4)
    with pytest.raises(ValueError, match="window_size 5 is larger than a slice of \\(16, 4\\)"):
        FeatureMutualInformationMetric(window_size=5)(torch.rand(1, 1, 16, 4), torch.rand(1, 2, 16, 4))
    with pytest.raises(ValueError, match="variant must be one of"):
        FeatureSimilarityMetric("paper")


# of three equal images
BEST_EDGES = 0.9994 / (1 + np.exp(-7.5)) * 0.9879 / (1 + np.exp(-4.4))
IDENTICAL = {"psnr": np.inf, "qabf": BEST_EDGES, "scd": 0, "nmi": 2}
IDENTICAL |= dict.fromkeys(
    ["ssim", "ssim_worse", "ms_ssim", "fsim", "fsim_published", "fmi_pixel", "fmi_gradient", "fmi_edge", "vif", "cc"], 1
)


@pytest.mark.parametrize("name", IDENTICAL)
def test_identical_images(name):
    metric = ConfigParser({"metric": declared()[name]}).get_parsed_content("metric")
    for shape in SHAPES[:2]:
        fused, _ = images(shape)
        values = metric(fused, torch.cat([fused, fused], dim=1))
        torch.testing.assert_close(values, torch.full((shape[0], 1), float(IDENTICAL[name])), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", sorted({*IDENTICAL} - {"psnr", "fmi_edge", "nmi"}))
def test_noise_is_worse_than_the_average(name):
    metric = ConfigParser({"metric": declared()[name]}).get_parsed_content("metric")
    _, sources = images((1, 1, 64, 64))
    noise = torch.rand((1, 1, 64, 64), generator=torch.Generator().manual_seed(0))
    assert metric(noise, sources).item() < metric(sources.mean(dim=1, keepdim=True), sources).item()


def test_a_copy_of_one_source():
    _, sources = images(SHAPES[0])
    copy, other = sources.split(1, dim=1)
    assert FusionPSNRMetric()(copy, sources).isposinf().all()
    worse = FusionSSIMMetric()(copy, torch.cat([other, other], dim=1))
    torch.testing.assert_close(WorseSourceSSIMMetric()(copy, sources), worse)
    assert (FusionSSIMMetric()(copy, sources) > worse).all()
    both = EntropyMetric()(copy, sources) + MutualInformationMetric()(copy, torch.cat([other, other], dim=1)) / 2
    torch.testing.assert_close(MutualInformationMetric()(copy, sources), both)


@pytest.mark.parametrize("shape", [(40, 36), (28, 24, 30)])
@pytest.mark.parametrize("content", [slice(0, 6), slice(9, 14), slice(-4, None), slice(0, 0)])
def test_ssim_of_little_in_a_large_nothing(shape, content):
    """Windows that see nothing are counted, not computed, where no gradient is asked for."""
    pair = torch.zeros(2, 3, *shape)
    box = (slice(None), slice(None), *[content] * len(shape))
    pair[box] = torch.rand(pair[box].shape, generator=torch.Generator().manual_seed(0))
    pair[(1, 2, *[5] * len(shape))] = 0.5
    fused, sources = pair[:, :1], pair[:, 1:]
    found = ssim(fused, sources)
    torch.testing.assert_close(found, ssim(fused.clone().requires_grad_(), sources).detach())
    for channel, score in zip(sources.split(1, dim=1), found.T):
        expected = SSIMMetric(spatial_dims=len(shape))(fused, channel).flatten()
        torch.testing.assert_close(score, expected, atol=1e-5, rtol=0)


def test_edges_have_no_sign():
    fused, _ = images(SHAPES[0])
    values = EdgePreservationMetric()(1 - fused, torch.cat([fused, fused], dim=1))
    torch.testing.assert_close(values, torch.full((3, 1), float(BEST_EDGES)), atol=1e-4, rtol=0)


def test_edges_turned_by_a_right_angle_are_not_preserved():
    ramp = torch.linspace(0, 1, 16).repeat(16, 1).view(1, 1, 16, 16)
    assert EdgePreservationMetric()(ramp.transpose(2, 3), torch.cat([ramp, ramp], dim=1)).item() < 0.02


def test_nothing_is_preserved_of_constants():
    fused, _ = images((1, 1, 16, 16))
    for sources in (torch.zeros(1, 2, 16, 16), torch.full((1, 2, 16, 16), 0.3)):
        assert EdgePreservationMetric()(fused, sources).item() == 0
        assert SumOfCorrelationDifferencesMetric()(fused, sources).item() == 0


def test_sum_of_correlations_of_the_sum_is_two():
    _, sources = images(SHAPES[0])
    total = SumOfCorrelationDifferencesMetric()(sources.sum(dim=1, keepdim=True), sources)
    torch.testing.assert_close(total, torch.full((3, 1), 2.0))


def test_contrast_raises_the_information():
    fused, _ = images((1, 1, 48, 48))
    twice = torch.cat([fused, fused], dim=1) / 4
    assert VisualInformationFidelityMetric()(fused / 4, twice).item() == pytest.approx(1, abs=1e-4)
    assert VisualInformationFidelityMetric()(fused, twice).item() > 1.1
    assert VisualInformationFidelityMetric()(fused / 8, twice).item() < 0.9


@pytest.mark.parametrize("metric_class", [FeatureSimilarityMetric, VisualInformationFidelityMetric])
def test_empty_slices_have_no_weight(metric_class):
    fused, sources = images((1, 1, 32, 32))
    volumes = (torch.stack([torch.zeros_like(i), i, torch.zeros_like(i)], dim=-1) for i in (fused, sources))
    torch.testing.assert_close(metric_class()(*volumes), metric_class()(fused, sources), atol=1e-5, rtol=0)


def test_feature_mutual_information_by_hand():
    """Windows of one image each: the same distribution, an opposite one of two values, a constant one."""
    fmi = FeatureMutualInformationMetric("pixel")
    ramp = torch.arange(9.0).view(1, 1, 3, 3) / 10
    assert fmi(ramp / 2 + 0.1, torch.cat([ramp, ramp], dim=1)).item() == pytest.approx(1, abs=1e-5)
    assert fmi(torch.full_like(ramp, 0.5), torch.cat([ramp, ramp], dim=1)).item() == pytest.approx(0, abs=1e-5)
    # one of nine pixels against the rest: H = 0 and 3 bits, and nothing in common
    dot = torch.zeros(1, 1, 3, 3)
    dot[..., 1, 1] = 1
    assert fmi(dot, torch.cat([1 - dot, 1 - dot], dim=1)).item() == pytest.approx(0, abs=1e-5)


def test_edge_maps_are_equal_whatever_the_contrast():
    step = torch.zeros(1, 1, 16, 16)
    step[..., 8:] = 1
    sources = torch.cat([step, 1 - step], dim=1)
    assert FeatureMutualInformationMetric("edge")(0.3 + step / 10, sources).item() == 1
    assert FeatureMutualInformationMetric("pixel")(0.3 + step / 10, sources).item() < 1


def test_entropy_by_hand():
    fused = torch.zeros(3, 1, 16, 16)
    fused[1, :, :8] = 1
    fused[2] = torch.arange(256).view(1, 16, 16) / 255
    sources = torch.zeros(3, 2, 16, 16)
    assert EntropyMetric()(fused, sources).flatten().tolist() == pytest.approx([0, 1, 8])
    # values that 8 bits do not tell apart
    fused[2] /= 256
    assert EntropyMetric()(fused, sources).flatten().tolist() == pytest.approx([0, 1, 1], abs=0.01)
    assert FloatEntropyMetric()(fused, sources).flatten().tolist() == pytest.approx([0, 1, 8])


def test_mutual_information_by_hand():
    """One bit in the rows, one in the columns, and an image of both."""
    rows = torch.zeros(1, 1, 8, 8)
    rows[:, :, 4:] = 1
    columns = rows.transpose(2, 3)
    both = (rows + 2 * columns) / 3
    for fused, sources, mi, nmi in (
        (rows, [columns, columns], 0, 0),
        (rows, [rows, columns], 1, 1),
        (both, [rows, columns], 2, 2 * 2 / 3),
        (both, [both, both], 4, 2),
    ):
        sources = torch.cat(sources, dim=1)
        assert MutualInformationMetric()(fused, sources).item() == pytest.approx(mi, abs=1e-6)
        assert NormalizedMutualInformationMetric()(fused, sources).item() == pytest.approx(nmi, abs=1e-6)


def test_statistics_by_hand():
    """Stripes of 0 and 10 grey levels along both axes, and along the first axis only."""
    stripes = (torch.arange(6) % 2) * 10 / 255
    board = (stripes.view(-1, 1) - stripes).abs().expand(1, 1, 6, 6)
    sources = torch.zeros(1, 2, 6, 6)
    assert SpatialFrequencyMetric()(board, sources).item() == pytest.approx(10 * 2**0.5)
    assert SpatialFrequencyMetric()(stripes.view(1, 1, -1, 1).expand(1, 1, 6, 6), sources).item() == pytest.approx(10)
    assert StandardDeviationMetric()(board, sources).item() == pytest.approx(5)
    ramp = torch.arange(6).view(1, 1, 6, 1).expand(1, 1, 6, 6) / 255
    assert AverageGradientMetric()(ramp, sources).item() == pytest.approx(0.5**0.5)


def seconds_per_pair(fused, sources):
    """Seconds of one processor for all metrics of a pair, the fastest of the pairs: others use the machine, too."""
    metrics = [ConfigParser({"metric": m}).get_parsed_content("metric") for m in declared().values()]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    times = []
    for f, s in zip(fused.split(1), sources.split(1)):
        start = time.process_time()
        for metric in metrics:
            metric(f, s)
        times.append(time.process_time() - start)
    torch.set_num_threads(threads)
    return min(times)


def test_fifty_pairs_take_less_than_a_minute_on_two_cores():
    fused, sources = images((3, 1, 256, 256))
    assert seconds_per_pair(fused, sources) < 2 * 60 / 50

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

from pathlib import Path

import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from monai.metrics.regression import compute_ssim_and_cs
from monai.transforms import SobelGradients
from scipy import ndimage
from skimage.metrics import structural_similarity

from scripts.correlation import correlation, sum_of_correlation_differences
from scripts.gradients import edge_preservation, scharr, sobel
from scripts.losses import (
    ClinicalFMambaLoss,
    EdgePreservationLoss,
    FusionGradientLoss,
    FusionIntensityLoss,
    FusionSSIMLoss,
    JointFusionLoss,
    SumOfCorrelationDifferencesLoss,
)
from scripts.metrics import EdgePreservationMetric, SumOfCorrelationDifferencesMetric
from scripts.ssim import ssim

CONFIGS = Path(__file__).resolve().parents[1] / "bundles" / "clinicalfmamba_fusion" / "configs"

SHAPES = [(2, 1, 32, 27), (1, 1, 16, 20, 14), (2, 1, 24, 24, 10)]


def images(shape, seed=0):
    """A smooth random fused image and two sources, in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand((shape[0], 3, *shape[2:]), generator=generator)
    pool = {2: torch.nn.functional.avg_pool2d, 3: torch.nn.functional.avg_pool3d}[len(shape) - 2]
    smooth = pool(noise, 3, stride=1, padding=1, count_include_pad=False)
    return smooth[:, :1], smooth[:, 1:]


@pytest.mark.parametrize("shape", SHAPES)
def test_sobel_matches_scipy_and_monai(shape):
    x = torch.cat(images(shape), dim=1)
    gradients = sobel(x)
    assert gradients.shape == (shape[0], 3, len(shape) - 2, *shape[2:])
    scale = 4 ** (len(shape) - 4)
    for b, c in np.ndindex(shape[0], 3):
        expected = [ndimage.sobel(x[b, c].numpy(), axis=a, mode="nearest") / scale for a in range(len(shape) - 2)]
        np.testing.assert_allclose(gradients[b, c].numpy(), np.stack(expected), atol=1e-5)
        monai = 8 * SobelGradients(padding_mode="replicate")(x[b, c, None])
        torch.testing.assert_close(gradients[b, c], monai.as_tensor(), atol=1e-5, rtol=0)


def test_sobel_by_hand():
    step = torch.zeros(1, 1, 5, 6)
    step[..., 3:] = 0.5
    gradient = sobel(step)[0, 0]
    assert torch.all(gradient[0] == 0)
    assert gradient[1, 2].tolist() == [0, 0, 2, 2, 0, 0]
    assert torch.equal(gradient[1, 0], gradient[1, 2]), "the border must not add an edge"
    volume = sobel(step.unsqueeze(-1).expand(-1, -1, -1, -1, 4))[0, 0]
    assert torch.equal(volume[:2, ..., 0], gradient) and torch.all(volume[2] == 0)


def test_scharr_matches_scipy():
    x = torch.cat(images(SHAPES[0]), dim=1)
    for axis in range(2):
        kernel = np.outer([-1, 0, 1], [3, 10, 3])
        expected = ndimage.correlate(x[1, 2].numpy(), kernel if axis == 0 else kernel.T, mode="constant")
        np.testing.assert_allclose(scharr(x)[1, 2, axis].numpy(), expected, atol=1e-5)


def test_sobel_is_differentiable():
    x = torch.rand(1, 2, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(sobel, x)


@pytest.mark.parametrize("shape", SHAPES + [(1, 1, 7, 12), (1, 1, 9, 13, 4)])
def test_ssim_matches_monai(shape):
    fused, sources = images(shape)
    window = [min(11, side if side % 2 else side - 1) for side in shape[2:]]
    for s in range(2):
        expected, _ = compute_ssim_and_cs(fused, sources[:, s : s + 1], len(window), window, [1.5] * len(window))
        # MONAI's dense float32 window is off by up to 2e-5 from float64 here
        torch.testing.assert_close(ssim(fused, sources)[:, s], expected.flatten(1).mean(1), atol=5e-5, rtol=0)


@pytest.mark.parametrize("shape", SHAPES[:2])
def test_ssim_matches_skimage(shape):
    fused, sources = images(shape)
    settings = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1.0}
    expected = [structural_similarity(fused[0, 0].numpy(), s.numpy(), **settings) for s in sources[0]]
    np.testing.assert_allclose(ssim(fused, sources)[0].numpy(), expected, atol=1e-4)


def test_ssim_of_half_precision_is_computed_in_float32():
    fused, sources = (i.bfloat16() for i in images(SHAPES[0]))
    torch.testing.assert_close(ssim(fused, sources), ssim(fused.float(), sources.float()))


def test_ssim_of_a_volume_constant_along_an_axis():
    fused, sources = images(SHAPES[0])
    volume = ssim(*(i.unsqueeze(-1).expand(*i.shape, 12) for i in (fused, sources)))
    torch.testing.assert_close(volume, ssim(fused, sources), atol=1e-5, rtol=0)


def test_intensity_by_hand():
    sources = torch.tensor([[0.2, 0.8], [0.6, 0.4]]).view(1, 2, 1, 2)
    fused = torch.tensor([0.5, 0.5]).view(1, 1, 1, 2)
    assert FusionIntensityLoss()(fused, sources).item() == pytest.approx((0.1 + 0.3) / 2)


@pytest.mark.parametrize("shape", SHAPES)
def test_gradient_forms_match_numpy(shape):
    fused, sources = images(shape)

    def sobel_numpy(image, dims):
        return np.stack([ndimage.sobel(image, axis=a, mode="nearest") / 4 ** (dims - 2) for a in range(dims)])

    def expected(form, f, x, y):
        g = [sobel_numpy(i, f.ndim) for i in (f, x, y)]
        if form == "magnitude":
            g_f, g_x, g_y = (np.abs(i).sum(0) for i in g)
            return np.abs(g_f - np.maximum(g_x, g_y))
        x_wins = (g[1] ** 2).sum(0) >= (g[2] ** 2).sum(0)
        difference = ((g[0] - np.where(x_wins, g[1], g[2])) ** 2).sum(0)
        return difference / f.ndim if form == "vector" else np.sqrt(difference)

    triples = [(f[0].numpy(), *s.numpy()) for f, s in zip(fused, sources)]
    for form in FusionGradientLoss.FORMS:
        if form == "slices" and len(shape) == 5:
            values = [expected(form, *(i[..., k] for i in t)) for t in triples for k in range(shape[-1])]
        else:
            values = [expected(form, *t) for t in triples]
        assert FusionGradientLoss(form)(fused, sources).item() == pytest.approx(np.mean(values), rel=1e-4), form


def test_gradient_keeps_edges_towards_dark():
    dark_edge = torch.ones(1, 1, 8, 8, 8)
    dark_edge[:, :, 4:] = 0.2
    sources = torch.cat([dark_edge, torch.full_like(dark_edge, 0.5)], dim=1)
    assert FusionGradientLoss("vector")(dark_edge, sources).item() == 0
    assert FusionGradientLoss("vector")(1 - dark_edge, sources).item() > 0.1


@pytest.mark.parametrize("spatial_dims, ssim_weight, form", [(2, 5, "magnitude"), (3, 1, "vector")])
def test_weights_of_the_paper(spatial_dims, ssim_weight, form):
    fused, sources = images(SHAPES[spatial_dims - 2])
    loss = ClinicalFMambaLoss(spatial_dims)(fused, sources)
    expected = (
        2 * FusionIntensityLoss()(fused, sources)
        + 10 * FusionGradientLoss(form)(fused, sources)
        + ssim_weight * FusionSSIMLoss()(fused, sources)
    )
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(loss, ClinicalFMambaLoss(spatial_dims)(fused, sources.flip(1)))


@pytest.mark.parametrize("shape", SHAPES)
def test_no_loss_where_all_agree(shape):
    fused, _ = images(shape)
    loss = ClinicalFMambaLoss(len(shape) - 2)(fused, torch.cat([fused, fused], dim=1))
    assert abs(loss.item()) < 1e-4


@pytest.mark.parametrize("gradient_form", FusionGradientLoss.FORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_flow(shape, gradient_form):
    loss = ClinicalFMambaLoss(len(shape) - 2, gradient_form=gradient_form)
    fused, sources = images(shape)
    fused = fused.clone().requires_grad_()
    loss(fused, sources).backward()
    assert torch.isfinite(fused.grad).all() and (fused.grad != 0).float().mean() > 0.9
    black = torch.zeros_like(fused, requires_grad=True)
    loss(black, torch.zeros_like(sources)).backward()
    assert torch.isfinite(black.grad).all()


def losses(spatial_dims):
    return [
        ClinicalFMambaLoss(spatial_dims),
        JointFusionLoss(),
        EdgePreservationLoss(),
        SumOfCorrelationDifferencesLoss(),
    ]


@pytest.mark.parametrize("shape", SHAPES)
def test_autocast_computes_in_float32(shape):
    fused, sources = (i.bfloat16() for i in images(shape))
    for loss in losses(len(shape) - 2):
        expected = loss(fused.float(), sources.float())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            actual = loss(fused, sources)
        assert actual.dtype == torch.float32
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_joint_loss_is_what_the_metrics_say(shape):
    fused, sources = images(shape)
    edges, scd = EdgePreservationMetric()(fused, sources).mean(), SumOfCorrelationDifferencesMetric()(fused, sources)
    torch.testing.assert_close(EdgePreservationLoss()(fused, sources), -edges, atol=1e-3, rtol=0)
    torch.testing.assert_close(SumOfCorrelationDifferencesLoss()(fused, sources), -scd.mean())
    structure = 1 - ssim(fused, sources).mean()
    torch.testing.assert_close(
        JointFusionLoss()(fused, sources), 20 * structure - scd.mean() - 5 * edges, atol=5e-3, rtol=0
    )
    torch.testing.assert_close(
        JointFusionLoss(1, 2, 3)(fused, sources), structure - 2 * scd.mean() - 3 * edges, atol=5e-3, rtol=0
    )


@pytest.mark.parametrize("shape", [(1, 1, 6, 7), (1, 1, 4, 5, 4)])
def test_derivatives_of_edges_and_correlations(shape):
    fused, sources = (i.double() for i in images(shape))
    fused.requires_grad_()
    assert torch.autograd.gradcheck(lambda f: edge_preservation(f, sources, smoothing=1e-2), fused)
    assert torch.autograd.gradcheck(lambda f: sum_of_correlation_differences(f, sources, floor=1e-3), fused)
    # standard deviations of the difference below the floor
    nearly = (sources[:, :1] + 1e-5 * fused.detach()).requires_grad_()
    assert torch.autograd.gradcheck(lambda f: sum_of_correlation_differences(f, sources, floor=1e-3), nearly, eps=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
def test_derivatives_are_bounded_where_images_are_flat_or_equal(shape):
    textured, sources = images(shape)
    # a brain in a black background, in both sources at the same place
    head = torch.zeros_like(sources)
    head[:, :, 8:-4, 8:-8] = sources[:, :, 8:-4, 8:-8]
    flat = torch.full_like(textured, 0.4)
    fused = {
        "black": torch.zeros_like(flat),
        "flat": flat,
        "nearly flat": flat + 1e-7 * textured,
        "copy": head[:, :1],
        "copy and a constant": head[:, 1:] + 0.1,
        "average": head.mean(dim=1, keepdim=True),
    }
    for loss in losses(len(shape) - 2)[1:]:
        for name, image in fused.items():
            for target in (head, torch.cat([flat, flat], dim=1), torch.cat([head[:, :1], flat], dim=1)):
                image = image.detach().clone().requires_grad_()
                loss(image, target).backward()
                assert image.grad.isfinite().all(), (loss, name)
                # by pixel and case: of the order of the inverse of floor and smoothing at most
                assert image.grad.abs().max() * image.numel() < 1e5, (loss, name)


def test_correlation_with_a_constant_is_zero():
    a = torch.tensor([[0.7] * 5, [0.1, 0.2, 0.3, 0.4, 0.5]])
    b = torch.tensor([0.5, 0.4, 0.3, 0.2, 0.1])
    assert correlation(a, b).tolist() == pytest.approx([0, -1])


@pytest.mark.parametrize("files", [("train",), ("train", "volume")], ids="-".join)
def test_config_trains_with_the_joint_loss(files):
    parser = ConfigParser()
    parser.read_config([str(CONFIGS / f"{name}.json") for name in files])
    loss = parser.get_parsed_content("loss")
    assert isinstance(loss, JointFusionLoss)
    assert (loss.ssim_weight, loss.scd_weight, loss.edge_weight) == (20, 1, 5)


def test_meta_tensors_give_a_plain_loss():
    fused, sources = images(SHAPES[0])
    loss = ClinicalFMambaLoss(2)(MetaTensor(fused), MetaTensor(sources))
    assert type(loss) is torch.Tensor


@pytest.mark.parametrize(
    "fused, sources", [((1, 1, 8, 8), (1, 2, 8, 9)), ((1, 2, 8, 8), (1, 2, 8, 8)), ((8, 8), (8, 8))]
)
def test_shapes_are_checked(fused, sources):
    with pytest.raises(ValueError, match="expected fused images"):
        ClinicalFMambaLoss(2)(torch.rand(fused), torch.rand(sources))


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="form must be one of"):
        FusionGradientLoss("signed")
    with pytest.raises(ValueError, match="spatial_dims must be 2 or 3"):
        ClinicalFMambaLoss(1)

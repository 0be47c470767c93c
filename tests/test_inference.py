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

import pytest
import torch
import torch.nn as nn

from custom_nets.blocks import UpsampledConv
from custom_nets.nets import ClinicalFMamba, build_network, network_names, prepare_for_inference

pytestmark = pytest.mark.usefixtures("one_thread")

MODELS = Path(__file__).parents[1] / "bundles" / "clinicalfmamba_fusion" / "models"
CASES = [
    (2, {"strides": (2, 2, 2), "refinement": 4}, MODELS / "model.pt", (37, 50)),
    (3, {"strides": (2, 2, 2), "refinement": 1}, MODELS / "volume" / "model.pt", (19, 24, 17)),
    (3, {"strides": (2, 2, 2)}, MODELS / "volume" / "without_refinement.pt", (19, 24, 17)),
]


def trained(dims, shape, weights):
    network = ClinicalFMamba(dims, **shape)
    network.load_state_dict(torch.load(weights, weights_only=True))
    return network.eval()


@pytest.mark.parametrize("dims, shape, weights, size", CASES)
@torch.no_grad()
def test_the_same_outputs(dims, shape, weights, size):
    network, image = trained(dims, shape, weights), torch.rand(2, 2, *size)
    expected = network(image)
    norms = sum(isinstance(m, (nn.BatchNorm2d, nn.BatchNorm3d)) for m in network.modules())
    assert prepare_for_inference(network) is network
    torch.testing.assert_close(network(image), expected, atol=1e-5, rtol=0)
    # one behind each convolution of the decoder, and one before each pointwise convolution of the encoder
    left = sum(isinstance(m, (nn.BatchNorm2d, nn.BatchNorm3d)) for m in network.modules())
    assert norms - left == sum(stride == 2 for stride in shape["strides"]) + len(shape["strides"])
    assert not any(isinstance(m, UpsampledConv) for m in network.modules())


@pytest.mark.parametrize("dims, shape, weights, size", CASES)
@torch.no_grad()
def test_weights_in_half_precision(dims, shape, weights, size):
    """No weight is cast under autocast; the outputs are as good as those of autocast, also of a black background."""
    torch.manual_seed(0)
    network, image = trained(dims, shape, weights), torch.rand(1, 2, *size)
    image[..., : size[-1] // 2] = 0
    exact = network(image)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = network(image)
        fused = prepare_for_inference(network, torch.bfloat16)(image)
    halves = [p for p in network.parameters() if p.dtype == torch.bfloat16]
    assert sum(p.numel() for p in halves) > 0.9 * sum(p.numel() for p in network.parameters())
    assert (fused - exact).abs().mean() < 5e-3
    assert (fused - exact).abs().mean() < 1.3 * (expected - exact).abs().mean()


@torch.no_grad()
def test_padded_convolutions_keep_their_batch_norm():
    """Folding its shift would change the border of the image."""
    conv, norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(3)
    norm.running_mean.fill_(2.0)
    network, image = nn.Sequential(norm, conv).eval(), torch.rand(1, 3, 5, 5)
    expected = network(image)
    torch.testing.assert_close(prepare_for_inference(network)(image), expected)
    assert isinstance(network[0], nn.BatchNorm2d)


@pytest.mark.parametrize("name", network_names())
@torch.no_grad()
def test_every_network(name):
    torch.manual_seed(0)
    network, image = build_network(name, spatial_dims=2), torch.rand(1, 2, 21, 18)
    for x in [*network.parameters(), *network.buffers()]:
        if x.is_floating_point():
            x.add_(0.1 * (torch.rand_like(x) - 0.5))
    expected = network.eval()(image)
    assert expected.isfinite().all()
    # a pixel is rounded as those are that it was made from: with such weights, MSRPAN's reach 180
    largest = max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(prepare_for_inference(network)(image), expected, atol=1e-5 * largest, rtol=0.0)

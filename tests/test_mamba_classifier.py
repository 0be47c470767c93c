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

import math

import pytest
import torch
from monai.visualize import GradCAM

from custom_nets.nets import ClinicalFMamba, ClinicalFMambaClassifier, network_names

SMALL = {"channels": (8, 8, 16), "latent_depth": 1}


@pytest.mark.parametrize("dims, size", [(2, (17, 22)), (3, (9, 12, 10))])
@pytest.mark.parametrize("channels", [1, 2])
def test_shapes_and_gradients(dims, size, channels):
    network = ClinicalFMambaClassifier(dims, channels, num_classes=3, **SMALL)
    logits = network(torch.rand(2, channels, *size))
    assert logits.shape == (2, 3)
    logits.square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in network.parameters())


def test_images_are_told_apart():
    """Two images pass the encoder as one batch, and each has its own place in the features."""
    network = ClinicalFMambaClassifier(2, 2, **SMALL).eval()
    x = torch.rand(3, 2, 16, 16)
    with torch.inference_mode():
        logits = network(x)
        torch.testing.assert_close(torch.cat([network(item) for item in x.split(1)]), logits, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(network(x.flip(1)), logits, atol=1e-4)


@pytest.mark.parametrize("dims, size", [(2, (16, 24)), (3, (16, 16, 8))])
def test_statistics_of_the_brain(dims, size):
    """Tokens of the background do not count, and an empty image gives numbers."""
    torch.manual_seed(0)
    network, pooled = ClinicalFMambaClassifier(dims, **SMALL).eval(), []
    network.head.register_forward_pre_hook(lambda module, inputs: pooled.append(inputs[0]))
    tokens = torch.rand(1, math.prod(size) // network.stride**dims, SMALL["channels"][-1])
    network.norm.register_forward_hook(lambda *_: tokens)
    image = torch.zeros(1, 1, *size)
    half = size[0] // 2
    image[:, :, :half] = 0.5
    with torch.inference_mode():
        network(image)
        network(torch.zeros_like(image))
    for found, part in zip(pooled, (tokens[:, : tokens.shape[1] // 2], tokens)):
        expected = torch.cat([part.mean(1), part.std(1, correction=0)], dim=1)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_weights_of_a_fusion_network():
    fusion = ClinicalFMamba(2, **SMALL)
    network = ClinicalFMambaClassifier(2, **SMALL)
    head = network.head.weight.clone()
    network.load_fusion_weights(fusion.state_dict())
    expected = fusion.state_dict()
    taken = [name for name in network.state_dict() if not name.startswith(("norm.", "head."))]
    assert taken and all(torch.equal(network.state_dict()[name], expected[name]) for name in taken)
    assert torch.equal(network.head.weight, head)
    with pytest.raises(ValueError, match="not of a ClinicalFMamba with the same encoder"):
        ClinicalFMambaClassifier(2, channels=(8, 16, 16), latent_depth=1).load_fusion_weights(fusion.state_dict())


def test_frozen_encoder():
    network = ClinicalFMambaClassifier(2, frozen=True, **SMALL).train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], 0.1)
    network(torch.rand(4, 1, 16, 16)).square().sum().backward()
    optimizer.step()
    changed = {
        name.split(".")[0] for name, value in network.state_dict().items() if not torch.equal(value, before[name])
    }
    assert changed == {"latent_x", "norm", "head"}, "neither weights nor running statistics of the encoder"
    assert not network.encoder.training and network.head.training


def test_scripted_as_called():
    network = ClinicalFMambaClassifier(2, **SMALL).eval()
    x = torch.rand(2, 1, 18, 20)
    with torch.inference_mode():
        torch.testing.assert_close(torch.jit.script(network)(x), network(x))


def test_saliency():
    network = ClinicalFMambaClassifier(2, **SMALL)
    assert GradCAM(nn_module=network, target_layers="encoder")(torch.rand(2, 1, 16, 20), class_idx=1).shape == (
        2,
        1,
        16,
        20,
    )


def test_wrong_input():
    with pytest.raises(ValueError, match="expected a batch of 2D images with 1 channels"):
        ClinicalFMambaClassifier(2, **SMALL)(torch.rand(1, 2, 16, 16))


def test_not_a_fusion_network():
    assert not any("classifier" in name for name in network_names())

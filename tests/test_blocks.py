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
import torch.nn.functional as F

from custom_nets.blocks import (
    CrossMamba,
    CrossMambaBlock,
    CrossModalChannelAttention,
    DilatedGatedConvBlock,
    DirectionalSSM,
    MambaBlock,
    SourceRefinement,
    TokenExchange,
    UpsampledConv,
    swap_channels,
)
from custom_nets.ops import scan_orders

SCANS = [("raster", [4, 5]), ("cross", [3, 7]), ("raster", [2, 3, 3]), ("tri_plane", [3, 2, 5])]
CONV = {2: F.conv2d, 3: F.conv3d}


def randomised(module, seed=0):
    """The module in eval mode with all its parameters and running statistics moved off their initial values."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, x in [*module.named_parameters(), *module.named_buffers()]:
            if x.is_floating_point():
                x.add_(0.2 * torch.rand(x.shape, generator=generator) + (0.1 if "running" in name else -0.1))
    return module.eval()


def tokens(shape, channels, seed=0, batch=2):
    return torch.randn(batch, int(np.prod(shape)), channels, generator=torch.Generator().manual_seed(seed))


def reading(shape, axes, backward):
    """Raster indices of the voxels in the order in which a direction reads them."""
    order = np.arange(np.prod(shape)).reshape(shape).transpose(axes).reshape(-1)
    return torch.from_numpy((order[::-1] if backward else order).copy())


def layer_norm(x, norm):
    x = x - x.mean(-1, keepdim=True)
    return x / torch.sqrt((x**2).mean(-1, keepdim=True) + norm.eps) * norm.weight + norm.bias


def naive_direction(ssm, k, content, condition=None):
    """Direction k of a DirectionalSSM as the Mamba paper states it, token by token; in its own sequence."""
    kernel = ssm.conv_weight[k].t().unsqueeze(1)
    width, channels, states = kernel.shape[-1], content.shape[-1], ssm.A_log.shape[-1]
    padded = F.pad(content.transpose(1, 2), (width - 1, 0))
    content = F.silu(F.conv1d(padded, kernel, ssm.conv_bias[k], groups=channels)).transpose(1, 2)
    projected = (content if condition is None else condition) @ ssm.projection[k]
    step, B, C = projected.split([projected.shape[-1] - 2 * states, states, states], dim=-1)
    step = F.softplus(step @ ssm.step_weight[k] + ssm.step_bias[k])
    A = -torch.exp(ssm.A_log[k])
    state, outputs = torch.zeros(content.shape[0], channels, states), []
    for t in range(content.shape[1]):
        state = torch.exp(step[:, t, :, None] * A) * state
        state = state + step[:, t, :, None] * B[:, t, None, :] * content[:, t, :, None]
        outputs.append((state * C[:, t, None, :]).sum(-1) + ssm.D[k] * content[:, t])
    return torch.stack(outputs, dim=1)


def naive_mamba(mamba, x, shape, orders, condition=None):
    """Every direction scans and gates for itself; back in raster order they are averaged."""
    content, gate = (x @ mamba.in_proj.weight.t()).chunk(2, dim=-1)
    merged = torch.zeros_like(content)
    for k, (axes, backward) in enumerate(orders):
        read = reading(shape, axes, backward)
        y = naive_direction(mamba.ssm, k, content[:, read], None if condition is None else condition[:, read])
        merged[:, read] += y * F.silu(gate[:, read]) / len(orders)
    if isinstance(mamba.norm, torch.nn.LayerNorm):
        merged = layer_norm(merged, mamba.norm)
    return merged @ mamba.out_proj.weight.t()


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("dilation", [1, 3])
def test_dilated_gated_conv_block(dims, dilation):
    pyramid = dims == 2
    block = randomised(DilatedGatedConvBlock(dims, 4, dilation, pyramid))
    x = torch.randn(2, 4, 9, 7, 8)[..., 0] if dims == 2 else torch.randn(2, 4, 9, 7, 8)

    def bn(x, norm):
        mean, variance, weight, bias = (
            v.view(1, -1, *[1] * dims) for v in (norm.running_mean, norm.running_var, norm.weight, norm.bias)
        )
        return (x - mean) / torch.sqrt(variance + norm.eps) * weight + bias

    def conv(x, layer, dilation=1):
        padding = dilation * (layer.weight.shape[-1] - 1) // 2
        return CONV[dims](x, layer.weight, layer.bias, padding=padding, dilation=dilation)

    def lr(x):
        return torch.where(x > 0, x, 0.2 * x)

    (norm_a, conv_a, _), (norm_b, conv_b, _), (norm_h, conv_h, _) = block.content, block.gate, block.dilated
    assert (conv_a.weight.shape[-1], conv_b.weight.shape[-1], conv_h.weight.shape[-1]) == (3, 1, 3)
    gated = lr(conv(bn(x, norm_a), conv_a)) * lr(conv(bn(x, norm_b), conv_b))
    h = lr(conv(bn(gated, norm_h), conv_h, dilation))
    if pyramid:
        h = lr(bn(h, block.norm[0]))
        p1 = conv(h, block.pyramid)
        p2 = conv(p1, block.pyramid)
        h = p1 + p2 + conv(p2, block.pyramid)
    torch.testing.assert_close(block(x), x + h, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [[6, 5], [4, 5, 3]])
def test_cross_modal_channel_attention(shape):
    block = randomised(CrossModalChannelAttention(len(shape), 4))
    x, y = torch.randn(2, 2, 4, *shape)

    def pointwise(x, layer):
        features = torch.einsum("oi,bil->bol", layer.weight.flatten(1), x.flatten(2)) + layer.bias[:, None]
        return features.view_as(x)

    def g(x, y):
        features = pointwise(x, block.attention).flatten(2)
        weights = torch.sigmoid(features.max(dim=2).values + features.mean(dim=2))
        return pointwise(y, block.value) * weights.view(*weights.shape, *[1] * len(shape))

    torch.testing.assert_close(block(x, y), g(x, y) + g(y, x))
    torch.testing.assert_close(block(x, y), block(y, x))
    fused = torch.randn_like(x)
    kept = fused.clone()
    torch.testing.assert_close(block(x, y, fused), fused + g(x, y) + g(y, x))
    assert torch.equal(fused, kept)


@pytest.mark.parametrize("conditioned", [False, True])
@pytest.mark.parametrize("scan, shape", SCANS)
def test_directional_ssm(scan, shape, conditioned):
    orders = scan_orders(scan, len(shape))
    ssm = randomised(DirectionalSSM(6, orders, state_dim=3, step_rank=2))
    x = tokens(shape, 6)
    condition = tokens(shape, 6, seed=1) if conditioned else None
    expected = torch.zeros_like(x)
    for k, (axes, backward) in enumerate(orders):
        read = reading(shape, axes, backward)
        y = naive_direction(ssm, k, x[:, read], None if condition is None else condition[:, read])
        expected[:, read] += y / len(orders)
    torch.testing.assert_close(ssm(x, shape, condition), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("scan, shape", SCANS)
def test_mamba(scan, shape, normalise):
    orders = scan_orders(scan, len(shape))
    block = randomised(MambaBlock(8, orders, state_dim=3, normalise=normalise))
    x = tokens(shape, 8)
    y = naive_mamba(block.mamba, x, shape, orders)
    torch.testing.assert_close(block.mamba(x, shape), y, atol=1e-5, rtol=1e-4)
    y = naive_mamba(block.mamba, layer_norm(x, block.norm), shape, orders)
    torch.testing.assert_close(block(x, shape), x + y, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("scan, shape", SCANS)
def test_cross_mamba(scan, shape):
    """Content, gate and skip are the own modality's; step, B and C come linearly from the other one."""
    orders = scan_orders(scan, len(shape))
    block = randomised(CrossMambaBlock(8, orders, state_dim=3))
    x, other = tokens(shape, 8), tokens(shape, 8, seed=1)
    condition = layer_norm(other, block.other_norm) @ block.mamba.condition_proj.weight.t()
    y = naive_mamba(block.mamba, layer_norm(x, block.norm), shape, orders, condition)
    torch.testing.assert_close(block(x, other, shape), x + y, atol=1e-5, rtol=1e-4)


def test_dimensions_of_the_paper():
    mamba = CrossMamba(128, scan_orders("cross", 2))
    assert mamba.in_proj.weight.shape == (2 * 256, 128) and mamba.in_proj.bias is None
    assert mamba.out_proj.weight.shape == (128, 256) and mamba.out_proj.bias is None
    assert mamba.condition_proj.weight.shape == (256, 128) and mamba.condition_proj.bias is None
    assert mamba.norm.normalized_shape == (256,)
    assert mamba.ssm.conv_weight.shape == (4, 4, 256)
    assert mamba.ssm.projection.shape == (4, 256, 8 + 8 + 8)
    assert mamba.ssm.step_weight.shape == (4, 8, 256)
    assert mamba.ssm.A_log.shape == (4, 256, 8)


def test_swap_channels():
    x, y = torch.randn(2, 2, 3, 7)
    swapped_x, swapped_y = swap_channels(x, y)
    assert torch.equal(swapped_x[..., 1::2], y[..., 1::2]) and torch.equal(swapped_x[..., ::2], x[..., ::2])
    assert torch.equal(swapped_y[..., 1::2], x[..., 1::2]) and torch.equal(swapped_y[..., ::2], y[..., ::2])
    assert all(torch.equal(a, b) for a, b in zip(swap_channels(swapped_x, swapped_y), (x, y)))


@pytest.mark.parametrize("rounds", [1, 2])
def test_token_exchange(rounds):
    """r_i += t_i; u_i = LN_i(r_i); swap; t_i = Mamba_i(u_i); r starts as the encoder's tokens."""
    shape, orders = [3, 4], scan_orders("raster", 2)
    block = randomised(TokenExchange(8, orders, state_dim=3, rounds=rounds))
    t = [tokens(shape, 8, seed) for seed in (0, 1)]
    r = [tokens(shape, 8, seed) for seed in (2, 3)]
    actual = block(*t, *r, shape)
    for _ in range(rounds):
        r = [r_i + t_i for r_i, t_i in zip(r, t)]
        u_x, u_y = layer_norm(r[0], block.norm_x), layer_norm(r[1], block.norm_y)
        odd = torch.tensor([0.0, 1.0] * 4)
        swapped = (u_x * (1 - odd) + u_y * odd, u_y * (1 - odd) + u_x * odd)
        t = [naive_mamba(m, u, shape, orders) for m, u in zip((block.mamba_x, block.mamba_y), swapped)]
    for a, t_i in zip(actual, t):
        torch.testing.assert_close(a, t_i, atol=1e-5, rtol=1e-4)


def test_token_exchange_of_the_paper():
    block = TokenExchange(128, scan_orders("raster", 2))
    assert block.rounds == 2 and block.mamba_x.ssm.A_log.shape == (1, 256, 16)
    assert isinstance(block.mamba_x.norm, torch.nn.Identity), "a plain Mamba has no norm before its projection"


@pytest.mark.parametrize("states", [1, 8])
def test_initialisation_of_mamba(states):
    ssm = DirectionalSSM(64, scan_orders("cross", 2), state_dim=states)
    expected = torch.log(torch.arange(1, states + 1)).expand(4, 64, -1)
    torch.testing.assert_close(ssm.A_log.detach(), expected)
    assert torch.equal(ssm.D, torch.ones(4, 64))
    step = F.softplus(ssm.step_bias).detach()
    assert 1e-3 * 0.999 < step.min() < 2e-3 and 5e-2 < step.max() < 1e-1 * 1.001
    # log-uniform: half of the steps below the geometric mean
    assert 0.3 < (step < 1e-2).float().mean() < 0.7
    low_floor = DirectionalSSM(64, scan_orders("cross", 2), step_range=(1e-6, 1e-5))
    torch.testing.assert_close(F.softplus(low_floor.step_bias).detach(), torch.full((4, 64), 1e-4), rtol=1e-3, atol=0)


@pytest.mark.parametrize("conditioned", [False, True])
@pytest.mark.parametrize("axes, backward", [([0, 1], False), ([1, 0], False), ([1, 0], True)])
def test_single_direction_is_causal(axes, backward, conditioned):
    shape, changed = [4, 5], 9
    ssm = randomised(DirectionalSSM(6, [(axes, backward)], state_dim=3))
    read = reading(shape, axes, backward)
    first = tokens(shape, 6)
    second = first.clone()
    second[:, read[changed]] += 1
    if conditioned:
        own = tokens(shape, 6, seed=1)
        a, b = (ssm(own, shape, condition)[:, read] for condition in (first, second))
    else:
        a, b = (ssm(x, shape)[:, read] for x in (first, second))
    assert torch.equal(a[:, :changed], b[:, :changed])
    assert (a[:, changed:] != b[:, changed:]).any(dim=-1).all()


@pytest.mark.parametrize("shape", [[5, 4], [3, 1, 4]])
def test_upsampled_conv(shape):
    block = UpsampledConv(len(shape), 4, 3)
    x = torch.randn(2, 4, *shape, requires_grad=True)
    upsampled = F.interpolate(x, scale_factor=2, mode="nearest")
    expected = CONV[len(shape)](upsampled, block.weight, padding=1)
    torch.testing.assert_close(block(x), expected, atol=1e-5, rtol=1e-5)
    grad = torch.randn_like(expected)
    leaves = (x, block.weight)
    for actual, wanted in zip(torch.autograd.grad(block(x), leaves, grad), torch.autograd.grad(expected, leaves, grad)):
        torch.testing.assert_close(actual, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [(5, 7), (4, 5, 3)])
@torch.no_grad()
def test_source_refinement(shape):
    """Against its formula, step by step."""
    dims, channels = len(shape), 4
    block = randomised(SourceRefinement(dims, channels, depth=2))
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(2, channels, *shape, generator=generator)
    images = torch.rand(2, 2, *shape, generator=generator)
    images[0, :, 0], images[1, :, 0] = 0, 1  # black and white have no finite logit
    weights = [x for x in block.parameters()]
    conv = CONV[dims]
    h = features + conv(images, *weights[:2], padding=1)
    for first, first_bias, second, second_bias in (weights[2:6], weights[6:10]):
        h = h + conv(F.leaky_relu(conv(h, first, first_bias, padding=1), 0.2), second, second_bias, padding=1)
    *logits, correction = conv(h, *weights[10:], padding=1).unbind(1)
    x, y = images.unbind(1)
    shares = [logit.exp() / sum(other.exp() for other in logits) for logit in logits]
    chosen = shares[0] * x + shares[1] * y + shares[2] * torch.maximum(x, y)
    chosen = chosen.clamp(1 / 512, 511 / 512)
    expected = 1 / (1 + (1 - chosen) / chosen * torch.exp(-correction))
    torch.testing.assert_close(block(features, images)[:, 0], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [(6, 8), (4, 5, 3)])
@torch.no_grad()
def test_source_refinement_starts_near_the_maximum(shape):
    torch.manual_seed(0)
    block = SourceRefinement(len(shape), 8)
    images = torch.rand(1, 2, *shape)
    maximum, mean = images.amax(1, keepdim=True), images.mean(1, keepdim=True)
    torch.nn.init.zeros_(block.head.weight)
    fused = block(torch.randn(1, 8, *shape), images)
    # 0.787 of it and 0.107 of each image
    torch.testing.assert_close(fused, 0.7866 * maximum + 0.2134 * mean, atol=5e-3, rtol=0)
    assert block.eps < fused.min()


@torch.no_grad()
def test_source_refinement_in_half_precision():
    """256 grey levels are told apart, although the features are bfloat16."""
    block = SourceRefinement(2, 4)
    torch.nn.init.zeros_(block.head.weight)
    levels = torch.linspace(0, 1, 256).reshape(1, 1, 16, 16).repeat(1, 2, 1, 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fused = block(torch.zeros(1, 4, 16, 16), levels)
    assert fused.dtype == torch.float32
    torch.testing.assert_close((255 * fused).round(), 255 * levels[:, :1], atol=0.5, rtol=0)

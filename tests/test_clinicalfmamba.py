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

import io
import subprocess
import sys

import pytest
import torch
import torch.nn as nn

from custom_nets.blocks import UpsampledConv
from custom_nets.nets import ClinicalFMamba, build_network, network_names, register_network, registry

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = {"channels": (8, 8, 16), "latent_depth": 1}
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def network(dims, seed=0, **kwargs):
    torch.manual_seed(seed)
    return ClinicalFMamba(dims, **{**SMALL, **kwargs}).eval()


def images(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def count(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("size", [[16, 16], [17, 31], [37, 20], [16, 16, 16], [17, 19, 23]])
@torch.no_grad()
def test_every_size_is_kept(size, batch):
    fused = network(len(size))(images(batch, 2, *size))
    assert fused.shape == (batch, 1, *size)
    assert 0 <= fused.min() and fused.max() <= 1 and fused.std() > 1e-4


@pytest.mark.parametrize("size", [[24, 17], [16, 17, 18]])
@torch.no_grad()
def test_batch_equals_its_rows(size):
    net = network(len(size))
    x = images(3, 2, *size)
    rows = torch.cat([net(row) for row in x.split(1)])
    torch.testing.assert_close(net(x), rows, atol=1e-5, rtol=1e-4)
    assert (rows[0] - rows[1]).abs().max() > 1e-3


@pytest.mark.parametrize("dims", [2, 3])
@torch.no_grad()
def test_both_images_matter(dims):
    net = network(dims)
    x = images(1, 2, *[16] * dims)
    for channel in range(2):
        changed = x.clone()
        changed[:, channel] = images(*x[:, 0].shape, seed=1)
        assert (net(changed) - net(x)).abs().max() > 1e-3


@pytest.mark.parametrize("refinement", [0, 2])
@pytest.mark.parametrize("size", [(32, 24), (32, 16, 24)])
def test_every_parameter_gets_a_gradient(size, refinement):
    """In float64 and far above rounding: a bias that a batch norm cancels gets 1e-12 and would pass for alive."""
    torch.manual_seed(0)
    net = ClinicalFMamba(len(size), refinement=refinement).double()
    fused = net(images(2, 2, *size).double())
    (fused * images(*fused.shape, seed=1)).sum().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 1e-8, name


# Live parameters of the authors' release, from method.md.
RELEASE_2D, RELEASE_3D = 3_155_521, 3_408_289
# What every direction of a scan has for itself, at 256 inner channels, 8 states and a step of rank 8: convolution with
# bias, projection to step, B and C, projection of the step with bias, A_log, D.
DIRECTION = 256 * (4 + 1) + 256 * (8 + 8 + 8) + 256 * (8 + 1) + 256 * 8 + 256
# Ours has biases in the two pointwise convolutions of the channel attention.
ATTENTION_BIASES = 2 * 32
# Ours has no bias in the decoder's three convolutions: the batch norm behind cancels it, and no gradient reaches it.
DECODER_BIASES = 64 + 32 + 32


def test_parameters_2d():
    """The release is built for 128 x 128 slices: its first stage does not halve, so that it has two halvings only."""
    first_halving = 32 * 32 * 2 * 2 + 32
    last_upsampling = 32 * 32 * 3 * 3 + 32 + 2 * 32  # convolution with bias, batch norm
    assert count(ClinicalFMamba(2, strides=(1, 2, 2))) == RELEASE_2D + ATTENTION_BIASES - (DECODER_BIASES - 32)
    expected = RELEASE_2D + first_halving + last_upsampling + ATTENTION_BIASES - DECODER_BIASES
    assert count(ClinicalFMamba(2)) == expected == 3_168_897


def test_parameters_3d():
    """The release reads 3 directions in its 10 latent blocks and 8 in its 2 cross Mamba blocks, ours 6 in all 12."""
    expected = RELEASE_3D + (10 * (6 - 3) + 2 * (6 - 8)) * DIRECTION + ATTENTION_BIASES - DECODER_BIASES
    net = ClinicalFMamba(3)
    assert count(net) == expected == 3_721_057
    for block in (*net.latent_x, *net.latent_y, net.cross_x, net.cross_y):
        assert sum(p.numel() for p in block.mamba.ssm.parameters()) == 6 * DIRECTION


def test_network_of_the_paper():
    """Sizes of method.md that the counts alone do not fix."""
    for dims in (2, 3):
        net = ClinicalFMamba(dims)
        assert net.stride == 8 and len(net.latent_x) == len(net.latent_y) == 5
        assert [m.dilated[1].dilation[0] for m in net.encoder[1::2]] == [1, 3, 5]
        assert [m.out_channels for m in net.encoder[::2]] == [32, 64, 128]
        assert len(net.latent_x[0].mamba.ssm.orders) == {2: 4, 3: 6}[dims]
        assert len(net.refine) == {2: 3, 3: 0}[dims] and (net.exchange is None) == (dims == 3)
        activation = {2: nn.ReLU, 3: nn.LeakyReLU}[dims]
        norm = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[dims]
        stages = [UpsampledConv, norm, activation, UpsampledConv, norm, activation, UpsampledConv, norm]
        assert [type(m) for m in net.decoder] == stages
        assert [len(m.weight) for m in net.decoder if isinstance(m, UpsampledConv)] == [64, 32, 32]


@torch.no_grad()
def test_token_exchange_starts_from_the_encoder():
    net, seen = network(2, latent_depth=2), {}
    net.encoder.register_forward_hook(lambda module, args, out: seen.update(encoded=out))
    net.latent_x[-1].register_forward_hook(lambda module, args, out: seen.update(x=out))
    net.latent_y[-1].register_forward_hook(lambda module, args, out: seen.update(y=out))
    net.exchange.register_forward_pre_hook(lambda module, args: seen.update(arguments=args))
    net(images(2, 2, 16, 24))
    encoded = seen["encoded"].flatten(2).transpose(1, 2).split(2)
    for actual, expected in zip(seen["arguments"], (seen["x"], seen["y"], *encoded)):
        assert torch.equal(actual, expected)
    assert seen["arguments"][4] == [2, 3]


@pytest.mark.parametrize(
    "dims, kwargs, missing",
    [
        (2, {"cross_modal_attention": False}, ["skip"]),
        (3, {"cross_modal_attention": False}, ["skip"]),
        (2, {"cross_mamba": False}, ["cross_x", "cross_y"]),
        (3, {"cross_mamba": False}, ["cross_x", "cross_y"]),
    ],
)
@torch.no_grad()
def test_ablations_remove_a_part(dims, kwargs, missing):
    whole, ablated = network(dims), network(dims, **kwargs)
    assert count(whole) - count(ablated) == sum(count(whole.get_submodule(name)) for name in missing) > 0
    ablated.load_state_dict(whole.state_dict(), strict=False)
    x = images(1, 2, *[16] * dims)
    assert ablated(x).shape == whole(x).shape and (ablated(x) - whole(x)).abs().max() > 1e-4


@pytest.mark.parametrize("dims", [2, 3])
@torch.no_grad()
def test_raster_scan_keeps_one_direction(dims):
    whole, raster = network(dims), network(dims, scan="raster")
    blocks = [(w.latent_x[0].mamba, w.latent_y[0].mamba, w.cross_x.mamba, w.cross_y.mamba) for w in (whole, raster)]
    directions = len(blocks[0][0].ssm.orders)
    for many, one in zip(*blocks):
        assert one.ssm.orders == [(list(range(dims)), False)]
        assert count(many.ssm) == directions * count(one.ssm)
    # The first direction of a whole scan is the raster's: with equal weights, what differs is the other directions.
    shapes = {name: value.shape for name, value in raster.state_dict().items()}
    raster.load_state_dict({k: v if v.shape == shapes[k] else v[:1] for k, v in whole.state_dict().items()})
    x = images(1, 2, *[16] * dims)
    assert (raster(x) - whole(x)).abs().max() > 1e-5


@pytest.mark.parametrize("dims", [2, 3])
@torch.no_grad()
def test_refinement_takes_the_place_of_the_head(dims):
    plain, refined = network(dims), network(dims, refinement=2)
    keys = refined.load_state_dict(plain.state_dict(), strict=False)
    assert set(keys.unexpected_keys) == {"head.weight", "head.bias"}
    assert {key.split(".")[0] for key in keys.missing_keys} == {"refinement"}
    x = images(2, 2, *[19] * dims)
    fused = refined(x)
    assert fused.shape == (2, 1, *[19] * dims) and (fused - plain(x)).abs().max() > 1e-2
    assert refined.refinement.units[0] is not refined.refinement.units[1]


@pytest.mark.parametrize("strides, stride", [((1, 2, 2), 4), ((2, 1, 2), 4), ((2, 2, 1), 4), ((1, 1, 2), 2)])
@torch.no_grad()
def test_strides(strides, stride):
    net = network(2, strides=strides)
    tokens = []
    net.latent_x[0].register_forward_hook(lambda module, args, out: tokens.append(out.shape[1]))
    assert net(images(1, 2, 21, 16)).shape == (1, 1, 21, 16)
    assert net.stride == stride and tokens == [-(-21 // stride) * (16 // stride)]


@torch.no_grad()
def test_more_channels():
    assert network(2, in_channels=4, out_channels=3)(images(1, 4, 16, 16)).shape == (1, 3, 16, 16)
    assert network(2, in_channels=4, out_channels=2, refinement=1)(images(1, 4, 16, 16)).shape == (1, 2, 16, 16)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"spatial_dims": 1}, "spatial_dims should be 2 or 3"),
        ({"in_channels": 3}, "in_channels should be even"),
        ({"in_channels": 0}, "in_channels should be even"),
        ({"dilations": (1, 3)}, "one entry for each stage"),
        ({"strides": (2, 2, 3)}, "strides should be 1 or 2"),
        ({"strides": (1, 1, 1)}, "at least one of them 2"),
        ({"out_channels": 3, "refinement": 1}, "the channels of a source, 1, not 3"),
        ({"scan": "zigzag"}, "no scan named 'zigzag'"),
        ({"scan": "tri_plane"}, "no scan named 'tri_plane' in 2 dimensions"),
        ({"spatial_dims": 3, "scan": "cross"}, "no scan named 'cross' in 3 dimensions"),
    ],
)
def test_arguments_are_checked(kwargs, message):
    with pytest.raises(ValueError, match=message):
        ClinicalFMamba(**{**SMALL, **kwargs})


@pytest.mark.parametrize("shape", [(2, 1, 16, 16), (1, 4, 16, 16), (2, 16, 16), (1, 2, 16, 16, 16)])
def test_input_is_checked(shape):
    """Two images with one channel each would else be fused with each other, across the batch."""
    with pytest.raises(ValueError, match="expected a batch of 2D images with 2 channels"):
        network(2)(torch.rand(shape))


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("device", DEVICES)
@torch.no_grad()
def test_autocast(device, dims, dtype, tolerance):
    net = network(dims).to(device)
    x = images(2, 2, *[24] * dims).to(device)
    with torch.autocast(device, dtype=dtype):
        fused = net(x)
    assert fused.dtype in (dtype, torch.float32) and fused.isfinite().all()
    torch.testing.assert_close(fused.float(), net(x), atol=tolerance, rtol=0)


@pytest.mark.parametrize("dims", [2, 3])
def test_autocast_trains(dims):
    net = network(dims).train()
    # not 16: on 2 x 2 x 2 features, the bfloat16 weight gradient of oneDNN's 3D convolution reads memory never written
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fused = net(images(2, 2, *[24] * dims))
    fused.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("dims", [2, 3])
@torch.no_grad()
def test_cuda_equals_cpu(dims):
    net = network(dims)
    x = images(2, 2, *[24] * dims)
    expected = net(x)
    torch.testing.assert_close(net.cuda()(x.cuda()).cpu(), expected, atol=2e-3, rtol=0)


@pytest.mark.parametrize(
    "dims, kwargs",
    [
        (2, {}),
        (3, {}),
        (2, {"cross_mamba": False, "cross_modal_attention": False, "scan": "raster", "strides": (1, 2, 2)}),
        (2, {"refinement": 2}),
    ],
)
@torch.no_grad()
def test_script(dims, kwargs):
    """A scripted network takes other sizes, and survives being saved."""
    net = network(dims, **kwargs)
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(net), buffer)
    buffer.seek(0)
    scripted = torch.jit.load(buffer)
    for size in ([16, 16, 16], [19, 24, 17]):
        x = images(2, 2, *size[:dims])
        torch.testing.assert_close(scripted(x), net(x), atol=1e-6, rtol=1e-5)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("dims", [2, 3])
@torch.no_grad()
def test_trace(dims):
    """A traced network is for the size of its example."""
    net = network(dims)
    size = [16, 19, 17][:dims]
    traced = torch.jit.trace(net, images(1, 2, *size))
    x = images(1, 2, *size, seed=1)
    torch.testing.assert_close(traced(x), net(x), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dims", [2, 3])
@torch.no_grad()
def test_state_dict_loads_weights_only(dims):
    net, other = network(dims), network(dims, seed=1)
    buffer = io.BytesIO()
    torch.save(net.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    x = images(1, 2, *[16] * dims)
    assert torch.equal(other(x), net(x))


@pytest.mark.parametrize("dims", [2, 3])
def test_checkpoints(dims):
    """Activations that are computed again give the same loss, gradients and statistics, and are not kept meanwhile."""
    results = []
    for use_checkpoint in (False, True):
        net = network(dims, latent_depth=2, use_checkpoint=use_checkpoint).train()
        kept: dict[int, int] = {}

        def pack(x, kept=kept):
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            loss = net(images(2, 2, *[24] * dims)).square().mean()
        kept_bytes = sum(kept.values())
        loss.backward()
        gradients = {name: p.grad for name, p in net.named_parameters()}
        results.append((kept_bytes, loss.detach(), gradients, dict(net.named_buffers())))
    (plain_bytes, *plain), (kept_bytes, *again) = results
    assert kept_bytes < plain_bytes / 2
    torch.testing.assert_close(again, plain, atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("size", [(16, 24), (16, 24, 8)])
def test_channels_last_stays(size, batch):
    """The layout can be told from the strides, of one image as of several, forward and backward: cuDNN goes by them."""
    network = ClinicalFMamba(len(size), refinement=1)
    layout = torch.channels_last if len(size) == 2 else torch.channels_last_3d
    strides = {}

    def expected(x):
        return torch.empty(x.shape).to(memory_format=layout).stride()

    def note(name, x):
        strides[name] = (x.stride(), expected(x))

    def as_on_a_gpu(_module, _inputs, output):
        output = output.contiguous(memory_format=layout)
        output.register_hook(lambda gradient: note("gradient of the stem", gradient))
        return output

    network.stem.register_forward_hook(as_on_a_gpu)
    network.decoder.register_forward_pre_hook(lambda _, inputs: note("input of the decoder", inputs[0]))
    network.refinement.register_forward_pre_hook(lambda _, inputs: note("input of the refinement", inputs[0]))
    network(torch.rand(batch, 2, *size)).sum().backward()
    assert len(strides) == 3
    for name, (found, wanted) in strides.items():
        assert found == wanted, name


def test_registry(monkeypatch):
    monkeypatch.setattr(registry, "_NETWORKS", dict(registry._NETWORKS))
    net = build_network("clinicalfmamba", spatial_dims=3, **SMALL)
    assert isinstance(net, ClinicalFMamba) and net.spatial_dims == 3
    assert "clinicalfmamba" in network_names()
    with pytest.raises(ValueError, match="no network named 'nothing', choose one of .*clinicalfmamba"):
        build_network("nothing")
    with pytest.raises(ValueError, match="'clinicalfmamba' is registered already"):
        register_network("clinicalfmamba")(nn.Identity)
    assert register_network("another")(nn.Identity) is nn.Identity
    assert network_names() == sorted(network_names()) and isinstance(build_network("another"), nn.Identity)


def test_import_needs_no_extras():
    """Neither the import nor a forward on a CPU loads the extras (MONAI itself loads itk where it is installed)."""
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['triton', 'mamba_ssm', 'selective_scan_cuda', 'itk']));"
        "import torch, custom_nets.nets as nets;"
        f"nets.ClinicalFMamba(2, **{SMALL!r}).eval()(torch.rand(1, 2, 16, 16))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    code = (
        "import sys, monai; before = set(sys.modules); import custom_nets.nets;"
        "print(*{'triton', 'mamba_ssm', 'itk', 'sklearn', 'ignite', 'matplotlib'} & (set(sys.modules) - before))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == ""

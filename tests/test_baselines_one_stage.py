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
"""SwinFusion, MRSCFusion, MACTFusion and MambaDFuse: blocks, networks, losses, and MRSCFusion's two stages."""

from __future__ import annotations

import sys
from pathlib import Path

import monai
import pytest
import torch
from monai.bundle import ConfigWorkflow
from monai.metrics import MultiScaleSSIMMetric
from monai.networks.nets.swin_unetr import SwinTransformerBlock

from custom_nets.blocks import (
    CrossWindowBlock,
    GradientResidualDenseBlock,
    MaxViTBlock,
    MultiSourceMamba,
    ResidualSwinBlock,
    SobelEdges,
    SwinLayer,
)
from custom_nets.nets import MRSCFusion, build_network
from custom_nets.ops import scan_orders
from scripts.baseline_losses import MACTFusionLoss, MRSCFusionLoss, ms_ssim
from scripts.checkpoints import load_parts
from scripts.gradients import sobel
from scripts.losses import ClinicalFMambaLoss
from scripts.phantom import write
from scripts.ssim import ssim

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIGS = Path(__file__).resolve().parents[1] / "bundles" / "clinicalfmamba_fusion" / "configs"
SMALL = {
    "swinfusion": {"dim": 12, "num_heads": 2, "window_size": 4},
    "mactfusion": {"num_heads": 2, "window_size": 4, "kernel_size": 3},
    "mambadfuse": {"dim": 8, "depth": 1, "state_dim": 4},
    "mrscfusion": {"channels": (8, 8, 12, 12), "num_heads": 2, "window_size": 4},
}
NAMES = sorted(SMALL)


def network(name, dims=2, seed=0, **kwargs):
    torch.manual_seed(seed)
    return build_network(name, spatial_dims=dims, **{**SMALL[name], **kwargs})


def images(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def count(*modules):
    return sum(p.numel() for module in modules for p in module.parameters())


def loss_of(name, net):
    if name == "mactfusion":
        return MACTFusionLoss()
    if name == "mrscfusion":
        return MRSCFusionLoss(net.encoder)
    return ClinicalFMambaLoss(2, 20, 100, 50, "magnitude")


class TestNetworks:
    @pytest.mark.parametrize("size", [(1, 1), (3, 5), (24, 20), (17, 31), (3, 5, 4), (8, 9, 11)])
    @pytest.mark.parametrize("name", NAMES)
    @torch.no_grad()
    def test_every_size_and_batch(self, name, size):
        net = network(name, len(size)).eval()
        x = images(3, 2, *size)
        fused = net(x)
        assert fused.shape == (3, 1, *size) and fused.dtype == x.dtype and fused.isfinite().all()
        torch.testing.assert_close(torch.cat([net(row) for row in x.split(1)]), fused, atol=1e-5, rtol=1e-4)

    @pytest.mark.parametrize("dims", [2, 3])
    @pytest.mark.parametrize("name", NAMES)
    @torch.no_grad()
    def test_both_images_matter(self, name, dims):
        net = network(name, dims).eval()
        x = images(1, 2, *[8] * dims)
        for channel in range(2):
            changed = x.clone()
            changed[:, channel] = images(*x[:, 0].shape, seed=1)
            assert (net(changed) - net(x)).abs().max() > 1e-4

    @pytest.mark.parametrize("dims", [2, 3])
    @pytest.mark.parametrize("name", NAMES)
    @torch.no_grad()
    def test_padding_repeats_the_border(self, name, dims):
        """An image that ends within a window is fused like one whose last row is repeated until the window ends."""
        net = network(name, dims).eval()
        x = images(1, 2, 5, *[8] * (dims - 1))
        longer = torch.cat([x, *[x[:, :, -1:]] * 3], dim=2)
        if name == "mambadfuse":  # which needs no windows: what follows in the scan does not reach back
            assert net.multiple == 1
        else:
            torch.testing.assert_close(net(longer)[:, :, :5], net(x))

    @pytest.mark.parametrize("dims", [2, 3])
    @pytest.mark.parametrize("name, stage", [(name, None) for name in NAMES] + [("mrscfusion", "autoencoder")])
    def test_every_trained_parameter_gets_a_gradient(self, name, stage, dims):
        """In float64 and far above rounding: a bias that a norm cancels gets 1e-12 and would pass for alive."""
        net = network(name, dims, **({"stage": stage} if stage else {})).double()
        x = images(2, 2, *([16, 20] if dims == 2 else [16, 8, 8])).double()
        fused = net(x, reconstruct=True) if stage == "autoencoder" else net(x)
        (fused * images(*fused.shape, seed=1)).sum().backward()
        trained = [(key, p) for key, p in net.named_parameters() if p.requires_grad]
        assert trained
        for key, parameter in trained:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), key
            assert parameter.grad.abs().max() > 1e-9, key

    # 2D, from baselines.md
    @pytest.mark.parametrize(
        "name, release, ours",
        [("swinfusion", 973_681, 955_471), ("mactfusion", 623_355, 631_337), ("mambadfuse", 1_347_271, 1_356_751)],
    )
    def test_parameters(self, name, release, ours):
        net = build_network(name, spatial_dims=2)
        assert count(net) == ours == pytest.approx(release, rel=0.02)
        assert f"{ours:,} parameters" in type(net).__doc__ and f"{release:,}" in type(net).__doc__

    def test_parameters_of_mrscfusion(self):
        net = MRSCFusion(2)
        assert count(net.encoder, net.decoder) == 2_732_761 == pytest.approx(2.73e6, rel=0.002)
        assert count(net.fusion) == 20_423_776 == pytest.approx(20.4e6, rel=0.002)

    @pytest.mark.parametrize("dims", [2, 3])
    @pytest.mark.parametrize("name", NAMES)
    def test_autocast(self, name, dims):
        net = network(name, dims)
        x = images(2, 2, *[16, 12, 8][:dims])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            fused = net(x)
        assert fused.dtype == torch.float32
        fused.square().mean().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters() if p.requires_grad)
        torch.testing.assert_close(fused, net(x), atol=0.05, rtol=0.05)

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
    @pytest.mark.parametrize("dims", [2, 3])
    @pytest.mark.parametrize("name", NAMES)
    @torch.no_grad()
    def test_cuda_equals_cpu(self, name, dims):
        net, x = network(name, dims).eval(), images(2, 2, *[16, 12, 8][:dims])
        expected = net(x)
        torch.testing.assert_close(net.cuda()(x.cuda()).cpu(), expected, atol=2e-3, rtol=0)

    @pytest.mark.parametrize("name", NAMES)
    def test_arguments_and_input_are_checked(self, name):
        with pytest.raises(ValueError, match="spatial_dims should be 2 or 3, got 1"):
            network(name, 1)
        net = network(name)
        for shape in ((2, 1, 16, 16), (2, 16, 16), (1, 2, 16, 16, 16)):
            with pytest.raises(ValueError, match="expected a batch of 2D images with 2 channels"):
                net(torch.rand(shape))

    def test_stages_are_checked(self):
        with pytest.raises(ValueError, match="stage should be one of"):
            MRSCFusion(2, stage="both")

    @torch.no_grad()
    def test_autoencoder_sees_one_image_at_a_time(self):
        net, x = network("mrscfusion").eval(), images(2, 2, 17, 24)
        both = net(x, reconstruct=True)
        assert both.shape == x.shape
        changed = x.clone()
        changed[:, 1] = 0
        assert torch.equal(net(changed, reconstruct=True)[:, 0], both[:, 0])
        torch.testing.assert_close(net(x.flip(1), reconstruct=True), both.flip(1))

    @pytest.mark.parametrize("name", NAMES)
    def test_training_lowers_the_loss(self, name):
        net = network(name)
        frozen = {key: p.clone() for key, p in net.named_parameters() if not p.requires_grad}
        assert bool(frozen) == (name == "mrscfusion")
        loss, optimizer = loss_of(name, net), torch.optim.Adam(net.parameters(), 2e-3)
        x = images(2, 2, 16, 12)
        values = []
        for _ in range(20):
            optimizer.zero_grad()
            values.append(loss(net(x), x))
            values[-1].backward()
            optimizer.step()
        assert values[-1] < 0.9 * values[0]
        for key, parameter in net.named_parameters():
            if key in frozen:
                assert torch.equal(parameter, frozen[key]) and parameter.grad is None, key


class TestBlocks:
    @pytest.mark.parametrize("dims", [2, 3])
    @torch.no_grad()
    def test_cross_window_block_with_itself_is_a_swin_block(self, dims):
        torch.manual_seed(0)
        ours = CrossWindowBlock(dims, 8, 2, 4, 2.0)
        torch.nn.init.normal_(ours.attention.relative_position_bias_table)
        monais = SwinTransformerBlock(8, 2, [4] * dims, [0] * dims, mlp_ratio=2.0)
        names = {"attention": "attn"}
        monais.load_state_dict(
            {".".join(names.get(i, i) for i in key.split(".")): value for key, value in ours.state_dict().items()}
        )
        x = images(2, *[8] * dims, 8)
        torch.testing.assert_close(ours(x, x), monais(x, None))

    @torch.no_grad()
    def test_cross_window_block_takes_values_from_the_context(self):
        block = CrossWindowBlock(2, 8, 2, 4, 2.0)
        x, context = images(1, 8, 8, 8), images(1, 8, 8, 8, seed=1)
        changed = context.clone()
        changed[:, 5, 5] = 1 - changed[:, 5, 5]  # in the last of four windows
        difference = (block(x, changed) - block(x, context)).abs().amax(dim=(0, 3))
        assert (difference[4:, 4:] > 0).all() and difference[:4].max() == difference[:, :4].max() == 0

    @torch.no_grad()
    def test_grid_attention_reaches_what_is_a_grid_step_away(self):
        torch.manual_seed(0)
        block = MaxViTBlock(2, 8, 2, window_size=4).eval()
        for part in (block.convolution, block.window):  # leave only the grid
            for parameter in part.parameters():
                parameter.zero_()
        x = images(1, 8, 12, 16)
        changed = x.clone()
        changed[0, :, 1, 2] += images(8)
        difference = (block(changed) - block(x)).abs().amax(dim=(0, 1))
        rows, columns = torch.nonzero(difference > 0).T
        assert set(rows.tolist()) == {1, 4, 7, 10} and set(columns.tolist()) == {2, 6, 10, 14}
        assert (difference > 0).sum() == 16

    @pytest.mark.parametrize("dims", [2, 3])
    @torch.no_grad()
    def test_swin_layer_shifts_every_second_window(self, dims):
        x = images(1, *[8] * dims, 8)
        changed = x.clone()
        changed[(0, *[3] * dims)] += images(8)
        reach = []
        for depth in (1, 2):
            torch.manual_seed(0)
            layer = SwinLayer(dims, 8, depth, 2, window_size=4, mlp_ratio=2.0)
            reach.append((layer(changed) - layer(x)).abs().amax(dim=-1)[0] > 0)
        assert reach[0].sum() == 4 ** dims and reach[0][(slice(4),) * dims].all()
        assert reach[1].sum() == 6 ** dims and reach[1][(slice(6),) * dims].all()

    @torch.no_grad()
    def test_residual_swin_block_of_any_size(self):
        block = ResidualSwinBlock(2, 8, 2, 2, window_size=4, mlp_ratio=2.0)
        assert block(images(2, 8, 3, 13)).shape == (2, 8, 3, 13)
        torch.nn.init.zeros_(block.conv.weight)
        torch.nn.init.zeros_(block.conv.bias)
        x = images(2, 8, 3, 13)
        assert torch.equal(block(x), x)

    @pytest.mark.parametrize("dims", [2, 3])
    def test_sobel_edges(self, dims):
        x = images(2, 3, *[9, 8, 7][:dims])
        inner = (slice(None), slice(None), *[slice(1, -1)] * dims)
        torch.testing.assert_close(SobelEdges(dims)(x)[inner], sobel(x).abs().sum(dim=2)[inner])
        assert not SobelEdges(dims).state_dict()

    @torch.no_grad()
    def test_gradient_residual_dense_block_adds_the_edges(self):
        block = GradientResidualDenseBlock(2, 4, 6)
        for layer in (block.project, block.project_edges):
            torch.nn.init.zeros_(layer.bias)
        torch.nn.init.zeros_(block.project.weight)
        x = images(1, 4, 8, 8)
        expected = torch.nn.functional.leaky_relu(block.project_edges(SobelEdges(2)(x)), 0.2)
        torch.testing.assert_close(block(x), expected)

    @torch.no_grad()
    def test_multi_source_mamba_adds_its_sources(self):
        mamba = MultiSourceMamba(8, 3, scan_orders("raster", 2), state_dim=4)
        sources = [images(2, 12, 8, seed=seed) for seed in range(3)]
        silent = [torch.zeros_like(i) for i in sources]
        # a source of zeros has a gate of zero
        alone = [mamba([s if i == j else silent[j] for j, s in enumerate(sources)], [3, 4]) for i in range(3)]
        torch.testing.assert_close(mamba(sources, [3, 4]), sum(alone))
        assert all(i.abs().max() > 1e-4 for i in alone) and mamba(silent, [3, 4]).abs().max() == 0


class TestLosses:
    @pytest.mark.parametrize("shape", [(2, 176, 181), (1, 176, 176, 12)])
    def test_ms_ssim_matches_monai(self, shape):
        if len(shape) == 4:  # a volume that is constant along an axis is like its slice
            x = images(shape[0], 3, *shape[1:3]).unsqueeze(-1).expand(-1, -1, -1, -1, shape[3])
        else:
            x = images(shape[0], 3, *shape[1:])
        fused, sources = x[:, :1] * 0.3 + x.mean(dim=1, keepdim=True), x[:, 1:]
        flat = [i[..., 0] if len(shape) == 4 else i for i in (fused, sources)]
        metric = MultiScaleSSIMMetric(spatial_dims=2, reduction="none")
        expected = torch.cat([metric(flat[0], flat[1][:, i : i + 1]) for i in range(2)], dim=1)
        torch.testing.assert_close(ms_ssim(fused, sources), expected, atol=1e-4, rtol=1e-4)

    def test_ms_ssim_of_few_scales(self):
        fused, sources = images(2, 1, 15, 21), images(2, 2, 15, 21, seed=1)
        fused = 0.5 * (fused + sources.mean(dim=1, keepdim=True))
        assert ssim(fused, sources).min() > 0.05
        torch.testing.assert_close(ms_ssim(fused, sources), ssim(fused, sources))
        copies = ms_ssim(fused, fused.expand(-1, 2, -1, -1))
        torch.testing.assert_close(copies, torch.ones(2, 2))

    def test_ms_ssim_turns_inverted_contrast(self):
        image = images(1, 1, 24, 24)
        fused = (1 - image).requires_grad_()
        assert ms_ssim(fused, image).item() < -0.5
        optimizer = torch.optim.Adam([fused], 0.05)
        for _ in range(40):
            optimizer.zero_grad()
            (1 - ms_ssim(fused, image)).sum().backward()
            optimizer.step()
        assert ms_ssim(fused, image).item() > 0.7

    @pytest.mark.parametrize("size", [(32, 24), (24, 24, 8)])
    def test_terms(self, size):
        """One source twice: fused as it is costs nothing; what differs is paid by each term."""
        dims = len(size)
        net = network("mrscfusion", dims)
        image = images(1, 1, *size)
        twice = torch.cat([image, image], dim=1)
        other = images(1, 1, *size, seed=1)
        distance = 1 - ms_ssim(other, twice).mean()
        edges = (sobel(other).abs().sum(2) - sobel(image).abs().sum(2)).abs().mean()
        expected = 10 * distance + 20 * (other - image).square().mean() + 10 * edges
        torch.testing.assert_close(MACTFusionLoss()(other, twice), expected)
        features = [net.encoder(i) for i in (other, image)]
        expected = distance + sum((a - b).abs().mean() for a, b in zip(*features)) + 10 * edges
        torch.testing.assert_close(MRSCFusionLoss(net.encoder)(other, twice), expected)
        for loss in (MACTFusionLoss(), MRSCFusionLoss(net.encoder)):
            assert abs(loss(image, twice).item()) < 1e-4

    def test_the_sharper_source_weighs_more(self):
        smooth = torch.linspace(0, 1, 24).expand(1, 1, 24, 24)
        sources = torch.cat([smooth, (smooth > 0.5).float()], dim=1)
        weights = MRSCFusionLoss.source_weights(sources)
        assert weights.sum() == pytest.approx(1) and weights[0, 1] > 0.6
        kernel = -torch.ones(1, 1, 3, 3)
        kernel[..., 1, 1] = 8
        padded = torch.nn.functional.pad(sources[:, 1:], [1] * 4, mode="replicate")
        energy = torch.nn.functional.conv2d(padded, kernel).square().mean()
        assert weights[0, 1].item() == pytest.approx(torch.sigmoid(energy).item(), abs=1e-3)
        volume = sources.unsqueeze(-1).expand(-1, -1, -1, -1, 5)
        torch.testing.assert_close(MRSCFusionLoss.source_weights(volume), weights)

    @pytest.mark.parametrize("loss", ["mactfusion", "mrscfusion"])
    def test_autocast_and_black_images(self, loss):
        net = network("mrscfusion")
        criterion = loss_of(loss, net)
        fused = torch.zeros(1, 1, 24, 24, requires_grad=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = criterion(fused, torch.zeros(1, 2, 24, 24))
        value.backward()
        assert value.dtype == torch.float32 and fused.grad.isfinite().all()
        assert all(p.grad is None for p in net.encoder.parameters())


class TestTwoStages:
    """MRSCFusion's autoencoder, then its fusion blocks, as users run them."""

    NETWORK = {"network_def#channels": [8, 8, 12, 12], "network_def#num_heads": 2, "network_def#window_size": 4}
    SHARED = {**NETWORK, "device": "cpu", "num_workers": 0, "bundle_root": str(CONFIGS.parent)}
    TRAIN = {**SHARED, "max_epochs": 1, "val_interval": 1, "crop_size": [24, 24]}

    @pytest.fixture(autouse=True)
    def untouched_process(self, monkeypatch):
        """Workflows in this process change what the other tests should find as it was."""
        monkeypatch.setattr(sys, "path", list(sys.path))
        monkeypatch.setattr(sys, "excepthook", sys.excepthook)
        yield
        monai.utils.set_determinism(seed=None)

    @staticmethod
    def run(*configs, kind="train", **overrides):
        files = [str(CONFIGS / f"{name}.json") for name in configs]
        flow = ConfigWorkflow(files, logging_file=False, workflow_type=kind, **overrides)
        flow.initialize()
        flow.run()
        flow.finalize()
        return flow

    @pytest.mark.parametrize("volume", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["2d", "3d"])
    def test_chain(self, tmp_path, volume):
        kind = ("volumes", (24, 20, 16)) if volume else ("slices", (32, 28))
        write(str(tmp_path / "data"), kind=kind[0], subjects=3, shape=kind[1])
        base = ["volume"] if volume else []
        shared = {**self.SHARED, "dataset_dir": str(tmp_path / "data")}
        train = {**self.TRAIN, "dataset_dir": str(tmp_path / "data")}
        if volume:
            train |= {"crop_size": [16, 16, 8], "batch_size": 1}
        one, two = tmp_path / "one", tmp_path / "two"
        flow = self.run("train", *base, "baselines/mrscfusion_autoencoder", output_dir=str(one), **train)
        assert flow.check_properties() == []
        flow = self.run(
            "train",
            *base,
            "baselines/mrscfusion",
            output_dir=str(two),
            autoencoder_checkpoint=str(one / "model.pt"),
            **train,
        )
        first, second = (torch.load(folder / "model.pt", weights_only=True) for folder in (one, two))
        assert first.keys() == second.keys()
        for key, _ in flow.network_def.named_parameters():
            assert torch.equal(first[key], second[key]) != key.startswith("fusion."), key

        checkpoint = {"checkpoint": str(two / "model.pt")}
        self.run("train", *base, "evaluate", "baselines/mrscfusion", output_dir=str(two), **shared, **checkpoint)
        assert (two / "metrics.csv").is_file()
        self.run(
            "inference", *base, "baselines/mrscfusion", kind="infer", output_dir=str(two / "f"), **shared, **checkpoint
        )
        assert list((two / "f").rglob("*_fused.*"))

    def test_no_autoencoder(self, tmp_path):
        write(str(tmp_path / "data"), kind="slices", subjects=3, shape=(32, 32))
        overrides = {**self.TRAIN, "dataset_dir": str(tmp_path / "data"), "output_dir": str(tmp_path / "out")}
        missing = str(tmp_path / "no.pt")
        with pytest.raises(RuntimeError) as error:
            self.run("train", "baselines/mrscfusion", autoencoder_checkpoint=missing, **overrides)
        cause = error.value
        while cause.__cause__ is not None:
            cause = cause.__cause__
        assert isinstance(cause, FileNotFoundError) and missing in str(cause)
        assert not (tmp_path / "out").exists()

    def test_other_weights(self, tmp_path):
        net, path = network("mrscfusion"), tmp_path / "model.pt"
        torch.save(network("swinfusion").state_dict(), path)
        with pytest.raises(ValueError, match=f"{path} does not hold the weights of encoder of MRSCFusion"):
            load_parts(net, path, ["encoder"])
        torch.save(network("mrscfusion", channels=(8, 8, 8, 8)).state_dict(), path)
        with pytest.raises(ValueError, match="does not hold the weights of encoder"):
            load_parts(net, path, ["encoder"])
        other = network("mrscfusion", seed=1)
        torch.save(other.state_dict(), path)
        before = net.fusion[0].swin_merge.weight.clone()
        assert load_parts(net, path, ["encoder", "decoder"]) is net
        assert torch.equal(net.decoder.head.weight, other.decoder.head.weight)
        assert torch.equal(net.fusion[0].swin_merge.weight, before)

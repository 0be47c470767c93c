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

"""MSRPAN, MSDRA and EH-DRAN, average and maximum: blocks, networks, loss, and every config of a system to compare
with."""

from __future__ import annotations

import copy
import io
import json
import sys
from pathlib import Path

import monai
import numpy as np
import pytest
import torch
import torch.nn as nn
from monai.bundle import ConfigWorkflow
from PIL import Image

from custom_nets.blocks import ResidualPyramidAttention, double, halve, pooled_gate, shared_batch_norms
from custom_nets.nets import TwoStageNetwork, build_network, network_names
from custom_nets.ops import rule_names
from scripts.inferers import FusionInferer, ReconstructionInferer
from scripts.phantom import digital_brain, write
from scripts.reconstruction_losses import EHDRANLoss

pytestmark = pytest.mark.usefixtures("one_thread")

BUNDLE = Path(__file__).resolve().parents[1] / "bundles" / "clinicalfmamba_fusion"
CONFIGS = BUNDLE / "configs"
# MRSCFusion is trained in two runs, the second from the weights of the first: test_baselines_one_stage does that
SYSTEMS = sorted(p.stem for p in (CONFIGS / "baselines").glob("*.json") if not p.stem.startswith("mrscfusion"))

AUTOENCODERS = ["ehdran", "msdra", "msrpan"]
RULES = {"average": lambda x: x.mean(1, keepdim=True), "maximum": lambda x: x.amax(1, keepdim=True)}
SIZES = [(16, 16), (17, 23), (5, 3), (1, 1), (8, 9, 7), (1, 2, 1)]
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def network(name, dims=2, seed=0, **kwargs):
    torch.manual_seed(seed)
    return build_network(name, spatial_dims=dims, **({"channels": 8} | kwargs if name in AUTOENCODERS else kwargs))


def images(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


class TestNetworks:
    def test_they_are_registered(self):
        assert {*AUTOENCODERS, *RULES} <= set(network_names())

    @pytest.mark.parametrize("batch", [1, 3])
    @pytest.mark.parametrize("size", SIZES)
    @pytest.mark.parametrize("name", [*AUTOENCODERS, *RULES])
    @torch.no_grad()
    def test_every_size_is_kept(self, name, size, batch):
        net, x = network(name, len(size)).eval(), images(batch, 2, *size)
        fused = net(x)
        assert fused.shape == (batch, 1, *size) and fused.isfinite().all()
        torch.testing.assert_close(fused, torch.cat([net(row) for row in x.split(1)]), rtol=1e-4, atol=1e-5)
        if name in AUTOENCODERS:
            assert net(x, reconstruct=True).shape == x.shape

    @pytest.mark.parametrize("dims", [2, 3])
    @pytest.mark.parametrize("name", RULES)
    def test_rules_of_pixels(self, name, dims):
        net, x = network(name, dims), images(2, 2, *[9] * dims)
        assert torch.equal(net(x), RULES[name](x)) and not net.state_dict()

    # measured on the releases (baselines.md); what differs are biases that a batch norm cancels
    @pytest.mark.parametrize(
        "name, dims, expected",
        [
            ("msrpan", 2, 96_769),
            ("msdra", 2, 199_489 - 2 * 64),
            ("ehdran", 2, 414_209 - 4 * 64),
            ("ehdran", 3, 1_522_721),
        ],
    )
    def test_parameters(self, name, dims, expected):
        net = build_network(name, spatial_dims=dims)
        assert sum(p.numel() for p in net.parameters()) == expected
        assert f"{expected:,}" in type(net).__doc__

    @pytest.mark.parametrize("size", [(18, 13), (9, 7, 10)])
    @pytest.mark.parametrize("name", AUTOENCODERS)
    def test_every_parameter_gets_a_gradient(self, name, size):
        """In float64 and far above rounding: a bias that a batch norm cancels gets 1e-12 and would pass for alive."""
        net = network(name, len(size)).double()
        x = images(2, 2, *size).double()
        (net(x, reconstruct=True) * images(*x.shape, seed=1)).sum().backward()
        for key, parameter in net.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().max() > 1e-6, key

    @pytest.mark.parametrize("dims", [2, 3])
    @pytest.mark.parametrize("name", AUTOENCODERS)
    @torch.no_grad()
    def test_images_are_reconstructed_alone(self, name, dims):
        net, x = network(name, dims).eval(), images(2, 2, *[10] * dims)
        other = x.clone()
        other[:, 1] = images(*x[:, 1].shape, seed=1)
        before, after = net(x, reconstruct=True), net(other, reconstruct=True)
        torch.testing.assert_close(after[:, 0], before[:, 0])
        assert (after[:, 1] - before[:, 1]).abs().max() > 1e-3
        # the same autoencoder for both
        torch.testing.assert_close(net(x.flip(1), reconstruct=True), before.flip(1))

    @pytest.mark.parametrize("dims", [2, 3])
    @pytest.mark.parametrize("rule", rule_names())
    @pytest.mark.parametrize("name", AUTOENCODERS)
    @torch.no_grad()
    def test_every_rule_fits_every_network(self, name, rule, dims):
        net, x = network(name, dims, rule=rule).eval(), images(1, 2, *[10] * dims)
        fused = net(x)
        torch.testing.assert_close(net(x.flip(1)), fused, rtol=1e-4, atol=1e-5)
        # an image fused with itself is its reconstruction, where a rule's weights add up to one
        if rule not in ("addition", "l1nw", "al1nw"):
            x[:, 1] = x[:, 0]
            torch.testing.assert_close(net(x)[:, 0], net(x, reconstruct=True)[:, 0], rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("dims", [2, 3])
    @pytest.mark.parametrize("name", AUTOENCODERS)
    @pytest.mark.parametrize("device", DEVICES)
    def test_autocast(self, name, dims, device):
        net, x = network(name, dims).to(device), images(2, 2, *[24] * dims).to(device)
        with torch.autocast(device, dtype=torch.bfloat16):
            loss = (net(x, reconstruct=True) - x).square().mean()
        loss.backward()
        assert all(p.grad.isfinite().all() for p in net.parameters())
        net.eval()
        with torch.no_grad(), torch.autocast(device, dtype=torch.bfloat16):
            fused = net(x)
        assert fused.dtype == torch.float32
        torch.testing.assert_close(fused, net(x), atol=5e-2, rtol=5e-2)

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
    @pytest.mark.parametrize("dims", [2, 3])
    @pytest.mark.parametrize("name", AUTOENCODERS)
    @torch.no_grad()
    def test_cuda_equals_cpu(self, name, dims):
        net, x = network(name, dims).eval(), images(2, 2, *[19] * dims)
        expected = net(x)
        torch.testing.assert_close(net.cuda()(x.cuda()).cpu(), expected, atol=2e-3, rtol=1e-2)

    @pytest.mark.parametrize("name", AUTOENCODERS)
    def test_weights_survive_a_file(self, name):
        """Also those that several batch norms share, which a copy must go on sharing."""
        net, other = network(name), network(name, seed=1)
        buffer = io.BytesIO()
        torch.save(net.state_dict(), buffer)
        buffer.seek(0)
        other.load_state_dict(torch.load(buffer, weights_only=True))
        x = images(1, 2, 12, 12)
        torch.testing.assert_close(other.eval()(x), net.eval()(x))
        for twin in (copy.deepcopy(net), nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(net))):
            assert len(list(twin.parameters())) == len(list(net.parameters()))

    @pytest.mark.parametrize("name", [*AUTOENCODERS, *RULES])
    def test_arguments_and_input_are_checked(self, name):
        with pytest.raises(ValueError, match="spatial_dims should be 2 or 3, got 1"):
            build_network(name, spatial_dims=1)
        with pytest.raises(ValueError, match="expected a batch of 2D images with 2 channels"):
            network(name)(images(1, 1, 16, 16))

    @pytest.mark.parametrize("name", AUTOENCODERS)
    def test_unknown_rule(self, name):
        with pytest.raises(ValueError, match="no fusion rule named 'median'"):
            network(name, rule="median")

    @pytest.mark.parametrize("name", AUTOENCODERS)
    def test_learns_to_reconstruct(self, name):
        """And does in evaluation what it was trained to: MSDRA with one batch norm for all its uses does not."""
        brain = digital_brain((32, 32), seed=1)
        x = torch.stack([torch.as_tensor(brain[i]) for i in ("mri", "ct")])[None]
        net = network(name).train()
        optimizer = torch.optim.Adam(net.parameters(), 1e-2)
        losses = []
        for _ in range(50):
            loss = (net(x, reconstruct=True) - x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        with torch.no_grad():
            error = (net.eval()(x, reconstruct=True) - x).square().mean().item()
        assert losses[-1] < 0.1 * losses[0] and error < 0.25 * x.var().item()


class TestBlocks:
    def test_gate_by_hand(self):
        x = torch.tensor([[1.0, 3.0, -4.0], [2.0, 2.0, -2.0], [5.0, 7.0, 9.0]])[None, None]
        gate = torch.tensor([[2.0, 2.0, 0.0], [2.0, 2.0, 0.0], [6.0, 6.0, 9.0]])[None, None]
        features = images(1, 4, 3, 3)
        torch.testing.assert_close(pooled_gate(x, features), gate * features + x)

    @pytest.mark.parametrize("length", [1, 2, 3, 5, 6, 7, 97, 255, 1001])
    def test_up_repeats_each_cell_twice(self, length):
        x = images(1, 1, 1, length)
        assert torch.equal(double(halve(x), x), halve(x).repeat_interleave(2, dim=-1)[..., :length])

    @pytest.mark.parametrize("gated", [True, False])
    @pytest.mark.parametrize("dims", [2, 3])
    def test_pyramid_uses_one_convolution(self, dims, gated):
        block, x = ResidualPyramidAttention(dims, 3, gated), images(1, 3, *[6] * dims)
        once = block.conv(x)
        pyramid = once + block.conv(once) + block.conv(block.conv(once))
        expected = pooled_gate(x, pyramid) if gated else pyramid + x
        torch.testing.assert_close(block(x), expected)

    def test_norms_share_all_but_statistics(self):
        norms = shared_batch_norms(2, 4, uses=3)
        assert len(list(norms.parameters())) == 2
        norms[0](images(2, 4, 5, 5))
        assert norms[0].running_mean.abs().min() > 0 and not norms[1].running_mean.any()

    def test_edges_start_as_sobel(self):
        edge = network("ehdran", channels=2).encoder.edge
        x = torch.arange(5.0).expand(1, 2, 5, 5)
        assert (edge.sobel_x(x)[..., 1:-1, 1:-1] == 8).all() and not edge.sobel_y(x)[..., 1:-1, :].any()
        assert (edge.sobel_y(x.mT)[..., 1:-1, 1:-1] == 8).all()

    def test_a_new_network_is_an_encoder_and_a_decoder(self):
        class Halves(TwoStageNetwork):
            def encode(self, images):
                return images / 2

            def decode(self, features):
                return features * 2 + 0.1

        x = images(2, 2, 7, 5)
        net = Halves(2, "maximum", multiple=4)
        torch.testing.assert_close(net(x), x.amax(1, keepdim=True) + 0.1)
        torch.testing.assert_close(net(x, reconstruct=True), x + 0.1)


class TestLoss:
    @pytest.mark.parametrize("size", [(8, 10), (8, 10, 6)])
    def test_terms(self, size):
        """A ramp of slope 0.1 along one axis: eight times that is the classic Sobel operator's answer."""
        target = torch.zeros(1, 2, *size)
        ramp = 0.1 * torch.arange(float(size[0])).reshape(-1, *[1] * (len(size) - 1)).expand(1, 2, *size)
        edges = torch.full((size[0],), 0.8)
        edges[[0, -1]] = 0.4  # replicated borders
        expected = ramp.square().mean() + 0.2 * edges.square().mean()
        torch.testing.assert_close(EHDRANLoss()(ramp, target), expected)
        torch.testing.assert_close(EHDRANLoss(0)(ramp, target), ramp.square().mean())

    def test_flat_images_have_a_gradient(self):
        flat = torch.zeros(1, 2, 8, 8, requires_grad=True)
        EHDRANLoss()(flat, torch.ones(1, 2, 8, 8)).backward()
        assert flat.grad.isfinite().all() and flat.grad.any()

    def test_autocast(self):
        x, y = images(1, 2, 16, 16), images(1, 2, 16, 16, seed=1)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = EHDRANLoss()(x.bfloat16(), y.bfloat16())
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, EHDRANLoss()(x, y), rtol=1e-2, atol=1e-3)

    def test_shapes(self):
        with pytest.raises(ValueError, match="of the images' shape"):
            EHDRANLoss()(torch.zeros(1, 1, 8, 8), torch.zeros(1, 2, 8, 8))


class TestInferers:
    def test_reconstruction(self):
        net, x = network("msrpan").eval(), images(1, 2, 9, 9)
        assert torch.equal(ReconstructionInferer()(x, net), net(x, reconstruct=True))

    def test_fused_images_stay_in_range(self):
        x = torch.tensor([[-0.5, 0.5, 1.5]]).reshape(1, 1, 1, 3)
        fused = FusionInferer(roi_size=8, max_voxels=100)(x, lambda x: x)
        assert fused.flatten().tolist() == [0, 0.5, 1]


class TestConfigs:
    """Every system: one epoch, then evaluation and fusion with what it wrote, by `configs/baselines/NAME.json`."""

    COMMON = {"bundle_root": str(BUNDLE), "device": "cpu", "num_workers": 0}

    @pytest.fixture(autouse=True)
    def untouched_process(self, monkeypatch):
        """What workflows change in it."""
        monkeypatch.setattr(sys, "path", list(sys.path))
        monkeypatch.setattr(sys, "excepthook", sys.excepthook)
        yield
        monai.utils.set_determinism(seed=None)

    @pytest.fixture(scope="class")
    def data(self, tmp_path_factory):
        """Generated slices and volumes, with data lists: two pairs to train on, one to validate, one to test."""
        data = {}
        for dims, kind, count, shape in ((2, "slices", 2, (32, 24)), (3, "volumes", 4, (12, 14, 13))):
            folder = tmp_path_factory.mktemp(kind)
            write(str(folder), kind=kind, subjects=count, shape=shape)
            firsts = sorted(folder.glob("MRI-CT/MRI/*" if dims == 2 else "*/*_t2*"))
            seconds = sorted(folder.glob("MRI-CT/CT/*" if dims == 2 else "*/*_flair*"))
            pairs = [{"image": [str(i.relative_to(folder)) for i in pair]} for pair in zip(firsts, seconds)]
            lists = {"training": pairs[:2], "validation": pairs[2:3], "test": pairs[3:4]}
            (folder / "pairs.json").write_text(json.dumps(lists))
            data[dims] = {"dataset_dir": str(folder), "datalist": str(folder / "pairs.json")}
        return data

    def run(self, *configs, kind="train", **overrides):
        files = [str(CONFIGS / f"{name}.json") for name in configs]
        flow = ConfigWorkflow(files, logging_file=False, workflow_type=kind, **self.COMMON, **overrides)
        flow.initialize()
        flow.run()
        flow.finalize()
        return flow

    @pytest.mark.parametrize("dims", [2, 3])
    @pytest.mark.parametrize("name", SYSTEMS)
    def test_train_evaluate_infer(self, data, tmp_path, name, dims):
        configs = [f"baselines/{name}", *(["volume"] if dims == 3 else [])]
        checkpoint = {}
        if name not in RULES:
            crop_size = [16, 16] if dims == 2 else [12, 12, 12]
            small = {"crop_size": crop_size, "batch_size": 2, "max_epochs": 1, "val_interval": 1}
            flow = self.run("train", *configs, output_dir=str(tmp_path / "run"), **small, **data[dims])
            assert flow.check_properties() == []
            assert np.isfinite(flow.parser.get_parsed_content("train#trainer").state.output[0]["loss"])
            checkpoint = {"checkpoint": str(tmp_path / "run" / "model.pt")}

        self.run("train", "evaluate", *configs, output_dir=str(tmp_path / "scores"), **checkpoint, **data[dims])
        (case,) = json.loads((tmp_path / "scores" / "metrics.json").read_text())["cases"]
        assert -1 <= case["ssim"] <= 1 and case["psnr"] > 0

        settings = {"output_dir": str(tmp_path / "fused"), "split": "test", **checkpoint, **data[dims]}
        self.run("inference", *configs, kind="infer", **settings)
        (fused,) = (tmp_path / "fused").rglob("*_fused.*")
        assert fused.suffix == {2: ".png", 3: ".gz"}[dims]

    @pytest.mark.parametrize("name", RULES)
    def test_rules_fuse_pixels(self, data, tmp_path, name):
        settings = {"output_dir": str(tmp_path), "split": "test", **data[2]}
        self.run("inference", f"baselines/{name}", kind="infer", **settings)
        (fused,) = tmp_path.rglob("*_fused.png")
        pair = json.loads(Path(data[2]["datalist"]).read_text())["test"][0]["image"]
        sources = np.stack([np.asarray(Image.open(Path(data[2]["dataset_dir"]) / i), float) for i in pair])
        low, high = (f(sources, axis=(1, 2), keepdims=True) for f in (np.min, np.max))
        expected = RULES[name](torch.as_tensor((sources - low) / (high - low))[None])[0, 0].numpy() * 255
        assert np.abs(np.asarray(Image.open(fused), float) - expected).max() <= 1

    @pytest.mark.parametrize("run_id", ["run", "training"])
    @pytest.mark.parametrize("name", RULES)
    def test_what_has_no_weights_is_not_trained(self, tmp_path, name, run_id):
        """Said before any data are looked for."""
        files = [str(CONFIGS / f"{part}.json") for part in ("train", f"baselines/{name}")]
        overrides = {"dataset_dir": str(tmp_path / "nowhere"), "output_dir": str(tmp_path), **self.COMMON}
        flow = ConfigWorkflow(files, logging_file=False, workflow_type="train", run_id=run_id, **overrides)
        flow.initialize()
        with pytest.raises(RuntimeError) as error:
            flow.run()
        cause = error.value
        while cause.__cause__ is not None:
            cause = cause.__cause__
        assert str(cause).startswith(f"'{name}' has no weights")

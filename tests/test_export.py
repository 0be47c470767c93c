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

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import monai
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser

from custom_nets.blocks import MambaBlock
from custom_nets.nets import build_network
from custom_nets.ops import scan_orders
from scripts.export import TOLERANCE, export_network
from scripts.phantom import write

ROOT = Path(__file__).resolve().parents[1]
FUSION, GRADING = (ROOT / "bundles" / name for name in ("clinicalfmamba_fusion", "glioma_grading"))
SMALL = {"channels": [8, 8, 16], "latent_depth": 1}
RUN_ONNX = """
import sys, numpy, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
for image, result in zip(sys.argv[2::2], sys.argv[3::2]):
    numpy.save(result, session.run(None, {session.get_inputs()[0].name: numpy.load(image)})[0])
assert not {"torch", "monai", "custom_nets"} & sys.modules.keys()
"""

needs_compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="AOTInductor needs a C++ compiler, CXX or g++"
)
quiet = pytest.mark.filterwarnings("ignore:.*dynamic_axes")


def run_alone(path, images, folder):
    """What a process gives that imports ONNX Runtime and NumPy only; without `site`, no editable install is seen."""
    files = []
    for i, image in enumerate(images):
        files += [str(folder / f"image{i}.npy"), str(folder / f"result{i}.npy")]
        np.save(files[-2], image.numpy())
    environment = os.environ | {"PYTHONPATH": sysconfig.get_path("purelib")}
    subprocess.run([sys.executable, "-S", "-P", "-c", RUN_ONNX, str(path), *files], check=True, env=environment)
    return [torch.from_numpy(np.load(file)) for file in files[1::2]]


def assert_equal_alone(path, network, shapes, folder):
    images = [torch.rand(shape) for shape in shapes]
    for image, result in zip(images, run_alone(path, images, folder)):
        with torch.inference_mode():
            torch.testing.assert_close(result, network(image), atol=TOLERANCE, rtol=0)


def shipped(volume):
    configs = ["inference", "volume"] if volume else ["inference"]
    parser = ConfigParser()
    parser.read_config([str(FUSION / "configs" / f"{name}.json") for name in configs])
    # in float32, which exported networks compute in, also where this machine fuses in bfloat16
    parser.update({"bundle_root": str(FUSION), "device": "cpu", "num_workers": 0, "amp": False})
    network = parser.get_parsed_content("network").eval()
    network.load_state_dict(torch.load(parser.get_parsed_content("checkpoint"), weights_only=True))
    return parser, network


class Tokens(torch.nn.Module):
    """A Mamba block in all directions of a plane."""

    def __init__(self):
        super().__init__()
        self.block = MambaBlock(4, scan_orders("cross", 2), state_dim=3)

    def forward(self, x):
        return self.block(x.flatten(2).transpose(1, 2), list(x.shape[2:]))


@torch.no_grad()
def test_scan_of_any_length_is_one_node(tmp_path):
    onnx = pytest.importorskip("onnx")
    torch.manual_seed(0)
    module, sizes = Tokens().eval(), dict.fromkeys([0, 2, 3], torch.export.Dim.DYNAMIC)
    example = (torch.rand(2, 4, 5, 7),)
    torch.onnx.export(module, example, dynamo=True, dynamic_shapes=(sizes,), verbose=False).save(tmp_path / "m.onnx")
    assert [node.op_type for node in onnx.load(tmp_path / "m.onnx").graph.node].count("Scan") == 1
    assert_equal_alone(tmp_path / "m.onnx", module, [(1, 4, 9, 6), (3, 4, 2, 50)], tmp_path)


def small_network():
    torch.manual_seed(0)
    stages = {"channels": [8, 8], "strides": [1, 2], "dilations": [1, 3], "latent_depth": 1, "cross_mamba": False}
    return build_network("clinicalfmamba", spatial_dims=3, **stages)


@pytest.mark.slow
def test_onnx_of_any_size(tmp_path):
    network = small_network()
    assert export_network(network, tmp_path, "onnx") == tmp_path / "model.onnx"
    assert_equal_alone(tmp_path / "model.onnx", network, [(1, 2, 7, 10, 3), (2, 2, 8, 4, 9)], tmp_path)


def test_program_without_the_package(tmp_path):
    path = export_network(small_network(), tmp_path, "pt2")
    code = "import sys, torch; torch.export.load(sys.argv[1]).module()(torch.rand(1, 2, 9, 8, 7))"
    environment = os.environ | {"PYTHONPATH": sysconfig.get_path("purelib")}
    subprocess.run([sys.executable, "-S", "-P", "-c", code, str(path)], check=True, env=environment)


def test_unequal_file_is_not_kept(tmp_path, monkeypatch):
    network = build_network("clinicalfmamba", spatial_dims=3, **SMALL)
    wrong = (lambda network, path: path.touch(), lambda path: lambda image: network(image) + 0.01)
    monkeypatch.setitem(sys.modules["scripts.export"].FORMATS, "pt2", wrong)
    with pytest.raises(RuntimeError, match="differs by 0.01 from the original.*was not written"):
        export_network(network, tmp_path, "pt2")
    assert not any(tmp_path.iterdir())
    with pytest.raises(ValueError, match="export_format 'trt' is not known, choose one of onnx, pt2, aoti"):
        export_network(network, tmp_path, "trt")


@pytest.mark.slow
@torch.no_grad()
def test_program_with_own_operators():
    """What `torch.export` gives by itself: one operator for each convolution and scan, for a single image too."""
    network = build_network("clinicalfmamba", spatial_dims=2, **SMALL).eval()
    sizes = dict.fromkeys([0, 2, 3], torch.export.Dim.DYNAMIC)
    program = torch.export.export(network, (torch.rand(2, 2, 23, 19),), dynamic_shapes=(sizes,)).module()
    for shape in ((1, 2, 32, 40), (3, 2, 33, 16)):
        image = torch.rand(shape)
        torch.testing.assert_close(program(image), network(image), atol=1e-5, rtol=1e-4)


@pytest.mark.slow
@needs_compiler
def test_aot_inductor(tmp_path):
    export_network(build_network("clinicalfmamba", spatial_dims=3, **SMALL), tmp_path, "aoti")


@pytest.mark.slow
@pytest.mark.parametrize("volume", [False, True], ids=["2d", "3d"])
def test_shipped_weights(volume, tmp_path):
    """A case fused by ONNX Runtime alone equals what the bundle's inferer gives wherever a source shows anything."""
    shape = (48, 56, 40) if volume else (120, 100)
    write(str(tmp_path / "data"), kind="volumes" if volume else "slices", subjects=1, shape=shape)
    parser, network = shipped(volume)
    parser["dataset_dir"] = str(tmp_path / "data" if volume else tmp_path / "data" / "MRI-CT")
    parser["output_dir"] = str(tmp_path / "fused")
    image = torch.as_tensor(parser.get_parsed_content("dataset")[0]["image"])[None]
    with torch.inference_mode():
        fused = parser.get_parsed_content("inferer")(image, network)
    path = export_network(network, tmp_path, "onnx")
    alone = run_alone(path, [image], tmp_path)[0] * (image > 0).any(1, keepdim=True)
    torch.testing.assert_close(alone, fused, atol=TOLERANCE, rtol=0)


def monai_export(bundle, folder, overrides, **arguments):
    """By MONAI's own command, to any number of images of any size."""
    parser = ConfigParser()
    parser.read_config(str(bundle / "configs" / "train.json"))
    for key, value in overrides.items():
        parser[key] = value
    network = parser.get_parsed_content("network_def").eval()
    torch.save(network.state_dict(), folder / "model.pt")
    axes = {"image": {0: "batch", 2: "height", 3: "width"}}
    monai.bundle.onnx_export(
        "network_def",
        str(folder / "model.onnx"),
        ckpt_file=str(folder / "model.pt"),
        meta_file=str(bundle / "configs" / "metadata.json"),
        config_file=str(bundle / "configs" / "train.json"),
        key_in_ckpt="",
        converter_kwargs={"input_names": ["image"], "output_names": ["pred"], "dynamic_axes": axes},
        **arguments,
        **overrides,
    )
    return network


@quiet
def test_monai_onnx_export_grading(tmp_path):
    network = monai_export(GRADING, tmp_path, {"network_def#block_inplanes": [8, 16, 32, 64]})
    channels = next(network.parameters()).shape[1]
    assert_equal_alone(tmp_path / "model.onnx", network, [(1, channels, 64, 64), (3, channels, 50, 71)], tmp_path)


@quiet
@pytest.mark.slow
def test_monai_onnx_export_fusion(tmp_path):
    overrides = {f"network_def#{key}": value for key, value in SMALL.items()}
    network = monai_export(FUSION, tmp_path, overrides, input_shape=[2, 2, 23, 19])
    assert_equal_alone(tmp_path / "model.onnx", network, [(1, 2, 32, 40), (3, 2, 33, 16)], tmp_path)

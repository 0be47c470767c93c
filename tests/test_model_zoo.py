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

"""What the Model Zoo checks of a bundle, for both of them and without network."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import monai
import pytest
import torch
from monai.bundle import ConfigParser

ROOT = Path(__file__).resolve().parents[1]
BUNDLES = [ROOT / "bundles" / name for name in ("clinicalfmamba_fusion", "glioma_grading")]
SCHEMA = Path(__file__).parent / "metadata_schema.json"

each_bundle = pytest.mark.parametrize("bundle", BUNDLES, ids=lambda path: path.name)


def read_metadata(bundle):
    return json.loads((bundle / "configs" / "metadata.json").read_text())


@each_bundle
def test_verify_metadata(bundle):
    """Against requirements written for these tests: the schema that the metadata name is only to be downloaded."""
    # MONAI takes the file that is there instead
    monai.bundle.verify_metadata(str(bundle / "configs" / "metadata.json"), filepath=str(SCHEMA))
    meta = read_metadata(bundle)
    assert list(meta["changelog"])[0] == meta["version"], "the newest version comes first"
    formats = {key: value for key, value in meta.items() if key.endswith("_data_format")}
    assert list(formats) == ["network_data_format", "volume_data_format"]
    for tensors in (group for form in formats.values() for group in (form["inputs"], form["outputs"])):
        for tensor in tensors.values():
            assert [int(key) for key in tensor["channel_def"]] == list(range(tensor["num_channels"]))


@pytest.mark.parametrize(
    "changes",
    [
        {"-copyright": None},
        {"version": "1"},
        {"references": ["a paper", 1]},
        {"optional_packages_version": {}},
        {"required_packages_version#torch": 2},
        {"eval_metrics": {"mean_ssim": "0.7"}},
        {"-volume_data_format#outputs": None},
        {"network_data_format#inputs#image#num_channels": 0},
        {"network_data_format#inputs#image#channel_def": ["MRI", "CT"]},
        {"-network_data_format#outputs#pred#dtype": None},
    ],
    ids=str,
)
def test_verify_metadata_finds_mistakes(changes, tmp_path):
    parser = ConfigParser(read_metadata(BUNDLES[0]))
    for key, value in changes.items():
        if key.startswith("-"):
            parent, _, name = key[1:].rpartition("#")
            del parser[parent][name]
        else:
            parser[key] = value
    (tmp_path / "metadata.json").write_text(json.dumps(parser.config))
    with pytest.raises(ValueError, match="Failed validating against schema"):
        monai.bundle.verify_metadata(str(tmp_path / "metadata.json"), filepath=str(SCHEMA))


@each_bundle
def test_no_package_that_needs_a_gpu_to_install(bundle):
    """The Model Zoo's checks on a CPU install all that the metadata names."""
    assert (
        not {"mamba-ssm", "mamba_ssm", "causal-conv1d", "triton"}
        & read_metadata(bundle)["required_packages_version"].keys()
    )


@each_bundle
@pytest.mark.parametrize("volume", [False, True], ids=["2d", "3d"])
@torch.inference_mode()
def test_ckpt_export(bundle, volume, tmp_path):
    """The file has the checkpoint's weights, and computes the same as the network at sizes that are not multiples."""
    configs = [str(bundle / "configs" / f"{name}.json") for name in (["train", "volume"] if volume else ["train"])]
    parser = ConfigParser()
    parser.read_config(configs)
    network = parser.get_parsed_content("network_def").eval()
    torch.save(network.state_dict(), tmp_path / "model.pt")
    monai.bundle.ckpt_export(
        "network_def",
        str(tmp_path / "model.ts"),
        ckpt_file=str(tmp_path / "model.pt"),
        meta_file=str(bundle / "configs" / "metadata.json"),
        config_file=configs,
        key_in_ckpt="",
    )
    channels = read_metadata(bundle)["network_data_format"]["inputs"]["image"]["num_channels"]
    image = torch.rand(2, channels, *([33, 40, 17] if volume else [33, 40]))
    torch.testing.assert_close(torch.jit.load(tmp_path / "model.ts")(image), network(image), atol=1e-4, rtol=1e-4)


CREATE = """
import sys
from monai.bundle import create_workflow

root, part = sys.argv[1:]
override = {"bundle_root": root, "device": "cpu", "output_dir": "elsewhere", f"inferer#{part}": 9}
flow = create_workflow(config_file=f"{root}/configs/inference.json", workflow_type="infer", **override)
print(type(flow).__name__, flow.device, flow.parser.get_parsed_content("output_dir"), getattr(flow.inferer, part))
"""


@each_bundle
def test_create_workflow(bundle, tmp_path):
    """From a folder that is not the bundle's, with parts of the config overridden."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    part = "flip" if bundle.name == "glioma_grading" else "max_voxels"
    command = [sys.executable, "-c", CREATE, str(bundle), part]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.splitlines()[-1] == "ConfigWorkflow cpu elsewhere 9"

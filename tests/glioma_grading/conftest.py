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

import sys

import monai
import pytest
import torch
from grading import TINY_FUSION

from custom_nets.nets import build_network
from scripts.phantom import write


@pytest.fixture(autouse=True)
def untouched_process(monkeypatch):
    """Workflows in this process change what the other tests should find as it was; many threads make them slow."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    monai.utils.set_determinism(seed=None)


@pytest.fixture(scope="session")
def patients(tmp_path_factory):
    folder = tmp_path_factory.mktemp("patients")
    write(str(folder), num_patients=60)
    return folder


@pytest.fixture(scope="session")
def few_patients(tmp_path_factory):
    folder = tmp_path_factory.mktemp("few_patients")
    write(str(folder), num_patients=18, seed=100)
    return folder


@pytest.fixture(scope="session")
def tiny_fusion(tmp_path_factory):
    """Settings of a small fusion network with random weights, in slices and in volumes."""
    folder = tmp_path_factory.mktemp("fusion")
    settings = {key.split("#")[1]: value for key, value in TINY_FUSION.items()}
    found = {}
    for dims in (2, 3):
        torch.manual_seed(dims)
        network = build_network("clinicalfmamba", spatial_dims=dims, **settings)
        torch.save(network.state_dict(), folder / f"fusion{dims}d.pt")
        found[dims] = {"fusion_weights": str(folder / f"fusion{dims}d.pt"), "fusion_overrides": TINY_FUSION}
    return found

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

import pytest
import torch

from custom_nets.nets import build_network


@pytest.mark.slow
@pytest.mark.parametrize("dims", [2, 3])
@torch.no_grad()
def test_program_of_any_size(dims, tmp_path):
    """`torch.export` and a `.pt2` file: other sizes and batches than those of the example."""
    torch.manual_seed(0)
    network = build_network("clinicalfmamba", spatial_dims=dims, channels=[8, 8, 16], latent_depth=1).eval()
    # an example that needs no padding along an axis would allow only such sizes
    sizes = dict.fromkeys([0, *range(2, dims + 2)], torch.export.Dim.DYNAMIC)
    example = torch.rand(2, 2, *[23, 19, 29][:dims])
    torch.export.save(torch.export.export(network, (example,), dynamic_shapes=(sizes,)), tmp_path / "network.pt2")
    program = torch.export.load(tmp_path / "network.pt2").module()
    image = torch.rand(3, 2, *[33, 30, 17][:dims])
    torch.testing.assert_close(program(image), network(image), atol=1e-5, rtol=1e-4)

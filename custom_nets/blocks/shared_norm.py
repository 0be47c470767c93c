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

import torch.nn as nn
from monai.networks.layers.factories import Norm

__all__ = ["shared_batch_norms"]


def shared_batch_norms(spatial_dims: int, channels: int, uses: int) -> nn.ModuleList:
    """Batch norms with one scale and shift for several uses in a network, each with running statistics of its own.

    One batch norm used several times normalises each use by its own batch in training, but all of them by a mixture of
    their statistics in evaluation, where the network then computes something else than it was trained to.

    Args:
        spatial_dims: 2 or 3.
        channels: channels of what is normalised.
        uses: number of batch norms.
    """
    norms = nn.ModuleList(Norm[Norm.BATCH, spatial_dims](channels) for _ in range(uses))
    for norm in norms[1:]:
        norm.weight, norm.bias = norms[0].weight, norms[0].bias
    return norms

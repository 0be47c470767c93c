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

from collections.abc import Sequence

import torch.nn as nn
from monai.networks.layers.factories import Conv

__all__ = ["leaky_convs"]


def leaky_convs(spatial_dims: int, channels: Sequence[int], linear_end: bool = False) -> nn.Sequential:
    """3x3(x3) convolutions in a row, each followed by a leaky ReLU of slope 0.2.

    Args:
        spatial_dims: 2 or 3.
        channels: channels of the input and of each convolution's output.
        linear_end: whether the last convolution has no activation.
    """
    layers = nn.Sequential()
    for incoming, outgoing in zip(channels, channels[1:]):
        layers.append(Conv[Conv.CONV, spatial_dims](incoming, outgoing, 3, padding=1))
        layers.append(nn.LeakyReLU(0.2))
    if linear_end:
        layers.pop(-1)
    return layers

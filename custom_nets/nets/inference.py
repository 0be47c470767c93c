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

"""A trained network as it computes fastest."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, TypeVar

import torch
import torch.nn as nn
from monai.networks.layers.factories import Conv
from torch.nn.utils.fusion import fuse_conv_bn_weights

from custom_nets.blocks import DirectionalSSM, UpsampledConv

__all__ = ["prepare_for_inference"]

Network = TypeVar("Network", bound=nn.Module)
_BATCH_NORMS = (nn.BatchNorm2d, nn.BatchNorm3d)
_TRANSPOSED = (nn.ConvTranspose2d, nn.ConvTranspose3d)
_CONVS = (nn.Conv2d, nn.Conv3d, *_TRANSPOSED)


@torch.no_grad()
def prepare_for_inference(network: Network, dtype: torch.dtype = torch.float32) -> Network:
    """
    Change a trained network in place so that it computes the same outputs in less time. It goes to evaluation mode for
    good: its state dict is no longer that of its class, and it is not to be trained.

    Batch norms beside a convolution are folded into it, where that is exact: those behind one and, in float32, those
    before one without padding. (A padded convolution sees zeros around the image that the batch norm has not shifted.)
    The taps of upsampling convolutions are added up once, and weights of convolutions lie channels last.

    Args:
        network: on any device, with its trained weights.
        dtype: with ``torch.bfloat16`` or ``torch.float16`` the weights of matrices and convolutions are kept in it,
            so that they are not cast at every call. The network is then to be called under autocast in that dtype.

    Returns:
        the network.
    """
    network.eval()
    for module in [*network.modules()]:
        if isinstance(module, nn.Sequential):
            _fold_batch_norms(module, dtype)
    for module in network.modules():
        _cast(module, dtype)
        if isinstance(module, _CONVS):
            layout = torch.channels_last if module.weight.dim() == 4 else torch.channels_last_3d
            module.weight.data = module.weight.data.contiguous(memory_format=layout)
    return network.requires_grad_(False)


def _fold_batch_norms(sequence: nn.Sequential, dtype: torch.dtype) -> None:
    for name, part in sequence.named_children():
        if isinstance(part, UpsampledConv):
            setattr(sequence, name, _transposed_conv(part))
    for (name, part), (next_name, next_part) in pairwise([*sequence.named_children()]):
        if isinstance(part, _CONVS) and isinstance(next_part, _BATCH_NORMS):
            _fold_into_previous(part, next_part)
            setattr(sequence, next_name, nn.Identity())
        elif isinstance(part, _BATCH_NORMS) and isinstance(next_part, _CONVS[:2]) and not any(next_part.padding):
            # folded, the convolution takes the difference of large numbers: too coarse in half precision
            if dtype == torch.float32:
                _fold_into_next(part, next_part)
                setattr(sequence, name, nn.Identity())


def _transposed_conv(part: UpsampledConv) -> nn.Module:
    out_channels, in_channels = part.weight.shape[:2]
    transposed = Conv[Conv.CONVTRANS, part.spatial_dims]
    conv = transposed(in_channels, out_channels, 4, stride=2, padding=1, bias=False)
    conv.weight = nn.Parameter(part.kernel())
    return conv


def _fold_into_previous(conv: Any, norm: Any) -> None:
    statistics = (norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
    transposed = isinstance(conv, _TRANSPOSED)
    conv.weight, conv.bias = fuse_conv_bn_weights(conv.weight, conv.bias, *statistics, transpose=transposed)


def _fold_into_next(norm: Any, conv: Any) -> None:
    scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    shift = norm.bias - norm.running_mean * scale
    shape = [1, -1] + [1] * (conv.weight.dim() - 2)
    added = (conv.weight * shift.view(shape)).flatten(1).sum(1)
    conv.bias = nn.Parameter(added if conv.bias is None else conv.bias + added)
    conv.weight = nn.Parameter(conv.weight * scale.view(shape))


def _cast(module: nn.Module, dtype: torch.dtype) -> None:
    if isinstance(module, (*_CONVS, nn.Linear)):
        module.to(dtype)
    elif isinstance(module, DirectionalSSM):
        for weight in (module.projection, module.step_weight):
            weight.data = weight.data.to(dtype)

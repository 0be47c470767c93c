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

from custom_nets.blocks.channel_attention import CrossModalChannelAttention
from custom_nets.blocks.cross_mamba import CrossMamba, CrossMambaBlock
from custom_nets.blocks.cross_window_attention import CrossWindowAttention, CrossWindowBlock
from custom_nets.blocks.dilated_gated_conv import DilatedGatedConvBlock
from custom_nets.blocks.gradient_residual_dense import GradientResidualDenseBlock, SobelEdges
from custom_nets.blocks.leaky_convs import leaky_convs
from custom_nets.blocks.mamba import Mamba, MambaBlock
from custom_nets.blocks.max_vit import MaxViTBlock
from custom_nets.blocks.multi_source_mamba import MultiSourceMamba
from custom_nets.blocks.padding import crop_to_size, pad_to_multiple
from custom_nets.blocks.recompute import recomputed
from custom_nets.blocks.residual_attention import ResidualPyramidAttention, double, halve, pooled_gate
from custom_nets.blocks.residual_swin import ResidualSwinBlock, SwinLayer
from custom_nets.blocks.selective_ssm import DirectionalSSM
from custom_nets.blocks.shared_norm import shared_batch_norms
from custom_nets.blocks.source_refinement import SourceRefinement
from custom_nets.blocks.token_exchange import TokenExchange, swap_channels
from custom_nets.blocks.upsampled_conv import UpsampledConv

__all__ = [
    "CrossMamba",
    "CrossMambaBlock",
    "CrossModalChannelAttention",
    "CrossWindowAttention",
    "CrossWindowBlock",
    "DilatedGatedConvBlock",
    "DirectionalSSM",
    "GradientResidualDenseBlock",
    "Mamba",
    "MambaBlock",
    "MaxViTBlock",
    "MultiSourceMamba",
    "ResidualPyramidAttention",
    "ResidualSwinBlock",
    "SobelEdges",
    "SourceRefinement",
    "SwinLayer",
    "TokenExchange",
    "UpsampledConv",
    "crop_to_size",
    "double",
    "halve",
    "leaky_convs",
    "pad_to_multiple",
    "pooled_gate",
    "recomputed",
    "shared_batch_norms",
    "swap_channels",
]

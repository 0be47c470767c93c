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

from custom_nets.nets.clinicalfmamba import ClinicalFMamba
from custom_nets.nets.ehdran import EHDRAN
from custom_nets.nets.inference import prepare_for_inference
from custom_nets.nets.mactfusion import MACTFusion
from custom_nets.nets.mamba_classifier import ClinicalFMambaClassifier
from custom_nets.nets.mambadfuse import MambaDFuse
from custom_nets.nets.mrscfusion import MRSCFusion
from custom_nets.nets.msdra import MSDRA
from custom_nets.nets.msrpan import MSRPAN
from custom_nets.nets.pair_network import PairNetwork
from custom_nets.nets.pixel_rules import Average, Maximum
from custom_nets.nets.registry import build_network, network_names, register_network
from custom_nets.nets.swinfusion import SwinFusion
from custom_nets.nets.two_stage import TwoStageNetwork

__all__ = [
    "Average",
    "ClinicalFMamba",
    "ClinicalFMambaClassifier",
    "EHDRAN",
    "MACTFusion",
    "MRSCFusion",
    "MSDRA",
    "MSRPAN",
    "MambaDFuse",
    "Maximum",
    "PairNetwork",
    "SwinFusion",
    "TwoStageNetwork",
    "build_network",
    "network_names",
    "prepare_for_inference",
    "register_network",
]

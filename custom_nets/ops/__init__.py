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

from custom_nets.ops.directional import directional_conv, directional_scan, walks_in_place
from custom_nets.ops.fusion_rules import fusion_rule, register_rule, rule_names
from custom_nets.ops.scan_orders import SCANS, scan_orders, to_raster, to_sequences
from custom_nets.ops.selective_scan import BACKEND_VARIABLE, scan_backend, selective_scan, selective_scan_channels_last

__all__ = [
    "BACKEND_VARIABLE",
    "SCANS",
    "directional_conv",
    "directional_scan",
    "fusion_rule",
    "register_rule",
    "rule_names",
    "scan_backend",
    "scan_orders",
    "selective_scan",
    "selective_scan_channels_last",
    "to_raster",
    "to_sequences",
    "walks_in_place",
]

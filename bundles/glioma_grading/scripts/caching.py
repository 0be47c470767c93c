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
"""Keys of preprocessed cases on disk: a case is prepared anew when its files or the preprocessing have changed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

__all__ = ["hash_case"]


def hash_case(case: Mapping[str, Any]) -> bytes:
    """Key of a case for `monai.data.PersistentDataset`: all that the item holds, and size and time of its files."""
    files = [case["image"]] if isinstance(case["image"], str) else case["image"]
    stats = [(status.st_size, status.st_mtime_ns) for status in map(os.stat, files)]
    text = json.dumps([dict(case), stats], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest().encode()

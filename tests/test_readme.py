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

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]


def test_loading_by_api(tmp_path):
    """The README's lines as they stand, where `pairs` and `bundles` are."""
    (tmp_path / "bundles").symlink_to(ROOT / "bundles")
    for name in ("MRI", "CT"):
        (tmp_path / "pairs" / name).mkdir(parents=True)
        image = np.random.default_rng(0).integers(0, 255, (34, 45), dtype=np.uint8)
        Image.fromarray(image).save(tmp_path / "pairs" / name / "7003.png")
    blocks = (ROOT / "README.md").read_text().split("```python\n")[1:]
    (lines,) = (block.split("```")[0] for block in blocks if "ConfigWorkflow" in block)
    lines += "assert fused.shape == (1, 1, 45, 34) and 0 <= fused.min() < fused.max() <= 1\n"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", lines]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr

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

import gc
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.memory import forking

BUNDLE = Path(__file__).parents[1] / "bundles" / "clinicalfmamba_fusion"
CODE = """
import resource, torch
from scripts.memory import keep_freed_memory
kept = keep_freed_memory()
def faults(size):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(size).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
first, *later = [faults(size) for size in (2**26, 2**24, 2**24, 2**24)]
print(kept, max(later) < first / 100)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is another one")
@pytest.mark.parametrize("variable, expected", [("", "True True"), ("MALLOC_ARENA_MAX", "False False")])
def test_freed_memory_is_used_again(variable, expected):
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    environment |= {"PYTHONPATH": str(BUNDLE), "OMP_NUM_THREADS": "1", **({variable: "2"} if variable else {})}
    result = subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == expected


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are not forked here")
def test_a_fork_does_not_collect_what_it_inherits():
    with forking():
        child = os.fork()
        if child == 0:
            os._exit(int(gc.get_freeze_count() == 0))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert gc.get_freeze_count() == 0

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
"""What went wrong, as the last line that a command prints."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import NoReturn

__all__ = ["cause_of", "reason_of", "refuse", "show_cause_last"]

# how the exceptions begin that MONAI's config parser and transforms put around one
WRAPPERS = ("Failed to instantiate", "Failed to evaluate", "applying transform")


def show_cause_last() -> None:
    """
    Make the traceback of an uncaught exception end with what went wrong. MONAI's config parser raises
    ``Failed to instantiate component ...``, several times over, and the sentence that tells what to do about it stands
    far above.
    """
    sys.excepthook = _print_exception


def refuse(reason: str) -> NoReturn:
    """
    Stand in a config for what can not be had there.

    Args:
        reason: one sentence that says why, and what to do instead.

    Raises:
        ValueError: always, with ``reason``.
    """
    raise ValueError(reason)


def _print_exception(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    sys.__excepthook__(kind, error, traceback)
    cause = cause_of(error)
    if cause is not error:
        print(f"\n{type(cause).__name__}: {cause}", file=sys.stderr)


def cause_of(error: BaseException) -> BaseException:
    """The first exception of a chain that MONAI did not put there."""
    while error.__cause__ is not None and str(error).startswith(WRAPPERS):
        error = error.__cause__
    return error


def reason_of(error: BaseException) -> str:
    """What went wrong as one line: what this project raises is a sentence, what others raise needs its kind, too."""
    cause = cause_of(error)
    text = " ".join(str(cause).split())
    return text if isinstance(cause, (FileNotFoundError, ValueError)) else f"{type(cause).__name__}: {text}"

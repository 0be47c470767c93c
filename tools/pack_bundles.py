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

"""Packs bundles for where they are unpacked alone: links followed, weights in, what runs and tools write left out."""

from __future__ import annotations

import argparse
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path

__all__ = ["pack"]

CONTENTS = ("LICENSE", "configs", "custom_nets", "docs", "models", "scripts")
MAX_FILE_BYTES = 25_000_000  # of the Model Zoo
OLDEST = (1980, 1, 1, 0, 0, 0)  # that a zip file can name
REGULAR_FILE = 0o100644


def find_files(bundle: Path) -> Iterator[Path]:
    """Files that belong to a bundle, those behind links too, in the order of their names."""
    for name in CONTENTS:
        top = bundle / name
        for path in sorted([top] if top.is_file() else top.rglob("*")):
            parts = path.relative_to(bundle).parts
            if path.is_file() and not any(part == "__pycache__" or part.startswith(".") for part in parts):
                yield path


def pack(bundle: Path, output_dir: Path) -> Path:
    """Write ``output_dir/<name>-<version>.zip``, whose one folder ``<name>`` is the bundle; equal bundles, equal bytes.

    Raises:
        ValueError: if a file is larger than the Model Zoo takes.
    """
    version = json.loads((bundle / "configs" / "metadata.json").read_text(encoding="utf-8"))["version"]
    output_dir.mkdir(parents=True, exist_ok=True)
    archive = output_dir / f"{bundle.name}-{version}.zip"
    unfinished = archive.with_suffix(".zip.tmp")
    try:
        with zipfile.ZipFile(unfinished, "w", zipfile.ZIP_DEFLATED) as packed:
            for path in find_files(bundle):
                if path.stat().st_size > MAX_FILE_BYTES:
                    raise ValueError(f"{path} has more than {MAX_FILE_BYTES // 10**6} MB: store it in half precision.")
                entry = zipfile.ZipInfo(f"{bundle.name}/{path.relative_to(bundle).as_posix()}", date_time=OLDEST)
                entry.create_system, entry.external_attr = 3, REGULAR_FILE << 16
                packed.writestr(entry, path.read_bytes(), zipfile.ZIP_DEFLATED)
        unfinished.replace(archive)
    finally:
        unfinished.unlink(missing_ok=True)
    return archive


def main() -> None:
    root = Path(__file__).resolve().parents[1]
    bundles = sorted(path.parents[1] for path in root.glob("bundles/*/configs/metadata.json"))
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundles", nargs="*", type=Path, default=bundles)
    parser.add_argument("--output_dir", type=Path, default=root / "dist")
    arguments = parser.parse_args()
    for bundle in arguments.bundles:
        print(pack(bundle.absolute(), arguments.output_dir))


if __name__ == "__main__":
    main()

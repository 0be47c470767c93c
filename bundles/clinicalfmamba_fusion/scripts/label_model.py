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
"""
Copy this bundle into MONAI Label's app for bundles, as a model that Label can serve::

    python -m scripts.label_model --app_dir apps/monaibundle
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fire
from monai.bundle import ConfigParser

from scripts.checkpoints import check_file
from scripts.data import replacing_folder

__all__ = ["label_model"]

CONTENTS = ("configs", "custom_nets", "docs", "models", "scripts")


def label_model(
    app_dir: str,
    config_file: str | Sequence[str] = "configs/inference.json",
    bundle_root: str = ".",
    name: str | None = None,
    checkpoint: str | None = None,
    **overrides: Any,
) -> None:
    """
    Write ``<app_dir>/model/<name>``, an older one of that name being replaced. MONAI Label reads one config,
    ``configs/inference.json``, one file of weights, ``models/model.pt``, and from the metadata ``network_data_format``:
    the copy has there what the configs and weights named here say.

    Args:
        app_dir: folder of Label's app ``monaibundle``.
        config_file: configs by their paths in the bundle, the last one winning.
        bundle_root: folder of the bundle.
        name: by default the bundle's folder's, with ``_classification`` where the outputs are classes, since Label
            takes the kind of a model from this name.
        checkpoint: weights; by default those that the configs name.
        overrides: parts of the configs to replace, by id.

    Raises:
        FileNotFoundError: when there are no weights, or no app.
    """
    root, app = Path(bundle_root).absolute(), Path(app_dir).expanduser()
    if not (app / "main.py").is_file():
        raise FileNotFoundError(f"{app} is not an app of MONAI Label: `monailabel apps --download` makes one.")
    parser = ConfigParser()
    parser.read_config([root / file for file in ([config_file] if isinstance(config_file, str) else config_file)])
    parser.update({**overrides, "bundle_root": str(root)})
    weights = Path(checkpoint if checkpoint is not None else parser.get_parsed_content("checkpoint"))
    check_file(weights)
    metadata = ConfigParser.load_config_file(root / "configs" / "metadata.json")
    if parser.get_parsed_content("spatial_dims") == 3:
        metadata["network_data_format"] = metadata.pop("volume_data_format")
    if name is None:
        classes = metadata["network_data_format"]["outputs"]["pred"]["format"] == "classes"
        name = root.name + ("_classification" if classes else "")
    parser.update({"bundle_root": ".", "checkpoint": "$@bundle_root + '/models/model.pt'"})
    config = {key: value for key, value in parser.config.items() if key != parser.meta_key}
    with replacing_folder(app / "model" / name) as folder:
        for part in CONTENTS:
            if (root / part).is_dir():
                shutil.copytree(root / part, folder / part, ignore=shutil.ignore_patterns("__pycache__", ".*"))
        shutil.copy(root / "LICENSE", folder)
        os.makedirs(folder / "models", exist_ok=True)
        shutil.copy(weights, folder / "models" / "model.pt")
        for content, file in ((config, "inference.json"), (metadata, "metadata.json")):
            ConfigParser.export_config_file(content, str(folder / "configs" / file), indent=4)
    logging.getLogger(__name__).info(f"{name} is in {app}: start its server with --conf models {name}.")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    fire.Fire(label_model)

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
"""Fused images from a fusion bundle: its own configuration, network and weights, through MONAI's bundle parser."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import re
import sys
import threading
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import numpy as np
import torch
from monai.bundle import ConfigParser
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform
from torch.utils.data import get_worker_info
from tqdm import tqdm

from custom_nets.nets import network_names
from scripts.checkpoints import load_weights
from scripts.data import replacing, stem

__all__ = ["FuseModalitiesd", "FusionBundle", "content_digest", "own_scripts", "system_settings", "to_eight_bit"]

# what needs no fusion network
PLAIN_SOURCES = ("t2", "flair", "t2_flair", "average", "maximum", "fused_files")
# what a fused image depends on
CONFIG_IDS = ("spatial_dims", "network_def", "preprocessing", "inferer")
# what is kept of how the second image came onto the grid of the first
NOTES = ("registered", "resampled")


@contextmanager
def own_scripts(bundle: str | os.PathLike) -> Iterator[None]:
    """
    Let the name ``scripts`` mean the package in ``bundle`` for as long as its parts are made, then what it meant
    before. Every bundle calls its own code so, and a process has only one module of a name.

    The parts keep working afterwards, since their functions hold their own modules. Not served: code that imports from
    ``scripts`` only when it is called, pickling of the parts, and two threads that enter at once. ``custom_nets`` is
    the running bundle's, also where the other bundle carries another version of it.
    """
    modules, path = _forget_scripts(), list(sys.path)
    sys.path.insert(0, os.path.abspath(bundle))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        _forget_scripts()
        sys.modules.update(modules)
        sys.path[:] = path


def _forget_scripts() -> dict[str, Any]:
    names = [name for name in sys.modules if name == "scripts" or name.startswith("scripts.")]
    return {name: sys.modules.pop(name) for name in names}


def to_eight_bit(image: torch.Tensor) -> torch.Tensor:
    """[0, 1] rounded to its 256 levels, as a fusion run writes its images by default; the type stays."""
    return ((image.double().clamp(0, 1) * 255).round() / 255).to(image.dtype)


def content_digest(*files: str | os.PathLike) -> str:
    """SHA-256 of the bytes of files, in this order; of a folder, those of its files by name."""
    digest = hashlib.sha256()
    for file in map(Path, files):
        for part in sorted(p for p in file.rglob("*") if p.is_file()) if file.is_dir() else [file]:
            digest.update(hashlib.sha256(part.read_bytes()).digest())
    return digest.hexdigest()


class FusionBundle:
    """
    The parts of a fusion bundle that are used here, made when they are first asked for.

    Args:
        bundle: folder of the bundle.
        configs: its configs, by their paths inside of the bundle, the last one winning.
        weights: state dict, or checkpoint with the network as ``model``; by default what the config names as
            ``checkpoint``.
        overrides: parts of the configs to replace, by id.
        device: where the network runs.

    Raises:
        FileNotFoundError: when the bundle, a config or the weights are not there.
    """

    def __init__(
        self,
        bundle: str | os.PathLike,
        configs: Sequence[str] = ("configs/inference.json",),
        weights: str | os.PathLike | None = None,
        overrides: Mapping[str, Any] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.bundle = Path(bundle).absolute()
        self.device = torch.device(device)
        files = [self.bundle / config for config in configs]
        if missing := next((file for file in files if not file.is_file()), None):
            raise FileNotFoundError(
                f"No fusion bundle to make fused images with, {missing} does not exist: set fusion_bundle to the folder"
                " of clinicalfmamba_fusion, or grade another source (t2, flair, t2_flair, average, maximum, or"
                " fused_files, which a fusion has written)."
            )
        self.parser = ConfigParser()
        self.parser.read_config(files)
        # also a network for slices gets volumes here, slice by slice
        settings = {"bundle_root": str(self.bundle), "device": str(self.device), "input_dims": 3, "output_dir": None}
        self.parser.update({**settings, **(overrides or {})})
        self.weights = Path(weights if weights is not None else self.part("checkpoint"))
        if not self.weights.is_file():
            raise FileNotFoundError(f"Weights {self.weights} of the fusion network do not exist: set fusion_weights.")

    def part(self, name: str, default: Any = None) -> Any:
        """The object or value that the configs define under the id ``name``."""
        if name not in self.parser:
            return default
        with own_scripts(self.bundle):
            return self.parser.get_parsed_content(name)

    def load_network(self) -> torch.nn.Module:
        """
        The network with its weights, on the device, in evaluation mode.

        Raises:
            ValueError: when the weights are of another network.
        """
        network = self.part("network_def")
        try:
            load_weights(network, self.weights)
        except ValueError as error:
            raise ValueError(
                f"fusion_weights, fusion_configs and fusion_overrides do not belong together: {error}"
            ) from error
        return network.to(self.device).eval()

    def digest(self) -> str:
        """SHA-256 of the weights and of all in the configs that decides what a fused image looks like."""
        found: dict[str, str] = {}
        names = list(CONFIG_IDS)
        while names:
            name = names.pop()
            # where and on what it runs is not part of the image
            if name not in found and name not in ("bundle_root", "device") and name in self.parser:
                found[name] = json.dumps(self.parser.get(name), sort_keys=True)
                names += re.findall(r"@(\w+)", found[name])
        text = json.dumps(found, sort_keys=True) + content_digest(self.weights)
        return hashlib.sha256(text.encode()).hexdigest()


def system_settings(bundle: Path, system: str, weights: str | os.PathLike | None) -> dict[str, Any]:
    """
    What `FusionBundle` needs, beyond its other settings, for the fused image of one system: of ``"fused"``, the
    bundle's own network, nothing; of a ``configs/<system>.json`` or ``configs/baselines/<system>.json`` in the bundle,
    that config; of another network in the registry of `custom_nets`, its name in ``network_def``.

    Raises:
        ValueError: when there is no such system, or neither a config names its weights nor ``weights`` does.
    """
    if system == "fused":
        return {}
    config = next(
        (c for c in (f"configs/{system}.json", f"configs/baselines/{system}.json") if (bundle / c).is_file()), ""
    )
    if not config and system not in network_names():
        raise ValueError(
            f"source '{system}' is none of {', '.join(PLAIN_SOURCES)}, fused, a config of the fusion bundle or a"
            f" registered network ({', '.join(network_names())})."
        )
    if weights is None and "checkpoint" not in (ConfigParser.load_config_file(bundle / config) if config else {}):
        raise ValueError(f"source '{system}' is a network without weights of its own: name them as fusion_weights.")
    if config:
        return {"configs": [config]}
    network = {"_target_": "custom_nets.nets.build_network", "name": system, "spatial_dims": "@spatial_dims"}
    return {"overrides": {"network_def": network}}


class FuseModalitiesd(MapTransform):
    """
    Replace the file names of two co-registered images by their fused image ``(1, H, W[, D])``, a float32
    ``MetaTensor`` in [0, 1] at 256 levels, on the grid of the first image: what a run of the fusion bundle writes, up
    to that rounding. ``meta["registered"]`` says how the second image was registered, empty if it was not, and
    ``meta["resampled"]`` whether it came from another grid.

    Nothing of the fusion bundle is loaded before an image is fused that is not in the cache. One thread fuses at a
    time. A data loader's worker can not use a GPU: with ``device`` a GPU, fuse in the main process, or call `prepare`
    before the workers start, so that they find all in the cache.

    A network for slices fuses a volume slice by slice along its last axis.

    Args:
        keys: keys of the file names: two, or one with both images as channels.
        bundle, configs, weights, overrides, device: see `FusionBundle`.
        cache_dir: folder that keeps the fused images, named by a digest of weights, configuration and the images'
            content; None fuses anew each time.
        system: whose fused image, see :func:`system_settings`.
        allow_missing_keys: do not raise when a key is missing.
    """

    def __init__(
        self,
        keys: KeysCollection = "image",
        bundle: str | os.PathLike = "../clinicalfmamba_fusion",
        configs: Sequence[str] = ("configs/inference.json", "configs/volume.json"),
        weights: str | os.PathLike | None = None,
        overrides: Mapping[str, Any] | None = None,
        device: torch.device | str = "cpu",
        cache_dir: str | os.PathLike | None = None,
        system: str = "fused",
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        added = system_settings(Path(bundle), system, weights)
        configs = [*configs, *added.get("configs", ())]
        overrides = {**added.get("overrides", {}), **(overrides or {})}
        self.fusion = FusionBundle(bundle, configs, weights, overrides, device)
        self.cache_dir = None if cache_dir is None else Path(cache_dir)
        self.digest = self.fusion.digest()
        self.weights_digest = content_digest(self.fusion.weights)
        self._arguments = (keys, bundle, configs, weights, overrides, str(device), cache_dir, "fused")
        self._lock = threading.Lock()
        self._network: torch.nn.Module | None = None

    def __reduce__(self) -> tuple:
        # what the other bundle made can not be pickled: a worker process makes its own; the digest is what tells a
        # cache of preprocessed cases that the fusion network has changed
        return type(self), (*self._arguments, self.allow_missing_keys), {"digest": self.digest}

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """
        Raises:
            RuntimeError: in a worker process that would have to use a GPU.
        """
        d = dict(data)
        for key in self.key_iterator(d):
            files = [str(d[key])] if isinstance(d[key], (str, os.PathLike)) else [str(file) for file in d[key]]
            case = str(d.get("case") or stem(files[0]))
            fused, affine, notes = self._fused(files, case)
            meta = {"case": case, "filename_or_obj": files[0], **notes}
            d[key] = MetaTensor(torch.from_numpy(fused).float() / 255, affine=torch.from_numpy(affine), meta=meta)
        return d

    def prepare(self, items: Sequence[Mapping[Hashable, Any]]) -> None:
        """
        Fuse what is not in the cache, in this process and with a progress bar. Can be interrupted and repeated. Of
        several processes each begins with a share of its own, and then finds what the others have fused meanwhile.
        """
        if self.cache_dir is None:
            return
        first = len(items) * idist.get_rank() // idist.get_world_size()
        for item in tqdm([*items[first:], *items[:first]], desc="fusing", leave=False, disable=idist.get_rank() > 0):
            self(item)

    def _fused(self, files: Sequence[str], case: str) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
        """Fused image, uint8, its affine, and ``registered`` and ``resampled``."""
        if self.cache_dir is None:
            return self._fuse(files, case)
        path = self.cache_dir / f"{hashlib.sha256((self.digest + content_digest(*files)).encode()).hexdigest()}.npz"
        if not path.is_file():
            image, affine, notes = self._fuse(files, case)
            with self._lock, replacing(path) as temporary:
                np.savez_compressed(temporary, image=image, affine=affine, **notes)
            return image, affine, notes
        with np.load(path) as cached:
            return cached["image"], cached["affine"], {name: cached[name].item() for name in NOTES}

    def _fuse(self, files: Sequence[str], case: str) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
        if self.fusion.device.type == "cuda" and get_worker_info() is not None:
            raise RuntimeError(
                "An image would have to be fused on a GPU in a worker process of a data loader, which can not: set a"
                " cache_dir, so that images are fused before, or num_workers to 0."
            )
        with self._lock, torch.inference_mode():
            if self._network is None:
                self._network = self.fusion.load_network()
                self._preprocessing, self._inferer = (self.fusion.part(n) for n in ("preprocessing", "inferer"))
            item = self._preprocessing({"image": files if len(files) > 1 else files[0], "case": case})
            sources, info = item["image"], json.loads(item.get("fusion_info", "{}"))
            affine = sources.affine.numpy() if isinstance(sources, MetaTensor) else np.eye(4)
            plain = sources.as_tensor()[None].to(self.fusion.device)
            fused = self._inferer(plain, self._network)[0]
            image = (to_eight_bit(fused) * 255).round().to(torch.uint8).cpu().numpy()
            notes = ((info.get("registration") or {}).get("kind", ""), bool(info.get("resampled")))
            return image, np.asarray(affine), dict(zip(NOTES, notes))

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
"""Data lists: find co-registered pairs, and check them before any work starts."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import nibabel as nib
from PIL import Image

__all__ = [
    "case_name",
    "common_name",
    "dataset_root",
    "find_pairs",
    "read_datalist",
    "replacing",
    "replacing_folder",
    "stem",
]

SPLITS = ("training", "validation", "test")
PICTURES = (".png", ".tif", ".tiff", ".jpg")
EXTENSIONS = (".nii.gz", ".nii", ".nrrd", ".mha", *PICTURES)
# AANLIB names a slice <subject><three digits of slice number>
SLICE_SUBJECT = r"^(.+?)[_.-]?\d{3}$"
# BIDS and BraTS 2023 name the sessions of one patient apart; any other volume is its own subject
VOLUME_SUBJECT = r"^(sub-[A-Za-z0-9]+|BraTS-[A-Z]+-\d{5})(?=[_-])"


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary name beside ``path`` (same extension); on success it takes the place of ``path``."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replacing_folder(path: str | os.PathLike) -> Iterator[Path]:
    """As :func:`replacing`, for a folder: the files of an older one at ``path`` do not stay among the new ones."""
    path = Path(path)
    temporary, old = (path.with_name(f".{os.getpid()}.{kind}.{path.name}") for kind in ("new", "old"))
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if path.exists():
            os.replace(path, old)
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def stem(path: str | os.PathLike) -> str:
    """File name without its extension, ``.nii.gz`` counting as one."""
    name = Path(path).name
    extension = next((e for e in EXTENSIONS if name.lower().endswith(e)), Path(name).suffix)
    return name[: len(name) - len(extension)]


def find_pairs(
    dataset_dir: str | os.PathLike,
    modalities: Sequence[str | Sequence[str]],
    datalist: str | os.PathLike | None = None,
    split: str | None = None,
    subject_pattern: str | None = None,
    same_shape: bool = True,
) -> list[dict]:
    """
    Find the co-registered image pairs below ``dataset_dir``. Three layouts are understood:

    - two sibling folders, named as the modalities, with equal file names (``CT-MRI/MRI/16003.png``,
      ``CT-MRI/CT/16003.png``), anywhere below ``dataset_dir``;
    - files with the modality as suffix (``HGG/CASE/CASE_t2.nii.gz``, ``HGG/CASE/CASE_flair.nii.gz``, the layout of
      BraTS; the separator is ``_``, ``-`` or ``.``), anywhere below ``dataset_dir``;
    - a MONAI data-list JSON with any of the keys ``training``, ``validation`` and ``test``.

    Args:
        dataset_dir: folder with the images; the paths in ``datalist`` are relative to it.
        modalities: name of the first and of the second image, in any case. Each may be a list of alternatives:
            ``["MRI", ["CT", "SPECT", "PET"]]``, ``[["T2", "MRI"], ["FLAIR", "PET"]]``.
        datalist: JSON file to read instead of searching.
        split: the one key of ``datalist`` to read; all of them when not given.
        subject_pattern: regular expression whose first group, searched in a case's name, is its subject. By default,
            the name without its last three digits for pictures (slices), and for volumes the case itself, with the
            sessions of one patient in BIDS and BraTS 2023 names taken together.
        same_shape: whether the volumes of a pair must have one shape; pictures, which do not know where they lie, must.

    Returns:
        dictionaries with ``image`` (absolute paths), ``case`` (unique, fit for a file name), ``subject`` and ``task``
        (the kind of pair: the folder that the modalities' or the cases' folders lie in).

    Raises:
        FileNotFoundError: when ``dataset_dir``, ``datalist`` or a file in it does not exist, or no pair is found.
        ValueError: when an image has no partner, can not be read, or differs in shape from its partner.
    """
    root = dataset_root(dataset_dir)
    if datalist is not None:
        lists = read_datalist(root, Path(datalist), subject_pattern, same_shape)
        if split is not None and split not in lists:
            raise ValueError(f"datalist {datalist} lists nothing under '{split}', only under {', '.join(lists)}.")
        return [pair for name, pairs in lists.items() if split in (None, name) for pair in pairs]
    firsts, partners = ([names] if isinstance(names, str) else list(names) for names in modalities)
    folders = _list_folders(root)
    pairs = _sibling_folders(root, folders, firsts, partners) or _suffixed(root, folders, firsts, partners)
    if not pairs:
        first, partner = firsts[0], partners[0]
        raise FileNotFoundError(
            f"No pairs of {' or '.join(firsts)} and {' or '.join(partners)} below {root}: expected two folders with"
            f" equal file names ({first}/a.png, {partner}/a.png) or files with suffixes (a_{first}.nii.gz,"
            f" a_{partner}.nii.gz); set modalities to the names in use, or list the files in a datalist."
        )
    return _complete(pairs, subject_pattern, same_shape)


def _list_folders(root: Path) -> dict[Path, list[str]]:
    folders: dict[Path, list[str]] = {}
    seen: set[str] = set()
    for folder, subfolders, files in os.walk(root, followlinks=True):
        # a link to a folder above would be walked for ever
        if (real := os.path.realpath(folder)) in seen:
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(s for s in subfolders if not s.startswith("."))
        folders[Path(folder)] = sorted(f for f in files if f.lower().endswith(EXTENSIONS) and not f.startswith("."))
    return folders


def _sibling_folders(
    root: Path, folders: dict[Path, list[str]], firsts: Sequence[str], partners: Sequence[str]
) -> list[dict]:
    siblings: dict[Path, dict[str, Path]] = defaultdict(dict)
    for folder in folders:
        siblings[folder.parent][folder.name.lower()] = folder
    pairs = []
    for parent, named in siblings.items():
        first = next((name for name in firsts if name.lower() in named), None)
        present = [partner for partner in partners if partner.lower() in named]
        if first is None or not present or parent not in folders:
            continue
        mri = named[first.lower()]
        alone = set(folders[mri])
        for partner in present:
            other = named[partner.lower()]
            if missing := sorted(set(folders[other]).difference(folders[mri])):
                raise ValueError(_no_partner(other / missing[0], mri / missing[0], len(missing)))
            alone.difference_update(folders[other])
            parts = parent.relative_to(root).parts
            task = "/".join(parts if parts and len(present) == 1 else (*parts, partner))
            pairs += [
                {"image": [mri / name, other / name], "case": stem(name), "folder": task, "task": task}
                for name in folders[other]
            ]
        if alone:
            name = min(alone)
            raise ValueError(_no_partner(mri / name, named[present[0].lower()] / name, len(alone)))
    return pairs


def _suffixed(root: Path, folders: dict[Path, list[str]], firsts: Sequence[str], partners: Sequence[str]) -> list[dict]:
    suffixes = "|".join(re.escape(modality) for modality in (*firsts, *partners))
    pattern = re.compile(rf"^(?:(.+)[_.-])?({suffixes})$", re.IGNORECASE)
    groups: dict[tuple[Path, str], dict[str, Path]] = defaultdict(dict)
    for folder, files in folders.items():
        for name in files:
            if match := pattern.match(stem(name)):
                group, modality = groups[folder, match[1] or ""], match[2].lower()
                if modality in group:
                    raise ValueError(f"{group[modality]} and {folder / name} are the same image twice: remove one.")
                group[modality] = folder / name
    # the prefix names the case unless all files are called alike (a/img_t2, b/img_t2): then the folder does
    prefixes = [(folder.parent, prefix) for folder, prefix in groups]
    by_prefix = len(set(prefixes)) == len(prefixes) and all(prefix for _, prefix in prefixes)
    neighbours: dict[Path, set[Path]] = defaultdict(set)
    for folder, _ in groups:
        neighbours[folder.parent].add(folder)
    pairs = []
    for (folder, prefix), group in groups.items():
        first = next((name for name in firsts if name.lower() in group), None)
        present = [partner for partner in partners if partner.lower() in group]
        if first is None or not present:
            here = next(iter(group.values()))
            missing = firsts[0] if first is None else partners[0]
            raise ValueError(_no_partner(here, here.with_name(f"{prefix}_{missing}".lstrip("_") + ".*"), 1))
        parent = "/".join(folder.parent.relative_to(root).parts) if folder != root else ""
        # HGG and LGG tell a kind of pair, the folder of a single case does not
        task = parent if len(neighbours[folder.parent]) > 1 else ""
        for partner in present:
            pairs.append(
                {
                    "image": [group[first.lower()], group[partner.lower()]],
                    "case": prefix if by_prefix else folder.name,
                    "folder": f"{parent}/{partner}".lstrip("/") if len(present) > 1 else parent,
                    "task": f"{task}/{partner}".lstrip("/") if len(partners) > 1 else task,
                }
            )
    return pairs


def _no_partner(image: Path, partner: Path, count: int) -> str:
    more = f" ({count} images are alone)" if count > 1 else ""
    return f"{image} has no partner, {partner} does not exist{more}: add it, or take the image out of the data set."


def read_datalist(
    root: Path, path: Path, subject_pattern: str | None, same_shape: bool = True
) -> dict[str, list[dict]]:
    # monai's load_decathlon_datalist would turn a case name that is also the name of a folder into a path
    if not path.is_file():
        raise FileNotFoundError(f"datalist {path} does not exist.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"datalist {path} is not valid JSON: {error}.") from error
    lists: dict[str, list[dict]] = {}
    for key in SPLITS:
        for entry in content.get(key, []):
            item = dict(entry) if isinstance(entry, dict) else {"image": entry}
            if "image" not in item:
                raise ValueError(f"datalist {path} has an item without 'image' under '{key}'.")
            files = [item["image"]] if isinstance(item["image"], str) else item["image"]
            item["image"] = [root / file for file in files]
            item.setdefault("case", common_name(item["image"]))
            lists.setdefault(key, []).append({**item, "folder": item["image"][0].parent.name})
    if not lists:
        raise ValueError(f"datalist {path} lists nothing under {', '.join(SPLITS)}.")
    pairs = iter(_complete([item for items in lists.values() for item in items], subject_pattern, same_shape))
    return {key: [next(pairs) for _ in items] for key, items in lists.items()}


def common_name(files: Sequence[Path]) -> str:
    """``CASE`` for ``CASE_t2.nii.gz`` and ``CASE_flair.nii.gz``."""
    stems = [stem(file) for file in files]
    if len(set(stems)) == 1:
        return stems[0]
    return re.sub(r"[_.-][^_.-]*$", "", os.path.commonprefix(stems)) or stems[0]


def case_name(name: str) -> str:
    """``name`` as it is fit for a file name."""
    return re.sub(r"[^\w.-]+", "_", name, flags=re.ASCII)


def _complete(pairs: list[dict], subject_pattern: str | None, same_shape: bool) -> list[dict]:
    """Check the files of every pair, give it its subject and, where names repeat, a case name of its own."""
    for pair in pairs:
        shapes = [_shape(file) for file in pair["image"]]
        known = {shape for shape in shapes if shape}
        if len(known) > 1 and (same_shape or any(len(shape) == 2 for shape in known)):
            found = " and ".join(f"{file} {shape}" for file, shape in zip(pair["image"], shapes))
            raise ValueError(f"The images of a pair differ in shape, {found}: register and resample one to the other.")
    repeated = len({pair["case"] for pair in pairs}) < len(pairs)
    complete = []
    for pair in pairs:
        folder, case = pair.pop("folder"), pair["case"]
        default = SLICE_SUBJECT if pair["image"][0].name.lower().endswith(PICTURES) else VOLUME_SUBJECT
        match = re.search(subject_pattern or default, case)
        name = f"{folder}_{case}" if repeated and folder else case
        images = [str(file) for file in pair["image"]]
        complete.append(
            {
                **pair,
                "image": images if len(images) > 1 else images[0],
                "case": case_name(name),
                "subject": str(pair.get("subject", match[1] if match else case)),
                "task": pair.get("task", ""),
            }
        )
    names: set[str] = set()
    for pair in complete:
        if pair["case"] in names:
            raise ValueError(f"Case {pair['case']} occurs twice: give every item of a datalist its own 'case'.")
        names.add(pair["case"])
    return complete


def _shape(file: Path) -> tuple[int, ...]:
    """Spatial shape from the header alone; empty for what has no single one (a DICOM folder in a datalist)."""
    name = file.name.lower()
    if not file.exists():
        raise FileNotFoundError(f"{file} does not exist: correct the datalist or dataset_dir.")
    try:
        if name.endswith(PICTURES):
            with Image.open(file) as picture:
                return picture.size
        if name.endswith((".nii", ".nii.gz")):
            shape = nib.load(file).shape  # type: ignore[attr-defined]
            return tuple(shape[:-1] if len(shape) == 4 and shape[-1] == 1 else shape)
        if name.endswith((".nrrd", ".mha")):
            with open(file, "rb") as stream:
                header = stream.read(4096).decode("latin-1")
            return tuple(int(n) for n in re.findall(r"(?m)^(?:sizes:|DimSize =)([ \d]+)", header)[0].split())
    except (OSError, IndexError, ValueError, nib.filebasedimages.ImageFileError) as error:
        raise ValueError(f"{file} can not be read as an image: replace it, or take its pair out.") from error
    return ()


def dataset_root(dataset_dir: str | os.PathLike) -> Path:
    """
    Raises:
        FileNotFoundError: when ``dataset_dir`` is not a folder.
    """
    root = Path(dataset_dir).expanduser().absolute()
    if not root.is_dir():
        raise FileNotFoundError(f"dataset_dir {root} is not a folder: set it to the folder that holds the images.")
    return root

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
"""The network as a file that runs elsewhere, for images of any size."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.export import Dim, ExportedProgram

from custom_nets.nets import ClinicalFMamba
from custom_nets.ops import BACKEND_VARIABLE
from scripts.data import replacing

__all__ = ["FORMATS", "TOLERANCE", "export_network"]

# largest difference between the values, in [0, 1], of the exported network and of the original
TOLERANCE = 1e-4

# Of an example and of the images that try out what was made of it: sizes that need padding and sizes that do not.
# An example may have no dimension of size 1, which would stay so.
EXAMPLE = (2, 23, 19, 29)
TRIALS = ((1, 32, 40, 24), (3, 33, 16, 17))


def export_network(network: ClinicalFMamba, output_dir: str | os.PathLike, export_format: str = "onnx") -> Path:
    """
    Write ``<output_dir>/model.<extension>`` and run it on images of other sizes and batches than those of the example
    that it was made from. A file that gives other values than the network is not kept.

    Args:
        network: the network with its weights, on a CPU; it is put into evaluation mode.
        output_dir: where to write.
        export_format: one of ``FORMATS``: ``"onnx"`` for ONNX Runtime, ``"pt2"`` for `torch.export.load`, or
            ``"aoti"``, compiled for this machine by AOTInductor, for `torch._inductor.aoti_load_package`. The last one
            calls the operators of `custom_nets`; the others need nothing of this project.

    Returns:
        the file.

    Raises:
        ValueError: when the format is not known.
        RuntimeError: when the values of the exported network differ by more than ``TOLERANCE``.
    """
    if export_format not in FORMATS:
        raise ValueError(f"export_format {export_format!r} is not known, choose one of {', '.join(FORMATS)}.")
    write, load = FORMATS[export_format]
    path = Path(output_dir) / ("model_aoti.pt2" if export_format == "aoti" else f"model.{export_format}")
    log = logging.getLogger(__name__)
    log.info(f"Exporting the network to {path}, which takes minutes.")
    network.eval()
    with replacing(path) as temporary, torch.no_grad():
        write(network, temporary)
        run = load(temporary)
        for sizes in TRIALS:
            image = _image(network, sizes)
            difference = float((run(image) - network(image)).abs().max())
            if not difference <= TOLERANCE:
                raise RuntimeError(
                    f"The exported network differs by {difference:.2g} from the original for an image of shape "
                    f"{list(image.shape)}: {path} was not written."
                )
            log.info(f"Shape {list(image.shape)}: the largest difference is {difference:.2g}.")
    return path


def _image(network: ClinicalFMamba, sizes: tuple[int, ...]) -> torch.Tensor:
    """Random batch: ``sizes`` are its number of images and as many spatial sizes as there are dimensions, or more."""
    generator = torch.Generator().manual_seed(0)
    return torch.rand(sizes[0], network.in_channels, *sizes[1 : 1 + network.spatial_dims], generator=generator)


def _any_size(network: ClinicalFMamba) -> tuple[dict[int, object]]:
    return (dict.fromkeys([0, *range(2, 2 + network.spatial_dims)], Dim.DYNAMIC),)


@contextmanager
def _without_own_operators() -> Iterator[None]:
    """A program that is traced within has operators of PyTorch only."""
    before = os.environ.get(BACKEND_VARIABLE)
    os.environ[BACKEND_VARIABLE] = "torch"
    try:
        yield
    finally:
        os.environ.pop(BACKEND_VARIABLE)
        if before is not None:
            os.environ[BACKEND_VARIABLE] = before


def _trace(network: ClinicalFMamba) -> ExportedProgram:
    return torch.export.export(network, (_image(network, EXAMPLE),), dynamic_shapes=_any_size(network))


def _write_onnx(network: ClinicalFMamba, path: Path) -> None:
    for library in ("onnxscript", "onnx_ir"):
        # they log every node that they simplify
        logging.getLogger(library).setLevel(logging.WARNING)
    program = torch.onnx.export(
        network,
        (_image(network, EXAMPLE),),
        dynamo=True,
        dynamic_shapes=_any_size(network),
        input_names=["image"],
        output_names=["pred"],
        verbose=False,
    )
    program.save(path)


def _load_onnx(path: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda image: torch.from_numpy(session.run(None, {"image": image.numpy()})[0])


def _write_pt2(network: ClinicalFMamba, path: Path) -> None:
    with _without_own_operators():
        program = _trace(network)
    torch.export.save(program, path)


def _load_pt2(path: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    return torch.export.load(path).module()


def _write_aoti(network: ClinicalFMamba, path: Path) -> None:
    # with the own operators, which are called by what AOTInductor compiles
    torch._inductor.aoti_compile_and_package(_trace(network), package_path=str(path))


def _load_aoti(path: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    return torch._inductor.aoti_load_package(str(path))


FORMATS = {"onnx": (_write_onnx, _load_onnx), "pt2": (_write_pt2, _load_pt2), "aoti": (_write_aoti, _load_aoti)}

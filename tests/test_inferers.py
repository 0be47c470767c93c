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

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import DataLoader, Dataset, MetaTensor
from monai.engines import SupervisedEvaluator
from monai.transforms import Compose, CopyItemsd

from custom_nets.nets import ClinicalFMamba
from scripts.inferers import FusionInferer
from scripts.phantom import digital_brain
from scripts.transforms import LoadPaird

BUNDLE = Path(__file__).resolve().parents[1] / "bundles" / "clinicalfmamba_fusion"


class Mean(torch.nn.Module):
    """Mean of the sources; keeps the sizes it was called with."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.calls: list[tuple[int, ...]] = []
        self.dtype = dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert type(x) is torch.Tensor
        self.calls.append(tuple(x.shape))
        return x.mean(1, keepdim=True).to(self.dtype)


@pytest.mark.parametrize("shape", [(2, 2, 24, 33), (1, 2, 16, 17, 18)])
def test_whole_image_up_to_max_voxels(shape: tuple[int, ...]) -> None:
    x, network = torch.rand(shape), Mean()
    fused = FusionInferer(roi_size=8, max_voxels=int(np.prod(shape[2:])))(x, network)
    assert network.calls == [shape]
    assert torch.equal(fused, x.mean(1, keepdim=True)) and type(fused) is torch.Tensor


def test_nothing_is_seen_where_no_source_shows_anything() -> None:
    x = torch.rand(2, 2, 24, 33)
    x[:, :, :9], x[0, 0, 9:12] = 0, 0
    fused = FusionInferer(roi_size=8, max_voxels=1000)(x, lambda sources: sources.mean(1, keepdim=True) + 0.01)
    assert (fused[:, :, :9] == 0).all() and (fused[:, :, 9:] > 0).all()


@pytest.mark.parametrize("shape", [(2, 2, 24, 33), (1, 2, 16, 17, 18)])
def test_windows_above(shape: tuple[int, ...]) -> None:
    x, network = torch.rand(shape), Mean()
    inferer = FusionInferer(roi_size=8, max_voxels=int(np.prod(shape[2:])) - 1, overlap=0.5, sw_batch_size=4)
    torch.testing.assert_close(inferer(x, network), x.mean(1, keepdim=True))
    assert len(network.calls) > 1
    assert {call[2:] for call in network.calls} == {(8,) * (len(shape) - 2)}
    assert max(call[0] for call in network.calls) == 4


def test_windows_where_the_memory_ends(caplog: pytest.LogCaptureFixture) -> None:
    class Small(Mean):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if x[0, 0].numel() > 400:
                raise torch.cuda.OutOfMemoryError
            return super().forward(x)

    x, network = torch.rand(1, 2, 24, 33), Small()
    torch.testing.assert_close(FusionInferer(roi_size=16, max_voxels=1000)(x, network), x.mean(1, keepdim=True))
    assert len(network.calls) > 1
    assert "does not hold 24 x 33 at once" in caplog.text
    with pytest.raises(torch.cuda.OutOfMemoryError):
        FusionInferer(roi_size=24, max_voxels=1000)(x, Small())


@pytest.mark.parametrize(("dims", "size", "roi_size"), [(2, (96, 128), 96), (3, (64, 64, 48), 48)])
def test_windows_are_equal_to_the_whole_up_to_blending(dims: int, size: tuple[int, ...], roi_size: int) -> None:
    network = ClinicalFMamba(dims, refinement={2: 4, 3: 1}[dims]).eval()
    weights = BUNDLE / "models" / ("model.pt" if dims == 2 else "volume/model.pt")
    network.load_state_dict(torch.load(weights, weights_only=True))
    brain = digital_brain(size)
    pair = torch.from_numpy(np.stack([brain[name] for name in ("t2", "flair")])).float()[None]
    with torch.no_grad():
        whole, windows = (FusionInferer(roi_size, voxels)(pair, network) for voxels in (10**6, 1))
    # channel attention and scans see less in a window
    assert 0 < (whole - windows).abs().mean() < 0.01


@pytest.mark.parametrize("max_voxels", [16 * 17, 100])
def test_volume_slice_by_slice(max_voxels: int) -> None:
    """A network for slices on volumes, whole slices or windows of them, and on slices as ever."""
    x, network = torch.rand(2, 2, 16, 17, 5), Mean()
    inferer = FusionInferer(roi_size=8, max_voxels=max_voxels, sw_batch_size=4, spatial_dims=2, slice_batch=3)
    affine = torch.diag(torch.tensor([2.0, 1, 1, 1]))
    fused = inferer(MetaTensor(x, affine=affine), network)
    torch.testing.assert_close(fused.as_tensor(), x.mean(1, keepdim=True))
    assert torch.equal(fused.affine, affine.to(fused.affine))
    assert {len(call) for call in network.calls} == {4}
    if max_voxels == 16 * 17:
        assert network.calls == [(3, 2, 16, 17)] * 3 + [(1, 2, 16, 17)]
    torch.testing.assert_close(inferer(x[..., 0], network), x[..., 0].mean(1, keepdim=True))


def test_only_the_box_with_content() -> None:
    x, network = torch.zeros(1, 2, 100, 100), Mean()
    x[0, 0, 40:60, 45], x[0, 1, 50, 30:60] = 0.5, 1
    fused = FusionInferer(roi_size=[64, 64], max_voxels=1)(x, network)
    torch.testing.assert_close(fused, x.mean(1, keepdim=True))
    # 20 x 30 with a margin of 16
    assert network.calls == [(1, 2, 52, 62)]
    assert FusionInferer(roi_size=64, max_voxels=1)(torch.zeros(1, 2, 100, 100), Mean()).shape == (1, 1, 100, 100)


def test_windows_are_even() -> None:
    network = Mean()
    FusionInferer(roi_size=64, max_voxels=1)(torch.rand(1, 2, 70, 64), network)
    assert network.calls == [(1, 2, 40, 64)] * 2


@pytest.mark.parametrize(("roi_size", "window"), [((16, 16, 16), (16, 16, 10)), ((16, -1, 4), (16, 40, 4))])
def test_window_larger_than_the_slab(roi_size: tuple[int, ...], window: tuple[int, ...]) -> None:
    x, network = torch.rand(1, 2, 40, 40, 10), Mean()
    torch.testing.assert_close(FusionInferer(roi_size, max_voxels=100)(x, network), x.mean(1, keepdim=True))
    assert {call[2:] for call in network.calls} == {window}


@pytest.mark.parametrize("max_voxels", [10, 10000])
def test_half_precision_comes_back_as_the_input(max_voxels: int) -> None:
    fused = FusionInferer(8, max_voxels)(torch.rand(1, 2, 20, 20), Mean(torch.bfloat16))
    assert fused.dtype == torch.float32


@pytest.mark.parametrize("max_voxels", [100, 100000])
@pytest.mark.parametrize("workers", [0, 2])
def test_every_image_of_a_batch_keeps_its_metadata(tmp_path: Path, max_voxels: int, workers: int) -> None:
    items, affines = [], {}
    for number in range(3):
        affine = np.diag([-1.0, 1.0 + number, 2.0, 1.0])
        affine[:3, 3] = number
        files = []
        for modality in ("t2", "flair"):
            files.append(str(tmp_path / f"{number}_{modality}.nii.gz"))
            data = np.random.RandomState(number).rand(20, 18, 10).astype(np.float32)
            nib.save(nib.Nifti1Image(data, affine), files[-1])
        items.append({"image": files, "case": f"case{number}", "subject": f"case{number}"})
        affines[f"case{number}"] = affine
    dataset = Dataset(items, Compose([LoadPaird(), CopyItemsd("image", names="label")]))
    seen = []

    def collect(item: dict) -> dict:
        seen.append(item)
        return item

    evaluator = SupervisedEvaluator(
        device=torch.device("cpu"),
        val_data_loader=DataLoader(dataset, batch_size=2, num_workers=workers),
        network=Mean(),
        inferer=FusionInferer((16, 16, 16), max_voxels),
        postprocessing=collect,
        decollate=True,
    )
    evaluator.run()
    assert [item["case"] for item in seen] == ["case0", "case1", "case2"]
    for item in seen:
        pred = item["pred"]
        assert isinstance(pred, MetaTensor) and pred.shape == (1, 20, 18, 10)
        assert pred.meta["case"] == item["case"]
        np.testing.assert_allclose(pred.affine, affines[item["case"]])
        torch.testing.assert_close(pred.as_tensor(), item["image"].as_tensor().mean(0, keepdim=True))

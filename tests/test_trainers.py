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

import pytest
import torch
from monai.data import DataLoader, Dataset
from monai.engines import SupervisedTrainer

from custom_nets.nets import ClinicalFMamba
from scripts.losses import ClinicalFMambaLoss
from scripts.trainers import CUDAGraphTrainer

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def network() -> ClinicalFMamba:
    torch.manual_seed(0)
    return ClinicalFMamba(2, channels=(8, 16, 32), latent_depth=1)


def train(trainer_class: type[SupervisedTrainer], device: str, batches: int = 7, **kwargs) -> dict[str, torch.Tensor]:
    """Weights after some steps, the last one with a batch of another size."""
    net = network().to(device)
    images = torch.rand(2 * batches - 1, 2, 32, 32, generator=torch.Generator().manual_seed(1))
    trainer = trainer_class(
        device=device,
        max_epochs=1,
        train_data_loader=DataLoader(Dataset([{"image": i, "label": i} for i in images]), batch_size=2),
        network=net,
        optimizer=torch.optim.Adam(
            net.parameters(), lr=torch.tensor(1e-3, device=device), capturable=device.startswith("cuda")
        ),
        loss_function=ClinicalFMambaLoss(2),
        **kwargs,
    )
    trainer.run()
    return {name: value.cpu() for name, value in net.state_dict().items()}


def test_on_a_cpu_it_is_the_ordinary_trainer():
    expected, result = train(SupervisedTrainer, "cpu"), train(CUDAGraphTrainer, "cpu")
    for name, value in expected.items():
        torch.testing.assert_close(result[name], value, rtol=0, atol=0)


@needs_gpu
def test_on_a_gpu_it_trains_as_the_ordinary_trainer():
    expected, result = train(SupervisedTrainer, "cuda"), train(CUDAGraphTrainer, "cuda")
    start = network().state_dict()
    for name, value in expected.items():
        if name.endswith("num_batches_tracked"):
            assert result[name] == value
        elif value.is_floating_point():
            moved = (value - start[name]).norm()
            assert (result[name] - value).norm() <= 0.05 * moved + 1e-5, name


@pytest.mark.parametrize(
    "kwargs", [{"amp": True, "amp_kwargs": {"dtype": torch.float16}}, {"amp": True}, {"accumulation_steps": 2}]
)
def test_what_a_graph_can_not_do_is_refused(kwargs):
    with pytest.raises(ValueError, match="a CUDA graph"):
        train(CUDAGraphTrainer, "cpu", **kwargs)

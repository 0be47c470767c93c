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

from scripts.inferers import GradingInferer


def brightness(x):
    """Logit of HGG: the mean; that of LGG: 0."""
    score = x.flatten(1).mean(dim=1)
    return torch.stack([torch.zeros_like(score), score], dim=1)


def test_mean_of_slices():
    image = torch.randn(3, 1, 6, 5, 4)
    pooled = GradingInferer(2, slice_batch=5)(image, brightness).exp()
    expected = torch.sigmoid(image.mean(dim=(1, 2, 3))).mean(dim=1)
    torch.testing.assert_close(pooled[:, 1], expected)
    torch.testing.assert_close(pooled.sum(dim=1), torch.ones(3))
    # what the postprocessing of the configs makes of it
    torch.testing.assert_close(pooled.log().softmax(dim=1), pooled)


def test_most_suspicious_slice():
    image = torch.randn(3, 1, 6, 5, 4)
    pooled = GradingInferer(2, pooling="max")(image, brightness).exp()
    torch.testing.assert_close(pooled[:, 1], torch.sigmoid(image.mean(dim=(1, 2, 3))).amax(dim=1))


@pytest.mark.parametrize("dims, shape", [(3, (2, 2, 6, 5, 4)), (2, (2, 2, 6, 5))])
def test_taken_together(dims, shape):
    image = torch.randn(shape)
    torch.testing.assert_close(GradingInferer(dims)(image, brightness), brightness(image).log_softmax(dim=1))


def test_mirror_image():
    def left(x):
        return brightness(x[:, :, :3])

    image = torch.randn(2, 1, 6, 5, 4)
    both = GradingInferer(2)(image, left)
    torch.testing.assert_close(GradingInferer(2)(image.flip(2), left), both)
    assert not torch.allclose(GradingInferer(2, flip=False)(image, left), both)


def test_certain_in_half_precision():
    def sure(x):
        return torch.tensor([[-60000.0, 60000.0]], dtype=torch.float16).expand(len(x), 2)

    pooled = GradingInferer(2)(torch.zeros(2, 1, 4, 4, 3), sure)
    assert pooled.dtype == torch.float32 and torch.isfinite(pooled).all()


def test_unknown_pooling():
    with pytest.raises(ValueError, match="pooling must be 'mean' or 'max', not 'median'"):
        GradingInferer(2, pooling="median")

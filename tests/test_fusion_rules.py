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

import math

import pytest
import torch

from custom_nets.ops import fusion_rule, fusion_rules, register_rule, rule_names

RULES = ["abs_ratio", "addition", "al1nw", "average", "fer", "fl1n", "l1nw", "maximum", "sfnn"]
SIZES = [(5, 7), (4, 5, 3)]


def features(*shape, seed=0):
    """Of either sign, as behind a batch norm."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def nuclear_norm(matrix):
    return torch.linalg.svdvals(matrix.double()).sum()


def test_registry(monkeypatch):
    assert rule_names() == RULES
    with pytest.raises(ValueError, match="no fusion rule named 'median', choose one of .*'average'"):
        fusion_rule("median")
    monkeypatch.setattr(fusion_rules, "_RULES", dict(fusion_rules._RULES))
    with pytest.raises(ValueError, match="'average' is registered already"):
        register_rule("average")(torch.add)
    register_rule("minimum")(torch.minimum)
    assert fusion_rule("minimum")(torch.ones(1, 1, 1), torch.zeros(1, 1, 1)) == 0


# of (3, -1) and (0, 2) at two pixels; both images have the mean magnitude 1.5
BY_HAND = {
    "average": [1.0, 1.0],
    "addition": [2.0, 2.0],
    "maximum": [3.0, 2.0],
    "fer": [9 / 10 * 3 - 1 / 10, 2.0],
    "fl1n": [1.0, 1.0],
    "l1nw": [1.5 * 3 - 1.5, 1.5 * 2],
    "al1nw": [(1.5 * 3 - 1.5) / 2, 1.5],
    "abs_ratio": [3 / 2 * 3 - 1 / 2 * 1, 2.0],
}


@pytest.mark.parametrize("rule", BY_HAND)
def test_by_hand(rule):
    a, b = torch.tensor([3.0, 0.0]).reshape(1, 1, 1, 2), torch.tensor([-1.0, 2.0]).reshape(1, 1, 1, 2)
    torch.testing.assert_close(fusion_rule(rule)(a, b).flatten(), torch.tensor(BY_HAND[rule]))


def test_l1_norms_of_unequal_images():
    a, b = torch.tensor([3.0, 0.0]).reshape(1, 1, 1, 2), torch.tensor([-2.0, 4.0]).reshape(1, 1, 1, 2)
    torch.testing.assert_close(fusion_rule("fl1n")(a, b).flatten(), torch.tensor([(3 - 2 * 2) / 3, 8 / 3]))
    torch.testing.assert_close(fusion_rule("l1nw")(a, b).flatten(), torch.tensor([1.5 * 3 - 3 * 2, 12.0]))


def test_sfnn_by_hand():
    """Two channels at two pixels of a row: the norm of a map with one row is its length."""
    a = torch.tensor([[0.0, 0.0], [math.log(3), 0.0]]).reshape(1, 2, 1, 2)  # softmax: 1/4, 1/2 and 3/4, 1/2
    b = torch.zeros(1, 2, 1, 2)
    m_a, m_b = 9 / 16 + 1 / 4, 1 / 2  # squared
    w = m_a / (m_a + m_b)
    torch.testing.assert_close(fusion_rule("sfnn")(a, b), w * a, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(fusion_rule("sfnn")(a, b + 1), w * a + (1 - w), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [(9, 12), (12, 9), (6, 5, 7), (40, 3, 2)])
def test_nuclear_norm_against_singular_values(size):
    x = features(2, 3, *size)
    maps = x.softmax(1)
    unfoldings = [[m.movedim(axis, 0).flatten(1) for axis in range(m.dim())] for m in maps.flatten(0, 1)]
    norms = torch.stack([torch.stack([nuclear_norm(m) for m in ms]).mean() for ms in unfoldings])
    expected = norms.reshape(2, 3).amax(1).float()
    torch.testing.assert_close(fusion_rules._largest_nuclear_norm(x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("rule", RULES)
class TestEveryRule:
    def test_symmetric(self, rule, size):
        a, b = features(2, 3, *size), features(2, 3, *size, seed=1)
        fused = fusion_rule(rule)(a, b)
        assert fused.shape == a.shape
        torch.testing.assert_close(fused, fusion_rule(rule)(b, a), rtol=1e-4, atol=1e-5)

    def test_images_of_a_batch_are_apart(self, rule, size):
        a, b = features(2, 3, *size), features(2, 3, *size, seed=1)
        a[1] *= 10
        rows = torch.cat([fusion_rule(rule)(*row) for row in zip(a.split(1), b.split(1))])
        torch.testing.assert_close(fusion_rule(rule)(a, b), rows)

    @pytest.mark.parametrize("case", ["both zero", "one zero", "opposite"])
    def test_no_division_by_zero(self, rule, size, case):
        a = features(1, 3, *size) * (case != "both zero")
        b = -a if case == "opposite" else torch.zeros_like(a)
        a.requires_grad_()
        fused = fusion_rule(rule)(a, b)
        fused.sum().backward()
        assert fused.isfinite().all() and a.grad.isfinite().all()
        if case == "both zero":
            assert not fused.any()

    @pytest.mark.parametrize("scale", [1e-6, 1e4])
    def test_half_precision(self, rule, size, scale):
        """Squares of these over- and underflow in float16."""
        if rule in ("l1nw", "al1nw") and scale > 1:
            pytest.skip("their results are squares themselves")
        a, b = (scale * features(1, 3, *size, seed=seed) for seed in (0, 1))
        fused = fusion_rule(rule)(a.half(), b.half())
        assert fused.dtype == torch.half
        expected = fusion_rule(rule)(a.half().double(), b.half().double())
        torch.testing.assert_close(fused.double(), expected, rtol=2e-3, atol=1e-7)


def test_root_traces():
    """As by eigenvalues: of full and of low rank, of features that are nearly constant, and of zeros."""
    generator = torch.Generator().manual_seed(0)
    kinds = {"generator": generator, "dtype": torch.float64}
    noise = torch.randn(20, 30, **kinds)
    low = torch.rand(20, 2, **kinds) @ torch.rand(2, 30, **kinds)
    matrices = torch.stack([noise, low, 1 + 1e-3 * noise, 1 + 1e-6 * noise, torch.zeros_like(noise)])
    expected = torch.linalg.svdvals(matrices).sum(-1)
    torch.testing.assert_close(fusion_rules._root_traces(matrices @ matrices.mT), expected, rtol=2e-6, atol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_sfnn_in_a_cuda_graph():
    a, b = features(1, 2, 4, 4), features(1, 2, 4, 4, seed=1)
    expected = fusion_rule("sfnn")(a, b)
    a, b, graph = a.cuda(), b.cuda(), torch.cuda.CUDAGraph()
    fusion_rule("sfnn")(a, b)
    with torch.cuda.graph(graph):
        found = fusion_rule("sfnn")(a, b)
    graph.replay()
    torch.testing.assert_close(found.cpu(), expected)


@pytest.mark.parametrize("rule", ["fer", "fl1n", "abs_ratio", "sfnn"])
def test_equal_images_are_kept(rule):
    a = features(1, 3, 4, 6)
    torch.testing.assert_close(fusion_rule(rule)(a, a), a)


def test_abs_ratio_near_its_pole():
    """Each of its two terms is as large as a^2 / |a + b|."""
    a = features(1, 1, 64, 64)
    b = -a * (1 + 1e-5 * features(1, 1, 64, 64, seed=1))
    exact = a.double() * (a / (a + b).double()).abs() + b.double() * (b / (a + b).double()).abs()
    torch.testing.assert_close(fusion_rule("abs_ratio")(a, b)[a + b != 0].double(), exact[a + b != 0])

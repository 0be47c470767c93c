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

import numpy as np
import pytest
import torch

from custom_nets.ops import SCANS, scan_orders, to_raster, to_sequences

# odd sides, sides of one, no cubes
SHAPES = {2: [[5, 7], [1, 9], [6, 3]], 3: [[3, 5, 7], [4, 1, 6], [2, 3, 2]]}
CASES = [(scan, shape) for scan, by_dims in SCANS.items() for dims in by_dims for shape in SHAPES[dims]]


def visited(shape, orders):
    """Raster index of every visited voxel, ``(K, L)``."""
    return to_sequences(torch.arange(np.prod(shape)).view(1, -1, 1), shape, orders)[0, :, :, 0]


@pytest.mark.parametrize(
    "scan, dims, expected",
    [
        ("raster", 2, [([0, 1], False)]),
        ("raster", 3, [([0, 1, 2], False)]),
        ("cross", 2, [(axes, backward) for axes in ([0, 1], [1, 0]) for backward in (False, True)]),
        (
            "tri_plane",
            3,
            [(axes, backward) for axes in ([0, 1, 2], [1, 2, 0], [2, 0, 1]) for backward in (False, True)],
        ),
    ],
)
def test_directions_of_the_method(scan, dims, expected):
    assert scan_orders(scan, dims) == expected


def test_cross_scan_by_hand():
    assert visited([2, 3], scan_orders("cross", 2)).tolist() == [
        [0, 1, 2, 3, 4, 5],
        [5, 4, 3, 2, 1, 0],
        [0, 3, 1, 4, 2, 5],
        [5, 2, 4, 1, 3, 0],
    ]


@pytest.mark.parametrize("scan, shape", CASES)
def test_every_voxel_once(scan, shape):
    sequences = visited(shape, scan_orders(scan, len(shape)))
    assert torch.equal(sequences.sort(dim=1).values, torch.arange(np.prod(shape)).expand_as(sequences))


@pytest.mark.parametrize("scan, shape", CASES)
def test_neighbours_follow_the_order(scan, shape):
    """Like an odometer: the last axis of the order steps by one, and carries to the axis before it at its end."""
    orders = scan_orders(scan, len(shape))
    for (axes, backward), sequence in zip(orders, visited(shape, orders).numpy()):
        coordinates = np.stack(np.unravel_index(sequence[::-1] if backward else sequence, shape), axis=1)
        position = coordinates[0].copy()
        assert not position.any()
        for actual in coordinates[1:]:
            for axis in axes[::-1]:
                position[axis] = (position[axis] + 1) % shape[axis]
                if position[axis]:
                    break
            assert actual.tolist() == position.tolist(), (axes, backward)


@pytest.mark.parametrize("scan, shape", CASES)
def test_round_trips_are_exact(scan, shape):
    orders = scan_orders(scan, len(shape))
    x = torch.randn(2, int(np.prod(shape)), 3)
    back = to_raster(to_sequences(x, shape, orders), shape, orders)
    assert back.shape == (2, len(orders), *x.shape[1:])
    assert all(torch.equal(back[:, k], x) for k in range(len(orders)))
    # what differs between the directions stays with its direction
    sequences = torch.randn(back.shape)
    rasters = to_raster(sequences, shape, orders)
    for k, order in enumerate(orders):
        assert torch.equal(to_sequences(rasters[:, k], shape, [order])[:, 0], sequences[:, k])


@pytest.mark.parametrize("scan, dims", [("zigzag", 2), ("cross", 3), ("tri_plane", 2), ("raster", 1), ("raster", 4)])
def test_unknown_scans(scan, dims):
    with pytest.raises(ValueError, match=f"no scan named '{scan}' in {dims} dimensions"):
        scan_orders(scan, dims)

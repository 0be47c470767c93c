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

"""One registry of the fusion networks: a name to a class, so that a config, a table or a command picks one by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.nn as nn

__all__ = ["build_network", "network_names", "register_network"]

_NETWORKS: dict[str, type[nn.Module]] = {}
NetworkClass = TypeVar("NetworkClass", bound=type[nn.Module])


def register_network(name: str) -> Callable[[NetworkClass], NetworkClass]:
    """Class decorator that makes a fusion network known as ``name``.

    Every network takes ``spatial_dims`` and is called with ``(B, 2, H, W[, D])`` in [0, 1].
    """

    def register(cls: NetworkClass) -> NetworkClass:
        if name in _NETWORKS:
            raise ValueError(f"a network named {name!r} is registered already.")
        _NETWORKS[name] = cls
        return cls

    return register


def network_names() -> list[str]:
    """Names that :py:func:`build_network` knows."""
    return sorted(_NETWORKS)


def build_network(name: str, **kwargs: Any) -> nn.Module:
    """Builds the network called ``name`` with the arguments of its class.

    Raises:
        ValueError: if there is no such network.
    """
    if name not in _NETWORKS:
        raise ValueError(f"no network named {name!r}, choose one of {network_names()}.")
    return _NETWORKS[name](**kwargs)

"""What tells one model from another, and whether a plan or a cost table is for it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tvm_nm.inventory import Layer

__all__ = ["plain_target", "structure_digest"]


def structure_digest(layers: Sequence[Layer]) -> str:
    """Return a hash of the layers' names, shapes and attributes, in order; weights do not count."""
    described = [
        [
            *(layer.name, layer.kind, layer.weight_shape, layer.groups, layer.strides, layer.padding, layer.dilation),
            *(layer.input_shape, layer.output_shape),
        ]
        for layer in layers
    ]
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()


def plain_target(target: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of a target that say what code is made for: without the number of threads and TVM's defaults."""
    wanted = ("kind", "mtriple", "mcpu", "mattr")
    return {key: target[key] for key in wanted if target.get(key)}

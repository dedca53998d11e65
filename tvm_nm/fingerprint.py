"""What tells one model from another, and whether a plan or a cost table is for it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import onnx

from tvm_nm.linker import file_sha256

if TYPE_CHECKING:
    from tvm_nm.frontend import ImportedModel
    from tvm_nm.inventory import Layer

__all__ = ["model_sha256", "plain_target", "structure_digest"]


def model_sha256(imported: ImportedModel) -> str:
    """Return the hash of the model's file, or of the serialised model where there was no file."""
    if imported.path is not None:
        return file_sha256(imported.path)
    assert isinstance(imported.source, onnx.ModelProto)
    return hashlib.sha256(imported.source.SerializeToString(deterministic=True)).hexdigest()


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

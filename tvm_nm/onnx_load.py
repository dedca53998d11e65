"""Read ONNX files without trusting them.

A model file may be truncated, may be something else, may be larger than protobuf can hold, and may name files of
external data anywhere on the disk. Everything here ends in `UnsupportedModelError` or in arrays in memory.
"""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import numpy_helper

from tvm_nm.errors import UnsupportedModelError

__all__ = ["MAX_MODEL_BYTES", "Array", "Weights", "read_model", "split_model"]

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]
Weights: TypeAlias = dict[str, Array]
"""Constant tensors of a graph by name."""

MAX_MODEL_BYTES = 2**31 - 1
"""Largest model that is read, external data included: protobuf's own limit."""

_SMALL = 1024  # elements; constants up to this also stay in the skeleton, where shape inference reads them


def read_model(path: Path, *, max_bytes: int = MAX_MODEL_BYTES) -> onnx.ModelProto:
    """Parse a model file; external data is not loaded.

    Raises
    ------
    UnsupportedModelError
        If the file is missing, no regular file, empty, larger than `max_bytes`, or no ONNX model.
    """
    try:
        info = path.stat()
        if stat.S_ISDIR(info.st_mode):
            raise UnsupportedModelError(f"{path} is a directory; name the .onnx file in it")
        if not stat.S_ISREG(info.st_mode):
            raise UnsupportedModelError(f"{path} is not a regular file")
        if info.st_size == 0:
            raise UnsupportedModelError(f"{path} is empty; export the model again")
        if info.st_size > max_bytes:
            raise UnsupportedModelError(f"{path} has {info.st_size} bytes, more than the limit of {max_bytes}")
        data = path.read_bytes()
    except FileNotFoundError:
        raise UnsupportedModelError(f"{path}: no such file") from None
    except (OSError, ValueError) as err:  # ValueError: a null byte in the name
        raise UnsupportedModelError(f"{path} cannot be read: {getattr(err, 'strerror', None) or err}") from err
    model = onnx.ModelProto()
    try:
        model.ParseFromString(data)
    except DecodeError as err:
        raise UnsupportedModelError(f"{path} is not an ONNX file, or it is truncated; export the model again") from err
    if not model.HasField("graph") or not model.graph.output or not model.opset_import:
        raise UnsupportedModelError(f"{path} is not an ONNX model: it has no graph with outputs, or no operator set")
    return model


def split_model(
    model: onnx.ModelProto, folder: Path | None, *, max_bytes: int = MAX_MODEL_BYTES
) -> tuple[onnx.ModelProto, Weights]:
    """Separate a model into its graph and its constant tensors.

    The skeleton is small: shape inference and the checker can work on it without copying hundreds of megabytes.

    Parameters
    ----------
    model
        Not changed.
    folder
        Where external data lies, or None for a model that was not read from a file.
    max_bytes
        Limit on all constant tensors together.

    Returns
    -------
    skeleton
        The model without initializers above 1024 elements and without ``Constant`` nodes; every node has a unique
        name, every input that is no initializer is kept.
    weights
        All initializers and the values of the ``Constant`` nodes.

    Raises
    ------
    UnsupportedModelError
        If a tensor is damaged, too large, or its external data is missing or outside `folder`.
    """
    graph = model.graph
    for text in _texts(model):
        if isinstance(text, bytes):  # how protobuf hands out text that is no valid UTF-8
            raise UnsupportedModelError(f"the model is damaged: the name {text!r} is no valid UTF-8")
    weights: Weights = {}
    budget = max_bytes
    for tensor, name, where in _constant_tensors(graph):
        size = _byte_size(tensor, where)
        if size > budget:
            raise UnsupportedModelError(f"{where}: the model's constants exceed the limit of {max_bytes} bytes")
        budget -= size
        weights[name] = _array(tensor, where, folder)
    for sparse in graph.sparse_initializer:
        weights[sparse.values.name] = _dense(sparse, folder, budget)

    skeleton = onnx.ModelProto(ir_version=max(model.ir_version, 4))  # from 4 on, initializers need not be inputs
    skeleton.opset_import.extend(model.opset_import)
    skeleton.functions.extend(model.functions)
    skeleton.graph.name = graph.name or "graph"
    skeleton.graph.node.extend(n for n in graph.node if not _is_tensor_constant(n))
    skeleton.graph.input.extend(i for i in graph.input if i.name not in weights)
    skeleton.graph.output.extend(graph.output)
    for name, array in weights.items():
        if array.size <= _SMALL:
            skeleton.graph.initializer.append(numpy_helper.from_array(array, name))
    _name_nodes(skeleton.graph)
    return skeleton, weights


def _texts(model: onnx.ModelProto) -> Iterator[str | bytes]:
    """Yield every name that later code reads."""
    graph = model.graph
    yield graph.name
    yield from (entry.domain for entry in model.opset_import)
    yield from (tensor.name for tensor in graph.initializer)
    yield from (sparse.values.name for sparse in graph.sparse_initializer)
    for value in (*graph.input, *graph.output):
        yield value.name
        yield from (dim.dim_param for dim in value.type.tensor_type.shape.dim)
    for node in graph.node:
        yield from (node.name, node.op_type, node.domain, *node.input, *node.output)
        yield from (attribute.name for attribute in node.attribute)


def _is_tensor_constant(node: onnx.NodeProto) -> bool:
    return node.op_type == "Constant" and node.domain in ("", "ai.onnx")


def _constant_tensors(graph: onnx.GraphProto) -> Iterator[tuple[onnx.TensorProto, str, str]]:
    """Yield tensor, the name of the value it gives, and words for it in errors."""
    for tensor in graph.initializer:
        yield tensor, tensor.name, f"initializer {tensor.name!r}"
    for node in graph.node:
        if not _is_tensor_constant(node) or len(node.output) != 1:
            continue
        where = f"node {node.name or node.output[0]!r} (Constant)"
        tensor = _constant_value(node)
        if tensor is None:
            raise UnsupportedModelError(f"{where} has no value that is a tensor of numbers")
        yield tensor, node.output[0], where


def _constant_value(node: onnx.NodeProto) -> onnx.TensorProto | None:
    for attribute in node.attribute:
        if attribute.name == "value":
            return attribute.t
        if attribute.name in ("value_float", "value_floats"):
            array = np.array(onnx.helper.get_attribute_value(attribute), dtype=np.float32)
            return numpy_helper.from_array(array)
        if attribute.name in ("value_int", "value_ints"):
            array = np.array(onnx.helper.get_attribute_value(attribute), dtype=np.int64)
            return numpy_helper.from_array(array)
    return None


def _byte_size(tensor: onnx.TensorProto, where: str) -> int:
    if any(d < 0 for d in tensor.dims):
        raise UnsupportedModelError(f"{where} has a negative dimension: {list(tensor.dims)}")
    try:
        itemsize = int(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)
    except (KeyError, TypeError) as err:
        raise UnsupportedModelError(f"{where} has no valid data type ({tensor.data_type})") from err
    return math.prod(map(int, tensor.dims)) * itemsize


def _array(tensor: onnx.TensorProto, where: str, folder: Path | None) -> Array:
    if tensor.data_type == onnx.TensorProto.STRING:
        raise UnsupportedModelError(f"{where} holds strings; only numbers are supported")
    try:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            return _external_array(tensor, where, folder)
        array: Array = numpy_helper.to_array(tensor)
        return array.reshape(tuple(tensor.dims))
    except UnsupportedModelError:
        raise
    except Exception as err:
        # onnx reports damaged tensors through whatever NumPy or the C++ side happens to raise.
        raise UnsupportedModelError(f"{where} is damaged: {_first_line(err)}") from err


def _external_array(tensor: onnx.TensorProto, where: str, folder: Path | None) -> Array:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    if folder is None:
        raise UnsupportedModelError(
            f"{where} has external data ({location!r}), but the model was not given as a file; "
            "load it with onnx.load, or pass the path"
        )
    path = _external_path(location, where, folder)
    try:
        offset, length = int(entries.get("offset", 0)), int(entries.get("length", -1))
    except ValueError as err:
        raise UnsupportedModelError(f"{where}: offset or length of its external data is no number") from err
    expected = _byte_size(tensor, where)
    size = path.stat().st_size
    if length not in (-1, expected) or offset < 0 or offset + expected > size:
        raise UnsupportedModelError(
            f"{where} needs {expected} bytes at {offset} of {location!r}, which has {size} (length given: {length})"
        )
    with path.open("rb") as file:
        file.seek(offset)
        data = file.read(expected)
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    return np.frombuffer(data, dtype=dtype).reshape(tuple(tensor.dims))


def _external_path(location: str, where: str, folder: Path) -> Path:
    """Resolve the name of an external data file; it has to lie in the model's folder, links followed."""
    remedy = "copy it there and save the model again"
    if not location or "\0" in location or os.path.isabs(location):
        raise UnsupportedModelError(
            f"{where}: external data at {location!r} is not inside the model's folder; {remedy}"
        )
    root = folder.resolve()
    path = (root / location).resolve()
    if not path.is_relative_to(root):
        raise UnsupportedModelError(
            f"{where}: external data at {location!r} is not inside the model's folder; {remedy}"
        )
    if not path.is_file():
        raise UnsupportedModelError(f"{where}: external data file {location!r} is missing; put it beside the model")
    return path


def _dense(sparse: onnx.SparseTensorProto, folder: Path | None, budget: int) -> Array:
    """Write out a sparse initializer: indices are linear (NNZ,) or by axis (NNZ, rank)."""
    where = f"sparse initializer {sparse.values.name!r}"
    if min(sparse.dims, default=0) < 0 or 4 * math.prod(sparse.dims) > budget:
        raise UnsupportedModelError(f"{where} has the impossible shape {list(sparse.dims)}")
    values, indices = _array(sparse.values, where, folder), _array(sparse.indices, where, folder)
    out = np.zeros(tuple(sparse.dims), values.dtype)
    try:
        if indices.ndim == 1:
            out.reshape(-1)[indices] = values
        else:
            out[tuple(indices.T)] = values
    except (IndexError, ValueError) as err:
        raise UnsupportedModelError(f"{where} is damaged: {_first_line(err)}") from err
    return out


def _name_nodes(graph: onnx.GraphProto) -> None:
    """Give every node a unique name; exporters leave them out, and errors and layers need them."""
    taken: set[str] = set()
    for index, node in enumerate(graph.node):
        name = node.name or next((o for o in node.output if o), f"{node.op_type}_{index}")
        name = "".join(c if c.isprintable() else "_" for c in name)  # it will be shown in tables
        unique, count = name, 1
        while unique in taken:
            unique, count = f"{name}_{count}", count + 1
        taken.add(unique)
        node.name = unique


def _first_line(err: BaseException) -> str:
    lines = str(err).strip().splitlines()
    return lines[0] if lines else type(err).__name__

"""Make a graph static: input shapes are fixed, shape arithmetic and constant sub-graphs are computed.

Works on the skeleton and the weights of `tvm_nm.onnx_load.split_model` and changes both in place.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper, numpy_helper, shape_inference
from onnx.reference import ReferenceEvaluator

from tvm_nm.errors import UnsupportedModelError
from tvm_nm.onnx_checks import check_structure, first_line, opset_of, shape_error
from tvm_nm.onnx_load import MAX_MODEL_BYTES, Array, Weights

__all__ = [
    "Shape",
    "ValueTypes",
    "fix_shapes",
    "fold_constants",
    "inline_functions",
    "parse_shapes",
    "transpose_gemm_weights",
]

Shape = tuple[int, ...]

_MAX_ROUNDS = 20
_SMALL = 1024
# Their output may be larger than any product of their inputs: folded only if shape inference knows how large.
_GROWING = ("ConstantOfShape", "Expand", "Tile", "Range", "Resize", "Upsample", "OneHot", "EyeLike", "Pad")


@dataclass(frozen=True, slots=True)
class ValueTypes:
    """Element types and static shapes of a graph's values, as far as onnx can infer them."""

    types: Mapping[str, int]
    shapes: Mapping[str, Shape]


def parse_shapes(texts: Iterable[str]) -> dict[str, Shape]:
    """Parse ``name:1,3,224,224``, the form of the command line's ``--shape``.

    Raises
    ------
    ValueError
        Saying which text does not have the form.

    Examples
    --------
    >>> parse_shapes(["input:1,3,224,224"])
    {'input': (1, 3, 224, 224)}
    """
    shapes: dict[str, Shape] = {}
    for text in texts:
        name, _, dims = text.rpartition(":")  # names may hold colons themselves
        if not name or not re.fullmatch(r"\s*[0-9]+(\s*,\s*[0-9]+)*\s*", dims):
            raise ValueError(f"shape {text!r} is not of the form NAME:1,3,224,224")
        if name in shapes:
            raise ValueError(f"input {name!r} has two shapes")
        shapes[name] = tuple(int(d) for d in dims.split(","))
    return shapes


def fix_shapes(graph: onnx.GraphProto, shapes: Mapping[str, Sequence[int]]) -> None:
    """Write static shapes into the graph's inputs and forget all other shapes.

    A symbolic first axis is the batch and becomes 1. Other symbolic axes need an entry in `shapes`; an axis that has
    the name of one that `shapes` fixes elsewhere gets the same value.

    Raises
    ------
    UnsupportedModelError
        If a name is unknown, a rank or a fixed dimension differs, or an axis stays symbolic.
    """
    inputs = {value.name: value for value in graph.input}
    for name in shapes:
        if name not in inputs:
            raise UnsupportedModelError(
                f"the model has no input {name!r}; its inputs are {', '.join(map(repr, inputs)) or 'none'}"
            )
    symbols: dict[str, int] = {}
    for name, wanted in shapes.items():
        _check_wanted(inputs[name], tuple(wanted))
        for dim, size in zip(inputs[name].type.tensor_type.shape.dim, wanted, strict=False):
            if dim.dim_param and symbols.setdefault(dim.dim_param, size) != size:
                raise UnsupportedModelError(
                    f"axis {dim.dim_param!r} would be both {symbols[dim.dim_param]} and {size}; give one value"
                )
    for value in graph.input:
        if not value.type.HasField("tensor_type"):
            raise UnsupportedModelError(f"input {value.name!r} is not a tensor; export the model with plain tensors")
        _set_shape(value, shapes.get(value.name) or _default_shape(value, symbols))
    for value in graph.output:
        for dim in value.type.tensor_type.shape.dim:
            dim.Clear()  # follows from the inputs; what is written there may be symbolic


def _check_wanted(value: onnx.ValueInfoProto, wanted: Shape) -> None:
    if any(int(d) <= 0 for d in wanted):
        raise UnsupportedModelError(f"shape {list(wanted)} of input {value.name!r} has an axis that is not positive")
    if not value.type.tensor_type.HasField("shape"):
        return
    dims = value.type.tensor_type.shape.dim
    own = ", ".join(str(d.dim_value) if d.dim_value > 0 else d.dim_param or "?" for d in dims)
    if len(dims) != len(wanted):
        raise UnsupportedModelError(
            f"input {value.name!r} has {len(dims)} axes ({own}), the shape {list(wanted)} has {len(wanted)}"
        )
    if any(d.dim_value > 0 and d.dim_value != w for d, w in zip(dims, wanted, strict=True)):
        raise UnsupportedModelError(
            f"input {value.name!r} has the fixed shape ({own}), which {list(wanted)} contradicts; "
            "export the model with that shape"
        )


def _default_shape(value: onnx.ValueInfoProto, symbols: Mapping[str, int]) -> Shape:
    tensor = value.type.tensor_type
    if not tensor.HasField("shape"):
        raise UnsupportedModelError(f"input {value.name!r} has no shape; give it with --shape {value.name}:1,3,224,224")
    sizes: list[int] = []
    for axis, dim in enumerate(tensor.shape.dim):
        if dim.dim_value > 0:
            sizes.append(dim.dim_value)
        elif dim.dim_param in symbols:
            sizes.append(symbols[dim.dim_param])
        elif axis == 0:
            sizes.append(1)
        else:
            shown = ",".join(
                str(d.dim_value) if d.dim_value > 0 else "1" if a == 0 else (d.dim_param or "?").upper()
                for a, d in enumerate(tensor.shape.dim)
            )
            raise UnsupportedModelError(
                f"axis {axis} of input {value.name!r} is symbolic ({dim.dim_param or '?'}); "
                f"give its size with --shape {value.name}:{shown}"
            )
    return tuple(sizes)


def _set_shape(value: onnx.ValueInfoProto, shape: Sequence[int]) -> None:
    value.type.tensor_type.ClearField("shape")
    value.type.tensor_type.shape.SetInParent()  # a scalar has a shape, too
    for size in shape:
        value.type.tensor_type.shape.dim.add().dim_value = int(size)


def inline_functions(skeleton: onnx.ModelProto) -> onnx.ModelProto:
    """Replace calls of the model's own functions by their bodies."""
    if not skeleton.functions:
        return skeleton
    from onnx import inliner

    try:
        return inliner.inline_local_functions(skeleton)
    except Exception as err:
        raise UnsupportedModelError(f"the model's local functions cannot be inlined: {first_line(err)}") from err


def fold_constants(skeleton: onnx.ModelProto, weights: Weights) -> ValueTypes:
    """Check the graph, infer all shapes, and compute every node whose inputs are constant.

    Shape of a tensor of static shape counts as constant, so what exporters write for ``x.view(x.size(0), -1)`` is gone
    afterwards, and so are ConstantOfShape, Identity and Cast of weights, and nodes that no output needs. Constants
    that no node reads any more are dropped from `weights`.

    Parameters
    ----------
    skeleton, weights
        From `split_model`, input shapes fixed. Changed in place.

    Raises
    ------
    UnsupportedModelError
        If the graph is invalid or its shapes do not fit.
    """
    graph = skeleton.graph
    _drop_dead(graph)
    check_structure(_with_weight_inputs(skeleton, weights))
    opset = opset_of(skeleton)
    for _ in range(_MAX_ROUNDS):
        known = _infer(skeleton, weights)
        folded = _fold_round(graph, weights, known, opset)
        if not folded:
            break
    _drop_dead(graph)
    needed = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
    for name in [n for n in weights if n not in needed]:
        del weights[name]
    return known


def transpose_gemm_weights(graph: onnx.GraphProto, weights: Weights) -> None:
    """Turn ``x @ W.T`` of Gemm into ``x @ V`` with V a view of W, so that W itself is never copied into the module."""
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    outputs = {value.name for value in graph.output}
    for name, nodes in readers.items():
        if name not in weights or name in outputs:
            continue
        flags = [next((a for a in n.attribute if a.name == "transB"), None) for n in nodes]
        if all(
            n.op_type == "Gemm" and flag is not None and flag.i and list(n.input).index(name) == 1
            for n, flag in zip(nodes, flags, strict=True)
        ):
            weights[name] = weights[name].T
            for flag in flags:
                assert flag is not None
                flag.i = 0


def _drop_dead(graph: onnx.GraphProto) -> None:
    needed = {value.name for value in graph.output}
    kept = []
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            needed.update(node.input)
            needed.update(_outer_names(node))
            kept.append(node)
    if len(kept) != len(graph.node):
        nodes = [onnx.NodeProto.FromString(n.SerializeToString()) for n in reversed(kept)]
        del graph.node[:]
        graph.node.extend(nodes)


def _outer_names(node: onnx.NodeProto) -> set[str]:
    """Names that a node's sub-graphs read, from inside or outside."""
    names: set[str] = set()
    for attribute in node.attribute:
        for graph in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
            for inner in graph.node:
                names.update(inner.input)
                names |= _outer_names(inner)
            names.update(value.name for value in graph.output)
    return names


def _with_weight_inputs(skeleton: onnx.ModelProto, weights: Weights) -> onnx.ModelProto:
    """Copy the skeleton and declare the large weights as inputs: their shapes are known, their values are not."""
    model = onnx.ModelProto()
    model.CopyFrom(skeleton)
    present = {tensor.name for tensor in model.graph.initializer}
    for name, array in weights.items():
        if name not in present:
            kind = helper.np_dtype_to_tensor_dtype(array.dtype)
            model.graph.input.append(helper.make_tensor_value_info(name, kind, array.shape))
    return model


def _infer(skeleton: onnx.ModelProto, weights: Weights) -> ValueTypes:
    try:
        inferred = shape_inference.infer_shapes(
            _with_weight_inputs(skeleton, weights), check_type=True, strict_mode=True, data_prop=True
        ).graph
    except Exception as err:  # InferenceError, and what the C++ side throws for damaged attributes
        raise shape_error(err) from err
    types: dict[str, int] = {name: helper.np_dtype_to_tensor_dtype(a.dtype) for name, a in weights.items()}
    shapes: dict[str, Shape] = {name: a.shape for name, a in weights.items()}
    for value in (*inferred.input, *inferred.value_info, *inferred.output):
        tensor = value.type.tensor_type
        types[value.name] = tensor.elem_type
        if tensor.HasField("shape") and all(d.HasField("dim_value") for d in tensor.shape.dim):
            shapes[value.name] = tuple(d.dim_value for d in tensor.shape.dim)
    return ValueTypes(types, shapes)


def _fold_round(graph: onnx.GraphProto, weights: Weights, known: ValueTypes, opset: int) -> bool:
    kept, folded = [], False
    for node in graph.node:
        values = _constant_outputs(node, weights, known, opset)
        if values is None:
            kept.append(onnx.NodeProto.FromString(node.SerializeToString()))
            continue
        folded = True
        _check_budget(sum(a.nbytes for a in weights.values()) + sum(a.nbytes for a in values), node)
        for name, array in zip(node.output, values, strict=False):
            if name:
                weights[name] = array
                if array.size <= _SMALL:
                    graph.initializer.append(numpy_helper.from_array(array, name))
    if folded:
        del graph.node[:]
        graph.node.extend(kept)
    return folded


def _constant_outputs(node: onnx.NodeProto, weights: Weights, known: ValueTypes, opset: int) -> list[Array] | None:
    """Compute the outputs of a node that does not depend on the model's inputs; None for others."""
    if node.op_type in ("Shape", "Size") and node.input[0] in known.shapes:
        shape = known.shapes[node.input[0]]
        if node.op_type == "Size":
            return [np.array(math.prod(shape), dtype=np.int64)]
        bounds = {a.name: a.i for a in node.attribute}
        return [np.array(shape[bounds.get("start", 0) : bounds.get("end")], dtype=np.int64)]
    if not node.input or any(name and name not in weights for name in node.input):
        return None
    if node.op_type == "Identity":
        return [weights[node.input[0]]]
    size = known.shapes.get(node.output[0])
    if size is None and node.op_type in _GROWING:
        return None
    if size is not None:
        _check_budget(sum(a.nbytes for a in weights.values()) + 4 * math.prod(size), node)
    try:
        inputs = {name: weights[name] for name in node.input if name}
        outputs = [name for name in node.output if name]
        # As a graph: for a node alone the operator set cannot be chosen.
        ends = [[onnx.ValueInfoProto(name=name) for name in names] for names in (inputs, outputs)]
        evaluator = ReferenceEvaluator(helper.make_graph([node], "fold", *ends), opsets={"": opset})
        results = dict(zip(outputs, evaluator.run(None, inputs), strict=True))
    except Exception as err:
        raise UnsupportedModelError(
            f"its inputs are constant, but it cannot be computed: {first_line(err)}", node=node.name, op=node.op_type
        ) from err
    return [np.asarray(results[name]) if name else np.empty(0) for name in node.output]


def _check_budget(size: int, node: onnx.NodeProto) -> None:
    if size > MAX_MODEL_BYTES:
        raise UnsupportedModelError(
            f"the model's constants would take {size} bytes, more than the limit of {MAX_MODEL_BYTES}",
            node=node.name,
            op=node.op_type,
        )

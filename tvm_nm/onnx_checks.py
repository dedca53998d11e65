"""What an ONNX graph must not hold, and the one line that says so."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np
import onnx
from onnx import TensorProto
from tvm.relax.frontend.onnx import onnx_frontend

from tvm_nm.errors import UnsupportedModelError
from tvm_nm.onnx_load import Array, Weights

__all__ = [
    "MIN_OPSET",
    "check_finite",
    "check_operators",
    "check_structure",
    "check_types",
    "first_line",
    "opset_of",
    "shape_error",
]

MIN_OPSET = 7
"""Before it, Add and its kin broadcast by rules of their own; neither TVM nor onnxruntime reads them."""

_QUANTISED = "quantised models are not supported; export the float32 model"
_CONTROL = "control flow is not supported; export the model with loops unrolled and conditions resolved"
_SEQUENCE = "sequences and optional values are not supported; export the model with plain tensors"
_RECURRENT = "recurrent layers are not supported; only feed-forward models are"
_RANDOM = "random operators are not supported; export the model in inference mode"

_REASONS = {
    **dict.fromkeys(
        (
            *("QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger", "MatMulInteger16", "QuantizeLinear"),
            *("DequantizeLinear", "DynamicQuantizeLinear", "QLinearAdd", "QLinearConcat", "QLinearMul", "QGemm"),
            *("QLinearAveragePool", "QLinearGlobalAveragePool", "QLinearLeakyRelu", "QLinearSigmoid"),
        ),
        _QUANTISED,
    ),
    **dict.fromkeys(("If", "Loop", "Scan"), _CONTROL),
    **dict.fromkeys(
        (
            *("SequenceAt", "SequenceConstruct", "SequenceEmpty", "SequenceErase", "SequenceInsert", "SequenceLength"),
            *("SequenceMap", "SplitToSequence", "ConcatFromSequence"),
            *("Optional", "OptionalGetElement", "OptionalHasElement"),
        ),
        _SEQUENCE,
    ),
    **dict.fromkeys(("LSTM", "GRU", "RNN"), _RECURRENT),
    **dict.fromkeys(
        ("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli"), _RANDOM
    ),
}

_ALLOWED_TYPES = (
    TensorProto.UNDEFINED,  # not inferred: TVM infers its own
    *(TensorProto.FLOAT, TensorProto.INT64, TensorProto.INT32, TensorProto.BOOL),
)
_MAY_BE_INFINITE = ("Clip", "Max", "Min", "Pad", "Where")  # as bounds and as padding of max pools


def first_line(err: BaseException) -> str:
    """First line of an exception's message that says something."""
    lines = [line.strip() for line in str(err).splitlines() if line.strip()]
    return lines[0] if lines else type(err).__name__


def opset_of(model: onnx.ModelProto) -> int:
    """Version of the standard operator set.

    Raises
    ------
    UnsupportedModelError
        If there is none, or it is older than `MIN_OPSET`.
    """
    versions = [entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")]
    if not versions:
        raise UnsupportedModelError("the model does not use the standard operator set (ai.onnx)")
    if versions[0] < MIN_OPSET:
        raise UnsupportedModelError(
            f"operator set {versions[0]} is too old; "
            f"convert the model with onnx.version_converter to {MIN_OPSET} or later"
        )
    return int(versions[0])


def check_operators(graph: onnx.GraphProto, weights: Weights) -> None:
    """Refuse operators without a converter, control flow, quantisation, training mode, custom domains.

    Raises
    ------
    UnsupportedModelError
        For the first such node, naming it.
    """
    known = onnx_frontend._get_convert_map()
    for node in graph.node:
        if node.op_type in _REASONS:
            raise UnsupportedModelError(_REASONS[node.op_type], node=node.name, op=node.op_type)
        if node.domain not in ("", "ai.onnx"):
            raise UnsupportedModelError(
                f"operators of the domain {node.domain!r} are not supported; "
                "export the model with standard ONNX operators only",
                node=node.name,
                op=node.op_type,
            )
        if node.op_type not in known:
            raise UnsupportedModelError(
                "TVM has no converter for this operator; export the model without it", node=node.name, op=node.op_type
            )
        if _is_training(node, weights):
            raise UnsupportedModelError(
                "the node is in training mode; export the model in inference mode", node=node.name, op=node.op_type
            )


def _is_training(node: onnx.NodeProto, weights: Weights) -> bool:
    if node.op_type == "BatchNormalization":
        return any(a.name == "training_mode" and a.i for a in node.attribute)
    if node.op_type == "Dropout" and len(node.input) > 2 and node.input[2] in weights:
        return bool(weights[node.input[2]].any())
    return False


def check_structure(model: onnx.ModelProto) -> None:
    """Run onnx's checker: unsorted graphs, undefined names, missing attributes.

    Parameters
    ----------
    model
        A copy: outputs without a shape get one.

    Raises
    ------
    UnsupportedModelError
        With the checker's first line.
    """
    for value in model.graph.output:
        value.type.tensor_type.shape.SetInParent()  # required by the checker, by nobody else
    try:
        onnx.checker.check_model(model)
    except onnx.checker.ValidationError as err:
        raise UnsupportedModelError(f"invalid ONNX model: {_without_tags(first_line(err))}") from err


def shape_error(err: Exception) -> UnsupportedModelError:
    """Turn an error of onnx's shape inference into one that names the node."""
    text = " ".join(str(err).split())
    found = re.search(r"\(op_type: ?([^,)]*)(?:, node name: ?(.*?))?\): ?(.*)", text)
    if found is None:
        return UnsupportedModelError(f"shapes do not fit: {_without_tags(text)}")
    op, node, reason = found.groups()
    return UnsupportedModelError(f"shapes do not fit: {_without_tags(reason)}", node=node or op, op=op)


def _without_tags(text: str) -> str:
    return re.sub(r"\[[A-Za-z]+Error\]\s*", "", text).strip()


def check_types(graph: onnx.GraphProto, types: Mapping[str, int]) -> None:
    """Refuse tensors that are neither float32 nor the integers and booleans of shape arithmetic.

    Parameters
    ----------
    graph
        The graph after constants have been folded.
    types
        Element types by value name, as far as they are known.

    Raises
    ------
    UnsupportedModelError
        Naming the input or the node.
    """
    for value in graph.input:
        kind = types.get(value.name, TensorProto.UNDEFINED)
        if kind != TensorProto.FLOAT:
            raise UnsupportedModelError(f"input {value.name!r} is {_type_name(kind)}; {_only_float(kind)}")
    for node in graph.node:
        for name in (*node.input, *node.output):
            kind = types.get(name, TensorProto.UNDEFINED)
            if kind not in _ALLOWED_TYPES:
                raise UnsupportedModelError(
                    f"tensor {name!r} is {_type_name(kind)}; {_only_float(kind)}", node=node.name, op=node.op_type
                )


def _type_name(kind: int) -> str:
    return str(TensorProto.DataType.Name(kind)).lower() if kind else "of unknown type"


def _only_float(kind: int) -> str:
    integers = (TensorProto.INT8, TensorProto.UINT8, TensorProto.INT16, TensorProto.UINT16)
    return _QUANTISED if kind in integers else "only float32 models are supported; export the float32 model"


def check_finite(graph: onnx.GraphProto, weights: Weights) -> None:
    """Refuse NaN and infinite weights, and batch norms with a negative variance.

    Raises
    ------
    UnsupportedModelError
        Naming the tensor and the node that reads it.
    """
    checked: set[str] = set()
    for node in graph.node:
        for name in node.input:
            array = weights.get(name)
            if array is None or array.dtype.kind != "f" or name in checked or node.op_type in _MAY_BE_INFINITE:
                continue
            checked.add(name)
            if not _is_finite(array):
                raise UnsupportedModelError(
                    f"weight {name!r} holds NaN or infinite values; train or export the model again",
                    node=node.name,
                    op=node.op_type,
                )
        if node.op_type == "BatchNormalization" and len(node.input) > 4:
            variance = weights.get(node.input[4])
            epsilon = next((a.f for a in node.attribute if a.name == "epsilon"), 1e-5)
            if variance is not None and variance.size and float(variance.min()) + epsilon <= 0:
                raise UnsupportedModelError(
                    f"variance {node.input[4]!r} is negative ({float(variance.min()):g})",
                    node=node.name,
                    op=node.op_type,
                )


def _is_finite(array: Array) -> bool:
    # In pieces: the temporary of np.isfinite would be a quarter of a VGG's 400 MB.
    flat = array.reshape(-1)
    step = 1 << 20
    return all(bool(np.isfinite(flat[i : i + step]).all()) for i in range(0, flat.size, step))

"""From a static ONNX graph to a Relax module, by TVM's importer with some converters replaced.

TVM's own converters are used wherever they give what later passes can read. Replaced are those that hide an operator
in a TIR function (Clip, Pad, padding by ``auto_pad``) or disagree with the standard (``auto_pad`` of pools, average
pools in ceil mode, ``output_shape`` of transposed convolutions, scales of Resize, Upsample), and those whose result
has to be told apart later: every convolution and FC gets a variable whose name leads back to its node. TVM's loop over
the nodes is replaced because it prints to stdout when a converter fails, and does not name the node.
"""

from __future__ import annotations

import contextlib
import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import onnx
import tvm
from tvm import relax
from tvm.relax.frontend.onnx.onnx_frontend import ONNXGraphImporter, onnx_input

from tvm_nm.errors import UnsupportedModelError
from tvm_nm.onnx_checks import first_line, opset_of
from tvm_nm.onnx_geometry import resized_shape, write_transposed_padding
from tvm_nm.onnx_load import MAX_MODEL_BYTES, Weights
from tvm_nm.relax_numpy import as_constant

__all__ = ["import_graph"]

_DTYPES = ("float32", "int64", "int32", "bool")


def import_graph(skeleton: onnx.ModelProto, weights: Weights) -> tuple[tvm.IRModule, dict[str, str]]:
    """Translate a checked, static graph.

    Parameters
    ----------
    skeleton
        From `tvm_nm.onnx_load.split_model`, after `tvm_nm.onnx_shapes.fold_constants`.
    weights
        The constants; emptied on the way so that each lives in memory once.

    Returns
    -------
    module
        Function "main" in one dataflow block, not yet canonical.
    names
        ONNX node name by name of the Relax variable, for every node's main result.

    Raises
    ------
    UnsupportedModelError
        If a converter refuses a node, or a tensor has no static shape or a dtype that is not supported.
    """
    importer = _Importer(weights)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the importer warns of every name that it changes
        try:
            module = importer.from_onnx(skeleton.graph, opset_of(skeleton))
        except (UnsupportedModelError, KeyboardInterrupt):
            importer.bb._end_block()  # a builder that goes with an open block prints a warning to stderr
            raise
    _check_static(module, importer.node_names, {node.name: node.op_type for node in skeleton.graph.node})
    return module, importer.node_names


def _check_static(module: tvm.IRModule, node_names: dict[str, str], node_ops: dict[str, str]) -> None:
    owner = ""
    owned = []
    for block in reversed(module["main"].body.blocks):
        for binding in reversed(block.bindings):
            owner = node_names.get(binding.var.name, owner)  # what a converter binds on the way comes before its result
            owned.append((binding.var.ty, owner))
    for ty, node in reversed(owned):
        reason = _unsuitable(ty)
        if reason:
            raise UnsupportedModelError(reason, node=node, op=node_ops.get(node))


def _unsuitable(ty: Any) -> str:
    if not isinstance(ty, relax.TensorType):
        return ""
    if ty.shape is None or not all(isinstance(d, tvm.tirx.IntImm) for d in ty.shape):
        return "the shape of its output depends on the data"
    shape = [int(d) for d in ty.shape]
    if min(shape, default=1) <= 0 or 4 * math.prod(shape) > MAX_MODEL_BYTES:
        return f"its output would have the shape {shape}"
    return "" if str(ty.dtype) in _DTYPES else f"its output is {ty.dtype}; only float32 is supported"


@contextlib.contextmanager
def _naming(node: onnx.NodeProto) -> Iterator[None]:
    """Turn whatever a converter raises into an error that names the node."""
    try:
        yield
    except UnsupportedModelError as err:
        raise err if err.node else UnsupportedModelError(err.reason, node=node.name, op=node.op_type) from err
    except Exception as err:
        # Converters fail in as many ways as there are exceptions, and TVM's C++ errors are among them.
        raise UnsupportedModelError(
            f"TVM's importer refuses it: {first_line(err)}", node=node.name, op=node.op_type
        ) from err


class _Nodes(dict[str, Any]):
    """Expressions by value name; weights become Relax constants when they are first read."""

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        self._weights = weights

    def __missing__(self, name: str) -> Any:
        self[name] = as_constant(self._weights.pop(name))
        return self[name]


class _Importer(ONNXGraphImporter):  # type: ignore[misc]
    """TVM's importer with names, and with the converters below."""

    def __init__(self, weights: Weights) -> None:
        super().__init__({}, "float32")
        self._nodes = _Nodes(weights)
        self._taken = {"main"}  # variables and functions share their names
        self.node_names: dict[str, str] = {}
        self._hint = ""

    def _parse_graph_initializers(self, graph: onnx.GraphProto) -> None:
        """Constants come from the weights, not from the graph."""

    def _check_for_unsupported_ops(self, graph: onnx.GraphProto) -> None:
        """Do nothing: operators are checked before, with better words."""

    def _sanitize_name(self, name: str) -> str:
        """Turn any text into an identifier that no other variable has."""
        base = re.sub(r"\W+", "_", name, flags=re.ASCII).strip("_") or "value"
        base = base if not base[0].isdigit() else f"v{base}"
        unique, count = base, 1
        while unique in self._taken:
            unique, count = f"{base}_{count}", count + 1
        self._taken.add(unique)
        return unique

    def _construct_nodes(self, graph: onnx.GraphProto) -> None:
        for node in graph.node:
            with _naming(node):
                self._construct_node(node)
        for output in graph.output:
            value = self._nodes[output.name]
            if not isinstance(value, relax.Var):
                self._nodes[output.name] = self.bb.emit(value, name_hint=self._sanitize_name(output.name))

    def _construct_node(self, node: onnx.NodeProto) -> None:
        attributes = self._parse_attr(node.attribute)
        attributes["tvm_custom"] = {"name": node.name, "num_outputs": len(node.output)}
        inputs = onnx_input(self._nodes[name] if name else None for name in node.input)
        self._hint = self._sanitize_name(node.name)
        converter = _CONVERTERS.get(node.op_type)
        value = converter(self, inputs, attributes) if converter else None
        if value is None:
            value = self._convert_operator(node.op_type, inputs, attributes, self.opset)
        outputs = [name for name in node.output if name]
        results = self._results(value, node.name)
        if len(results) < len(outputs):
            raise UnsupportedModelError(
                f"TVM computes {len(results)} of its {len(outputs)} outputs", node=node.name, op=node.op_type
            )
        for name, result in zip(node.output, results, strict=False):
            if name:
                self._nodes[name] = result

    def _results(self, value: Any, node: str) -> list[Any]:
        """Bind what a converter returned to variables."""
        if isinstance(value, relax.Tuple):
            return [self._results(field, node)[0] for field in value.fields]
        if isinstance(value, relax.Var):  # bound by the converter itself, or by another node if this one is an identity
            self.node_names.setdefault(value.name, node)
            return [value]
        if not isinstance(value, relax.Expr) or isinstance(value, tvm.ir.GenericConst | relax.ShapeExpr):
            return [value]
        value = self.bb.normalize(value)
        if isinstance(value.ty, relax.TupleType):
            var = self.bb.emit(value, name_hint=self._sanitize_name(f"{self._hint}_all"))
            return [self._named(relax.TupleGetItem(var, i), node) for i in range(len(value.ty.fields))]
        return [self._named(value, node)] if isinstance(value.ty, relax.TensorType) else [value]

    def _named(self, value: Any, node: str, suffix: str = "") -> Any:
        taken = self._hint in self.node_names
        hint = self._sanitize_name(self._hint + suffix) if taken or suffix else self._hint
        var = self.bb.emit(value, name_hint=hint)
        self.node_names[var.name] = node
        return var

    # Converters: each returns an expression, or None to leave the node to TVM's.

    def _layer(self, call: Any, attributes: dict[str, Any]) -> Any:
        return self._named(call, attributes["tvm_custom"]["name"])

    def _conv(self, inputs: Any, attributes: dict[str, Any]) -> Any:
        data, weight, bias = inputs[0], inputs[1], inputs[2]
        rank = data.ty.ndim
        self._resolve_auto_pad(data, [int(d) for d in weight.ty.shape][2:], attributes)
        if rank not in (3, 4):
            return None
        op, layouts = (relax.op.nn.conv1d, ("NCW", "OIW")) if rank == 3 else (relax.op.nn.conv2d, ("NCHW", "OIHW"))
        ones = [1] * (rank - 2)
        conv = self._layer(
            op(
                data,
                weight,
                strides=list(attributes.get("strides", ones)),
                padding=list(attributes.get("pads", [0] * 2 * (rank - 2))),
                dilation=list(attributes.get("dilations", ones)),
                groups=attributes.get("group", 1),
                data_layout=layouts[0],
                kernel_layout=layouts[1],
            ),
            attributes,
        )
        return conv if bias is None else relax.op.add(conv, self.bb.normalize(relax.op.reshape(bias, [1, -1, *ones])))

    def _gemm(self, inputs: Any, attributes: dict[str, Any]) -> Any:
        a, b, c = inputs[0], inputs[1], inputs[2]
        if attributes.get("transA"):
            a = relax.op.permute_dims(a, [1, 0])
        if attributes.get("transB"):
            b = relax.op.permute_dims(b, [1, 0])
        alpha, beta = attributes.get("alpha", 1.0), attributes.get("beta", 1.0)
        out = self._layer(relax.op.matmul(a, b), attributes)
        if alpha != 1:
            out = relax.op.multiply(out, relax.const(alpha, "float32"))
        if c is None or beta == 0:
            return out
        return relax.op.add(out, c if beta == 1 else relax.op.multiply(c, relax.const(beta, "float32")))

    def _matmul(self, inputs: Any, attributes: dict[str, Any]) -> Any:
        return self._layer(relax.op.matmul(inputs[0], inputs[1]), attributes)

    def _clip(self, inputs: Any, attributes: dict[str, Any]) -> Any:
        x = inputs[0]
        if str(x.ty.dtype) != "float32":
            return None
        bounds = []
        for index, key in ((1, "min"), (2, "max")):
            bound = inputs[index]
            if bound is None and key in attributes:
                bound = relax.const(float(attributes[key]), "float32")
            # onnxruntime takes a bound that is no number for no bound
            if isinstance(bound, tvm.ir.GenericConst) and math.isnan(float(bound.value.numpy())):
                bound = None
            bounds.append(bound)
        low, high = bounds
        if low is not None:
            x = relax.op.maximum(x, low)
        return x if high is None else relax.op.minimum(x, high)

    def _pad(self, inputs: Any, attributes: dict[str, Any]) -> Any:
        data, rank = inputs[0], inputs[0].ty.ndim
        if attributes.get("mode", b"constant") != b"constant":
            return None
        if self.opset < 11:
            widths, value = list(attributes["pads"]), float(attributes.get("value", 0.0))
            axes = list(range(rank))
        else:
            widths, value_expr = _integers(inputs[1]), inputs[2]
            value = 0.0 if value_expr is None else float(value_expr.value.numpy())
            axes = list(range(rank)) if inputs[3] is None else [a % rank for a in _integers(inputs[3])]
        before, after = [0] * rank, [0] * rank
        for axis, b, a in zip(axes, widths[: len(axes)], widths[len(axes) :], strict=True):
            before[axis], after[axis] = b, a
        if min(*before, *after) < 0:  # a negative width cuts off
            shape = [int(d) for d in data.ty.shape]
            data = relax.op.strided_slice(
                data,
                list(range(rank)),
                [max(-b, 0) for b in before],
                [size - max(-a, 0) for size, a in zip(shape, after, strict=True)],
            )
        pairs = [max(w, 0) for pair in zip(before, after, strict=True) for w in pair]
        return relax.op.nn.pad(data, pairs, "constant", value)

    def _average_pool(self, inputs: Any, attributes: dict[str, Any]) -> Any:
        self._resolve_auto_pad(inputs[0], attributes["kernel_shape"], attributes)
        if not (attributes.get("ceil_mode") and attributes.get("count_include_pad")):
            return None
        # Here TVM also counts what lies beyond the padding. With the padding made explicit nothing does.
        spatial = len(attributes["kernel_shape"])
        pads = attributes.get("pads", [0] * 2 * spatial)
        if any(pads):
            pairs = [0, 0, 0, 0, *(p for axis in range(spatial) for p in (pads[axis], pads[axis + spatial]))]
            inputs[0] = self.bb.emit(relax.op.nn.pad(inputs[0], pairs, "constant", 0.0))
        attributes["pads"], attributes["count_include_pad"] = [0] * 2 * spatial, 0
        return self._convert_operator("AveragePool", inputs, attributes, self.opset)

    def _max_pool(self, inputs: Any, attributes: dict[str, Any]) -> Any:
        self._resolve_auto_pad(inputs[0], attributes["kernel_shape"], attributes)

    def _transposed_conv(self, inputs: Any, attributes: dict[str, Any]) -> None:
        shape, kernel = ([int(d) for d in inputs[index].ty.shape][2:] for index in (0, 1))
        write_transposed_padding(shape, kernel, attributes)

    def _resize(self, inputs: Any, attributes: dict[str, Any]) -> Any:
        """Leave it to TVM's converter of Resize, which reads sizes as operator set 18 gives them."""
        if self.opset < 11:  # Upsample, and the Resize that followed it
            given = attributes.pop("scales", None)
            roi, scales, sizes = None, _numbers(inputs[1]) if given is None else list(given), None
            attributes |= {"coordinate_transformation_mode": b"asymmetric", "nearest_mode": b"floor"}
        else:
            roi, scales, sizes = inputs[1], _numbers(inputs[2]), _numbers(inputs[3])
        shape = resized_shape([int(d) for d in inputs[0].ty.shape], scales, sizes, attributes)
        if attributes.get("coordinate_transformation_mode") != b"tf_crop_and_resize":
            roi = None
        arguments = onnx_input([inputs[0], roi, None, as_constant(np.array(shape))])
        return self._convert_operator("Resize", arguments, attributes, max(self.opset, 11))

    @staticmethod
    def _resolve_auto_pad(data: Any, kernel: Sequence[int], attributes: dict[str, Any]) -> None:
        """Write what ``auto_pad`` means into ``pads``."""
        mode = attributes.pop("auto_pad", b"NOTSET").decode()
        if mode == "NOTSET":
            return
        sizes = [int(d) for d in data.ty.shape][2:]
        ones = [1] * len(sizes)
        before, after = [], []
        for size, k, s, d in zip(
            sizes, kernel, attributes.get("strides", ones), attributes.get("dilations", ones), strict=True
        ):
            total = 0 if mode == "VALID" else max((-(-size // s) - 1) * s + (k - 1) * d + 1 - size, 0)
            small = total // 2
            before.append(small if mode == "SAME_UPPER" else total - small)
            after.append(total - before[-1])
        attributes["pads"] = [*before, *after]


_CONVERTERS: dict[str, Callable[[_Importer, Any, dict[str, Any]], Any]] = {
    "Conv": _Importer._conv,
    "ConvTranspose": _Importer._transposed_conv,
    "Gemm": _Importer._gemm,
    "MatMul": _Importer._matmul,
    "Clip": _Importer._clip,
    "Pad": _Importer._pad,
    "AveragePool": _Importer._average_pool,
    "MaxPool": _Importer._max_pool,
    "Resize": _Importer._resize,
    "Upsample": _Importer._resize,
}
"""By operator; TVM's converters do the rest. A table in the importer would tie it into a cycle with its weights."""


def _numbers(expr: Any) -> list[Any] | None:
    """Return what a constant input holds; None where it is left out or empty."""
    return None if expr is None else _constant_list(expr, "scales or sizes that depend") or None


def _integers(expr: Any) -> list[int]:
    return [int(value) for value in _constant_list(expr, "an integer list that depends")]


def _constant_list(expr: Any, refused: str) -> list[Any]:
    if not isinstance(expr, tvm.ir.GenericConst):
        raise UnsupportedModelError(f"{refused} on the data ({type(expr).__name__})")
    values: list[Any] = expr.value.numpy().reshape(-1).tolist()
    return values

"""What ONNX operators without weights of their own compute, in PyTorch.

Each entry of `OPERATORS` is given a `NodeReader` and returns the value of the node's output in an FX graph. The
functions that end up in that graph are plain functions of tensors, so that a traced module can be printed, copied and
compiled.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from tvm_nm.errors import UnsupportedModelError
from tvm_nm.torch import functions

__all__ = ["OPERATORS", "NodeReader"]


class NodeReader:
    """What a converter may ask of the node that it converts.

    Parameters
    ----------
    name, op
        Of the node, for errors.
    attributes
        Its attributes as Python values.
    inputs
        Values in the FX graph, None for inputs left out.
    constants
        The arrays of those inputs that are constant, else None.
    call
        Adds a call to the FX graph and returns its value.
    opset
        Version of the standard operators.
    outputs
        Number of the node's outputs.
    """

    def __init__(
        self,
        name: str,
        op: str,
        attributes: dict[str, Any],
        inputs: Sequence[Any],
        constants: Sequence[NDArray[Any] | None],
        call: Callable[..., Any],
        opset: int,
        outputs: int = 1,
    ) -> None:
        self.name, self.op, self.attributes, self.inputs = name, op, attributes, inputs
        self.constants, self.call, self.opset, self.outputs = constants, call, opset, outputs

    def static(self, position: int, key: str | None = None) -> NDArray[Any] | None:
        """Return an input that has to be constant, or the attribute that it was in older versions of the operator."""
        if key is not None and key in self.attributes:
            return np.asarray(self.attributes[key])
        if position >= len(self.inputs) or self.inputs[position] is None:
            return None
        if self.constants[position] is None:
            raise self.error(f"its input {position} is not constant")
        return self.constants[position]

    def ints(self, position: int, key: str | None = None) -> tuple[int, ...] | None:
        """Return `static` as integers."""
        found = self.static(position, key)
        return None if found is None else tuple(int(value) for value in found.reshape(-1))

    def error(self, reason: str) -> UnsupportedModelError:
        """Return the error that says why this node cannot be converted."""
        return UnsupportedModelError(f"cannot be trained in PyTorch: {reason}", node=self.name, op=self.op)


def _geometry(read: NodeReader) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], Any]:
    kernel = tuple(read.attributes["kernel_shape"])
    if len(kernel) > 2:
        raise read.error("only one or two spatial axes are known")
    ones = (1,) * len(kernel)
    strides = tuple(read.attributes.get("strides", ones))
    automatic = read.attributes.get("auto_pad", "NOTSET")
    pads: Any = tuple(read.attributes.get("pads", (0, 0) * len(kernel)))
    if automatic.startswith("SAME"):
        pads = automatic
    elif automatic == "VALID":
        pads = (0, 0) * len(kernel)
    return kernel, strides, tuple(read.attributes.get("dilations", ones)), pads


def _max_pool(read: NodeReader) -> Any:
    kernel, strides, dilations, pads = _geometry(read)
    if read.outputs > 1:
        raise read.error("the positions of maxima are not known")
    return read.call(
        functions.max_pool, read.inputs[0], kernel, strides, dilations, pads, bool(read.attributes.get("ceil_mode"))
    )


def _average_pool(read: NodeReader) -> Any:
    kernel, strides, dilations, pads = _geometry(read)
    if any(step != 1 for step in dilations):
        raise read.error("a dilated average is not known")
    flags = bool(read.attributes.get("ceil_mode")), bool(read.attributes.get("count_include_pad"))
    return read.call(functions.average_pool, read.inputs[0], kernel, strides, pads, *flags)


def _clip(read: NodeReader) -> Any:
    bounds = []
    for position, key in ((1, "min"), (2, "max")):
        found = read.static(position, key)
        bound = None if found is None else float(found.reshape(-1)[0])
        bounds.append(None if bound is None or math.isnan(bound) else bound)
    return read.call(functions.clip, read.inputs[0], *bounds)


def _softmax(read: NodeReader) -> Any:
    axis = int(read.attributes.get("axis", -1 if read.opset >= 13 else 1))
    return read.call(functions.softmax, read.inputs[0], axis, read.op == "LogSoftmax", read.opset < 13)


def _reduce(read: NodeReader) -> Any:
    axes = read.ints(1, "axes")
    if axes == () and read.attributes.get("noop_with_empty_axes"):
        return read.inputs[0]
    return read.call(functions.reduce, read.inputs[0], read.op, axes or None, bool(read.attributes.get("keepdims", 1)))


def _reshape(read: NodeReader) -> Any:
    batch = read.attributes.get("static_batch")
    shape = read.inputs[1] if len(read.inputs) > 1 and read.constants[1] is None else read.ints(1, "shape")
    return read.call(functions.reshape, read.inputs[0], shape, batch, bool(read.attributes.get("allowzero")))


def _slice(read: NodeReader) -> Any:
    starts, ends = read.ints(1, "starts"), read.ints(2, "ends")
    assert starts is not None
    axes = read.ints(3, "axes") or tuple(range(len(starts)))
    return read.call(functions.slice_axes, read.inputs[0], starts, ends, axes, read.ints(4) or (1,) * len(starts))


def _split(read: NodeReader) -> Any:
    axis, sizes = int(read.attributes.get("axis", 0)), read.ints(1, "split")
    return read.call(functions.split, read.inputs[0], sizes, read.outputs, axis)


def _pad(read: NodeReader) -> Any:
    pads, axes = read.ints(1, "pads"), read.ints(3)
    mode = str(read.attributes.get("mode", "constant"))
    found = read.static(2, "value")
    assert pads is not None
    if mode not in ("constant", "reflect", "edge"):
        raise read.error(f"mode {mode!r} is not known")
    value = 0.0 if found is None else float(found.reshape(-1)[0])
    return read.call(functions.pad_axes, read.inputs[0], pads, axes, mode, value)


def _attributes(function: Callable[..., Any], **defaults: float) -> Callable[[NodeReader], Any]:
    def convert(read: NodeReader) -> Any:
        values = {key: float(read.attributes.get(key, value)) for key, value in defaults.items()}
        return read.call(function, read.inputs[0], *values.values())

    return convert


def _plain(function: Callable[..., Any]) -> Callable[[NodeReader], Any]:
    return lambda read: read.call(function, *read.inputs)


def _same(read: NodeReader) -> Any:
    return read.inputs[0]


def _many(read: NodeReader) -> Any:
    return read.call(functions.many, read.op, tuple(read.inputs))


OPERATORS: dict[str, Callable[[NodeReader], Any]] = {
    **{name: _plain(getattr(torch, name.lower())) for name in ("Sigmoid", "Tanh", "Exp", "Log", "Sqrt", "Abs", "Neg")},
    **{name: _plain(getattr(torch, name.lower())) for name in ("Erf", "Floor", "Ceil", "Reciprocal", "Add", "Sub")},
    **{name: _plain(getattr(torch, name.lower())) for name in ("Mul", "Div", "Pow")},
    **dict.fromkeys(("Sum", "Max", "Min", "Mean"), _many),
    **dict.fromkeys(("Identity", "Dropout"), _same),
    **dict.fromkeys(("Softmax", "LogSoftmax"), _softmax),
    **dict.fromkeys(("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceL2"), _reduce),
    "Relu": _plain(functional.relu),
    "Softplus": _plain(functional.softplus),
    "Softsign": _plain(functional.softsign),
    "HardSwish": _plain(functional.hardswish),
    "Mish": _plain(functional.mish),
    "PRelu": _plain(functions.prelu),
    "Elu": _attributes(functional.elu, alpha=1.0),
    "LeakyRelu": _attributes(functional.leaky_relu, alpha=0.01),
    "HardSigmoid": _attributes(functions.hard_sigmoid, alpha=0.2, beta=0.5),
    "Selu": _attributes(functions.selu, alpha=1.67326319217681884765625, gamma=1.05070102214813232421875),
    "Clip": _clip,
    "MaxPool": _max_pool,
    "AveragePool": _average_pool,
    "GlobalAveragePool": _plain(functions.global_average),
    "GlobalMaxPool": _plain(functions.global_max),
    "LRN": lambda read: read.call(
        functions.local_response,
        read.inputs[0],
        int(read.attributes["size"]),
        *(float(read.attributes.get(key, value)) for key, value in (("alpha", 1e-4), ("beta", 0.75), ("bias", 1.0))),
    ),
    "Concat": lambda read: read.call(torch.cat, tuple(read.inputs), int(read.attributes["axis"])),
    "Flatten": lambda read: read.call(functions.flatten, read.inputs[0], int(read.attributes.get("axis", 1))),
    "Transpose": lambda read: read.call(functions.transpose, read.inputs[0], read.attributes.get("perm")),
    "Squeeze": lambda read: read.call(functions.squeeze, read.inputs[0], read.ints(1, "axes")),
    "Unsqueeze": lambda read: read.call(functions.unsqueeze, read.inputs[0], read.ints(1, "axes")),
    "Reshape": _reshape,
    "Slice": _slice,
    "Split": _split,
    "Pad": _pad,
    "Gather": lambda read: read.call(functions.gather, *read.inputs, int(read.attributes.get("axis", 0))),
    "Shape": lambda read: read.call(functions.shape_of, read.inputs[0]),
    "Cast": lambda read: read.call(functions.cast, read.inputs[0], int(read.attributes["to"])),
    "DepthToSpace": lambda read: read.call(
        functions.depth_to_space,
        read.inputs[0],
        int(read.attributes["blocksize"]),
        read.attributes.get("mode", "DCR") == "DCR",
    ),
}

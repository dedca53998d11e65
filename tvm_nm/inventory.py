"""The convolutions and fully connected layers of a canonical Relax module, and their weights."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import tvm
from numpy.typing import NDArray

from tvm_nm.errors import UnsupportedModelError

__all__ = ["LAYERS_ATTR", "Layer", "LayerCall", "inventory", "layer_calls", "layer_weights"]

LAYERS_ATTR = "tvm_nm.layers"
"""Module attribute with the layers' names in binding order."""


@dataclass(frozen=True, slots=True)
class Layer:
    """A convolution or fully connected layer with a constant weight.

    Attributes
    ----------
    name
        The ONNX node's name, or ``conv_3`` and ``fc_7`` by index where the module keeps no names.
    kind
        "conv" or "fc".
    weight_shape
        (OC, IC / groups, KH, KW); a fully connected layer's is (OUT, K, 1, 1).
    groups, strides, padding, dilation
        The convolution's; strides and dilation are (vertical, horizontal), padding is (top, left, bottom, right).
        A fully connected layer has those of a 1x1 convolution.
    input_shape, output_shape
        (N, C, H, W); a fully connected layer's are (N, K) and (N, OUT).
    macs
        Multiply-accumulates of the dense layer.
    index
        Position among the layers.
    """

    name: str
    kind: Literal["conv", "fc"]
    weight_shape: tuple[int, int, int, int]
    groups: int
    strides: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    macs: int
    index: int

    @property
    def parameters(self) -> int:
        """Number of weights, without the bias."""
        return math.prod(self.weight_shape)


@dataclass(frozen=True, slots=True)
class LayerCall:
    """Where a layer stands in the module.

    Attributes
    ----------
    layer
        The layer.
    var
        The Relax variable that the call is bound to.
    call
        The ``relax.nn.conv2d`` or ``relax.matmul`` call; its second argument is a constant.
    """

    layer: Layer
    var: Any
    call: Any

    @property
    def weight(self) -> NDArray[Any]:
        """The weight as a new array of shape (OC, IC / groups, KH, KW)."""
        return self.as_layer(self.call.args[1].value.numpy())

    @property
    def weight_view(self) -> NDArray[Any]:
        """The weight as a read-only view of shape (OC, IC / groups, KH, KW), not contiguous for an FC layer."""
        value: NDArray[Any] = np.from_dlpack(self.call.args[1].value)
        value.flags.writeable = False
        return value if self.layer.kind == "conv" else value.T.reshape(self.layer.weight_shape)

    def as_layer(self, value: NDArray[Any]) -> NDArray[Any]:
        """Bring an array from the call's weight shape to (OC, IC / groups, KH, KW)."""
        if self.layer.kind == "conv":
            return value
        return np.ascontiguousarray(value.T).reshape(self.layer.weight_shape)

    def as_argument(self, value: NDArray[Any]) -> NDArray[Any]:
        """Bring an array of shape (OC, IC / groups, KH, KW) to the call's weight shape."""
        if self.layer.kind == "conv":
            return value
        return np.ascontiguousarray(value.reshape(value.shape[:2]).T)


def inventory(mod: tvm.IRModule) -> tuple[Layer, ...]:
    """List the layers with constant weights in binding order.

    Parameters
    ----------
    mod
        A canonical module: function "main", NCHW convolutions with OIHW weights, static shapes.

    Raises
    ------
    UnsupportedModelError
        If a layer has a shape that is not static, or another layout.
    """
    return tuple(found.layer for found in layer_calls(mod))


def layer_weights(mod: tvm.IRModule) -> dict[str, NDArray[Any]]:
    """Return every layer's weight by name, as new arrays of shape (OC, IC / groups, KH, KW)."""
    return {found.layer.name: found.weight for found in layer_calls(mod)}


def layer_calls(mod: tvm.IRModule) -> tuple[LayerCall, ...]:
    """List the layers with constant weights in binding order, with the calls that compute them.

    Raises
    ------
    UnsupportedModelError
        As `inventory`.
    """
    found = list(_calls(mod))
    names = _names(mod, [kind for _, _, kind in found])
    return tuple(
        LayerCall(_layer(name, kind, var, call, index), var, call)
        for index, (name, (var, call, kind)) in enumerate(zip(names, found, strict=True))
    )


def _calls(mod: tvm.IRModule) -> Iterator[tuple[Any, Any, Literal["conv", "fc"]]]:
    if "main" not in [var.name_hint for var in mod.get_global_vars()]:
        raise UnsupportedModelError("the module has no function main")
    for block in mod["main"].body.blocks:
        for binding in block.bindings:
            call = getattr(binding, "value", None)
            if not isinstance(call, tvm.relax.Call) or not isinstance(call.op, tvm.ir.Op):
                continue
            if call.op.name == "relax.nn.conv2d" and _is_constant(call.args[1]):
                yield binding.var, call, "conv"
            elif call.op.name == "relax.matmul" and _is_constant(call.args[1]) and call.args[1].ty.ndim == 2:
                yield binding.var, call, "fc"


def _is_constant(expr: Any) -> bool:
    return isinstance(expr, tvm.ir.GenericConst)


def _names(mod: tvm.IRModule, kinds: list[Literal["conv", "fc"]]) -> list[str]:
    kept = mod.get_attr(LAYERS_ATTR)
    names = [] if kept is None else [str(name) for name in kept]
    # A pass of somebody else may have added or removed calls; then the names cannot be told apart any more.
    if len(names) == len(kinds) == len(set(names)):
        return names
    return [f"{kind}_{index}" for index, kind in enumerate(kinds)]


def _layer(name: str, kind: Literal["conv", "fc"], var: Any, call: Any, index: int) -> Layer:
    data, weight, output = (_shape(name, expr) for expr in (call.args[0], call.args[1], var))
    if kind == "fc":
        inputs, outputs = weight
        macs = math.prod(output) * inputs
        return Layer(name, kind, (outputs, inputs, 1, 1), 1, (1, 1), (0, 0, 0, 0), (1, 1), data, output, macs, index)
    attrs = call.attrs
    layout = (attrs.data_layout, attrs.kernel_layout, attrs.out_layout or attrs.data_layout)
    if layout != ("NCHW", "OIHW", "NCHW"):
        raise UnsupportedModelError(
            f"layout {'/'.join(layout)} is not NCHW/OIHW/NCHW; take the inventory before layouts change",
            node=name,
            op="Conv",
        )
    channels, inputs, height, width = weight
    top, left, bottom, right = (int(pad) for pad in attrs.padding)
    stride_h, stride_w = (int(step) for step in attrs.strides)
    dilation_h, dilation_w = (int(step) for step in attrs.dilation)
    return Layer(
        name,
        kind,
        (channels, inputs, height, width),
        int(attrs.groups),
        (stride_h, stride_w),
        (top, left, bottom, right),
        (dilation_h, dilation_w),
        data,
        output,
        math.prod(output) * inputs * height * width,
        index,
    )


def _shape(name: str, expr: Any) -> tuple[int, ...]:
    shape = expr.ty.shape
    if shape is None or not all(isinstance(size, tvm.tirx.IntImm) for size in shape):
        raise UnsupportedModelError(f"layer {name!r} has a shape that is not static: {shape}; fix the input shapes")
    return tuple(int(size) for size in shape)

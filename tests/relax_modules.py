"""Builds small Relax modules in canonical form."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tvm
from tvm import relax

from tvm_nm.inventory import LAYERS_ATTR

__all__ = ["Builder", "module"]


class Builder:
    """Emits one operator after the other; constants are small integers, so that float32 sums are exact."""

    def __init__(self, builder: relax.BlockBuilder, seed: int = 0) -> None:
        self._builder = builder
        self._rng = np.random.default_rng(seed)
        self.weights: list[np.ndarray] = []

    def __call__(self, value: Any) -> Any:
        """Bind a value."""
        return self._builder.emit(value)

    def output(self, value: Any) -> Any:
        """Bind a value that the function returns, in a tuple that is not bound."""
        return self._builder.emit_output(value)

    def constant(self, *shape: int) -> Any:
        """A constant of integers from -3 to 3."""
        return relax.const(self._rng.integers(-3, 4, shape).astype(np.float32))

    def conv(self, x: Any, channels: int, kernel: int = 3, mask: np.ndarray | None = None, **attributes: Any) -> Any:
        """A convolution without bias; "same" padding unless told otherwise. Where `mask` is False the weight is 0."""
        shape = (channels, int(x.ty.shape[1]) // attributes.get("groups", 1), kernel, kernel)
        weight = self._rng.integers(1, 4, shape) * self._rng.choice([-1, 1], shape)
        if mask is not None:
            weight = np.where(mask, weight, 0)
        self.weights.append(weight.astype(np.float32))
        attributes.setdefault("padding", kernel // 2)
        return self(relax.op.nn.conv2d(x, relax.const(self.weights[-1]), **attributes))

    def bias(self, x: Any) -> Any:
        """Add a bias by channel."""
        rank = len(x.ty.shape)
        return self.add(x, self.constant(1, int(x.ty.shape[1]), *[1] * (rank - 2)))

    def add(self, x: Any, y: Any) -> Any:
        """Add two tensors."""
        return self(relax.op.add(x, y))

    def relu(self, x: Any) -> Any:
        """Apply ReLU."""
        return self(relax.op.nn.relu(x))

    def fc(self, x: Any, outputs: int, mask: np.ndarray | None = None) -> Any:
        """A fully connected layer without bias; `mask` has shape (OUT, IN)."""
        weight = self._rng.integers(1, 4, (outputs, int(x.ty.shape[1]))).astype(np.float32)
        if mask is not None:
            weight = np.where(mask, weight, 0).astype(np.float32)
        self.weights.append(weight)
        return self(relax.op.matmul(x, relax.const(np.ascontiguousarray(weight.T))))


def module(
    build: Callable[..., Any],
    *shapes: tuple[int, ...],
    names: Sequence[str] | None = None,
    seed: int = 0,
    bind_tuple: bool = True,
) -> tvm.IRModule:
    """One function "main" with one dataflow block; `build(b, *inputs)` returns its result or a list of results.

    The tuple of several results is a binding of the block, as Canonicalize has it, or stands in the function's body.
    """
    builder = relax.BlockBuilder()
    inputs = [relax.Var(f"x{i}", relax.TensorType(shape, "float32")) for i, shape in enumerate(shapes)]
    with builder.function("main", inputs):
        with builder.dataflow():
            result = build(Builder(builder, seed), *inputs)
            if isinstance(result, list) and not bind_tuple:
                inner = relax.DataflowVar
                out = relax.Tuple([builder.emit_output(p) if isinstance(p, inner) else p for p in result])
            else:
                out = builder.emit_output(relax.Tuple(result) if isinstance(result, list) else result)
        builder.emit_func_output(out)
    mod = builder.get()
    return mod if names is None else mod.with_attr(LAYERS_ATTR, list(names))

"""The arguments that the convolution kernels of all families take."""

from __future__ import annotations

from dataclasses import dataclass

import tvm
from tvm import te

from tvm_nm.workload import ConvWorkload

__all__ = ["ConvArguments", "conv_argument_shapes", "kernel_func"]


@dataclass(frozen=True, slots=True)
class ConvArguments:
    """Placeholders, in order.

    Attributes
    ----------
    data
        (N, C, H, W).
    weight
        Packed weights.
    index
        The index table; None for kernels without one.
    bias
        (OC,).
    residual
        (N, OC, OH, OW); None if the epilogue adds none.
    """

    data: te.Tensor
    weight: te.Tensor
    index: te.Tensor | None
    bias: te.Tensor
    residual: te.Tensor | None

    @classmethod
    def of(
        cls,
        work: ConvWorkload,
        weight_shape: tuple[int, ...],
        index_shape: tuple[int, ...] | None = None,
        index_dtype: str = "int32",
    ) -> ConvArguments:
        """Declare the arguments of a workload: float32, but for the table."""
        return cls(
            te.placeholder(work.input_shape, name="data"),
            te.placeholder(weight_shape, name="weight"),
            None if index_shape is None else te.placeholder(index_shape, index_dtype, name="index"),
            te.placeholder((work.out_channels,), name="bias"),
            te.placeholder(work.output_shape, name="residual") if work.epilogue.residual else None,
        )

    def func(self, out: te.Tensor) -> tvm.tirx.PrimFunc:
        """Return the unscheduled PrimFunc that computes `out`, its last argument."""
        return kernel_func([self.data, self.weight, self.index, self.bias, self.residual, out])


def conv_argument_shapes(
    work: ConvWorkload, weight_shape: tuple[int, ...], index_shape: tuple[int, ...] | None = None, index_dtype: str = ""
) -> dict[str, tuple[tuple[int, ...], str]]:
    """Return names, shapes and dtypes of the same arguments and the output, in order, for functions written out."""
    shapes = {"data": (work.input_shape, "float32"), "weight": (weight_shape, "float32")}
    if index_shape is not None:
        shapes["index"] = (index_shape, index_dtype)
    shapes["bias"] = ((work.out_channels,), "float32")
    if work.epilogue.residual:
        shapes["residual"] = (work.output_shape, "float32")
    return {**shapes, "out": (work.stored_shape, "float32")}


def kernel_func(arguments: list[te.Tensor | None]) -> tvm.tirx.PrimFunc:
    """Return the unscheduled PrimFunc of a kernel; arguments that are None are left out."""
    func = te.create_prim_func([tensor for tensor in arguments if tensor is not None])
    # Opaque to Relax: nothing is to be fused into it.
    return func.with_attr({"tirx.noalias": True, "op_pattern": 8})

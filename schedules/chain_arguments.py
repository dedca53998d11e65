"""What the function of a chain takes."""

from __future__ import annotations

from tvm_nm.schedules.chain import ChainKernel, Mixing, blocked_shape
from tvm_nm.workload import ConvWorkload

__all__ = ["argument_shapes"]


def argument_shapes(kernel: ChainKernel) -> dict[str, tuple[tuple[int, ...], str]]:
    """Return names, shapes and dtypes of a chain's arguments in order, the output last."""
    first, work, lanes = kernel.first, kernel.depthwise, kernel.lanes
    size = first.input_shape
    shapes: dict[str, tuple[tuple[int, ...], str]] = {
        "data": (blocked_shape(size, lanes) if kernel.blocked_input else size, "float32")
    }
    shapes |= _mixing_shapes("first", first, kernel.mixing, lanes, 1)
    shapes["depthwise"] = ((kernel.hidden_vectors, work.taps, lanes), "float32")
    shapes["depthwise_bias"] = ((kernel.hidden_vectors * lanes,), "float32")
    out = blocked_shape((work.batch, kernel.output.out_channels, work.out_height, work.out_width), lanes)
    if kernel.last is not None:
        shapes |= _mixing_shapes("last", kernel.last, kernel.last_mixing, lanes, kernel.shares)
        if kernel.last.epilogue.residual:
            shapes["residual"] = (out, "float32")
    return {**shapes, "out": (out, "float32")}


def _mixing_shapes(
    name: str, work: ConvWorkload, mixing: Mixing, lanes: int, shares: int
) -> dict[str, tuple[tuple[int, ...], str]]:
    vectors = -(-work.out_channels // lanes)
    kept = mixing.kept or work.in_channels
    shapes: dict[str, tuple[tuple[int, ...], str]] = {name: ((vectors * kept * work.taps * lanes,), "float32")}
    if mixing.kept:
        entries = kept + (shares + 1 if shares > 1 else 0)
        shapes[f"{name}_index"] = ((-(-work.out_channels // mixing.block) * entries,), "int32")
    return {**shapes, f"{name}_bias": ((vectors * lanes,), "float32")}

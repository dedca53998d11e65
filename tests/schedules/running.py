"""Builds one kernel the way a module would and runs it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import tvm

from tvm_nm.schedules.apply import pass_context, schedule_function
from tvm_nm.schedules.channel_conv import ChannelConvKernel
from tvm_nm.schedules.conv import ConvKernel, IndexKind
from tvm_nm.schedules.depthwise_conv import DepthwiseKernel
from tvm_nm.schedules.families import conv_family_of
from tvm_nm.schedules.lane_conv import LaneConvKernel
from tvm_nm.schedules.pair_conv import PairConvKernel
from tvm_nm.schedules.stem_conv import StemKernel
from tvm_nm.workload import ConvWorkload

__all__ = ["build", "call", "haswell", "host_flags", "integers", "masked_weights", "run_conv"]


def host_flags() -> frozenset[str]:
    """Vector extensions of this machine, as Linux lists them."""
    with open("/proc/cpuinfo") as file:
        lines = (line.partition(":") for line in file)
        return next((frozenset(v.split()) for key, _, v in lines if key.strip() in ("flags", "Features")), frozenset())


def haswell(threads: int = 1) -> tvm.target.Target:
    """A target with AVX2 and no AVX-512."""
    return tvm.target.Target({"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": "haswell", "num-cores": threads})


def build(func: tvm.tirx.PrimFunc, target: tvm.target.Target) -> Any:
    """Schedule with the default decisions and compile."""
    with pass_context():
        return tvm.compile(tvm.IRModule({"main": schedule_function(func, target)}), target=target)


def call(module: Any, arguments: Sequence[npt.NDArray[Any]], shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """Run a compiled PrimFunc whose last argument is its output, NaN at first: what is not written shows."""
    tensors = [tvm.runtime.tensor(np.ascontiguousarray(array)) for array in arguments]
    out = tvm.runtime.tensor(np.full(shape, np.nan, np.float32))
    module["main"](*tensors, out)
    return np.array(out.numpy())


def integers(shape: tuple[int, ...], rng: np.random.Generator) -> npt.NDArray[np.float32]:
    """Integers from -3 to 3. Sums of their products are exact in float32 in any order: no tolerance is needed."""
    return rng.integers(-3, 4, shape).astype(np.float32)


def masked_weights(
    work: ConvWorkload, block: int, index: IndexKind, density: float, rng: np.random.Generator
) -> npt.NDArray[np.float32]:
    """Small integers whose block rows keep about `density` of their inputs, each another number, some none."""
    shape = (work.out_channels, work.in_channels_per_group, *work.kernel)
    weights = integers(shape, rng)
    weights[weights == 0] = 4
    if index is IndexKind.NONE:
        return weights
    per_group = work.out_channels_per_group
    for group in range(work.groups):
        for start in range(0, per_group, block):
            rows = slice(group * per_group + start, group * per_group + min(start + block, per_group))
            taps = work.kernel if index is IndexKind.POSITION else (1, 1)
            weights[rows] *= rng.random((1, work.in_channels_per_group, *taps)) < density
    return weights


def run_conv(
    kernel: ConvKernel | ChannelConvKernel | DepthwiseKernel | LaneConvKernel | PairConvKernel | StemKernel,
    original: ConvWorkload,
    weights: npt.NDArray[np.float32],
    target: tvm.target.Target,
    rng: np.random.Generator,
    compiler: Callable[[tvm.tirx.PrimFunc, tvm.target.Target], Any] = build,
) -> tuple[npt.NDArray[np.float32], list[npt.NDArray[Any] | None]]:
    """Pack, build and run; returns the output and (data, weights, bias, residual), in the original shapes."""
    work = kernel.workload
    family = conv_family_of(kernel)
    packed, func = family.pack(kernel, weights), family.prim_func(kernel)
    data_shape = original.input_shape
    out_shape = original.output_shape
    data = integers(data_shape, rng)
    bias = integers((original.out_channels,), rng)
    residual = integers(out_shape, rng) if original.epilogue.residual else None
    # A pointwise workload may have been reshaped.
    kernel_out = work.output_shape
    arguments = [data.reshape(work.input_shape), packed.values]
    if packed.index is not None:
        arguments.append(packed.index)
    arguments.append(bias)
    if residual is not None:
        arguments.append(residual.reshape(kernel_out))
    out = call(compiler(func, target), arguments, work.stored_shape)
    return out.reshape(original.stored_shape), [data, weights, bias, residual]

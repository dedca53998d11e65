"""The fully connected family: vectors run over output features.

    Y[n, o] = act(sum over kept k of W[o, k] * X[n, k] + bias[o])

At batch 1 the layer is bound by reading its weights once, so the packed weights are one contiguous stream: feature
blocks of `block` outputs, each step a few vectors of weights times one broadcast input. A sparse layer whose pattern is
1xN with N a multiple of the vector width reads an index table and a fraction of the stream.

Loop nest (default)::

    parallel feature block
      acc[rows][vectors][lanes] = 0      # rows: up to 4 of the batch
      for kept input                     # `vectors` loads, `rows` broadcasts, rows * vectors FMAs
        acc += weight * data
      out = act(acc + bias)
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import tvm
import tvm_ffi
from tvm import s_tir, te, tirx

from tvm_nm.schedules.conv_arguments import kernel_func
from tvm_nm.schedules.epilogue import activate
from tvm_nm.schedules.machine import Machine
from tvm_nm.schedules.packing import PackedWeights
from tvm_nm.schedules.weight_stream import STREAM
from tvm_nm.workload import Epilogue

__all__ = ["FcKernel", "choose_fc_kernel", "fc_prim_func", "pack_fc", "schedule_fc"]

FC_RULE = "tvm_nm_fc"


@dataclass(frozen=True, slots=True)
class FcKernel:
    """A fully connected layer's kernel variant.

    Attributes
    ----------
    batch, in_features, out_features
        Logical sizes.
    epilogue
        Applied to the sums.
    lanes
        float32 elements of one vector.
    block
        Output features computed together, a multiple of `lanes`; those of a block share their kept inputs.
    kept
        Inputs that each block reads; `in_features` without an index table.
    sparse
        Whether an index table is read.
    """

    batch: int
    in_features: int
    out_features: int
    epilogue: Epilogue
    lanes: int
    block: int
    kept: int
    sparse: bool

    @property
    def blocks(self) -> int:
        return -(-self.out_features // self.block)

    @property
    def index_dtype(self) -> str:
        return "uint8" if self.in_features <= 1 << 8 else "uint16" if self.in_features <= 1 << 16 else "int32"

    @property
    def macs(self) -> int:
        """Multiply-accumulates on kept weights."""
        return self.batch * self.out_features * self.kept

    def __str__(self) -> str:
        return f"feature-vector {self.block} {'channel' if self.sparse else 'none'}"


def choose_fc_kernel(
    batch: int,
    in_features: int,
    out_features: int,
    epilogue: Epilogue,
    machine: Machine,
    *,
    block: int | None = None,
    kept: int | None = None,
) -> FcKernel:
    """Return the variant of an untuned build; `block` and `kept` describe a sparse layer.

    Raises
    ------
    ValueError
        If `block` is not a multiple of the vector width.
    """
    lanes = machine.lanes
    if block is not None:
        if block % lanes:
            raise ValueError(f"a block of {block} features is not a multiple of {lanes} lanes")
        return FcKernel(batch, in_features, out_features, epilogue, lanes, block, kept or in_features, True)
    vectors = 4
    while vectors > 1 and -(-out_features // (vectors * lanes)) < 2 * machine.threads:
        vectors //= 2
    return FcKernel(batch, in_features, out_features, epilogue, lanes, vectors * lanes, in_features, False)


def pack_fc(kernel: FcKernel, weights: npt.NDArray[np.float32]) -> PackedWeights:
    """Pack weights (OUT, IN) into values (blocks, kept, block) and, if sparse, a table (blocks, kept).

    Raises
    ------
    ValueError
        If a block keeps more inputs than `kernel.kept`.
    """
    rows = kernel.blocks * kernel.block
    if rows == kernel.out_features:
        filled = weights  # not copied: it may have hundreds of megabytes
    else:
        filled = np.zeros((rows, kernel.in_features), np.float32)
        filled[: kernel.out_features] = weights
    blocks = filled.reshape(kernel.blocks, kernel.block, kernel.in_features)
    if not kernel.sparse:
        return PackedWeights(np.ascontiguousarray(blocks.transpose(0, 2, 1)), None)
    kept = (blocks != 0).any(axis=1)
    if kept.sum(axis=1).max(initial=0) > kernel.kept:
        raise ValueError(f"a block keeps {kept.sum(axis=1).max()} inputs, the kernel was made for {kernel.kept}")
    order = np.argsort(~kept, axis=1, kind="stable")[:, : kernel.kept]
    order.sort(axis=1)
    values = np.take_along_axis(blocks, order[:, None, :], axis=2).transpose(0, 2, 1)
    return PackedWeights(np.ascontiguousarray(values), order.astype(kernel.index_dtype))


@lru_cache(maxsize=64)
def fc_prim_func(kernel: FcKernel) -> tvm.tirx.PrimFunc:
    """Return the unscheduled PrimFunc.

    Arguments: data (N, IN); values (blocks, kept, block); the table (blocks, kept) if sparse; bias (OUT,); residual
    (N, OUT) if the epilogue adds one; output (N, OUT).
    """
    lanes = kernel.lanes
    data = te.placeholder((kernel.batch, kernel.in_features), name="data")
    weight = te.placeholder((kernel.blocks, kernel.kept, kernel.block), name="weight")
    index = te.placeholder((kernel.blocks, kernel.kept), kernel.index_dtype, name="index") if kernel.sparse else None
    bias = te.placeholder((kernel.out_features,), name="bias")
    shape = (kernel.batch, kernel.out_features)
    residual = te.placeholder(shape, name="residual") if kernel.epilogue.residual else None
    kept = te.reduce_axis((0, kernel.kept), name="kept")

    def product(b: Any, n: Any, v: Any, lane: Any) -> Any:
        k = kept if index is None else index[b, kept].astype("int32")
        return te.sum(weight[b, kept, v * lanes + lane] * data[n, k], axis=[kept])

    def element(n: Any, o: Any) -> Any:
        in_block = tirx.indexmod(o, kernel.block)
        lane = tirx.bitwise_and(in_block, tirx.const(lanes - 1, "int32"))
        value = sums[tirx.indexdiv(o, kernel.block), n, tirx.indexdiv(in_block, lanes), lane] + bias[o]
        if residual is not None:
            value = value + residual[n, o]
        return activate(value, kernel.epilogue)

    attrs = {"schedule_rule": FC_RULE, "tvm_nm_block": kernel.block}
    sums = te.compute((kernel.blocks, kernel.batch, kernel.block // lanes, lanes), product, name="sums", attrs=attrs)
    out = te.compute(shape, element, name="out")
    return kernel_func([data, weight, index, bias, residual, out])


@tvm_ffi.register_global_func(f"s_tir.meta_schedule.cpu.{FC_RULE}", override=True)  # type: ignore[untyped-decorator]
def schedule_fc(sch: s_tir.Schedule, sums: Any) -> list[s_tir.Schedule]:
    """Schedule the layer whose reduction is block `sums`."""
    block = int(sch.get(sums).annotations["tvm_nm_block"])
    out = sch.get_consumers(sums)[0]
    n, o = sch.get_loops(out)
    batch = int(sch.get(n).extent)
    rows_choices = [rows for rows in (1, 2, 4) if rows <= batch]
    rows = sch.sample_categorical(rows_choices, [1 / len(rows_choices)] * len(rows_choices), len(rows_choices) - 1)
    task, in_block = sch.split(o, [None, block])
    n_outer, n_inner = sch.split(n, [None, rows])
    sch.reorder(task, n_outer, n_inner, in_block)
    sch.parallel(task)
    sch.cache_write(sums, 0, "local")
    flush = sch.get_consumers(sums)[0]
    sch.compute_inline(flush)
    sch.compute_at(sums, n_outer, preserve_unit_loops=True)
    _, n1, v1, lane1, kept = sch.get_loops(sums)[-5:]
    sch.reorder(kept, n1, v1, lane1)
    sch.vectorize(lane1)
    sch.unroll(v1)
    sch.unroll(n1)
    sch.annotate(kept, STREAM, block)
    sch.decompose_reduction(sums, kept)
    return [sch]

"""Chooses the kernel of one layer from the zeros in its weights, and packs the weights for it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from tvm_nm.detect import Detection, detect_pattern
from tvm_nm.inventory import Layer
from tvm_nm.patterns import NM, Dense, Granularity, OneByN, SparsityPattern
from tvm_nm.schedules.conv import IndexKind
from tvm_nm.schedules.families import conv_family_of
from tvm_nm.schedules.fc import FcKernel, choose_fc_kernel, pack_fc
from tvm_nm.schedules.kernel_task import KernelTask
from tvm_nm.schedules.lane_conv import LaneConvKernel
from tvm_nm.schedules.lane_packing import pack_lane_conv
from tvm_nm.schedules.lane_tiling import lane_candidates, lane_cycles
from tvm_nm.schedules.machine import Machine
from tvm_nm.schedules.packing import PackedWeights, kept_per_block_row
from tvm_nm.schedules.pool import maxima_cycles
from tvm_nm.schedules.tuned import TunedKernel, TunedKernels
from tvm_nm.schedules.variants import Kernel, default_kernel, kernel_cycles, pooled_task, winograd_fits
from tvm_nm.workload import ConvWorkload, Epilogue, MaxPool

__all__ = ["Choice", "choose_conv", "choose_fc", "conv_workload", "index_kind", "nm_of", "sparse_task"]

Weights = npt.NDArray[np.float32]

# A trained weight may happen to be zero; so few need no explanation.
_STRAY_ZEROS = 0.99
# The model's error is of this order: a smaller predicted gain is no gain.
_CONV_WORTHWHILE = 0.95
# A sparse FC kernel reads this share of the dense one's bytes, or it is not worth its index look-ups.
_FC_WORTHWHILE = 0.9


@dataclass(frozen=True, slots=True)
class Choice:
    """A layer's kernel.

    Attributes
    ----------
    kernel
        The kernel variant.
    packed
        Weights in its format, or what the kernel's family expands to that.
    pattern
        The sparsity pattern it exploits, as text; `dense` for none.
    density
        Share of the weights that are not zero.
    note
        Why zeros are not exploited; empty if they are, or if there are none.
    tuning
        Where the variant comes from: `default`, or a `tvm_nm.schedules.tuned.Origin`.
    task
        What the kernel is a variant of; None where nothing is tuned.
    """

    kernel: Kernel
    packed: PackedWeights
    pattern: str
    density: float
    note: str
    tuning: str = "default"
    task: KernelTask | None = None


def choose_conv(
    layer: Layer,
    weights: Weights,
    epilogue: Epilogue,
    machine: Machine,
    *,
    always_sparse: bool = False,
    winograd: bool = True,
    tuned: TunedKernels | None = None,
) -> Choice:
    """Choose a convolution's kernel.

    A sparse kernel competes with the better of the direct and the Winograd kernel; where whole kernels were dropped, it
    is the better of a direct and a Winograd kernel itself.

    Parameters
    ----------
    layer
        Shape and attributes.
    weights
        (OC, IC / groups, KH, KW).
    epilogue
        What belongs to the layer. Where it ends with maxima, a kernel that does not take them is counted with a pooling
        of its own.
    machine
        What the kernel is generated for.
    always_sparse
        Take the sparse kernel even where the dense one is predicted to be faster.
    winograd
        Whether Winograd kernels may be chosen.
    tuned
        Tuned variants, which replace the default ones; where it knows the times of both kernels, they decide.
    """
    work = conv_workload(layer, epilogue)
    best = partial(_best_option, machine=machine, tuned=tuned, winograd=winograd, pool=epilogue.pool)
    dense = best(KernelTask("conv", work.unpooled, machine.threads))
    detection = detect_pattern(weights != 0, work.groups)
    task = sparse_task(work.unpooled, weights, detection.pattern, machine)
    note = _why_dense(detection)
    if task is not None:
        sparse = best(task)
        ratio, measured = sparse.compared_with(dense)
        if ratio < (1 if measured else _CONV_WORTHWHILE) or always_sparse:
            packed = conv_family_of(sparse.kernel).stored(sparse.kernel, weights)
            return Choice(
                sparse.kernel, packed, str(detection.pattern), detection.density, "", sparse.tuning, sparse.task
            )
        how = "tuned" if measured else "predicted"
        note = f"{detection.pattern} at density {detection.density:.2f}: {how} {ratio:.2f}x the dense kernel's time"
    packed = conv_family_of(dense.kernel).stored(dense.kernel, weights)
    return Choice(dense.kernel, packed, "dense", detection.density, note, dense.tuning, dense.task)


@dataclass(frozen=True, slots=True)
class _Option:
    """A kernel that may be chosen: the default variant with the model's cycles, and the tuned one if there is any.

    The pooling that follows it takes `pooling` times as long as the kernel.
    """

    task: KernelTask
    default: Kernel
    cycles: float
    tuned: TunedKernel | None
    pooling: float

    @property
    def kernel(self) -> Kernel:
        return self.default if self.tuned is None else self.tuned.kernel

    @property
    def tuning(self) -> str:
        return "default" if self.tuned is None else self.tuned.origin

    def compared_with(self, other: _Option) -> tuple[float, bool]:
        """Return this kernel's time as a share of the other's, and whether the times are tuned ones.

        Times within a network are compared with such, else those of calls alone. Times that came with the package are
        other machines': they compare with those of the same table only.
        """
        mine, others = self.tuned, other.tuned
        if mine is not None and others is not None and mine.table == others.table:
            ratio = mine.latency_us / others.latency_us
            if mine.within_us and others.within_us:
                ratio = mine.within_us / others.within_us
            return ratio * (1 + self.pooling) / (1 + other.pooling), True
        return self.cycles * (1 + self.pooling) / (other.cycles * (1 + other.pooling)), False


def _best(tuned: TunedKernels | None, task: KernelTask) -> TunedKernel | None:
    return None if tuned is None else tuned.best(task)


def _option(task: KernelTask, machine: Machine, tuned: TunedKernels | None, *, pool: MaxPool | None = None) -> _Option:
    """Return a task's option, followed by a pooling of its own if there is one."""
    default = default_kernel(task, machine)
    cycles = kernel_cycles(default, machine)
    pooling = 0.0 if pool is None else maxima_cycles(task.workload.pooled(pool), machine) / cycles
    return _Option(task, default, cycles, _best(tuned, task), pooling)


def choose_fc(
    layer: Layer,
    weights: Weights,
    epilogue: Epilogue,
    machine: Machine,
    *,
    always_sparse: bool = False,
    tuned: TunedKernels | None = None,
) -> Choice:
    """Choose a fully connected layer's kernel; as `choose_conv`, with weights (OUT, IN, 1, 1)."""
    batch, in_features = layer.input_shape[0], layer.input_shape[1]
    out_features = layer.weight_shape[0]
    matrix = weights.reshape(out_features, in_features)
    detection = detect_pattern(weights != 0)
    note = _why_dense(detection)
    if not note and isinstance(detection.pattern, OneByN):
        block = detection.pattern.n
        if block % machine.lanes:
            note = (
                f"{detection.pattern}: the FC kernel skips blocks of a multiple of {machine.lanes} outputs, built dense"
            )
        else:
            kept = int(kept_per_block_row(weights, 1, block, IndexKind.CHANNEL).max())
            sparse = choose_fc_kernel(
                batch, in_features, out_features, epilogue, machine, block=block, kept=max(kept, 1)
            )
            if kept < _FC_WORTHWHILE * in_features or always_sparse:
                return Choice(sparse, pack_fc(sparse, matrix), str(detection.pattern), detection.density, "")
            note = f"{detection.pattern}: a block keeps {kept} of {in_features} inputs, built dense"
    elif not note and isinstance(detection.pattern, NM):
        lanes = _nm_fc(layer, epilogue, machine, detection.pattern)
        if lanes is not None and (lanes.packed_bytes < _FC_WORTHWHILE * matrix.nbytes or always_sparse):
            packed = pack_lane_conv(lanes, weights)
            return Choice(lanes, packed, str(detection.pattern), detection.density, "")
        note = f"{detection.pattern}: the FC kernel reads N:M for a batch of 1 and an M that divides {machine.lanes}"
        note += ", where that saves bytes, built dense"
    elif not note and not isinstance(detection.pattern, Dense):
        note = f"{detection.pattern}: the FC kernel skips whole blocks of outputs only, built dense"
    dense = choose_fc_kernel(batch, in_features, out_features, epilogue, machine)
    task = KernelTask.of(dense, machine.threads)
    found = _best(tuned, task)
    if found is not None and isinstance(found.kernel, FcKernel):
        return Choice(found.kernel, pack_fc(found.kernel, matrix), "dense", detection.density, note, found.origin, task)
    return Choice(dense, pack_fc(dense, matrix), "dense", detection.density, note, task=task)


def _nm_fc(layer: Layer, epilogue: Epilogue, machine: Machine, pattern: NM) -> LaneConvKernel | None:
    """Return a kernel for an N:M layer of one input, as a convolution of one pixel; None where there is none."""
    work = ConvWorkload(1, layer.input_shape[1], layer.weight_shape[0], 1, 1, (1, 1), epilogue=epilogue)
    if layer.input_shape[0] != 1 or machine.lanes % pattern.m:
        return None
    found = lane_candidates(work, machine, machine.lanes // pattern.m * pattern.n)
    return min(found, key=lambda kernel: lane_cycles(kernel, machine), default=None)


def conv_workload(layer: Layer, epilogue: Epilogue) -> ConvWorkload:
    """Return the workload of an inventoried convolution."""
    batch, channels, height, width = layer.input_shape
    return ConvWorkload(
        batch,
        channels,
        layer.weight_shape[0],
        height,
        width,
        layer.weight_shape[2:],
        layer.strides,
        layer.padding,
        layer.dilation,
        layer.groups,
        epilogue,
    )


def _why_dense(detection: Detection) -> str:
    return "" if detection.density > _STRAY_ZEROS else detection.reason


def _best_option(
    task: KernelTask, machine: Machine, tuned: TunedKernels | None, *, winograd: bool, pool: MaxPool | None
) -> _Option:
    """Return a direct task's best kernel, direct or Winograd; those that take the maxima that follow do so.

    Winograd's weights take up to 4 times the memory and its rounding errors are larger: a small gain is not worth it.
    """
    direct = _option(task, machine, tuned, pool=pool)
    pooled = None if pool is None else pooled_task(task, pool, machine)
    if pooled is not None:
        taking = _option(pooled, machine, tuned)
        if taking.compared_with(direct)[0] < 1:
            direct = taking
    if winograd and winograd_fits(task, machine):
        by_winograd = task.as_winograd
        taking_task = None if pool is None else pooled_task(by_winograd, pool, machine)
        if taking_task is None:
            transformed = _option(by_winograd, machine, tuned, pool=pool)
        else:
            transformed = _option(taking_task, machine, tuned)
        if transformed.compared_with(direct)[0] < _CONV_WORTHWHILE:
            return transformed
    return direct


def index_kind(pattern: SparsityPattern, work: ConvWorkload) -> IndexKind:
    """Return how a kernel for a pattern finds its inputs; there is no index for `Dense`."""
    if isinstance(pattern, Dense):
        return IndexKind.NONE
    by_kernel = work.taps == 1 or (isinstance(pattern, OneByN) and pattern.granularity is Granularity.KERNEL)
    return IndexKind.CHANNEL if by_kernel else IndexKind.POSITION


def sparse_task(
    work: ConvWorkload, weights: Weights, pattern: SparsityPattern | None, machine: Machine
) -> KernelTask | None:
    """Return what a sparse kernel for weights with a pattern computes; None where there is nothing to skip."""
    if pattern is None or isinstance(pattern, Dense):
        return None
    index = index_kind(pattern, work)
    block = min(pattern.block, work.out_channels_per_group)
    kept = int(kept_per_block_row(weights, work.groups, block, index).max(initial=0))
    of, group = nm_of(pattern)
    return KernelTask("conv", work, machine.threads, index, block, max(kept, 1), of_group=of, group=group)


def nm_of(pattern: SparsityPattern) -> tuple[int, int]:
    """Return N and M of an N:M pattern whose output channels choose each for themselves, else zeros."""
    return (pattern.n, pattern.m) if isinstance(pattern, NM) else (0, 0)

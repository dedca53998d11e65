"""Chooses the kernel of one layer from the zeros in its weights, and packs the weights for it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tvm_nm.detect import Detection, detect_pattern
from tvm_nm.inventory import Layer
from tvm_nm.patterns import Dense, Granularity, OneByN
from tvm_nm.schedules.conv import ConvKernel, IndexKind
from tvm_nm.schedules.fc import FcKernel, choose_fc_kernel, pack_fc
from tvm_nm.schedules.machine import Machine
from tvm_nm.schedules.packing import PackedWeights, kept_per_block_row, pack_conv
from tvm_nm.schedules.tiling import choose_kernel, predicted_cycles
from tvm_nm.schedules.winograd import WinogradKernel, pack_winograd
from tvm_nm.schedules.winograd_tiling import choose_winograd, winograd_cycles
from tvm_nm.workload import ConvWorkload, Epilogue

__all__ = ["Choice", "choose_conv", "choose_fc", "conv_workload"]

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
        Weights in its format.
    pattern
        The sparsity pattern it exploits, as text; `dense` for none.
    density
        Share of the weights that are not zero.
    note
        Why zeros are not exploited; empty if they are, or if there are none.
    """

    kernel: ConvKernel | FcKernel | WinogradKernel
    packed: PackedWeights
    pattern: str
    density: float
    note: str


def choose_conv(
    layer: Layer,
    weights: Weights,
    epilogue: Epilogue,
    machine: Machine,
    *,
    always_sparse: bool = False,
    winograd: bool = True,
) -> Choice:
    """Choose a convolution's kernel.

    A sparse kernel competes with the better of the direct and the Winograd kernel.

    Parameters
    ----------
    layer
        Shape and attributes.
    weights
        (OC, IC / groups, KH, KW).
    epilogue
        What is fused.
    machine
        What the kernel is generated for.
    always_sparse
        Take the sparse kernel even where the dense one is predicted to be faster.
    winograd
        Whether Winograd kernels may be chosen.
    """
    work = conv_workload(layer, epilogue)
    dense, dense_cycles = _dense_conv(work, machine, winograd=winograd)
    detection = detect_pattern(weights != 0, work.groups)
    sparse = _sparse_conv(work, weights, detection, machine)
    note = _why_dense(detection)
    if sparse is not None:
        ratio = predicted_cycles(sparse) / dense_cycles
        if ratio < _CONV_WORTHWHILE or always_sparse:
            return Choice(sparse, pack_conv(sparse, weights), str(detection.pattern), detection.density, "")
        note = f"{detection.pattern} at density {detection.density:.2f}: predicted {ratio:.2f}x the dense kernel's time"
    packed = pack_winograd(dense, weights) if isinstance(dense, WinogradKernel) else pack_conv(dense, weights)
    return Choice(dense, packed, "dense", detection.density, note)


def choose_fc(
    layer: Layer, weights: Weights, epilogue: Epilogue, machine: Machine, *, always_sparse: bool = False
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
    elif not note and not isinstance(detection.pattern, Dense):
        note = f"{detection.pattern}: the FC kernel skips whole blocks of outputs only, built dense"
    dense = choose_fc_kernel(batch, in_features, out_features, epilogue, machine)
    return Choice(dense, pack_fc(dense, matrix), "dense", detection.density, note)


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


def _dense_conv(work: ConvWorkload, machine: Machine, *, winograd: bool) -> tuple[ConvKernel | WinogradKernel, float]:
    """Return the best dense kernel and its predicted cycles.

    Winograd's weights are 1.8 to 4 times as large and its rounding errors larger: a small gain is not worth them.
    """
    direct = choose_kernel(work, machine)
    cycles = predicted_cycles(direct)
    fast = choose_winograd(work, machine) if winograd else None
    if fast is not None and (fast_cycles := winograd_cycles(fast, machine)) < _CONV_WORTHWHILE * cycles:
        return fast, fast_cycles
    return direct, cycles


def _sparse_conv(work: ConvWorkload, weights: Weights, detection: Detection, machine: Machine) -> ConvKernel | None:
    pattern = detection.pattern
    if pattern is None or isinstance(pattern, Dense):
        return None
    by_kernel = work.taps == 1 or (isinstance(pattern, OneByN) and pattern.granularity is Granularity.KERNEL)
    index = IndexKind.CHANNEL if by_kernel else IndexKind.POSITION
    block = min(pattern.block, work.out_channels_per_group)
    kept = int(kept_per_block_row(weights, work.groups, block, index).max(initial=0))
    return choose_kernel(work, machine, block=block, index=index, kept=max(kept, 1))

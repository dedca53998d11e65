"""The families of kernels, and which of them may compute a task."""

from __future__ import annotations

from typing import Any, TypeAlias

from tvm_nm.schedules.chain import ChainKernel
from tvm_nm.schedules.channel_conv import ChannelConvKernel
from tvm_nm.schedules.conv import ConvKernel
from tvm_nm.schedules.depthwise_conv import DepthwiseKernel
from tvm_nm.schedules.families.base import ConvFamily, KernelFamily
from tvm_nm.schedules.families.chain import ChainFamily
from tvm_nm.schedules.families.channel import ChannelFamily
from tvm_nm.schedules.families.depthwise import DepthwiseFamily
from tvm_nm.schedules.families.feature import FeatureFamily
from tvm_nm.schedules.families.lane import LaneFamily
from tvm_nm.schedules.families.pair import PairFamily
from tvm_nm.schedules.families.pixel import PixelFamily
from tvm_nm.schedules.families.stem import StemFamily
from tvm_nm.schedules.families.stem_winograd import StemWinogradFamily
from tvm_nm.schedules.families.winograd import WinogradFamily
from tvm_nm.schedules.fc import FcKernel
from tvm_nm.schedules.kernel_task import KernelTask
from tvm_nm.schedules.lane_conv import LaneConvKernel
from tvm_nm.schedules.pair_conv import PairConvKernel
from tvm_nm.schedules.stem_conv import StemKernel
from tvm_nm.schedules.stem_winograd import StemWinogradKernel
from tvm_nm.schedules.winograd import WinogradKernel, winograd_applies

__all__ = ["ConvFamily", "Kernel", "KernelFamily", "conv_family_of", "families_for", "family_of"]

Kernel: TypeAlias = (
    ConvKernel
    | ChannelConvKernel
    | DepthwiseKernel
    | LaneConvKernel
    | PairConvKernel
    | StemKernel
    | StemWinogradKernel
    | WinogradKernel
    | FcKernel
    | ChainKernel
)

_CONV_FAMILIES: dict[type, ConvFamily[Any]] = {
    ConvKernel: PixelFamily(),
    ChannelConvKernel: ChannelFamily(),
    DepthwiseKernel: DepthwiseFamily(),
    LaneConvKernel: LaneFamily(),
    PairConvKernel: PairFamily(),
    StemKernel: StemFamily(),
    StemWinogradKernel: StemWinogradFamily(),
    WinogradKernel: WinogradFamily(),
}
_FAMILIES: dict[type, KernelFamily[Any]] = {**_CONV_FAMILIES, FcKernel: FeatureFamily(), ChainKernel: ChainFamily()}
_DIRECT = tuple(
    _FAMILIES[kernel]
    for kernel in (ConvKernel, ChannelConvKernel, DepthwiseKernel, LaneConvKernel, PairConvKernel, StemKernel)
)


def family_of(kernel: Kernel) -> KernelFamily[Any]:
    """Return a kernel's family."""
    return _FAMILIES[type(kernel)]


def conv_family_of(kernel: Kernel) -> ConvFamily[Any]:
    """Return a kernel's family, which must be one for single convolutions."""
    return _CONV_FAMILIES[type(kernel)]


def families_for(task: KernelTask) -> tuple[KernelFamily[Any], ...]:
    """Return the families that may compute a task, the usual one first."""
    if task.links is not None:
        return (_FAMILIES[ChainKernel],)
    if task.kind == "fc":
        return (_FAMILIES[FcKernel],)
    if task.winograd:
        return (_FAMILIES[WinogradKernel if winograd_applies(task.workload) else StemWinogradKernel],)
    return _DIRECT if task.workload.epilogue.pool is None else (_FAMILIES[StemKernel],)

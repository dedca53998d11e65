"""What is tuned: one layer's computation, without the choice of a kernel variant. The key of the tuning database."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Literal

from tvm_nm.schedules.chain import KEEP_ALL, ChainKernel, Mixing, chain_applies
from tvm_nm.schedules.conv import ConvKernel, IndexKind
from tvm_nm.schedules.fc import FcKernel
from tvm_nm.schedules.stem_conv import stem_applies
from tvm_nm.schedules.stem_winograd import StemWinogradKernel, stem_winograd_applies
from tvm_nm.schedules.winograd import WinogradKernel, winograd_applies
from tvm_nm.workload import ConvWorkload, Epilogue, MaxPool

__all__ = ["TEMPLATE_REVISION", "ChainLinks", "KernelTask", "parse_task"]

TEMPLATE_REVISION = 3
"""Version of the kernels' code: records of another one are not used. Raise it when a change of a computation or a
template makes other variants the fastest, or when a variant's text form changes its meaning."""

_LAYER = re.compile(
    r"(?:n(?P<n>\d+) )?(?P<ic>\d+)x(?P<h>\d+)x(?P<w>\d+)->(?P<oc>\d+) k(?P<kernel>\d+x\d+)"
    r"(?: s(?P<stride>\d+x\d+))?(?: p(?P<padding>\d+(?:,\d+){3}))?(?: d(?P<dilation>\d+x\d+))?(?: g(?P<groups>\d+))?"
    r" (?P<epilogue>bias\S*)"
)
_TASK = re.compile(
    r"(?P<kind>conv|fc) (?P<layer>[^;]*)"
    r"; (?!;)(?:dense|(?P<winograd>winograd(?:(?=;)| (?=1x)))?"
    r"(?:1x(?P<block>\d+) (?P<index>channel|position) (?P<kept>\d+)(?: (?P<of_group>\d+) of (?P<group>\d+))?)?)"
    r"; (?P<threads>\d+) threads?"
)
_KEPT = r"(?:dense|1x(?P<block{0}>\d+) channel (?P<kept{0}>\d+))"
_CHAIN = re.compile(
    r"chain(?P<blocked> blocked)? (?P<first>[^;]*?) > (?P<depthwise>[^;]*?)(?: > (?P<last>[^;]*))?"
    rf"; {_KEPT.format(1)}, {_KEPT.format(2)}; (?P<threads>\d+) threads?"
)


@dataclass(frozen=True, slots=True)
class ChainLinks:
    """What a chain's task has beside its first layer.

    Attributes
    ----------
    depthwise, last
        Its other layers.
    kept, last_kept
        What the first and the last layer keep; `vectors` is 0, being a variant's choice.
    blocked_input
        Whether its input is blocked.
    """

    depthwise: ConvWorkload
    last: ConvWorkload | None = None
    kept: Mixing = KEEP_ALL
    last_kept: Mixing = KEEP_ALL
    blocked_input: bool = False

    @property
    def layers(self) -> tuple[ConvWorkload, ...]:
        return (self.depthwise,) if self.last is None else (self.depthwise, self.last)


@dataclass(frozen=True, slots=True)
class KernelTask:
    """A layer's computation as the tuner sees it.

    Layers with equal tasks take equal time, whatever their weights: a task says how many inputs a block row keeps,
    not which.

    Attributes
    ----------
    kind
        `conv`, `fc` or `chain`.
    workload
        Shape and epilogue, as the model has them (kernels may reshape 1x1 convolutions); a fully connected layer
        is a 1x1 convolution of a 1x1 map. A chain's first layer.
    threads
        Threads that the kernel runs with.
    index
        How inputs are found; `NONE` for dense kernels.
    block
        Output channels that share their kept inputs; 0 for dense kernels.
    kept
        Inputs that a block row keeps: channels (`CHANNEL`) or positions (`POSITION`); 0 for dense kernels.
    of_group, group
        For N:M, N and M: every output channel keeps at most N of each M consecutive input channels of its group, at
        each kernel position. 0 where nothing is known of that.
    winograd
        Whether it is computed by Winograd's algorithm, which needs whole kernels: a task of its own, since who builds
        may not want that. The epilogue may take maxima of 2x2 pixels then, or those that the stem family takes.
    links
        The rest of a chain.

    Raises
    ------
    ValueError
        If a dense task has a block, or a sparse one keeps nothing or more than there is, or Winograd's algorithm does
        not apply, or it takes maxima that no kernel takes.
    """

    kind: Literal["conv", "fc", "chain"]
    workload: ConvWorkload
    threads: int
    index: IndexKind = IndexKind.NONE
    block: int = 0
    kept: int = 0
    winograd: bool = False
    of_group: int = 0
    group: int = 0
    links: ChainLinks | None = None

    def __post_init__(self) -> None:
        if (self.kind == "chain") != (self.links is not None) or (self.links and self.index is not IndexKind.NONE):
            raise ValueError(f"chains have links, which say what they keep: {self!r}")
        if self.links is not None and not chain_applies(self.workload, self.links.depthwise, self.links.last):
            raise ValueError(f"no chain: {self!r}")
        if self.winograd and not self.takes_winograd:
            raise ValueError(f"Winograd's algorithm does not apply to {self!r}")
        if self.workload.epilogue.pool is not None and not self._takes(self.workload.epilogue.pool):
            raise ValueError(f"no kernel takes these maxima: {self!r}")
        if self.index is IndexKind.NONE:
            if self.block or self.kept or self.group:
                raise ValueError(f"a dense task has neither block nor kept, not {self.block} and {self.kept}")
        elif self.block < 1 or not 1 <= self.kept <= self.inputs:
            raise ValueError(f"a sparse task keeps 1 to {self.inputs} inputs of blocks of 1 or more, not {self!r}")
        if not (0 < self.of_group < self.group or self.of_group == self.group == 0):
            raise ValueError(f"N:M keeps fewer than M, not {self.of_group} of {self.group}")

    @property
    def inputs(self) -> int:
        """What a block row could keep at most: input channels of its group, or positions."""
        return self.workload.in_channels_per_group * (self.workload.taps if self.index is IndexKind.POSITION else 1)

    @property
    def density(self) -> float:
        """Share of the weights that the kernel computes with."""
        if self.links is not None:
            return self.macs / sum(work.macs for work in (self.workload, *self.links.layers))
        return 1.0 if self.index is IndexKind.NONE else self.kept / self.inputs

    @property
    def macs(self) -> int:
        """Multiply-accumulates on kept weights."""
        if self.links is not None:
            last = 0 if self.links.last is None else _kept_macs(self.links.last, self.links.last_kept)
            return _kept_macs(self.workload, self.links.kept) + self.links.depthwise.macs + last
        return round(self.workload.macs * self.density)

    @property
    def dense(self) -> KernelTask:
        """The same layer with all its weights."""
        if self.links is not None:
            return replace(self, links=replace(self.links, kept=KEEP_ALL, last_kept=KEEP_ALL))
        return KernelTask(self.kind, self.workload.unpooled, self.threads)

    @property
    def takes_winograd(self) -> bool:
        """Whether Winograd's algorithm applies: it needs all positions of a kernel, or none; stems are dense."""
        whole = self.index is not IndexKind.POSITION and not self.group
        stem = self.index is IndexKind.NONE and stem_winograd_applies(self.workload)
        return self.kind == "conv" and (stem or (whole and winograd_applies(self.workload)))

    @property
    def as_winograd(self) -> KernelTask:
        """The same by Winograd's algorithm."""
        return replace(self, winograd=True)

    def pooled(self, pool: MaxPool) -> KernelTask | None:
        """Return the same with maxima after all else; None where only kernels of another task take them."""
        return replace(self, workload=self.workload.pooled(pool)) if self._takes(pool) else None

    def _takes(self, pool: MaxPool) -> bool:
        if self.winograd:
            return pool.is_squares or not winograd_applies(self.workload)
        return self.kind == "conv" and self.index is IndexKind.NONE and stem_applies(self.workload)

    def with_kept(self, kept: int) -> KernelTask:
        """Return the task at another density."""
        return replace(self, kept=kept)

    def __str__(self) -> str:
        """Return the text form that `parse_task` reads."""
        plural = f"; {self.threads} thread{'s' if self.threads > 1 else ''}"
        if self.links is not None:
            links = self.links
            text = f"chain{' blocked' if links.blocked_input else ''} "
            text += " > ".join(_layer_text(work) for work in (self.workload, *links.layers))
            return f"{text}; {_kept_text(links.kept)}, {_kept_text(links.last_kept)}{plural}"
        text = f"{self.kind} {_layer_text(self.workload)}; "
        parts = ["winograd"] if self.winograd else []
        if self.index is not IndexKind.NONE:
            parts.append(f"1x{self.block} {self.index.value} {self.kept}")
        if self.group:
            parts.append(f"{self.of_group} of {self.group}")
        return text + (" ".join(parts) or "dense") + plural

    @classmethod
    def of(
        cls,
        kernel: ConvKernel | FcKernel | StemWinogradKernel | WinogradKernel | ChainKernel,
        threads: int,
        workload: ConvWorkload | None = None,
    ) -> KernelTask:
        """Return the task that a kernel is a variant of.

        Parameters
        ----------
        kernel
            The variant.
        threads
            Threads that it runs with.
        workload
            The convolution's workload before a variant reshaped it; default: the kernel's.
        """
        if isinstance(kernel, ChainKernel):
            kept, last_kept = (replace(mixing, vectors=0) for mixing in (kernel.mixing, kernel.last_mixing))
            links = ChainLinks(kernel.depthwise, kernel.last, kept, last_kept, kernel.blocked_input)
            return cls("chain", kernel.first, threads, links=links)
        if isinstance(kernel, FcKernel):
            work = ConvWorkload(
                kernel.batch, kernel.in_features, kernel.out_features, 1, 1, (1, 1), epilogue=kernel.epilogue
            )
            if not kernel.sparse:
                return cls("fc", work, threads)
            return cls("fc", work, threads, IndexKind.CHANNEL, kernel.block, kernel.kept)
        work = workload or kernel.workload
        if isinstance(kernel, StemWinogradKernel):
            return cls("conv", work, threads, winograd=True)
        if isinstance(kernel, WinogradKernel):
            index = IndexKind.CHANNEL if kernel.block else IndexKind.NONE
            return cls("conv", work, threads, index, kernel.block, kernel.kept, winograd=True)
        if kernel.index is IndexKind.NONE:
            return cls("conv", work, threads)
        return cls("conv", work, threads, kernel.index, kernel.block, kernel.kept)


def parse_task(text: str) -> KernelTask:
    """Read a task's text form; the inverse of ``str(task)``.

    Raises
    ------
    ValueError
        If the text is no task.
    """
    if text.startswith("chain"):
        return _parse_chain(text)
    found = _TASK.fullmatch(text)
    if found is None:
        raise ValueError(f"{text!r:.200} is no kernel task, such as {_EXAMPLE!r}")
    workload = _read_layer(found["layer"])
    kind: Literal["conv", "fc"] = "conv" if found["kind"] == "conv" else "fc"
    threads = int(found["threads"])
    index = IndexKind.NONE if found["index"] is None else IndexKind(found["index"])
    block, kept, of_group, group = (int(found[name] or 0) for name in ("block", "kept", "of_group", "group"))
    return KernelTask(kind, workload, threads, index, block, kept, found["winograd"] is not None, of_group, group)


def _parse_chain(text: str) -> KernelTask:
    found = _CHAIN.fullmatch(text)
    if found is None:
        raise ValueError(f"{text!r:.200} is no task of a chain")
    kept, last_kept = (
        Mixing(0, int(found[f"kept{number}"] or 0), int(found[f"block{number}"] or 0)) for number in (1, 2)
    )
    last = None if found["last"] is None else _read_layer(found["last"])
    links = ChainLinks(_read_layer(found["depthwise"]), last, kept, last_kept, found["blocked"] is not None)
    return KernelTask("chain", _read_layer(found["first"]), int(found["threads"]), links=links)


def _read_layer(text: str) -> ConvWorkload:
    found = _LAYER.fullmatch(text)
    if found is None:
        raise ValueError(f"{text!r:.200} is no layer of a kernel task, such as {_EXAMPLE!r}")
    top, left, bottom, right = (int(pad) for pad in (found["padding"] or "0,0,0,0").split(","))
    return ConvWorkload(
        int(found["n"] or 1),
        int(found["ic"]),
        int(found["oc"]),
        int(found["h"]),
        int(found["w"]),
        _read_pair(found["kernel"]),
        _read_pair(found["stride"] or "1x1"),
        (top, left, bottom, right),
        _read_pair(found["dilation"] or "1x1"),
        int(found["groups"] or 1),
        Epilogue.parse(found["epilogue"]),
    )


def _layer_text(work: ConvWorkload) -> str:
    text = f"n{work.batch} " if work.batch != 1 else ""
    text += f"{work.in_channels}x{work.height}x{work.width}->{work.out_channels} k{_pair(work.kernel)}"
    if work.stride != (1, 1):
        text += f" s{_pair(work.stride)}"
    if any(work.padding):
        text += f" p{','.join(map(str, work.padding))}"
    if work.dilation != (1, 1):
        text += f" d{_pair(work.dilation)}"
    if work.groups != 1:
        text += f" g{work.groups}"
    return f"{text} {work.epilogue}"


def _kept_text(kept: Mixing) -> str:
    return f"1x{kept.block} channel {kept.kept}" if kept.kept else "dense"


def _kept_macs(work: ConvWorkload, kept: Mixing) -> int:
    return work.macs * kept.kept // work.in_channels if kept.kept else work.macs


_EXAMPLE = "conv 64x56x56->64 k3x3 p1,1,1,1 bias+relu; 1x16 channel 32; 1 thread"


def _pair(values: tuple[int, int]) -> str:
    return f"{values[0]}x{values[1]}"


def _read_pair(text: str) -> tuple[int, int]:
    first, _, second = text.partition("x")
    return int(first), int(second)

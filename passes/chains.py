"""Finds convolutions, the depthwise ones after them and the pointwise ones after those: one kernel computes them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from tvm_nm.detect import detect_pattern
from tvm_nm.passes.epilogue import BindingGraph, FusedLayer
from tvm_nm.passes.select import Choice, conv_workload
from tvm_nm.patterns import OneByN
from tvm_nm.schedules.chain import KEEP_ALL, ChainKernel, Mixing, chain_applies
from tvm_nm.schedules.chain_packing import channel_vectors, pack_depthwise, pack_mixing
from tvm_nm.schedules.chain_tiling import chain_cycles, choose_chain, crossing_cycles
from tvm_nm.schedules.conv import IndexKind
from tvm_nm.schedules.kernel_task import KernelTask
from tvm_nm.schedules.machine import Machine
from tvm_nm.schedules.packing import PackedWeights, kept_per_block_row
from tvm_nm.schedules.tuned import TunedKernels
from tvm_nm.schedules.variants import kernel_cycles
from tvm_nm.workload import ConvWorkload

__all__ = ["ChainChoice", "chain_works", "choose_chain_kernel", "find_chains", "skipped_inputs"]

Weights = npt.NDArray[np.float32]
Chain = tuple[FusedLayer, ...]

# A stage that keeps more than this of its inputs is computed with all of them: no table, larger register tiles.
_WORTHWHILE = 0.95


@dataclass(frozen=True, slots=True)
class ChainChoice:
    """A chain's kernel.

    Attributes
    ----------
    layers
        The chain.
    kernel
        The kernel variant.
    packed
        Weights of each layer in its format.
    biases
        Biases of each layer, as whole vectors.
    patterns
        Sparsity pattern that the kernel exploits in each layer, as text; `dense` for none.
    densities
        Share of each layer's weights that are not zero.
    notes
        Why a layer's zeros are not exploited; empty if they are, or if there are none.
    tuning
        Where the variant comes from, as of `Choice`.
    """

    layers: Chain
    kernel: ChainKernel
    packed: tuple[PackedWeights, ...]
    biases: tuple[Weights, ...]
    patterns: tuple[str, ...]
    densities: tuple[float, ...]
    notes: tuple[str, ...]
    tuning: str = "default"


def find_chains(layers: Sequence[FusedLayer], bindings: Sequence[Any], result: Any) -> tuple[Chain, ...]:
    """Return the chains among the layers of a function, in order; no layer is in two of them."""
    graph = BindingGraph(bindings, result)
    by_call = {layer.found.var: layer for layer in layers if layer.found.layer.kind == "conv"}
    taken: set[Any] = set()
    chains = []
    for first in layers:
        if first.found.var in taken or first.found.var not in by_call:
            continue
        depthwise = by_call.get(graph.only_user(first.end))
        if depthwise is None or depthwise.found.var in taken:
            continue
        last = by_call.get(graph.only_user(depthwise.end))
        for chain in ((first, depthwise, last), (first, depthwise)):
            if None not in chain and chain_applies(*chain_works(chain)):  # type: ignore[arg-type]
                chains.append(chain)
                taken |= {layer.found.var for layer in chain}  # type: ignore[union-attr]
                break
    return tuple(chains)  # type: ignore[arg-type]


def chain_works(chain: Chain) -> tuple[ConvWorkload, ConvWorkload, ConvWorkload | None]:
    """Return the workloads of a chain's layers."""
    works = [conv_workload(layer.found.layer, layer.epilogue) for layer in chain]
    return works[0], works[1], works[2] if len(works) > 2 else None


def choose_chain_kernel(
    chain: Chain,
    alone: Sequence[Choice],
    machine: Machine,
    *,
    blocked_input: bool,
    always_sparse: bool,
    tuned: TunedKernels | None = None,
) -> ChainChoice | None:
    """Choose a chain's kernel; None where its layers are predicted to be faster one by one.

    Parameters
    ----------
    chain
        The layers.
    alone
        Their kernels, if each had one of its own.
    machine
        What the kernel is generated for.
    blocked_input
        Whether the input is there as a blocked tensor.
    always_sparse
        Whether a layer whose zeros have a pattern must be computed by a kernel that skips them.
    tuned
        Tuned variants, which replace the default ones.
    """
    if machine.lanes < 8:
        return None  # half of the registers would be needed for operands
    works = chain_works(chain)
    weights = [layer.found.weight for layer in chain]
    mixing = (0, 2) if len(chain) > 2 else (0,)
    sparse = {position: skipped_inputs(works[position], weights[position], machine) for position in mixing}
    options: dict[int, list[Mixing]] = {}
    for position, choice in enumerate(alone):
        must_skip = always_sparse and choice.pattern != "dense"
        found = sparse.get(position)
        if must_skip and found is None:
            return None
        options[position] = [KEEP_ALL] * (not must_skip) + [found] * (found is not None)  # type: ignore[list-item]
    kernels = [
        choose_chain(works, machine, kept=(one, other), blocked_input=blocked_input and works[0].is_pointwise)
        for one, other in itertools.product(options[0], options.get(2, [KEEP_ALL]))
    ]
    kernel = min(kernels, key=lambda variant: chain_cycles(variant, machine))
    # Layers one by one read what other threads wrote, as stages do. The models of pixel and channel vectors count some
    # of that already, those of depthwise layers and channel pairs none; but without it here MobileNet-V2 at 2:4 got
    # single layers in four places on two threads and was 5% slower: it stands for all that lies between layers.
    stages = replace(kernel, rows=kernel.depthwise.out_height, shares=1, staged=True)
    one_by_one = sum(kernel_cycles(choice.kernel, machine) for choice in alone) + crossing_cycles(stages, machine)
    if chain_cycles(kernel, machine) >= one_by_one:
        return None
    better = None if tuned is None else tuned.best(KernelTask.of(kernel, machine.threads))
    if better is not None and isinstance(better.kernel, ChainKernel):
        return _packed(chain, better.kernel, weights, alone, better.origin)
    return _packed(chain, kernel, weights, alone, "default")


def skipped_inputs(work: ConvWorkload | None, weights: Weights, machine: Machine) -> Mixing | None:
    """Return what a layer keeps; None where the kernel cannot skip what its pattern drops, or too little is dropped."""
    assert work is not None
    pattern = detect_pattern(weights != 0, work.groups).pattern
    if not isinstance(pattern, OneByN) or pattern.n % machine.lanes:
        return None
    kept = max(1, int(kept_per_block_row(weights, 1, pattern.n, IndexKind.CHANNEL).max(initial=0)))
    return None if kept > _WORTHWHILE * work.in_channels else Mixing(0, kept, pattern.n)


def _packed(
    chain: Chain, kernel: ChainKernel, weights: Sequence[Weights], alone: Sequence[Choice], tuning: str
) -> ChainChoice:
    packed, patterns, notes = [], [], []
    for position, choice in enumerate(alone):
        mixing = (kernel.mixing, None, kernel.last_mixing)[position]
        if mixing is None:
            packed.append(pack_depthwise(kernel, weights[position]))
        else:
            packed.append(pack_mixing(kernel, weights[position], last=position == 2))
        skips = mixing is not None and mixing.kept
        found = detect_pattern(weights[position] != 0, chain[position].found.layer.groups).pattern if skips else None
        patterns.append(str(found) if skips else "dense")
        whole = f"{choice.pattern} at density {choice.density:.2f}: faster with all inputs, in a chain of layers"
        notes.append("" if skips else choice.note if choice.pattern == "dense" else whole)
    return ChainChoice(
        chain,
        kernel,
        tuple(packed),
        tuple(channel_vectors(layer.bias, kernel.lanes) for layer in chain),
        tuple(patterns),
        tuple(choice.density for choice in alone),
        tuple(notes),
        tuning,
    )

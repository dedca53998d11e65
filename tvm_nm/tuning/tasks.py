"""The tuning tasks of a model: every distinct kernel that its layers need, at all patterns and densities wanted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import tvm

from tvm_nm.detect import detect_pattern
from tvm_nm.errors import PlanError
from tvm_nm.inventory import inventory, layer_calls
from tvm_nm.passes.chains import chain_works, find_chains, skipped_inputs
from tvm_nm.passes.epilogue import FusedLayer, fuse_epilogues
from tvm_nm.passes.power import QuarterPowers
from tvm_nm.passes.select import conv_workload, index_kind, nm_of, sparse_task
from tvm_nm.patterns import Dense, OneByN, SparsityPattern, parse_pattern
from tvm_nm.plan import uniform_plan
from tvm_nm.schedules.chain import KEEP_ALL, Mixing
from tvm_nm.schedules.conv import IndexKind
from tvm_nm.schedules.fc import choose_fc_kernel
from tvm_nm.schedules.kernel_task import ChainLinks, KernelTask
from tvm_nm.schedules.machine import Machine
from tvm_nm.schedules.packing import kept_per_block_row
from tvm_nm.schedules.variants import pooled_task, winograd_fits
from tvm_nm.workload import ConvWorkload, MaxPool

__all__ = ["ModelTask", "conv_workloads", "layer_task", "model_tasks", "pruned_to", "with_winograd"]


@dataclass(frozen=True, slots=True)
class ModelTask:
    """A task with what the model needs it for.

    Attributes
    ----------
    task
        The task.
    layers
        Names of the layers that could use it.
    """

    task: KernelTask
    layers: tuple[str, ...]

    @property
    def macs(self) -> int:
        """Multiply-accumulates of all its layers: how much the network's time depends on it."""
        return self.task.macs * len(self.layers)


def model_tasks(
    module: tvm.IRModule,
    machine: Machine,
    patterns: Sequence[str | SparsityPattern] = (),
    densities: Sequence[float] = (),
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
) -> tuple[ModelTask, ...]:
    """List the distinct tasks of a canonical module.

    Every layer is needed dense (by Winograd's algorithm too, where it applies), and with the zeros that its weights
    already have; layers that pruning does not spare, also with each pattern at each density (or at the pattern's own,
    such as 2:4).

    Parameters
    ----------
    module
        What `import_onnx` returns.
    machine
        What kernels are generated for.
    patterns, densities
        What may be pruned to.
    include, exclude
        Globs; see `tvm_nm.plan.uniform_plan`.

    Raises
    ------
    PlanError
        If a pattern's text form is unknown, a density does not go with its pattern or a glob matches no layer.
    """
    wanted = pruned_to(patterns, densities)
    layers = inventory(module)
    eligible: set[str] = set()
    if wanted:
        pattern, density = wanted[0]
        eligible = {choice.name for choice in uniform_plan(layers, pattern, density, include, exclude).layers}
    names: dict[KernelTask, list[str]] = {}
    fused_layers, chains = _fused_layers(module)
    for fused in fused_layers:
        layer = fused.found.layer
        for task in _layer_tasks(fused, machine, wanted if layer.name in eligible else []):
            names.setdefault(task, []).append(layer.name)
    for task, name in _chain_tasks(chains, machine, wanted, eligible):
        names.setdefault(task, []).append(name)
    return tuple(ModelTask(task, tuple(found)) for task, found in names.items())


def conv_workloads(module: tvm.IRModule) -> dict[str, ConvWorkload]:
    """Return a canonical module's convolutions with the epilogues that they are compiled with, by layer name."""
    return {
        fused.found.layer.name: conv_workload(fused.found.layer, fused.epilogue)
        for fused in _fused_layers(module)[0]
        if fused.found.layer.kind == "conv"
    }


def layer_task(work: ConvWorkload, threads: int, pattern: SparsityPattern, density: float) -> KernelTask:
    """Return the task of a convolution that is pruned to a pattern.

    Unbalanced patterns are taken for balanced ones: how long their longest row is depends on the weights.

    Parameters
    ----------
    work
        The convolution.
    threads
        Threads that it runs with.
    pattern, density
        As `SparsityPattern.mask` takes them.

    The task is direct: without the maxima that the workload may end with.
    """
    work = work.unpooled
    index = index_kind(pattern, work)
    if index is IndexKind.NONE:
        return KernelTask("conv", work, threads)
    block = min(pattern.block, work.out_channels_per_group)
    if isinstance(pattern, OneByN) and not pattern.balanced:
        pattern = OneByN(pattern.n, pattern.granularity)
    # Every block row keeps as much as the first one.
    saliency = np.random.default_rng(0).random((block, work.in_channels_per_group, *work.kernel), np.float32)
    kept = kept_per_block_row(pattern.mask(saliency, density).astype(np.float32), 1, block, index)
    of, group = nm_of(pattern)
    return KernelTask("conv", work, threads, index, block, int(kept.max()), of_group=of, group=group)


def pruned_to(
    patterns: Sequence[str | SparsityPattern], densities: Sequence[float]
) -> list[tuple[SparsityPattern, float]]:
    """Return every pattern at every density, those with one of their own at that; `dense` is left out.

    Raises
    ------
    PlanError
        If a pattern's text form is unknown, or a density does not go with its pattern.
    """
    try:
        chosen = [parse_pattern(p) if isinstance(p, str) else p for p in patterns]
        pairs: list[tuple[SparsityPattern, float]] = []
        for pattern in chosen:
            if pattern.fixed_density is not None:
                pairs.append((pattern, pattern.fixed_density))
            else:
                pairs += [(pattern, pattern.check_density(density)) for density in densities or (0.5,)]
    except ValueError as error:
        raise PlanError(str(error)) from error
    return [(pattern, density) for pattern, density in pairs if not isinstance(pattern, Dense)]


def _fused_layers(module: tvm.IRModule) -> tuple[tuple[FusedLayer, ...], tuple[tuple[FusedLayer, ...], ...]]:
    module = tvm.transform.Sequential([QuarterPowers()])(module)
    calls = [found for found in layer_calls(module) if found.layer.kind == "conv" or len(found.layer.input_shape) == 2]
    main = module["main"]
    bindings = [binding for block in main.body.blocks for binding in block.bindings]
    layers = fuse_epilogues(calls, bindings, main.body.body)
    return layers, find_chains(layers, bindings, main.body.body)


def _chain_tasks(
    chains: Sequence[tuple[FusedLayer, ...]],
    machine: Machine,
    wanted: Sequence[tuple[SparsityPattern, float]],
    eligible: set[str],
) -> Iterator[tuple[KernelTask, str]]:
    """Yield the chains' tasks and their first layers' names: dense, with their own zeros, and with those wanted."""
    if machine.lanes < 8:
        return
    ends = {chain[-1].end for chain in chains}
    for chain in chains:
        first, depthwise, last = chain_works(chain)
        blocked = first.is_pointwise and chain[0].found.call.args[0] in ends
        mixing = [(0, first)] + ([(2, last)] if last is not None else [])
        found = {(KEEP_ALL, KEEP_ALL)}
        own = [skipped_inputs(work, chain[at].found.weight, machine) or KEEP_ALL for at, work in mixing]
        found.add((own[0], own[1] if last is not None else KEEP_ALL))
        for pattern, density in wanted:
            kept = [
                _kept_inputs(work, machine, pattern, density) if chain[at].found.layer.name in eligible else KEEP_ALL
                for at, work in mixing
            ]
            found.add((kept[0], kept[1] if last is not None else KEEP_ALL))
        for one, other in sorted(found, key=str):
            links = ChainLinks(depthwise, last, one, other, blocked)
            yield KernelTask("chain", first, machine.threads, links=links), chain[0].found.layer.name


def _kept_inputs(work: ConvWorkload, machine: Machine, pattern: SparsityPattern, density: float) -> Mixing:
    """Return what a chain's layer keeps that is pruned to a pattern; everything if a chain cannot skip it."""
    task = layer_task(work, machine.threads, pattern, density)
    skips = isinstance(pattern, OneByN) and task.index is IndexKind.CHANNEL and pattern.n % machine.lanes == 0
    return Mixing(0, task.kept, pattern.n) if skips and isinstance(pattern, OneByN) else KEEP_ALL


def _layer_tasks(
    fused: FusedLayer, machine: Machine, wanted: Sequence[tuple[SparsityPattern, float]]
) -> list[KernelTask]:
    layer = fused.found.layer
    if layer.kind == "fc":
        sizes = (layer.input_shape[0], layer.input_shape[1], layer.weight_shape[0])
        return [KernelTask.of(choose_fc_kernel(*sizes, fused.epilogue, machine), machine.threads)]
    work = conv_workload(layer, fused.epilogue).unpooled
    tasks = [KernelTask("conv", work, machine.threads)]
    weights = fused.found.weight
    detection = detect_pattern(weights != 0, work.groups)
    own = sparse_task(work, weights, detection.pattern, machine)
    if own is not None:
        tasks.append(own)
    tasks += [layer_task(work, machine.threads, pattern, density) for pattern, density in wanted]
    return list(dict.fromkeys(with_winograd(tasks, machine, pool=fused.epilogue.pool)))


def with_winograd(tasks: Iterable[KernelTask], machine: Machine, *, pool: MaxPool | None = None) -> list[KernelTask]:
    """Return direct tasks, each followed by the same layer by Winograd's algorithm where there are kernels for it.

    With `pool`, those by kernels that take it as well; where Winograd's do, only those.
    """
    found = []
    for task in tasks:
        found.append(task)
        if pool is not None and (pooled := pooled_task(task, pool, machine)) is not None:
            found.append(pooled)
        if winograd_fits(task, machine):
            transformed = task.as_winograd
            taking = None if pool is None else pooled_task(transformed, pool, machine)
            found.append(taking or transformed)
    return found

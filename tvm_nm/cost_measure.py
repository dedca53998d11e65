"""Measures what every layer costs at every candidate, in the network itself.

The whole network is built dense and once for each pattern at some densities, and the builds take turns: a layer is
timed with the epilogue that it has and the caches as the network leaves them, and what layers and the fixed time add up
to is the time of every build. Times at other densities are interpolated.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import tvm
from numpy.typing import NDArray

from tvm_nm.compiler import write_library
from tvm_nm.cost_merge import interpolate_times
from tvm_nm.costs import Candidate, CostTable, LayerCosts, TimeSource
from tvm_nm.errors import PlanError
from tvm_nm.fingerprint import model_sha256, plain_target, structure_digest
from tvm_nm.frontend import ImportedModel
from tvm_nm.inventory import Layer, inventory
from tvm_nm.manifest import MANIFEST
from tvm_nm.memory import release_memory
from tvm_nm.network_times import spread_rest, time_networks
from tvm_nm.patterns import Dense, SparsityPattern, parse_pattern
from tvm_nm.pipeline import build_executable
from tvm_nm.plan import LayerChoice, Plan, prunable_layers
from tvm_nm.pruning import prune_by_plan
from tvm_nm.runtime import CompiledModel
from tvm_nm.schedules.kernel_task import TEMPLATE_REVISION
from tvm_nm.schedules.tuned import TunedKernels

__all__ = ["DEFAULT_DENSITIES", "DEFAULT_PATTERNS", "TEMPLATE_REVISION", "CandidateGrid", "build_plan", "measure_costs"]

DEFAULT_PATTERNS = ("1x4p", "1x16p")
"""Blocks by position: at the same density they lose less accuracy than whole kernels and cost the same."""
DEFAULT_DENSITIES = (0.75, 0.625, 0.5, 0.4375, 0.375, 0.3125, 0.25, 0.1875, 0.125, 0.09375, 0.0625)
_ANCHORS = (0.75, 0.5, 0.375, 0.25, 0.125, 0.0625)


@dataclass(frozen=True, slots=True)
class CandidateGrid:
    """What layers may be pruned to.

    Attributes
    ----------
    patterns
        Sparsity patterns.
    densities
        Densities of the patterns that leave it open.
    measured
        Those of the densities that are measured; the others' times are interpolated.

    Raises
    ------
    PlanError
        If there is no pattern, or no density for one that needs it.
    """

    patterns: tuple[SparsityPattern, ...]
    densities: tuple[float, ...] = DEFAULT_DENSITIES
    measured: tuple[float, ...] = _ANCHORS

    @classmethod
    def make(
        cls, patterns: Sequence[str] = DEFAULT_PATTERNS, densities: Sequence[float] = DEFAULT_DENSITIES
    ) -> CandidateGrid:
        """Read text forms; measured are the lowest and the usual densities among the given, or else ends and middle.

        Raises
        ------
        PlanError
            If a pattern is unknown or a density out of range.
        """
        try:
            parsed = tuple(dict.fromkeys(parse_pattern(text) for text in patterns))
        except ValueError as error:
            raise PlanError(str(error)) from error
        parsed = tuple(pattern for pattern in parsed if not isinstance(pattern, Dense))
        chosen = tuple(sorted(set(densities), reverse=True))
        if not parsed or any(not 0 < density < 1 for density in chosen):
            raise PlanError("candidates need at least one sparsity pattern, and densities between 0 and 1")
        if not chosen and any(pattern.fixed_density is None for pattern in parsed):
            raise PlanError("candidates need at least one density")
        measured = tuple(density for density in chosen if density in _ANCHORS or density == chosen[-1])
        if len(measured) < min(3, len(chosen)):
            measured = tuple(dict.fromkeys((chosen[0], chosen[len(chosen) // 2], chosen[-1])))
        return cls(parsed, chosen, measured)

    def of(self, pattern: SparsityPattern, *, measured: bool = False) -> tuple[float, ...]:
        """Return the densities of a pattern: all, or those that are measured."""
        if pattern.fixed_density is not None:
            return (pattern.fixed_density,)
        return self.measured if measured else self.densities


@dataclass(frozen=True, slots=True)
class _Build:
    """A build of the network: everything dense, or every layer that can be pruned at one pattern and density."""

    pattern: SparsityPattern
    density: float
    model: CompiledModel


def measure_costs(
    imported: ImportedModel,
    target: tvm.target.Target,
    grid: CandidateGrid | None = None,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    tuned: TunedKernels | None = None,
    seconds: float = 20.0,
    early: Callable[[float, float], None] | None = None,
    progress: Callable[[str], None] | None = None,
) -> CostTable:
    """Build and time a network's candidates.

    Parameters
    ----------
    imported
        The model.
    target
        The target with its number of threads; it must be this machine.
    grid
        Patterns and densities; default: `DEFAULT_PATTERNS` at `DEFAULT_DENSITIES`.
    include, exclude
        Globs of layers to prune although they are spared by default, and to leave alone; see
        `tvm_nm.plan.uniform_plan`.
    tuned
        Tuned kernel variants to build with.
    seconds
        How long to measure, at least; a slow network takes more.
    early
        Called with first estimates of the least time of any plan and of the dense time, in microseconds, as soon as the
        dense network and the sparsest ones are built; may raise.
    progress
        Called with the name of each step when it starts.

    Returns
    -------
    The table, without importance.

    Raises
    ------
    PlanError
        If a glob matches no layer, or nothing can be pruned.
    """
    grid = grid or CandidateGrid.make()
    step = progress or (lambda _: None)
    layers = inventory(imported.module)
    names = prunable_layers(layers, include, exclude)
    if not names:
        raise PlanError("the model has no layer that can be pruned; name one with --include")
    wanted: list[tuple[SparsityPattern, float]] = [(Dense(), 1.0)]
    sparse = [(pattern, density) for pattern in grid.patterns for density in grid.of(pattern, measured=True)]
    sparsest = [(pattern, min(grid.of(pattern))) for pattern in grid.patterns]
    wanted += sorted(sparse, key=lambda entry: entry not in sparsest)
    with TemporaryDirectory(prefix="tvm-nm-costs-") as folder:
        builds = []
        for number, (pattern, density) in enumerate(wanted):
            step(f"building {number + 1} of {len(wanted)}: {pattern.at(density)}")
            plan = Plan(tuple(LayerChoice(name, pattern, density) for name in names))
            model = build_plan(imported, plan, target, Path(folder) / str(number), tuned)
            builds.append(_Build(pattern, density, model))
            if early is not None and number == len(sparsest):
                step("measuring the dense and the sparsest builds")
                times, fixed_us = _times(builds, set(names), 0.0)
                early(fixed_us + float(times.min(axis=0).sum()), fixed_us + float(times[0].sum()))
        step(f"measuring {len(builds)} builds in turns, {len(layers)} layers each")
        times, fixed_us = _times(builds, set(names), seconds)
    found = _layer_costs(layers, set(names), builds, times, grid)
    return CostTable(
        model=imported.name,
        model_sha256=model_sha256(imported),
        structure=structure_digest(layers),
        target=plain_target(json.loads(str(target))),
        threads=int(target.attrs["num-cores"]),
        revision=TEMPLATE_REVISION,
        fixed_us=fixed_us,
        layers=found,
    )


def build_plan(
    imported: ImportedModel,
    plan: Plan,
    target: tvm.target.Target,
    directory: Path,
    tuned: TunedKernels | None = None,
    *,
    always_sparse: bool = True,
) -> CompiledModel:
    """Prune and build a model that is imported already, unverified, into a new directory, to be measured."""
    directory.mkdir()
    module, _ = prune_by_plan(imported.module, plan)
    built = build_executable(module, target, always_sparse=always_sparse, tuned=tuned)
    del module
    manifest = write_library(imported, model_sha256(imported), built, target, directory)
    del built
    release_memory()
    (directory / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return CompiledModel(directory, manifest)


def _times(builds: Sequence[_Build], prunable: set[str], seconds: float) -> tuple[NDArray[np.float64], float]:
    """Return each layer's time in each build, (builds, layers), in us, and the time of everything else."""
    measured = time_networks([build.model for build in builds], seconds)
    layers = np.array([times.layers_us for times in measured])
    weights = np.array([[report.packed_bytes for report in build.model.layers] for build in builds], dtype=np.float64)
    spared = [report.name not in prunable for report in builds[0].model.layers]
    # A layer that is never pruned has the same kernel in every build: one time out of all of them.
    layers[:, spared] = np.median(layers[:, spared], axis=0)
    weights[:, spared] = 0.0
    return spread_rest(np.array([times.total_us for times in measured]), layers, weights)


def _layer_costs(
    layers: Sequence[Layer],
    prunable: set[str],
    builds: Sequence[_Build],
    times: NDArray[np.float64],
    grid: CandidateGrid,
) -> tuple[LayerCosts, ...]:
    reports = [build.model.layers for build in builds]
    order = {report.name: index for index, report in enumerate(reports[0])}
    costs = []
    for layer in layers:
        index = order[layer.name]
        dense = reports[0][index]
        everywhere = times[:, index]
        candidates = [
            Candidate(
                Dense(), 1.0, float(everywhere[0]), macs=dense.kept_macs, bytes=dense.packed_bytes, kernel=dense.kernel
            )
        ]
        if layer.name in prunable:
            for pattern in grid.patterns:
                measured = [
                    Candidate(
                        pattern,
                        build.density,
                        float(everywhere[number]),
                        macs=reports[number][index].kept_macs,
                        bytes=reports[number][index].packed_bytes,
                        kernel=reports[number][index].kernel,
                    )
                    for number, build in enumerate(builds)
                    if build.pattern == pattern
                ]
                candidates += _with_interpolated(measured, grid.of(pattern))
        costs.append(LayerCosts(layer.name, layer.kind, dense.workload, dense.epilogue, layer.macs, tuple(candidates)))
    return tuple(costs)


def _with_interpolated(measured: Sequence[Candidate], densities: Sequence[float]) -> list[Candidate]:
    known = {candidate.density: candidate for candidate in measured}
    points = {what: [(c.density, float(getattr(c, what))) for c in measured] for what in ("time_us", "macs", "bytes")}
    between = {what: interpolate_times(found, densities) for what, found in points.items()}
    return [
        known.get(density)
        or dataclasses.replace(
            measured[0],
            density=density,
            time_us=between["time_us"][number],
            macs=round(between["macs"][number]),
            bytes=round(between["bytes"][number]),
            source=TimeSource.INTERPOLATED,
            kernel="",
        )
        for number, density in enumerate(densities)
    ]

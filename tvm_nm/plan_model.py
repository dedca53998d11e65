"""Plans a model from start to end: costs, importance, the dynamic program, and the measured loop."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
import tvm
from numpy.typing import NDArray

from tvm_nm.calibration import CalibrationImages, embedded_images
from tvm_nm.compiler import model_sha256, processor, resolve_target
from tvm_nm.constraints import Constraints
from tvm_nm.cost_measure import CandidateGrid, measure_costs
from tvm_nm.costs import CostTable, merge_tables
from tvm_nm.environment import check_environment, missing_features
from tvm_nm.errors import EnvironmentMismatchError, PlanError
from tvm_nm.frontend import ImportedModel, import_onnx
from tvm_nm.importance import NORMS, add_norms
from tvm_nm.inventory import inventory, layer_weights
from tvm_nm.linker import file_sha256
from tvm_nm.output_error import MOST_IMAGES, OUTPUT, add_output_errors
from tvm_nm.perturbed import MagnitudeWeights, PerturbedNetwork
from tvm_nm.plan import Plan
from tvm_nm.plan_check import check_match
from tvm_nm.plan_loop import MAX_ROUNDS, LoopResult, close_loop
from tvm_nm.plan_search import SearchResult, search_plan
from tvm_nm.planner import FrontPoint, Planner, Solution
from tvm_nm.planning import Goal, UniformPoint, make_plan, uniform_points
from tvm_nm.pruning import Images, open_for
from tvm_nm.reference import reference_model_path
from tvm_nm.schedules.kernel_task import TEMPLATE_REVISION
from tvm_nm.schedules.tuned import TunedKernels
from tvm_nm.tuning.tables import tuned_kernels

__all__ = ["Planned", "cost_table", "plan_model", "with_importance"]

_SEARCH_MACS = 6e12
"""Multiply-accumulates to spend on a search: minutes; images are left out beyond."""


@dataclass(frozen=True, slots=True)
class Planned:
    """A plan and what it was chosen from.

    Attributes
    ----------
    plan
        The plan.
    table, metric
        Costs, as they are after correction, and the importance metric.
    budget_us
        The time budget on the scale of the table; for a largest loss, the time of the fastest plan.
    dense_us
        Time of the dense network in the table before correction.
    front
        The whole Pareto front of the table before correction.
    uniform
        What one pattern and density for all comes to.
    loop
        What was built and measured; None where nothing was.
    search
        What the search over sensitivities found; None where there was none.
    """

    plan: Plan
    table: CostTable
    metric: str
    budget_us: float
    dense_us: float
    front: tuple[FrontPoint, ...]
    uniform: tuple[UniformPoint, ...]
    loop: LoopResult | None
    search: SearchResult | None = None

    def front_dict(self) -> dict[str, Any]:
        """Return the front as JSON-ready values."""
        origin = self.plan.origin
        assert origin is not None
        return {
            "format": "tvm_nm front",
            "version": 1,
            "model": self.table.model,
            "metric": self.metric,
            "dense_us": self.dense_us,
            "budget_us": self.budget_us,
            "chosen": {"time_us": origin.predicted_us, "loss": origin.loss},
            "points": [{"time_us": round(p.time_us, 3), "loss": p.loss} for p in self.front],
            "uniform": [
                {"label": p.label, "pattern": p.pattern, "time_us": round(p.time_us, 3), "loss": p.loss}
                for p in self.uniform
            ],
        }

    def to_dict(self) -> dict[str, Any]:
        """Return plan, budget and measurements as JSON-ready values."""
        loop = self.loop
        rounds = [
            {"predicted_share": item.predicted, "measured_share": item.measured, "dense_ms": item.dense_ms}
            for item in (loop.rounds if loop is not None else ())
        ]
        return {
            "plan": json.loads(self.plan.to_json()),
            "budget_us": self.budget_us,
            "dense_us": self.dense_us,
            "rounds": rounds,
            "taken": loop.best if loop is not None else None,
        }


def plan_model(
    model: str | os.PathLike[str] | onnx.ModelProto,
    goal: Goal,
    *,
    costs: str | os.PathLike[str] | CostTable | None = None,
    grid: CandidateGrid | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    metric: str | None = None,
    constraints: Constraints | None = None,
    images: Images | None = None,
    trials: int = 0,
    database: str | os.PathLike[str] | None = None,
    shipped_records: bool = True,
    rounds: int = MAX_ROUNDS,
    seconds: float = 20.0,
    threads: int | None = None,
    target: Mapping[str, Any] | str | tvm.target.Target | None = None,
    shapes: Mapping[str, Sequence[int]] | None = None,
    progress: Callable[[str], None] | None = None,
) -> Planned:
    """Choose what every layer of a model is pruned to.

    Parameters
    ----------
    model
        A file, or a model in memory with its weights.
    goal
        The budget.
    costs
        A cost table, or its file: read if it exists, otherwise measured and written. None measures.
    grid
        Patterns and densities that layers may be pruned to; what the table lacks is measured. Default: the table's, or
        the usual ones.
    include, exclude
        Globs of layers to prune although they are spared by default, and to leave alone, when costs are measured.
    metric
        Importance metric: `l1`, `l2` or `output`; default: `output` where there are `images`, else `l1`.
    constraints
        What the plan may do to which layer.
    images
        Calibration data without labels, as for `tvm_nm.compile`.
    trials
        Search the layers' sensitivities with so many trials; needs a time budget and `images`.
    database, shipped_records
        Tuned records to build with, as for `tvm_nm.compile`.
    rounds
        Plans to build and measure, at most; with 0 the table's prediction is trusted.
    seconds
        How long to measure costs, and three times as long as each plan; at least a few rounds.
    threads, target, shapes
        As for `tvm_nm.compile`.
    progress
        Called with the name of each step when it starts.

    Raises
    ------
    InfeasibleBudgetError
        If no plan achieves the goal.
    PlanError
        If the table is for something else, a glob matches no layer, or nothing can be pruned.
    EnvironmentMismatchError
        If something has to be measured and the target is not this machine.
    """
    check_environment()
    step = progress or (lambda _: None)
    chosen = resolve_target(target, threads)
    step("importing")
    imported = import_onnx(model, shapes=shapes, verify=False)
    tuned = tuned_kernels(chosen, database, shipped=shipped_records)
    data = open_for(imported, images)
    if data is None and model_sha256(imported) == file_sha256(reference_model_path()):
        data = embedded_images()
    metric = metric or ("l1" if data is None else OUTPUT)
    table = cost_table(
        *(imported, chosen, costs, grid),
        include=include,
        exclude=exclude,
        tuned=tuned,
        seconds=seconds,
        progress=step,
    )
    if metric not in table.metrics:
        table = with_importance(imported, table, metric, data, step)
        if costs is not None and not isinstance(costs, CostTable):
            table.save(costs)
    step("planning")
    planner = Planner(table, metric, constraints)
    solution = goal.solve(planner)
    search = None
    if trials:
        search = _search(imported, table, metric, goal, data, constraints, trials, step)
        table, metric, solution = search.table, "search", search.solution
        planner = Planner(table, metric, constraints)
    front, uniform, dense_us = planner.front(), uniform_points(table, metric), table.dense_us
    budget_us = solution.time_us if goal.max_loss is not None else goal.budget_us(table)
    plan = make_plan(table, solution, metric, budget_us)
    loop = None
    if rounds and not _is_dense(table, solution):
        _check_measurable(chosen)
        with TemporaryDirectory(prefix="tvm-nm-plan-") as folder:
            loop = close_loop(
                imported,
                chosen,
                table,
                metric,
                budget_us,
                Path(folder),
                constraints=constraints,
                first=plan,
                tuned=tuned,
                rounds=1 if goal.max_loss is not None else rounds,
                seconds=seconds / 3,
                progress=step,
            )
        plan, table = loop.chosen.plan, loop.table
    return Planned(plan, table, metric, budget_us, dense_us, front, uniform, loop, search)


def cost_table(
    imported: ImportedModel,
    target: tvm.target.Target,
    costs: str | os.PathLike[str] | CostTable | None = None,
    grid: CandidateGrid | None = None,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    tuned: TunedKernels | None = None,
    seconds: float = 20.0,
    progress: Callable[[str], None] | None = None,
) -> CostTable:
    """Return a cost table for a model: the given one, with what it lacks measured; see `plan_model`."""
    table = costs if isinstance(costs, CostTable) else None
    path = None if costs is None or isinstance(costs, CostTable) else Path(costs)
    if path is not None and path.exists():
        table = CostTable.load(path)
    if table is not None:
        made_for = {
            "structure": table.structure,
            "model": table.model,
            "model_sha256": table.model_sha256,
            "target": table.target,
            "threads": table.threads,
        }
        check_match("the cost table", made_for, inventory(imported.module), model_sha256(imported), target)
        if table.revision != TEMPLATE_REVISION:
            raise PlanError(
                f"the cost table was measured with revision {table.revision} of the kernels and this is revision "
                f"{TEMPLATE_REVISION}; measure again"
            )
        known = {str(candidate.pattern) for layer in table.layers for candidate in layer.candidates}
        if grid is None or known >= {str(pattern) for pattern in grid.patterns}:
            return table
        patterns = tuple(pattern for pattern in grid.patterns if str(pattern) not in known)
        grid = dataclasses.replace(grid, patterns=patterns)
    _check_measurable(target)
    found = measure_costs(
        imported, target, grid, include=include, exclude=exclude, tuned=tuned, seconds=seconds, progress=progress
    )
    table = found if table is None else merge_tables(table, found)
    table = with_importance(imported, table, "l1")
    if path is not None:
        table.save(path)
    return table


def with_importance(
    imported: ImportedModel,
    table: CostTable,
    metric: str,
    data: CalibrationImages | None = None,
    progress: Callable[[str], None] | None = None,
) -> CostTable:
    """Add an importance metric to a table.

    Raises
    ------
    PlanError
        If there is no such metric, or it needs calibration data and there are none.
    """
    if metric not in (*NORMS, OUTPUT):
        raise PlanError(f"there is no importance metric {metric!r}; there are {', '.join((*NORMS, OUTPUT))}")
    groups = {layer.name: layer.groups for layer in inventory(imported.module)}
    weights = layer_weights(imported.module)
    table = add_norms(table, weights, groups)
    if metric != OUTPUT:
        return table
    if data is None:
        raise PlanError("the importance metric 'output' needs calibration images; give --calib")
    network = PerturbedNetwork(imported.onnx, [layer.name for layer in table.layers if layer.can_be_pruned])
    return add_output_errors(table, network, _first_images(data), weights, groups, progress=progress)


def _search(
    imported: ImportedModel,
    table: CostTable,
    metric: str,
    goal: Goal,
    data: CalibrationImages | None,
    constraints: Constraints | None,
    trials: int,
    step: Callable[[str], None],
) -> SearchResult:
    if data is None:
        raise PlanError("the search needs calibration images; give --calib")
    network = PerturbedNetwork(imported.onnx, [layer.name for layer in table.layers if layer.can_be_pruned])
    groups = {layer.name: layer.groups for layer in inventory(imported.module)}
    source = MagnitudeWeights(network, layer_weights(imported.module), groups)
    macs = max(1, sum(layer.macs for layer in table.layers))
    images = _first_images(data)[: int(np.clip(_SEARCH_MACS / macs / trials, 16, 256))]
    budget_us = goal.budget_us(table)
    return search_plan(
        table, metric, budget_us, network, images, source, constraints=constraints, trials=trials, progress=step
    )


def _first_images(data: CalibrationImages) -> NDArray[np.float32]:
    parts: list[NDArray[np.float32]] = []
    for batch in data.batches(16):
        parts.append(batch)
        if len(parts) * 16 >= MOST_IMAGES:
            break
    return np.concatenate(parts)


def _check_measurable(target: tvm.target.Target) -> None:
    if missing := missing_features(*processor(target)):
        raise EnvironmentMismatchError(
            f"the target needs {', '.join(missing)}, which this machine lacks, so nothing can be measured here; plan "
            "on such a machine, or give --costs and --rounds 0"
        )


def _is_dense(table: CostTable, solution: Solution) -> bool:
    return all(layer.candidates[index].is_dense for layer, index in zip(table.layers, solution.choices, strict=True))

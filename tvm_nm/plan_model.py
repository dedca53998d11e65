"""Plans a model from start to end: costs, importance, the dynamic program, and the measured loop."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
import tvm

from tvm_nm.calibration import CalibrationImages, embedded_images
from tvm_nm.constraints import Constraints
from tvm_nm.cost_measure import CandidateGrid
from tvm_nm.costs import CostTable
from tvm_nm.environment import check_environment
from tvm_nm.errors import PlanError
from tvm_nm.fingerprint import model_sha256
from tvm_nm.frontend import ImportedModel, import_onnx
from tvm_nm.inventory import inventory
from tvm_nm.layer_pruning import Method
from tvm_nm.linker import file_sha256
from tvm_nm.output_error import OUTPUT
from tvm_nm.passes.tied_layers import tied_layers
from tvm_nm.plan import prunable_layers
from tvm_nm.plan_calibration import Calibration, calibrate
from tvm_nm.plan_costs import NEEDS_IMAGES, check_measurable, cost_table, with_importance
from tvm_nm.plan_loop import MAX_ROUNDS, close_loop
from tvm_nm.plan_search import SearchResult, search_plan
from tvm_nm.planned import Planned
from tvm_nm.planner import Planner, Solution
from tvm_nm.planning import Goal, make_plan, uniform_points
from tvm_nm.pruning import Images, chosen_method, open_for
from tvm_nm.reference import reference_model_path
from tvm_nm.targets import resolve_target
from tvm_nm.tuning.database import TuningDatabase
from tvm_nm.tuning.tables import tuned_kernels

__all__ = ["Planned", "plan_model"]

_SEARCH_MACS = 6e12
"""Multiply-accumulates to spend on a search: minutes; images are left out beyond."""


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
    method: str | Method | None = None,
    reconstruction: str | os.PathLike[str] | None = None,
    tie_channels: bool = False,
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
    method
        How weights will be dropped, as for `tvm_nm.compile`: losses are estimated with such weights.
    reconstruction
        Directory of a `tvm_nm.reconstruction_db.ReconstructionDatabase`, for `images` and any method but magnitude: the
        layers pruned to all candidates. What it lacks is added. Default: a temporary one.
    tie_channels
        Whether layers that compute the same channels must share a pattern; see `tvm_nm.passes.tied_layers`.
    database, shipped_records
        Tuned records to build with, as for `tvm_nm.compile`; times of the database fill the gaps between densities that
        are measured.
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
    how = Method(method) if isinstance(method, str) else method
    chosen = resolve_target(target, threads)
    step("importing")
    imported = import_onnx(model, shapes=shapes, verify=False)
    tuned = tuned_kernels(chosen, database, shipped=shipped_records)
    data = open_for(imported, images)
    if data is None and model_sha256(imported) == file_sha256(reference_model_path()):
        data = embedded_images()
    metric = metric or ("l1" if data is None else OUTPUT)
    how = chosen_method(how, data)
    constraints = constraints or Constraints()
    if tie_channels:
        constraints = constraints.with_ties(tied_layers(imported.module))
    _check_request(imported, goal, costs, grid, include, exclude, metric, constraints, data, trials)
    table = cost_table(
        *(imported, chosen, costs, grid),
        include=include,
        exclude=exclude,
        tuned=tuned,
        trials=None if database is None else TuningDatabase(database, chosen),
        seconds=seconds,
        early=goal.check_reachable,
        progress=step,
    )
    with ExitStack() as stack:
        calibration: Calibration | None = None
        if data is not None and (metric == OUTPUT or trials):
            folder = reconstruction or stack.enter_context(TemporaryDirectory(prefix="tvm-nm-pruned-"))
            calibration = calibrate(imported, table, data, how, folder, step)
        if metric not in table.metrics or (metric == OUTPUT and calibration and calibration.origin != table.calibrated):
            table = with_importance(imported, table, metric, calibration, step)
            if costs is not None and not isinstance(costs, CostTable):
                table.save(costs)
        step("planning")
        planner = Planner(table, metric, constraints)
        solution = goal.solve(planner)
        search = None
        if trials:
            assert calibration is not None
            search = _search(table, metric, goal, calibration, constraints, trials, step)
            table, metric, solution = search.table, "search", search.solution
            planner = Planner(table, metric, constraints)
    front, uniform, dense_us = planner.front(), uniform_points(table, metric), table.dense_us
    budget_us = solution.time_us if goal.max_loss is not None else goal.budget_us(table)
    plan = make_plan(table, solution, metric, budget_us)
    loop = None
    if rounds and not _is_dense(table, solution):
        check_measurable(chosen)
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


def _check_request(
    imported: ImportedModel,
    goal: Goal,
    costs: str | os.PathLike[str] | CostTable | None,
    grid: CandidateGrid | None,
    include: Sequence[str],
    exclude: Sequence[str],
    metric: str,
    constraints: Constraints,
    data: CalibrationImages | None,
    trials: int,
) -> None:
    """Refuse what cannot be planned before minutes are spent on building and measuring."""
    layers = inventory(imported.module)
    constraints.check_names([layer.name for layer in layers])
    if trials and data is None:
        raise PlanError("the search needs calibration images; give --calib")
    if trials and goal.max_loss is not None:
        raise PlanError("the search needs a time budget, not a largest loss; give --budget or --speedup")
    if costs is not None and (isinstance(costs, CostTable) or Path(costs).exists()):
        return  # it may have what is missing here
    if metric == OUTPUT and data is None:
        raise PlanError(NEEDS_IMAGES)
    grid = grid or CandidateGrid.make()
    lowest = min(min(grid.of(pattern)) for pattern in grid.patterns)
    pruned = set(prunable_layers(layers, include, exclude))
    least = sum(layer.macs * (lowest if layer.name in pruned else 1.0) for layer in layers)
    goal.check_work(round(least), sum(layer.macs for layer in layers))


def _search(
    table: CostTable,
    metric: str,
    goal: Goal,
    calibration: Calibration,
    constraints: Constraints,
    trials: int,
    step: Callable[[str], None],
) -> SearchResult:
    macs = max(1, sum(layer.macs for layer in table.layers))
    images = calibration.images[: int(np.clip(_SEARCH_MACS / macs / trials, 16, 256))]
    return search_plan(
        *(table, metric, goal.budget_us(table), calibration.network, images, calibration.source),
        repair=calibration.repair,
        constraints=constraints,
        trials=trials,
        progress=step,
    )


def _is_dense(table: CostTable, solution: Solution) -> bool:
    return all(layer.candidates[index].is_dense for layer, index in zip(table.layers, solution.choices, strict=True))

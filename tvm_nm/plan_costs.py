"""The cost table that a model is planned with: read or measured, with the importance metrics that are asked for."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import tvm

from tvm_nm.cost_measure import CandidateGrid, measure_costs
from tvm_nm.cost_merge import merge_tables
from tvm_nm.costs import CostTable
from tvm_nm.environment import missing_features
from tvm_nm.errors import EnvironmentMismatchError, PlanError
from tvm_nm.fingerprint import model_sha256
from tvm_nm.frontend import ImportedModel
from tvm_nm.importance import NORMS, add_norms
from tvm_nm.inventory import inventory, layer_weights
from tvm_nm.output_error import OUTPUT, add_output_errors
from tvm_nm.plan_calibration import Calibration
from tvm_nm.plan_check import check_match
from tvm_nm.schedules.kernel_task import TEMPLATE_REVISION
from tvm_nm.schedules.tuned import TunedKernels
from tvm_nm.targets import processor
from tvm_nm.tuned_costs import add_tuned_times
from tvm_nm.tuning.trials import TrialTable

__all__ = ["NEEDS_IMAGES", "check_measurable", "cost_table", "with_importance"]

NEEDS_IMAGES = "the importance metric 'output' needs calibration images; give --calib"


def cost_table(
    imported: ImportedModel,
    target: tvm.target.Target,
    costs: str | os.PathLike[str] | CostTable | None = None,
    grid: CandidateGrid | None = None,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    tuned: TunedKernels | None = None,
    trials: TrialTable | None = None,
    seconds: float = 20.0,
    early: Callable[[float, float], None] | None = None,
    progress: Callable[[str], None] | None = None,
) -> CostTable:
    """Return a cost table for a model: the given one, with what it lacks measured.

    Parameters are as for `plan_model` and `measure_costs`; `trials` are tuned times to put in the place of interpolated
    ones.
    """
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
            return table if trials is None else add_tuned_times(table, imported.module, trials)
        patterns = tuple(pattern for pattern in grid.patterns if str(pattern) not in known)
        grid = dataclasses.replace(grid, patterns=patterns)
    check_measurable(target)
    found = measure_costs(
        *(imported, target, grid),
        include=include,
        exclude=exclude,
        tuned=tuned,
        seconds=seconds,
        early=early,
        progress=progress,
    )
    table = found if table is None else merge_tables(table, found)
    if trials is not None:
        table = add_tuned_times(table, imported.module, trials)
    table = with_importance(imported, table, "l1")
    if path is not None:
        table.save(path)
    return table


def with_importance(
    imported: ImportedModel,
    table: CostTable,
    metric: str,
    calibration: Calibration | None = None,
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
    if calibration is None:
        raise PlanError(NEEDS_IMAGES)
    return add_output_errors(table, calibration, progress=progress)


def check_measurable(target: tvm.target.Target) -> None:
    """Raise `EnvironmentMismatchError` unless code for the target runs on this machine."""
    if missing := missing_features(*processor(target)):
        raise EnvironmentMismatchError(
            f"the target needs {', '.join(missing)}, which this machine lacks, so nothing can be measured here; plan "
            "on such a machine, or give --costs and --rounds 0"
        )

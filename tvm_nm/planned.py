"""A plan, what it was chosen from, and what was measured of it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from tvm_nm.costs import CostTable
from tvm_nm.plan import Plan
from tvm_nm.plan_loop import LoopResult
from tvm_nm.plan_search import SearchResult
from tvm_nm.planner import FrontPoint
from tvm_nm.planning import UniformPoint

__all__ = ["Planned"]


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

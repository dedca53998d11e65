"""Compares ways to plan at equal measured speed: one density for all, and plans by L1, by output error, and by search.

    python scripts/plan_study.py MODEL.onnx --calib calib.npz --test test.npz [--speedups 1.3,1.55,2] [--json F]

``calib.npz`` holds ``images``, float32 (N, C, H, W) as the network wants them; ``test.npz`` also ``labels``. All plans
are pruned by magnitude, at once and without training. Each is built and measured in turns with the dense build;
planned ones are planned again, at most twice, until they meet the speed-up.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from tvm_nm.compiler import resolve_target
from tvm_nm.cost_measure import CandidateGrid
from tvm_nm.costs import CostTable
from tvm_nm.frontend import import_onnx
from tvm_nm.inventory import inventory, layer_weights
from tvm_nm.output_error import add_output_errors
from tvm_nm.patterns import Dense, parse_pattern
from tvm_nm.perturbed import MagnitudeWeights, PerturbedNetwork, kl_divergence
from tvm_nm.plan import LayerChoice, Plan
from tvm_nm.plan_loop import close_loop
from tvm_nm.plan_model import cost_table
from tvm_nm.plan_search import search_plan
from tvm_nm.planner import Planner
from tvm_nm.planning import make_plan, uniform_points


class Judge:
    """Right answers and divergence of a plan's network, pruned by magnitude."""

    def __init__(self, network: PerturbedNetwork, source: MagnitudeWeights, test: Path, limit: int | None) -> None:
        with np.load(test) as archive:
            self.images = archive["images"][:limit]
            self.labels = archive["labels"][:limit]
        self.network, self.source = network, source
        self.dense = self._answers({})

    def __call__(self, plan: Plan) -> dict[str, float]:
        changed = {
            choice.name: self.source.parameters(choice.name, choice.pattern, choice.density)
            for choice in plan.layers
            if not isinstance(choice.pattern, Dense)
        }
        answers = self._answers(changed)
        return {
            "top1": float((answers.argmax(axis=1) == self.labels).mean()),
            "same": float((answers.argmax(axis=1) == self.dense.argmax(axis=1)).mean()),
            "divergence": kl_divergence(self.dense, answers),
        }

    def _answers(self, changed: dict[str, Any]) -> np.ndarray:
        parts = [self.network.run(self.images[i : i + 64], changed) for i in range(0, len(self.images), 64)]
        return np.concatenate(parts)


def uniform(table: CostTable, pattern: str, budget_us: float) -> Plan:
    """One density for all, such that the table predicts the budget."""
    points = sorted((p for p in uniform_points(table, "l1") if p.pattern == pattern), key=lambda p: p.time_us)
    densities = [float(point.label.split()[-1]) for point in points]
    density = round(float(np.interp(budget_us, [p.time_us for p in points], densities)), 3)
    names = [layer.name for layer in table.layers if layer.can_be_pruned]
    return Plan(tuple(LayerChoice(name, parse_pattern(pattern), density) for name in names))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calib", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--limit", type=int, help="test images")
    parser.add_argument("--costs", type=Path, help="cost table; measured and written there if it does not exist")
    parser.add_argument("--patterns", default="1x4p,1x16p")
    parser.add_argument("--speedups", default="1.3,1.55,2.0")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--images", type=int, default=256, help="calibration images of the search")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--no-measure", action="store_true", help="trust the costs")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    def say(text: str) -> None:
        print(f"[{time.perf_counter() - begin:6.1f} s] {text}", file=sys.stderr, flush=True)

    begin = time.perf_counter()
    imported = import_onnx(options.model, verify=False)
    target = resolve_target(None, options.threads)
    grid = CandidateGrid.make(options.patterns.split(","))
    table = cost_table(imported, target, options.costs, grid, seconds=options.seconds, progress=say)
    weights = layer_weights(imported.module)
    groups = {layer.name: layer.groups for layer in inventory(imported.module)}
    names = [layer.name for layer in table.layers if layer.can_be_pruned]
    network = PerturbedNetwork(imported.onnx, names)
    source = MagnitudeWeights(network, weights, groups)
    with np.load(options.calib) as archive:
        images = archive["images"].astype(np.float32)
    if "output" not in table.metrics:
        table = add_output_errors(table, network, images, weights, groups, source=source, progress=say)
        if options.costs is not None:
            table.save(options.costs)
    judge = Judge(network, source, options.test, options.limit)
    dense_top1 = float((judge.dense.argmax(axis=1) == judge.labels).mean())
    rows: list[dict[str, Any]] = []
    for speedup in (float(text) for text in options.speedups.split(",")):
        budget = table.dense_us / speedup
        contestants: list[tuple[str, Plan, CostTable, str]] = [
            (f"uniform {pattern}", uniform(table, pattern, budget), table, "l1")
            for pattern in options.patterns.split(",")
        ]
        for metric in ("l1", "l2", "output"):
            plan = make_plan(table, Planner(table, metric).solve(budget), metric, budget)
            contestants.append((f"plan, {metric}", plan, table, metric))
        found = search_plan(
            table, "output", budget, network, images[: options.images], source, trials=options.trials, progress=say
        )
        contestants.append(
            ("plan, search", make_plan(found.table, found.solution, "search", budget), found.table, "search")
        )
        for name, plan, costs, metric in contestants:
            row: dict[str, Any] = {"speedup": speedup, "way": name}
            if not options.no_measure:
                with TemporaryDirectory() as folder:
                    planned = not name.startswith("uniform")
                    result = close_loop(
                        *(imported, target, costs, metric, budget, Path(folder)),
                        first=plan,
                        rounds=3 if planned else 1,
                        seconds=options.seconds / 3,
                    )
                chosen = result.chosen
                plan = chosen.plan
                row.update(measured=1 / chosen.measured, predicted=1 / chosen.predicted, rounds=len(result.rounds))
            row.update(judge(plan))
            rows.append(row)
            say(json.dumps(row))
    if options.json is not None:
        data = {"model": options.model.name, "dense_top1": dense_top1, "images": len(judge.labels), "rows": rows}
        options.json.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    print(f"{options.model.stem}: dense top-1 {dense_top1:.2%} on {len(judge.labels)} images\n")
    print("| speed-up | way | measured | off | top-1 | as dense | divergence |\n|---|---|---|---|---|---|---|")
    for row in rows:
        measured = row.get("measured")
        shown = f"{measured:.2f}x | {row['speedup'] / measured - 1:+.1%}" if measured else "| "
        print(
            f"| {row['speedup']:g}x | {row['way']} | {shown} | {row['top1']:.2%} | {row['same']:.2%} | "
            f"{row['divergence']:.3f} |"
        )


if __name__ == "__main__":
    main()

"""Compares ways to plan at equal measured speed: one density for all, and plans by L1, by output error, and by search.

    python scripts/plan_study.py MODEL.onnx --calib calib.npz --test test.npz --folder study [--include GLOB]

``calib.npz`` holds ``images``, float32 (N, C, H, W) as the network wants them; ``test.npz`` also ``labels``. Every
network is pruned by Optimal Brain Surgeon, one layer behind the other, on the same calibration images and without
training. Each is built and measured in turns with the dense build and planned again, at most twice, until it meets the
speed-up; one density for all is changed in the same way. With --together each is planned once, and all are measured in
the end.

The folder keeps the cost table, the pruned layers that losses are estimated with, a JSON file for each network, and the
report. Run it again to go on where it was interrupted; delete a network's file to look at it anew.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tvm_nm.agreement import compare_answers, predict, top1_interval
from tvm_nm.calibration import CalibrationImages, batch_size, open_images
from tvm_nm.compiler import resolve_target
from tvm_nm.cost_measure import CandidateGrid, build_plan
from tvm_nm.cost_merge import add_density
from tvm_nm.costs import CostTable
from tvm_nm.frontend import ImportedModel, import_onnx
from tvm_nm.json_file import write_text
from tvm_nm.layer_pruning import Method
from tvm_nm.oneshot import prune_calibrated
from tvm_nm.onnx_network import OnnxNetwork
from tvm_nm.patterns import parse_pattern
from tvm_nm.plan import LayerChoice, Plan
from tvm_nm.plan_calibration import Calibration, calibrate
from tvm_nm.plan_costs import cost_table, with_importance
from tvm_nm.plan_loop import MAX_ROUNDS, TOLERANCE, LoopResult, LoopRound, close_loop, measure_share, predicted_us
from tvm_nm.plan_search import search_plan
from tvm_nm.planner import Planner
from tvm_nm.planning import make_plan, uniform_points
from tvm_nm.runtime import CompiledModel
from tvm_nm.tuning.database import TuningDatabase
from tvm_nm.tuning.tables import tuned_kernels

WAYS = ("uniform 1x4p", "uniform 1x16p", "l1", "output", "search")


@dataclass(frozen=True)
class Study:
    """What all networks of the comparison share."""

    imported: ImportedModel
    target: Any
    tuned: Any
    table: CostTable
    calibration: Calibration
    images: CalibrationImages
    test: CalibrationImages
    dense: NDArray[np.float64]
    options: argparse.Namespace

    def network(self, way: str, speedup: float) -> dict[str, Any]:
        """Plan one network, build and measure it, prune it, and look at its answers."""
        started = time.perf_counter()
        budget_us = self.table.dense_us / speedup
        if way.startswith("uniform "):
            loops = self._uniform(way.removeprefix("uniform "), budget_us)
        else:
            loops = [self._planned(way, budget_us)]
        rounds = [item for loop in loops for item in loop.rounds]
        best = min(
            (item for item in rounds if item.measured * speedup <= 1 + TOLERANCE),
            key=lambda item: -item.measured if way.startswith("uniform") else item.plan.origin.loss,
            default=min(rounds, key=lambda item: item.measured),
        )
        row: dict[str, Any] = {
            "speedup": speedup,
            "way": way,
            "measured": 1 / best.measured,
            "off": best.measured * speedup - 1,
            "predicted_off": best.predicted / best.measured - 1,
            "trusted": self.options.no_measure,
            "rounds": [{"predicted": item.predicted, "measured": item.measured} for item in rounds],
        }
        row |= self.answers(best.plan)
        if self.options.stitched:
            row["stitched"] = self.answers(best.plan, self.options.folder / "pruned")
        row["plan"] = json.loads(best.plan.to_json())["layers"]
        return row | {"seconds": time.perf_counter() - started}

    def answers(self, plan: Plan, database: Path | None = None) -> dict[str, float]:
        """Prune a network to a plan and compare its answers with the dense network's and the truth."""
        model = self.imported.onnx
        prune_calibrated(model, [self.imported.module], plan, self.images, database=database)
        found = predict(OnnxNetwork(model).run, self.test, batch_size(self.imported.inputs[0].shape[1:]))
        result = compare_answers(self.dense, found, self.test.labels)
        return {"top1": result.top1 or 0.0, "same": result.same, "divergence": result.divergence}

    def _planned(self, way: str, budget_us: float) -> LoopResult:
        table, metric = self.table, way
        plan = None
        if way == "search":
            given = self.calibration
            found = search_plan(
                *(table, "output", budget_us, given.network, given.images[: self.options.search_images], given.source),
                repair=given.repair,
                trials=self.options.trials,
                progress=say,
            )
            table, metric = found.table, "search"
            plan = make_plan(table, found.solution, metric, budget_us)
        return self._loop(table, metric, budget_us, plan, MAX_ROUNDS)

    def _uniform(self, pattern: str, budget_us: float) -> list[LoopResult]:
        table, dense_us = self.table, self.table.dense_us
        loops: list[LoopResult] = []
        for _ in range(MAX_ROUNDS):
            points = [point for point in uniform_points(table, "l1") if point.pattern == pattern]
            points.sort(key=lambda point: point.time_us)
            densities = [float(point.label.split()[-1]) for point in points]
            density = round(float(np.interp(budget_us, [point.time_us for point in points], densities)), 3)
            table = add_density(table, parse_pattern(pattern), density)
            names = [layer.name for layer in table.layers if layer.can_be_pruned]
            plan = Plan(tuple(LayerChoice(name, parse_pattern(pattern), density) for name in names))
            loops.append(self._loop(table, "l1", budget_us, plan, 1, dense_us))
            table = loops[-1].table
            if abs(loops[-1].chosen.measured * dense_us / budget_us - 1) <= TOLERANCE:
                break
        return loops

    def _loop(
        self,
        table: CostTable,
        metric: str,
        budget_us: float,
        plan: Plan | None,
        rounds: int,
        dense_us: float | None = None,
    ) -> LoopResult:
        if self.options.no_measure and plan is None:
            plan = make_plan(table, Planner(table, metric).solve(budget_us), metric, budget_us)
        if self.options.no_measure:
            assert plan is not None
            share = predicted_us(table, plan) / (dense_us or table.dense_us)
            return LoopResult((LoopRound(plan, share, share, 0.0),), 0, table, budget_us / (dense_us or table.dense_us))
        with TemporaryDirectory(prefix="plan-study-") as folder:
            return close_loop(
                *(self.imported, self.target, table, metric, budget_us, Path(folder)),
                first=plan,
                dense_us=dense_us,
                tuned=self.tuned,
                rounds=rounds,
                seconds=self.options.seconds / 3,
                progress=say,
            )


def measure_together(study: Study, rows: Sequence[dict[str, Any]]) -> None:
    """Build all networks that were planned without measuring, and measure them one after the other."""
    files = [row for row in rows if row.get("trusted")]
    if not files:
        return
    with TemporaryDirectory(prefix="plan-study-") as folder:
        say(f"building {len(files) + 1} networks")
        builds = [build_plan(study.imported, Plan(), study.target, Path(folder) / "dense", study.tuned)]
        for number, row in enumerate(files):
            plan = Plan.from_json(json.dumps({"format": "tvm_nm plan", "version": 1, "layers": row["plan"]}))
            builds.append(build_plan(study.imported, plan, study.target, Path(folder) / str(number), study.tuned))
        say("measuring them")
        shares = measured_shares(builds[0], builds[1:], study.options.seconds / 3)
    for row, share in zip(files, shares, strict=True):
        predicted = 1 / row["measured"]
        row |= {"measured": 1 / share, "off": share * row["speedup"] - 1, "predicted_off": predicted / share - 1}
        row["trusted"] = False
        write_row(study.options.folder, row)


def measured_shares(dense: CompiledModel, models: Sequence[CompiledModel], seconds: float) -> list[float]:
    """Time of each network as a share of the dense one's."""
    return [measure_share(dense, model, seconds) for model in models]


def row_file(folder: Path, speedup: float, way: str) -> Path:
    """Return where a network's result is kept."""
    return folder / f"{speedup:g}-{way.replace(' ', '-')}.json"


def write_row(folder: Path, row: dict[str, Any]) -> None:
    """Keep a network's result."""
    write_text(row_file(folder, row["speedup"], row["way"]), json.dumps(row, indent=1) + "\n", "result")


def open_study(options: argparse.Namespace) -> Study:
    """Measure and estimate what is not in the folder yet."""
    imported = import_onnx(options.model, verify=False)
    target = resolve_target(None, options.threads)
    tuned = tuned_kernels(target, options.db)
    shape = imported.inputs[0].shape[1:]
    images = open_images(options.calib, shape, limit=options.calib_images)
    test = open_images(options.test, shape, limit=options.test_images)
    if test.labels is None:
        raise SystemExit(f"{options.test} has no labels")
    options.folder.mkdir(parents=True, exist_ok=True)
    costs = options.folder / "costs.json"
    grid = CandidateGrid.make(options.patterns.split(","))
    table = cost_table(
        *(imported, target, costs, grid),
        include=options.include,
        tuned=tuned,
        trials=None if options.db is None else TuningDatabase(options.db, target),
        seconds=options.seconds,
        progress=say,
    )
    calibration = calibrate(imported, table, images, Method.OBS, options.folder / "pruned", say)
    if table.calibrated != calibration.origin:
        table = with_importance(imported, table, "output", calibration, say)
        table.save(costs)
    dense = predict(OnnxNetwork(imported.onnx).run, test, batch_size(shape))
    return Study(imported, target, tuned, table, calibration, images, test, dense, options)


def report(study: Study, rows: Sequence[dict[str, Any]]) -> str:
    """Return the comparison as Markdown."""
    assert study.test.labels is not None
    top1 = float((study.dense.argmax(axis=1) == study.test.labels).mean())
    margin = top1_interval(top1, study.test.count)
    lines = [
        f"{study.options.model.name}: dense top-1 {top1:.2%} on {study.test.count} images "
        f"(standard error {margin:.1%})",
        "",
        "| speed-up | way | measured | off the budget | prediction off | rounds | top-1 | as dense | divergence |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['speedup']:g}x | {row['way']} | {row['measured']:.2f}x | {row['off']:+.1%} | "
        f"{row['predicted_off']:+.1%} | {len(row['rounds'])} | {row['top1']:.2%} | {row['same']:.2%} | "
        f"{row['divergence']:.3f} |"
        for row in rows
    ]
    if any("stitched" in row for row in rows):
        lines += ["", "| speed-up | way | pruned in sequence | stitched |", "|---|---|---|---|"]
        lines += [
            f"| {row['speedup']:g}x | {row['way']} | {row['top1']:.2%} | {row['stitched']['top1']:.2%} |"
            for row in rows
            if "stitched" in row
        ]
    return "\n".join(lines) + "\n"


def say(text: str) -> None:
    """Report progress."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calib", type=Path, required=True)
    parser.add_argument("--calib-images", type=int, default=1024)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--test-images", type=int)
    parser.add_argument("--folder", type=Path, required=True, help="what is measured and found; the report")
    parser.add_argument("--include", nargs="*", default=[], help="globs of layers that are spared by default")
    parser.add_argument("--patterns", default="1x4p,1x16p")
    parser.add_argument("--speedups", default="1.3,1.55,2.0")
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--search-images", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--db", type=Path, help="tuning database to build with")
    parser.add_argument("--stitched", action="store_true", help="look at the stitched networks, too")
    parser.add_argument("--together", action="store_true", help="plan each once, and measure all in the end")
    parser.add_argument("--no-measure", action="store_true", help="trust the costs")
    options = parser.parse_args()
    options.no_measure |= options.together
    ways = options.ways.split(",")
    if wrong := [way for way in ways if way not in WAYS and not way.startswith("uniform ")]:
        parser.error(f"no such ways: {', '.join(wrong)}; there are {', '.join(WAYS)}")

    study = open_study(options)
    rows: list[dict[str, Any]] = []
    for speedup in (float(text) for text in options.speedups.split(",")):
        for way in ways:
            file = row_file(options.folder, speedup, way)
            if not file.exists():
                say(f"{way} at {speedup:g}x")
                write_row(options.folder, study.network(way, speedup))
            rows.append(json.loads(file.read_text(encoding="utf-8")))
            write_text(options.folder / "report.md", report(study, rows), "report")
    if options.together:
        measure_together(study, rows)
        write_text(options.folder / "report.md", report(study, rows), "report")
    print(report(study, rows), end="")


if __name__ == "__main__":
    main()

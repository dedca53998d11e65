"""Compares ways to plan at equal measured speed: one density for all, and plans by L1, by output error, and by search.

    python scripts/plan_study.py MODEL.onnx --calib calib.npz --test test.npz --folder study [--include GLOB]

``calib.npz`` holds ``images``, float32 (N, C, H, W) as the network wants them; ``test.npz`` also ``labels``. Every
network is pruned by Optimal Brain Surgeon, one layer behind the other, on the same calibration images and without
training. Each is built and measured in turns with the dense build and planned again, at most twice, until it meets the
speed-up; one density for all is changed in the same way. What weights are kept does not matter for the time: the builds
that are measured keep the largest, and only the plan that is taken is pruned.

The work has four steps, which can be done at different times: `costs` measures the network, `losses` prunes its layers
one by one, weighs them and searches, `plans` goes through the loops, and `answers` prunes the planned networks and runs
them. `costs` and `plans` measure and want a quiet machine.

The folder keeps the cost table, the pruned layers that losses are estimated with, what the search found, a JSON file
for each network, and the report. Run it again to go on where it was interrupted; delete a network's file to look at it
anew.
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
from tvm_nm.plan_loop import MAX_ROUNDS, TOLERANCE, LoopResult, close_loop
from tvm_nm.plan_search import search_plan
from tvm_nm.planning import uniform_points
from tvm_nm.runtime import CompiledModel
from tvm_nm.targets import resolve_target
from tvm_nm.tuning.database import TuningDatabase
from tvm_nm.tuning.tables import tuned_kernels

WAYS = ("uniform 1x4p", "uniform 1x16p", "l1", "output", "search")
STEPS = ("costs", "losses", "plans", "answers")


@dataclass(frozen=True)
class Study:
    """What all networks of the comparison share."""

    imported: ImportedModel
    target: Any
    tuned: Any
    table: CostTable
    images: CalibrationImages
    test: CalibrationImages
    options: argparse.Namespace

    def network(self, way: str, speedup: float, dense: CompiledModel, directory: Path) -> dict[str, Any]:
        """Plan one network and go through the loop with it."""
        started = time.perf_counter()
        budget_us = self.table.dense_us / speedup
        if way.startswith("uniform "):
            loops = self._uniform(way.removeprefix("uniform "), budget_us, dense, directory)
        else:
            loops = [self._planned(way, speedup, budget_us, dense, directory)]
        rounds = [item for loop in loops for item in loop.rounds]
        best = min(
            (item for item in rounds if item.measured * speedup <= 1 + TOLERANCE),
            key=lambda item: -item.measured if way.startswith("uniform") else item.plan.origin.loss,
            default=min(rounds, key=lambda item: item.measured),
        )
        return {
            "speedup": speedup,
            "way": way,
            "measured": 1 / best.measured,
            "off": best.measured * speedup - 1,
            "predicted_off": best.predicted / best.measured - 1,
            "first_predicted_off": rounds[0].predicted / rounds[0].measured - 1,
            "rounds": [{"predicted": item.predicted, "measured": item.measured} for item in rounds],
            "plan": json.loads(best.plan.to_json())["layers"],
            "seconds": time.perf_counter() - started,
        }

    def answers(self, row: dict[str, Any], dense: NDArray[np.float64]) -> dict[str, Any]:
        """Prune a planned network and look at its answers."""
        plan = Plan.from_json(json.dumps({"format": "tvm_nm plan", "version": 1, "layers": row["plan"]}))
        found: dict[str, Any] = dict(self._compared(plan, dense))
        if self.options.stitched:
            found["stitched"] = self._compared(plan, dense, self.options.folder / "pruned")
        return found

    def _compared(self, plan: Plan, dense: NDArray[np.float64], database: Path | None = None) -> dict[str, float]:
        model = self.imported.onnx
        prune_calibrated(model, [self.imported.module], plan, self.images, database=database)
        found = predict(OnnxNetwork(model).run, self.test, batch_size(self.imported.inputs[0].shape[1:]))
        result = compare_answers(dense, found, self.test.labels)
        return {"top1": result.top1 or 0.0, "same": result.same, "divergence": result.divergence}

    def _planned(self, way: str, speedup: float, budget_us: float, dense: CompiledModel, directory: Path) -> LoopResult:
        table = CostTable.load(search_file(self.options.folder, speedup)) if way == "search" else self.table
        return self._loop(table, way, budget_us, dense, directory)

    def _uniform(self, pattern: str, budget_us: float, dense: CompiledModel, directory: Path) -> list[LoopResult]:
        table, dense_us = self.table, self.table.dense_us
        loops: list[LoopResult] = []
        for number in range(MAX_ROUNDS):
            points = [point for point in uniform_points(table, "l1") if point.pattern == pattern]
            points.sort(key=lambda point: point.time_us)
            densities = [float(point.label.split()[-1]) for point in points]
            density = round(float(np.interp(budget_us, [point.time_us for point in points], densities)), 3)
            table = add_density(table, parse_pattern(pattern), density)
            names = [layer.name for layer in table.layers if layer.can_be_pruned]
            plan = Plan(tuple(LayerChoice(name, parse_pattern(pattern), density) for name in names))
            place = directory / str(number)
            place.mkdir()
            loops.append(self._loop(table, "l1", budget_us, dense, place, first=plan, rounds=1, dense_us=dense_us))
            table = loops[-1].table
            if abs(loops[-1].chosen.measured * dense_us / budget_us - 1) <= TOLERANCE:
                break
        return loops

    def _loop(
        self, table: CostTable, metric: str, budget_us: float, dense: CompiledModel, directory: Path, **options: Any
    ) -> LoopResult:
        return close_loop(
            *(self.imported, self.target, table, metric, budget_us, directory),
            dense=dense,
            tuned=self.tuned,
            seconds=self.options.seconds / 3,
            progress=say,
            **options,
        )


def row_file(folder: Path, speedup: float, way: str) -> Path:
    """Return where a network's result is kept."""
    return folder / f"{speedup:g}-{way.replace(' ', '-')}.json"


def search_file(folder: Path, speedup: float) -> Path:
    """Return where the sensitivities are kept that a search found."""
    return folder / f"search-{speedup:g}.costs.json"


def write_row(folder: Path, row: dict[str, Any]) -> None:
    """Keep a network's result."""
    write_text(row_file(folder, row["speedup"], row["way"]), json.dumps(row, indent=1) + "\n", "result")


def open_study(options: argparse.Namespace) -> Study:
    """Open what there is, and measure and estimate what is not in the folder yet if those steps are wanted."""
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
    if "costs" not in options.steps and not costs.exists():
        raise SystemExit(f"{costs} is not there; it is measured in the step costs")
    grid = CandidateGrid.make(options.patterns.split(","))
    table = cost_table(
        *(imported, target, costs, grid),
        include=options.include,
        tuned=tuned,
        trials=None if options.db is None else TuningDatabase(options.db, target),
        seconds=options.seconds,
        progress=say,
    )
    if "losses" in options.steps:
        calibration = calibrate(imported, table, images, Method.OBS, options.folder / "pruned", say)
        if table.calibrated != calibration.origin:
            table = with_importance(imported, table, "output", calibration, say)
            table.save(costs)
        for speedup in options.speedups if "search" in options.ways else ():
            search(table, calibration, speedup, options)
    return Study(imported, target, tuned, table, images, test, options)


def search(table: CostTable, calibration: Calibration, speedup: float, options: argparse.Namespace) -> None:
    """Search sensitivities for a speed-up, unless that has been done."""
    file = search_file(options.folder, speedup)
    if file.exists():
        return
    say(f"searching for {speedup:g}x")
    found = search_plan(
        *(table, "output", table.dense_us / speedup, calibration.network),
        *(calibration.images[: options.search_images], calibration.source),
        repair=calibration.repair,
        trials=options.trials,
        progress=say,
    )
    say(f"divergence {found.divergence:.4g} instead of {found.first_divergence:.4g}")
    found.table.save(file)


def missing(options: argparse.Namespace, what: str | None = None) -> list[tuple[float, str]]:
    """Return the networks, speed-up and way, that have no file, or nothing under a name in it."""
    found = []
    for speedup in options.speedups:
        for way in options.ways:
            file = row_file(options.folder, speedup, way)
            if not file.exists() if what is None else file.exists() and what not in read_row(file):
                found.append((speedup, way))
    return found


def read_row(file: Path) -> dict[str, Any]:
    """Return a network's result."""
    row: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return row


def make_plans(study: Study) -> None:
    """Go through the loop with every network that has no plan yet."""
    wanted = missing(study.options)
    if not wanted:
        return
    with TemporaryDirectory(prefix="plan-study-") as folder:
        say("building the dense network")
        dense = build_plan(study.imported, Plan(), study.target, Path(folder) / "dense", study.tuned)
        for number, (speedup, way) in enumerate(wanted):
            say(f"{way} at {speedup:g}x")
            directory = Path(folder) / str(number)
            directory.mkdir()
            write_row(study.options.folder, study.network(way, speedup, dense, directory))


def look_at_answers(study: Study) -> NDArray[np.float64]:
    """Prune and run every network that is planned and has not been looked at; return the dense network's answers."""
    dense = predict(OnnxNetwork(study.imported.onnx).run, study.test, batch_size(study.imported.inputs[0].shape[1:]))
    for speedup, way in missing(study.options, "top1"):
        say(f"pruning {way} at {speedup:g}x")
        row = read_row(row_file(study.options.folder, speedup, way))
        write_row(study.options.folder, row | study.answers(row, dense))
    return dense


def report(study: Study, dense: NDArray[np.float64], rows: Sequence[dict[str, Any]]) -> str:
    """Return the comparison as Markdown."""
    assert study.test.labels is not None
    top1 = float((dense.argmax(axis=1) == study.test.labels).mean())
    stitched = any("stitched" in row for row in rows)
    more = (" top-1 stitched |", "---|") if stitched else ("", "")
    lines = [
        f"{study.options.model.name}: dense top-1 {top1:.2%} on {study.test.count} images "
        f"(standard error {top1_interval(top1, study.test.count):.1%})",
        "",
        "| speed-up | way | first prediction off | rounds | measured | off the budget | top-1 | as dense | divergence |"
        + more[0],
        "|---|---|---|---|---|---|---|---|---|" + more[1],
    ]
    for row in rows:
        lines.append(
            f"| {row['speedup']:g}x | {row['way']} | {row['first_predicted_off']:+.1%} | {len(row['rounds'])} | "
            f"{row['measured']:.2f}x | {row['off']:+.1%} | {row['top1']:.2%} | {row['same']:.2%} | "
            f"{row['divergence']:.3f} |"
        )
        if stitched:
            lines[-1] += f" {row['stitched']['top1']:.2%} |" if "stitched" in row else " |"
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
    parser.add_argument("--steps", default=",".join(STEPS), help=f"default: {','.join(STEPS)}")
    options = parser.parse_args()
    options.ways, options.steps = options.ways.split(","), options.steps.split(",")
    options.speedups = [float(text) for text in options.speedups.split(",")]
    if wrong := [way for way in options.ways if way not in WAYS and not way.startswith("uniform ")]:
        parser.error(f"no such ways: {', '.join(wrong)}; there are {', '.join(WAYS)}")
    if wrong := [step for step in options.steps if step not in STEPS]:
        parser.error(f"no such steps: {', '.join(wrong)}; there are {', '.join(STEPS)}")

    study = open_study(options)
    if "plans" in options.steps:
        make_plans(study)
    if "answers" not in options.steps:
        return
    dense = look_at_answers(study)
    wanted = [row_file(options.folder, speedup, way) for speedup in options.speedups for way in options.ways]
    rows = [row for row in (read_row(file) for file in wanted if file.exists()) if "top1" in row]
    text = report(study, dense, rows)
    write_text(options.folder / "report.md", text, "report")
    print(text, end="")


if __name__ == "__main__":
    main()

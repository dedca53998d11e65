"""The two papers' main claims on CIFAR-10: networks trained here, pruned, trained again, and measured.

    python scripts/reproduce_papers.py first --train train.npz --test test.npz --work papers/
    python scripts/reproduce_papers.py second --train train.npz --test test.npz --work papers/

`first`: W. Wu et al., ICPADS 2023: VGG-16, N:M only, every layer's density by dynamic programming over measured times
and L1 norms, at 1.55 times the speed of the dense build; and the same speed with all patterns and calibrated losses.
`second`: M. Lin et al., TPAMI 2022: MobileNet-V2 at half of the weights: unstructured, 1xN with whole kernels, with
rearranged filters, the same pruned on images instead of by magnitude, and whole filters by L1 norm. (What is pruned
there are 1x1 convolutions, in which blocks of whole kernels and blocks by position, 1xN and 1xNp, are the same.)

Every row starts from one dense network and is trained equally long, the dense one included (--tune-epochs). All that is
done lies in --work: the same command goes on where it was stopped. `--rows` does some rows only. What measures wants an
idle machine and what trains can do without: `--prune-only` makes the plans of `first`, which are made from measured
times, and stops before any row is trained; `--no-times` trains without measuring what comes out. The data are .npz
files with `images` and `labels`. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import onnx
from paper_networks import hidden_filters, mobilenet_v2, vgg16_bn

from tvm_nm.agreement import top1_interval
from tvm_nm.bench import measure
from tvm_nm.calibration import CalibrationImages, open_images
from tvm_nm.compiler import compile as compile_model
from tvm_nm.cost_measure import DEFAULT_DENSITIES, CandidateGrid
from tvm_nm.errors import InfeasibleBudgetError
from tvm_nm.evaluation import answers_of_onnx, compare
from tvm_nm.frontend import import_onnx
from tvm_nm.json_file import write_text
from tvm_nm.layer_pruning import Method
from tvm_nm.masks import BoolArray, keep_largest, round_half_up
from tvm_nm.onnx_pruning import prune_imported
from tvm_nm.plan import Plan
from tvm_nm.plan_model import plan_model
from tvm_nm.planning import Goal
from tvm_nm.preprocessing import Preprocessing
from tvm_nm.prune_onnx import prune_onnx
from tvm_nm.pruning import PruneRequest
from tvm_nm.rearrangement import OrderSearch
from tvm_nm.reference_run import random_inputs
from tvm_nm.torch import Augmentation, Objective, TrainingOptions, import_model, train
from tvm_nm.torch.progress import TrainingProgress

SPEEDUP = 1.55  # what the first paper reports
N_M = ("3:4", "2:4", "1:4", "1:8", "1:16")
BLOCKS = (2, 4, 8, 16)


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the table.

    Attributes
    ----------
    name
        What was done.
    prune
        From the dense network to the one to be trained: a model and the masks to lock, None for those of its zeros.
    """

    name: str
    prune: Callable[[], tuple[onnx.ModelProto, dict[str, BoolArray] | None]]


class Reproduction:
    """Trains, prunes and measures one network, and remembers what is done.

    Parameters
    ----------
    args
        The command line's.
    make
        Makes the untrained network.
    """

    def __init__(self, args: argparse.Namespace, make: Callable[[], onnx.ModelProto]) -> None:
        self.args, self._make = args, make
        self.work: Path = args.work / args.paper
        self.work.mkdir(parents=True, exist_ok=True)
        shape = (3, 32, 32)
        self.images = open_images(args.train, shape, limit=args.limit, preprocessing=args.preprocess)
        self.test = open_images(args.test, shape, limit=args.limit, preprocessing=args.preprocess)
        for name, data in (("training", self.images), ("test", self.test)):
            if data.labels is None:
                raise SystemExit(f"reproduce_papers: the {name} images have no labels")
        self.calibration = open_images(args.train, shape, limit=args.calib_images, preprocessing=args.preprocess)
        self.options = TrainingOptions(
            batch=args.batch,
            augmentation=Augmentation(4, True),
            objective=Objective(0.0),
            device=args.device,
            weight_decay=5e-4,
            clip=args.clip,
            batch_norm="keep",  # they have their own
            evaluate_every=args.evaluate_every,
        )
        settings = repr((self.options, args.epochs, args.tune_epochs, args.lr, args.tune_lr, args.width, args.limit))
        path = self.work / "settings.txt"
        if path.is_file() and path.read_text() != settings:
            raise SystemExit(f"reproduce_papers: {self.work} holds results of other settings; choose another --work")
        write_text(path, settings, "settings")

    def dense(self) -> onnx.ModelProto:
        """Return the trained dense network."""
        options = replace(self.options, epochs=self.args.epochs, learning_rate=self.args.lr, warmup=0.15)
        return self._trained("dense", lambda: (self._make(), None), options, self.test)

    def pruned(self, plan: Plan, calibrated: bool = False, rearrange: OrderSearch = "none") -> onnx.ModelProto:
        """Return the dense network pruned to a plan: by magnitude, or by Optimal Brain Surgeon on images."""
        path = self.work / "dense.onnx"
        images, method = (self.calibration, Method.OBS) if calibrated else (None, Method.MAGNITUDE)
        imported = import_onnx(path, verify=False)
        return prune_imported(imported, [imported.module], onnx.load(path), plan, images, method, rearrange).model

    def top1(self, row: Row, seed: int) -> float:
        """Return a row's top-1 after training."""
        options = replace(self.options, epochs=self.args.tune_epochs, learning_rate=self.args.tune_lr, seed=seed)
        stem = f"{_stem(row.name)}-{seed}"
        record = self.work / f"{stem}.json"
        if not record.is_file():
            model = self._trained(stem, row.prune, options)
            answers = answers_of_onnx(model, self.test)
            score = compare(answers, answers, self.test)
            write_text(record, json.dumps({"row": row.name, "seed": seed, "top1": score.top1}), "score")
        return float(json.loads(record.read_text())["top1"])

    def times(self, rows: list[Row], reference: Row) -> dict[str, tuple[float, float]]:
        """Return each row's latency in ms and its speed beside the dense network, all measured in turns."""
        record = self.work / "times.json"
        found: dict[str, tuple[float, float]] = {}
        if record.is_file():
            found = {name: (pair[0], pair[1]) for name, pair in json.loads(record.read_text()).items()}
        if all(row.name in found for row in rows):
            return found
        models = {}
        for row in {reference.name: reference, **{row.name: row for row in rows}}.values():
            models[row.name] = compile_model(
                self.work / f"{_stem(row.name)}-{self.args.seeds[0]}.onnx",
                pattern="dense",  # the zeros are in the file
                threads=self.args.threads,
                database=self.args.db,
                verify=False,
            )
        inputs = random_inputs(models[reference.name].inputs)
        values = [inputs[spec.name] for spec in models[reference.name].inputs]
        timings = measure({name: partial(model, *values) for name, model in models.items()})
        dense = np.asarray(timings[reference.name])
        for name, blocks in timings.items():
            found[name] = float(np.median(blocks)), float(np.median(dense / np.asarray(blocks)))
        write_text(record, json.dumps(found, indent=1), "times")
        return found

    def _trained(
        self,
        stem: str,
        start: Callable[[], tuple[onnx.ModelProto, dict[str, BoolArray] | None]],
        options: TrainingOptions,
        test: CalibrationImages | None = None,
    ) -> onnx.ModelProto:
        path = self.work / f"{stem}.onnx"
        if path.is_file():
            return onnx.load(path)
        print(f"training {stem}", flush=True)
        model, masks = start()
        with TrainingProgress() as progress:
            done = train(
                model,
                self.images,
                options,
                masks=masks,
                test=test,
                checkpoint=path.with_suffix(".checkpoint"),
                progress=progress.status,
            )
        onnx.save(done.model, path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)
        return done.model


def first_rows(job: Reproduction) -> list[Row]:
    """VGG-16: the first paper's method, and ours, at the same measured speed."""

    def planned(name: str, goal: Goal, patterns: tuple[str, ...], calibrated: bool) -> Plan:
        path = job.work / f"{_stem(name)}.plan.json"
        if not path.is_file():
            found = plan_model(
                job.work / "dense.onnx",
                goal,
                grid=CandidateGrid.make(patterns, DEFAULT_DENSITIES),
                metric=None if calibrated else "l1",
                images=job.calibration if calibrated else None,
                method=Method.MAGNITUDE,  # of the estimates: with refitted weights they would take hours
                database=job.args.db,
                threads=job.args.threads,
                costs=job.work / f"{_stem(name)}.costs.json",
                progress=lambda step: print(f"  {step}", flush=True),
            )
            found.plan.save(path)
        return Plan.load(path)

    def by_magnitude() -> tuple[onnx.ModelProto, None]:
        try:
            plan = planned("N:M, DP over L1", Goal(speedup=SPEEDUP), N_M, False)
        except InfeasibleBudgetError as error:
            raise SystemExit(f"reproduce_papers: N:M alone does not reach {SPEEDUP}x here: {error}") from error
        return job.pruned(plan), None

    def best() -> tuple[onnx.ModelProto, None]:
        plan = planned("all patterns, calibrated", Goal(speedup=SPEEDUP), ("1x16", "1x16p", *N_M), True)
        return job.pruned(plan, calibrated=True), None

    return [
        Row("dense", lambda: (job.dense(), {})),
        Row("N:M, DP over L1", by_magnitude),
        Row("all patterns, calibrated", best),
    ]


def second_rows(job: Reproduction) -> list[Row]:
    """MobileNet-V2 at half of the weights of its 1x1 convolutions."""

    def blocks(
        form: str, rearrange: OrderSearch, calibrated: bool = False
    ) -> Callable[[], tuple[onnx.ModelProto, None]]:
        def prune() -> tuple[onnx.ModelProto, None]:
            module = import_onnx(job.work / "dense.onnx", verify=False).module
            return job.pruned(PruneRequest.make(form, 0.5).plan(module), calibrated, rearrange), None

        return prune

    def unstructured() -> tuple[onnx.ModelProto, None]:
        dense = onnx.load(job.work / "dense.onnx")
        module = import_onnx(job.work / "dense.onnx", verify=False).module
        names = [choice.name for choice in PruneRequest.make("1x16", 0.5).plan(module).layers]
        imported = import_model(dense)
        masks = {}
        for name in names:
            weight = imported.weight(name)
            flat = np.abs(weight).reshape(1, -1)
            masks[name] = keep_largest(flat, round_half_up(0.5 * flat.size)).reshape(weight.shape)
        return prune_onnx(dense, masks), None

    rows = [Row("dense", lambda: (job.dense(), {})), Row("unstructured", unstructured)]
    for n in BLOCKS:
        rows.append(Row(f"1x{n}", blocks(f"1x{n}", "none")))
        rows.append(Row(f"1x{n}, rearranged", blocks(f"1x{n}", "swap")))
        rows.append(Row(f"1x{n}, rearranged, on images", blocks(f"1x{n}", "swap", calibrated=True)))

    def filters() -> tuple[onnx.ModelProto, dict[str, BoolArray]]:
        return hidden_filters(onnx.load(job.work / "dense.onnx"), 0.5, job.args.width), {}

    return [*rows, Row("filters by L1", filters)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paper", choices=("first", "second"))
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--preprocess", type=Preprocessing.parse)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--epochs", type=float, default=30, help="of the dense network [30]")
    parser.add_argument("--tune-epochs", type=float, default=10, help="of every row [10]")
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--tune-lr", type=float, default=0.02)
    parser.add_argument("--clip", type=float, default=5.0)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--width", type=float, default=1.0, help="share of the networks' channels [1]")
    parser.add_argument("--evaluate-every", type=int, default=1)
    parser.add_argument("--calib-images", type=int, default=1024)
    parser.add_argument("--limit", type=int, help="training and test images to use; all by default")
    parser.add_argument("--rows", nargs="+", help="names of rows; all by default")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--db", type=Path, help="tuning database to build with")
    parser.add_argument("--threads", type=int, default=1, help="of the builds that are measured [1]")
    parser.add_argument("--prune-only", action="store_true", help="plan and prune, and train no row")
    parser.add_argument("--no-times", action="store_true", help="do not measure")
    args = parser.parse_args()

    make = vgg16_bn if args.paper == "first" else mobilenet_v2
    job = Reproduction(args, lambda: make(args.width))
    job.dense()
    rows = (first_rows if args.paper == "first" else second_rows)(job)
    reference = rows[0]
    if args.rows:
        unknown = set(args.rows) - {row.name for row in rows}
        if unknown:
            parser.error(f"no rows {sorted(unknown)}; there are: {', '.join(row.name for row in rows)}")
        rows = [row for row in rows if row.name in args.rows]
    if args.prune_only:
        for row in rows:
            row.prune()
            print(f"{row.name}: pruned", flush=True)
        return
    results = {}
    for row in rows:
        results[row.name] = float(np.mean([job.top1(row, seed) for seed in args.seeds]))
        print(f"{row.name}: top-1 {results[row.name]:.2%}", flush=True)
    times = {} if args.no_times else job.times(rows, reference)
    margin = top1_interval(next(iter(results.values())), job.test.count)
    lines = [
        f"{job.images.count} training images; dense {args.epochs:g} epochs, every row {args.tune_epochs:g} more; "
        f"{len(args.seeds)} seed(s), standard error {margin:.2%} on {job.test.count} test images; "
        f"{args.threads} thread(s)",
        "",
        "| | top-1 | to dense | ms | speed |",
        "|---|---|---|---|---|",
    ]
    base = results.get("dense")
    for name, top1 in results.items():
        latency = [f"{times[name][0]:.2f}", f"{times[name][1]:.2f}x"] if name in times else ["", ""]
        difference = "" if base is None else f"{top1 - base:+.2%}"
        lines.append(f"| {name} | {top1:.2%} | {difference} | {' | '.join(latency)} |")
    text = "\n".join(lines) + "\n"
    write_text(job.work / "table.md", text, "table")
    print(f"\n{text}")


def _stem(name: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in name)


if __name__ == "__main__":
    main()

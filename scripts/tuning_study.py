"""How far tuning within a budget stays behind tuning with a multiple of it.

    python scripts/tuning_study.py resnet50.onnx --db study/ --minutes 20 --sample 8

The table is that of every layer, dense and with each pattern at each density. `--sample N` takes every Nth layer (by
work) and its share of the minutes, since the whole takes five times the budget. Both runs start from nothing: the first
as `tvm-nm tune --minutes` does it, the second with `--times` times the minutes, as `--thorough` with as many times the
trials. Then the variants that both chose for an entry are measured side by side; where they are the same, that is 1.
Run it on an idle machine. Prints what share of the longer search's speed the shorter one has.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from tvm_nm.frontend import import_onnx
from tvm_nm.json_file import write_text
from tvm_nm.schedules.kernel_task import KernelTask
from tvm_nm.schedules.machine import machine_of
from tvm_nm.schedules.tuned import TunedKernel
from tvm_nm.schedules.variants import variant_text
from tvm_nm.targets import resolve_target
from tvm_nm.tuning.database import TuningDatabase
from tvm_nm.tuning.pool import Candidate, Laboratory
from tvm_nm.tuning.progress import TuningProgress, summary_text
from tvm_nm.tuning.tasks import ModelTask, model_tasks
from tvm_nm.tuning.tuner import DEFAULT_TRIALS, tune_tasks

ROUNDS = 14


def sampled(tasks: tuple[ModelTask, ...], nth: int) -> list[ModelTask]:
    """Return the tasks of every nth layer of those that are pruned, the layers ordered by their work."""
    pruned = {item.task.workload for item in tasks if item.task.kept}
    works: dict[object, int] = {}
    for item in tasks:
        if not item.task.kept and item.task.workload in pruned:
            works[item.task.workload] = max(works.get(item.task.workload, 0), item.macs)
    chosen = set(sorted(works, key=lambda work: (-works[work], str(work)))[nth // 2 :: nth])
    return [item for item in tasks if item.task.workload in chosen]


def entries(tasks: list[ModelTask]) -> dict[KernelTask, list[KernelTask]]:
    """Return the table's entries: a layer and what it keeps, with the tasks that compute it, Winograd's among them."""
    found: dict[KernelTask, list[KernelTask]] = {}
    for item in tasks:
        found.setdefault(replace(item.task, winograd=False), []).append(item.task)
    return found


def choice(database: TuningDatabase, tasks: list[KernelTask]) -> TunedKernel:
    """Return what a build takes for an entry."""
    known = [best for best in map(database.best, tasks) if best is not None]
    if not known:
        raise SystemExit(f"tuning_study: nothing was measured of {tasks[0]}: more minutes or a smaller sample")
    return min(known, key=lambda best: best.latency_us)


def compared(
    pairs: dict[KernelTask, tuple[TunedKernel, TunedKernel]], short: TuningDatabase
) -> Iterator[dict[str, object]]:
    """Yield each entry's times of both choices, measured in turns."""
    with Laboratory(short.target, builders=2) as laboratory:
        laboratory.prepare()
        laboratory.yardstick_us = short.yardstick_us
        for entry, both in pairs.items():
            candidates = [Candidate(best.task, variant_text(best.kernel)) for best in both]
            line: dict[str, object] = {"task": str(entry), "origin": both[0].origin, "predicted_us": both[0].latency_us}
            line |= {"variants": [candidate.variant for candidate in candidates]}
            if candidates[0] == candidates[1]:
                yield line | {"us": [both[1].latency_us] * 2}
                continue
            built = laboratory.build(candidates)
            with laboratory.alone():
                timings = laboratory.time(candidates, [path for path, _ in built], ROUNDS)
            yield line | {"us": [timing.latency_us for timing in timings]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--db", type=Path, required=True, help="folder of both databases; goes on where it stopped")
    parser.add_argument("--minutes", type=float, default=20, help="budget of the whole table [20]")
    parser.add_argument("--times", type=float, default=4, help="budget of the longer search, in those [4]")
    parser.add_argument("--sample", type=int, default=1, help="take every Nth layer, and its share of the minutes [1]")
    parser.add_argument("--patterns", default="1x4,1x16,3:4,2:4,3:8,1:4,1:8")
    parser.add_argument("--densities", default="0.75,0.5,0.375,0.25,0.125", help="of the patterns without their own")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", default="short,long,compare", help="what to do of %(default)s")
    args = parser.parse_args()
    steps = args.steps.split(",")
    target = resolve_target(None, args.threads)
    densities = [float(part) for part in args.densities.split(",")]
    module = import_onnx(args.model, verify=False).module
    every = model_tasks(module, machine_of(target), args.patterns.split(","), densities)
    tasks = sampled(every, args.sample)
    minutes = args.minutes * len(tasks) / len(every)
    print(f"{len(tasks)} of {len(every)} tasks; {minutes:.1f} and {args.times * minutes:.1f} minutes", flush=True)
    short, long = (TuningDatabase(args.db / name, target) for name in ("short", "long"))
    with TuningProgress() as progress:
        if "short" in steps:
            print(summary_text(tune_tasks(tasks, short, minutes=minutes, progress=progress)))
        if "long" in steps:
            trials = round(args.times * DEFAULT_TRIALS)
            summary = tune_tasks(
                tasks, long, trials=trials, minutes=args.times * minutes, thorough=True, progress=progress
            )
            print(summary_text(summary))
    if "compare" not in steps:
        return
    pairs = {entry: (choice(short, alike), choice(long, alike)) for entry, alike in entries(tasks).items()}
    lines = list(compared(pairs, short))
    write_text(args.db / "compared.json", json.dumps(lines, indent=1), "comparison")
    times = np.array([line["us"] for line in lines], float)
    ratios = times[:, 1] / times[:, 0]  # the speed that the shorter search reaches
    origins = [line["origin"] for line in lines]
    print(
        f"{len(lines)} entries, {origins.count('measured')} of them measured by the shorter search. Its choices have "
        f"{np.exp(np.log(ratios).mean()):.1%} of the longer search's speed (geometric mean); "
        f"a tenth have less than {np.quantile(ratios, 0.1):.1%}, the least {ratios.min():.1%}; "
        f"all layers together {times[:, 1].sum() / times[:, 0].sum():.1%}."
    )


if __name__ == "__main__":
    main()

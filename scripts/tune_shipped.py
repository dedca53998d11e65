"""Make the tuned records that come with the package: the common layers of ResNet, VGG, MobileNet-V2 and SqueezeNet.

    python scripts/tune_shipped.py tune DIR [--target JSON] [--threads 1] [--minutes 0.8] [--trials 8] [--patterns 1x16]
    python scripts/tune_shipped.py write DIR [--target JSON]

`tune` measures what the database DIR lacks and may be run as often as it takes; `write` puts the best variant of every
task into `tvm_nm/data/tuned/FAMILY.rN.jsonl`. An AVX2 file can be made on an AVX-512 machine with
``--target '{"kind": "llvm", "mcpu": "haswell"}'``. The times in it are this machine's: a build compares them with each
other only.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path

import tvm

from tvm_nm.patterns import parse_pattern
from tvm_nm.schedules.kernel_task import TEMPLATE_REVISION, KernelTask
from tvm_nm.schedules.machine import Machine, machine_of
from tvm_nm.schedules.variants import variant_text
from tvm_nm.targets import resolve_target
from tvm_nm.tuning.database import TuningDatabase
from tvm_nm.tuning.progress import TuningProgress, summary_text
from tvm_nm.tuning.tables import families_of
from tvm_nm.tuning.tasks import ModelTask, layer_task, with_winograd
from tvm_nm.tuning.tuner import tune_tasks
from tvm_nm.workload import ConvWorkload, Epilogue

DATA = Path(__file__).resolve().parent.parent / "tvm_nm" / "data" / "tuned"
PATTERNS = (("1x16", 0.5), ("1x16", 0.25), ("1x16", 0.125), ("1x4", 0.5), ("1x4", 0.25), ("2:4", None), ("1:4", None))
ALL = tuple(dict.fromkeys(pattern for pattern, _ in PATTERNS))
RELU, RELU6, NONE, ADD_RELU = Epilogue(False, 0.0), Epilogue(False, 0.0, 6.0), Epilogue(), Epilogue(True, 0.0)
MOST_BYTES = 300_000


def conv(
    channels: int, out: int, size: int, kernel: int = 1, stride: int = 1, epilogue: Epilogue = RELU, groups: int = 1
) -> ConvWorkload:
    """Return a square convolution with "same" padding on a map of `size`."""
    pad = kernel // 2
    square = ((kernel, kernel), (stride, stride), (pad,) * 4)
    return ConvWorkload(1, channels, out, size, size, *square, groups=groups, epilogue=epilogue)


def resnet50() -> Iterator[ConvWorkload]:
    """Bottleneck blocks with the stride in the 3x3 layer."""
    yield conv(3, 64, 224, 7, 2)
    channels, size = 64, 56
    for width, blocks, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for block in range(blocks):
            step = stride if block == 0 else 1
            yield conv(channels, width, size)
            yield conv(width, width, size, 3, step)
            if block == 0:
                yield conv(channels, 4 * width, size, 1, step, NONE)
            channels, size = 4 * width, size // step
            yield conv(width, channels, size, 1, 1, ADD_RELU)


def resnet18() -> Iterator[ConvWorkload]:
    """Two 3x3 layers a block."""
    channels, size = 64, 56
    for width, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        if stride == 2:
            yield conv(channels, width, size, 3, 2)
            yield conv(channels, width, size, 1, 2, NONE)
        channels, size = width, size // stride
        yield conv(width, width, size, 3)
        yield conv(width, width, size, 3, 1, ADD_RELU)


def vgg16() -> Iterator[ConvWorkload]:
    """3x3 layers only."""
    channels, size = 3, 224
    for width, layers in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(layers):
            yield conv(channels, width, size, 3)
            channels = width
        size //= 2


def mobilenet_v2() -> Iterator[ConvWorkload]:
    """Inverted residuals; depthwise layers stay dense."""
    yield conv(3, 32, 224, 3, 2, RELU6)
    channels, size = 32, 112
    blocks = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
    for expand, out, count, stride in blocks:
        for block in range(count):
            step, wide = (stride if block == 0 else 1), channels * expand
            if expand > 1:
                yield conv(channels, wide, size, 1, 1, RELU6)
            yield conv(wide, wide, size, 3, step, RELU6, wide)
            size //= step
            yield conv(wide, out, size, 1, 1, Epilogue(residual=block > 0))
            channels = out
    yield conv(320, 1280, 7, 1, 1, RELU6)


def squeezenet() -> Iterator[ConvWorkload]:
    """SqueezeNet 1.1: fire modules."""
    yield replace(conv(3, 64, 224, 3, 2), padding=(0, 0, 0, 0))
    channels, sizes = 64, (55, 55, 27, 27, 13, 13, 13, 13)
    for size, (squeeze, expand) in zip(
        sizes, ((16, 64), (16, 64), (32, 128), (32, 128), (48, 192), (48, 192), (64, 256), (64, 256)), strict=True
    ):
        yield conv(channels, squeeze, size)
        yield conv(squeeze, expand, size)
        yield conv(squeeze, expand, size, 3)
        channels = 2 * expand
    yield conv(512, 1000, 13)


def shipped_tasks(machine: Machine, patterns: Collection[str]) -> list[ModelTask]:
    """Return the distinct tasks, one epilogue for each shape: the others share its best variant."""
    names: dict[ConvWorkload, list[str]] = {}
    for network in (resnet50, resnet18, vgg16, mobilenet_v2, squeezenet):
        for work in network():
            names.setdefault(work, []).append(network.__name__)
    by_shape: dict[ConvWorkload, tuple[ConvWorkload, list[str]]] = {}
    for work, found in names.items():
        shape = replace(work, epilogue=NONE)
        if shape not in by_shape or len(found) > len(by_shape[shape][1]):
            by_shape[shape] = (work, found)
    tasks: dict[KernelTask, tuple[str, ...]] = {}
    for work, found in by_shape.values():
        of_layer = [KernelTask("conv", work, machine.threads)]
        if work.in_channels_per_group >= 16:
            for pattern, density in (pair for pair in PATTERNS if pair[0] in patterns):
                parsed = parse_pattern(pattern)
                of_layer.append(layer_task(work, machine.threads, parsed, parsed.check_density(density)))
        tasks.update((task, tuple(found)) for task in with_winograd(of_layer, machine))
    return [ModelTask(task, found) for task, found in tasks.items()]


def _without_epilogue(task: KernelTask) -> KernelTask:
    return replace(task, workload=replace(task.workload, epilogue=NONE))


def write(database: TuningDatabase, target: tvm.target.Target) -> Path:
    """Write what the database knows of the shipped tasks."""
    family, *_ = families_of(target) or ("",)
    if not family:
        raise SystemExit(f"records are shipped for AVX-512 and AVX2 only, not for {target}")
    lines = [json.dumps({"format": "tvm_nm trials", "version": 1, "revision": TEMPLATE_REVISION, "family": family})]
    machines = [replace(machine_of(target), threads=threads) for threads in (1, 2)]
    wanted = {item.task for machine in machines for item in shipped_tasks(machine, ALL)}
    others = {_without_epilogue(task): task for task in database.tasks()}  # another epilogue does as well
    for task in sorted(wanted, key=str):
        best = database.measured(task) or database.measured(others.get(_without_epilogue(task), task))
        if best is not None:
            named = {"task": str(best.task), "variant": variant_text(best.kernel)}
            found = {"us": best.latency_us, "within_us": best.within_us}
            lines += [
                json.dumps({**named, what: round(us, 1)}, separators=(",", ":")) for what, us in found.items() if us
            ]
    text = "\n".join(lines) + "\n"
    if len(text) > MOST_BYTES:
        raise SystemExit(f"{len(text)} bytes are more than {MOST_BYTES}")
    path = DATA / f"{family}.r{TEMPLATE_REVISION}.jsonl"
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8")
    print(f"{len(lines) - 1} of {len(wanted)} records, {len(text)} bytes, are in {path}")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", choices=("tune", "write"))
    parser.add_argument("database", type=Path)
    parser.add_argument("--target", help="TVM target as JSON; default: this machine")
    parser.add_argument("--patterns", default=",".join(ALL), help="tune only these, and dense; default: %(default)s")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--trials", type=int, default=8)
    options = parser.parse_args()
    target = resolve_target(options.target, options.threads)
    database = TuningDatabase(options.database, target)
    if options.job == "write":
        write(database, target)
        return
    with TuningProgress() as progress:
        tasks = shipped_tasks(machine_of(target), options.patterns.split(","))
        summary = tune_tasks(tasks, database, trials=options.trials, minutes=options.minutes, progress=progress)
    print(summary_text(summary))


if __name__ == "__main__":
    main()

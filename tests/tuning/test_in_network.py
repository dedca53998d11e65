"""Choosing kernels by their times within the network."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from models import Net

import tvm_nm
from tvm_nm.cli import cli
from tvm_nm.layer_report import LayerReport
from tvm_nm.schedules.kernel_task import parse_task
from tvm_nm.schedules.machine import host_target, machine_of
from tvm_nm.schedules.variants import ranked_kernels, variant_text
from tvm_nm.tuning.database import TuningDatabase
from tvm_nm.tuning.in_network import compare, scale_to
from tvm_nm.tuning.trials import Trial
from tvm_nm.workload import MaxPool

TARGET = host_target(1)
TASK = parse_task("conv 16x8x8->16 k3x3 p1,1,1,1 bias+relu; dense; 1 thread")


def row(*variants: str, chain: str = "") -> list[LayerReport]:
    """Layers `a`, `b`, ... with a task each; a variant `same` is that of every build."""
    made = []
    for name, variant in zip("abcdefghij", variants, strict=False):
        task = "the first" if name in "ab" else name
        made.append(LayerReport(name, "conv", "", "", "dense", 1.0, variant, "", 1, 1, 1, task=task, variant=variant))
    if chain:
        made[-1] = replace(made[-1], chain=chain, task="", variant="")
    return made


def test_the_fastest_within_the_network_wins_whatever_the_builds_pace() -> None:
    same = ["same"] * 6
    reports = [row("x", "x", "u", *same), row("y", "y", "v", *same)]
    times = np.array([[10.0, 12.0, 30.0, *range(5, 11)], [9.0, 11.0, 33.0, *range(5, 11)]])
    times[1] *= 1.5  # the second build had the busier turns
    found = compare(reports, times)
    by_task = {choice.task: choice for choice in found}
    first, third = by_task["the first"], by_task["c"]
    assert [(choice.layers, choice.before) for choice in (first, third)] == [(("a", "b"), "x"), (("c",), "u")]
    assert [choice.times_us[0][0] for choice in (first, third)] == ["y", "u"]
    assert (first.saved_us, third.saved_us) == (pytest.approx(2.0), 0)
    assert by_task["d"].times_us == (("same", pytest.approx(5.0)),)


def test_another_kind_of_kernel_is_timed_in_the_place_of_the_best() -> None:
    reports = [row("x", "x", "u"), row("x", "x", "u")]
    reports[1][2] = replace(reports[1][2], task="c by Winograd", variant="w")
    found = {choice.task: choice for choice in compare(reports, np.array([[1.0, 1.0, 5.0], [1.0, 1.0, 4.0]]))}
    assert found["c"].times_us == (("u", 5.0),)
    assert (found["c by Winograd"].layers, found["c by Winograd"].times_us) == ((), (("w", 4.0),))
    assert found["c by Winograd"].saved_us == 0


def test_a_chain_is_timed_as_a_whole() -> None:
    reports = [row("same", "same", "c1", "", chain="c"), row("same", "same", "c2", "", chain="c")]
    found = compare(reports, np.array([[1.0, 1.0, 5.0, 5.0], [1.0, 1.0, 2.0, 7.0]]))
    chain = next(choice for choice in found if choice.task == "c")
    assert (chain.layers, chain.times_us) == (("c",), (("c2", 9.0), ("c1", 10.0)))


def test_comparisons_on_a_slower_machine_are_scaled_to_earlier_ones() -> None:
    pooled = replace(TASK.as_winograd, workload=TASK.workload.pooled(MaxPool()))
    known = {pooled: {"a": 1.0}, TASK: {str(number): 10.0 + number for number in range(6)}}
    slower = {TASK: {text: 2 * us for text, us in known[TASK].items()} | {"new": 30.0}}
    assert scale_to(known, slower) == pytest.approx(0.5)
    assert scale_to({}, slower) == 1.0
    assert scale_to({TASK: {"0": 1.0}}, slower) == 1.0  # one variant says little


def test_what_was_fastest_within_a_network_goes_first_until_the_next_search(tmp_path: Path) -> None:
    texts = [variant_text(kernel) for kernel in ranked_kernels(TASK, machine_of(TARGET), 3)]
    database = TuningDatabase(tmp_path, TARGET)
    database.start(50.0)
    database.add([Trial(TASK, text, 10.0 + place) for place, text in enumerate(texts)], {TASK: "full"})
    database.add_within({TASK: {texts[0]: 15.0, texts[1]: 14.0}})
    for table in (database, TuningDatabase(tmp_path, TARGET)):  # as it is, and read again
        best = table.measured(TASK)
        assert best is not None
        assert (variant_text(best.kernel), best.latency_us, best.within_us) == (texts[1], 11.0, 14.0)
    database.add([], {TASK: "thorough"})
    for table in (database, TuningDatabase(tmp_path, TARGET)):
        best = table.measured(TASK)
        assert best is not None
        assert (variant_text(best.kernel), best.within_us) == (texts[0], 0.0)


def test_tune_in_network(tmp_path: Path) -> None:
    """Builds, times and keeps; a build with the database has what was chosen."""
    net = Net((1, 16, 12, 12))
    first = net.add("Relu", net.conv("input", (32, 16, 3, 3), pads=[1, 1, 1, 1]))
    second = net.add("Relu", net.conv(first, (32, 32, 1, 1)))
    third = net.conv(second, (48, 32, 3, 3), strides=[2, 2])
    onnx.save(net.model(third), tmp_path / "net.onnx")
    arguments = ["tune", str(tmp_path / "net.onnx"), "--db", str(tmp_path / "db"), "--threads", "1", "--trials", "3"]
    arguments += ["--patterns", "1x16", "--densities", "0.5", "--include", "*", "--in-network", "--json", "-"]
    done = CliRunner().invoke(cli, arguments)
    assert done.exit_code == 0, done.output
    choices = json.loads(done.stdout)["choices"]
    compared = [choice for choice in choices if choice["layers"]]
    assert compared
    assert any(len(choice["times_us"]) > 1 for choice in compared)
    assert any(not choice["layers"] for choice in choices)  # another kind: dense, direct or Winograd's
    for choice in choices:
        assert [us for _, us in choice["times_us"]] == sorted(us for _, us in choice["times_us"])
        assert choice["before"] in [text for text, _ in choice["times_us"]]
    model = tvm_nm.compile(
        tmp_path / "net.onnx", include=["*"], threads=1, database=tmp_path / "db", output=tmp_path / "built"
    )
    chosen = {choice["task"]: choice["times_us"][0][0] for choice in choices}
    built = {layer.task: layer.variant for layer in model.layers if layer.task in chosen}
    assert built
    assert all(chosen[task] == variant for task, variant in built.items())

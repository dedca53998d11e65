"""Tuned times in cost tables: where they come in, how they are scaled, and what is left interpolated."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import tvm
from models import Net

from tvm_nm.costs import Candidate, CostTable, LayerCosts, TimeSource
from tvm_nm.frontend import ImportedModel, import_onnx
from tvm_nm.inventory import inventory
from tvm_nm.patterns import Dense, OneByN
from tvm_nm.schedules.machine import machine_of
from tvm_nm.schedules.variants import ranked_kernels, variant_text
from tvm_nm.targets import resolve_target
from tvm_nm.tuned_costs import add_tuned_times
from tvm_nm.tuning.database import TuningDatabase
from tvm_nm.tuning.tasks import conv_workloads, layer_task
from tvm_nm.tuning.trials import Trial

DENSITIES = (0.75, 0.625, 0.5, 0.375, 0.25)
MEASURED = {0.75: 80.0, 0.25: 40.0}


@pytest.fixture(scope="module")
def target() -> tvm.target.Target:
    return resolve_target(None, 1)


@pytest.fixture(scope="module")
def imported() -> ImportedModel:
    net = Net((1, 16, 12, 12))
    x = net.add("Relu", net.conv("input", (32, 16, 3, 3), pads=[1, 1, 1, 1]))
    x = net.add("Relu", net.conv(x, (32, 32, 3, 3), pads=[1, 1, 1, 1]))
    return import_onnx(net.model(net.conv(x, (16, 32, 1, 1))), verify=False)


@pytest.fixture(scope="module")
def table(imported: ImportedModel) -> CostTable:
    """Two densities of five are measured in the network."""
    sparse = tuple(
        Candidate(
            OneByN(16),
            density,
            MEASURED.get(density, 20 + 80 * density),
            TimeSource.MEASURED if density in MEASURED else TimeSource.INTERPOLATED,
        )
        for density in DENSITIES
    )
    layers = tuple(
        LayerCosts(layer.name, layer.kind, "", "", layer.macs, (Candidate(Dense(), 1.0, 100.0), *sparse))
        for layer in inventory(imported.module)
    )
    return CostTable("m", "", "", {}, 1, 1, 0.0, layers)


def tuned(
    imported: ImportedModel, target: tvm.target.Target, folder: Path, times: dict[tuple[int, float], float]
) -> TuningDatabase:
    """A database that knows some layers, by number, at some densities."""
    works = list(conv_workloads(imported.module).values())
    database = TuningDatabase(folder, target)
    database.start(50.0)
    trials = []
    for (number, density), time_us in times.items():
        task = layer_task(works[number], 1, OneByN(16), density)
        trials.append(Trial(task, variant_text(ranked_kernels(task, machine_of(target), 1)[0]), time_us))
    database.add(trials)
    return database


def found(table: CostTable, number: int) -> list[tuple[float, str]]:
    return [
        (pytest.approx(candidate.time_us), candidate.source.value) for candidate in table.layers[number].candidates[1:]
    ]


def test_tuned_times_fill_gaps_in_the_networks_scale(
    imported: ImportedModel, target: tvm.target.Target, table: CostTable, tmp_path: Path
) -> None:
    # Alone, the layer takes half of what it takes in the network; the density between is slower than the line says.
    database = tuned(imported, target, tmp_path, {(1, 0.75): 40.0, (1, 0.25): 20.0, (1, 0.5): 36.0})
    merged = add_tuned_times(table, imported.module, database)
    assert found(merged, 1) == [
        (80.0, "measured"),
        (76.0, "interpolated"),
        (72.0, "tuned"),
        (56.0, "interpolated"),
        (40.0, "measured"),
    ]
    assert merged.layers[1].candidates[3].kernel
    assert merged.layers[0] == table.layers[0]
    assert merged.layers[1].dense == table.layers[1].dense
    assert CostTable.from_json(merged.to_json()).layers[1].candidates[3].source is TimeSource.TUNED


def test_a_layer_without_a_common_candidate_takes_the_others_scale(
    imported: ImportedModel, target: tvm.target.Target, table: CostTable, tmp_path: Path
) -> None:
    database = tuned(imported, target, tmp_path, {(0, 0.75): 40.0, (1, 0.5): 25.0})
    merged = add_tuned_times(table, imported.module, database)
    assert merged.layers[0] == table.layers[0]  # what was measured stays
    assert found(merged, 1)[2] == (50.0, "tuned")


def test_times_that_nothing_can_be_compared_with_are_left_out(
    imported: ImportedModel, target: tvm.target.Target, table: CostTable, tmp_path: Path
) -> None:
    assert add_tuned_times(table, imported.module, tuned(imported, target, tmp_path, {(1, 0.5): 25.0})) == table
    empty = TuningDatabase(tmp_path / "none", target)
    assert add_tuned_times(table, imported.module, empty) == table


def test_times_of_other_threads_do_not_count(
    imported: ImportedModel, target: tvm.target.Target, table: CostTable, tmp_path: Path
) -> None:
    database = tuned(imported, target, tmp_path, {(1, 0.75): 40.0, (1, 0.5): 36.0})
    two = dataclasses.replace(table, threads=2)
    assert add_tuned_times(two, imported.module, database) == two

"""Times of networks and layers, and how they are made to add up."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import numpy as np
import pytest
from models import small_cnn

import tvm_nm
from tvm_nm import bench, network_times
from tvm_nm.call_clock import CallTimer
from tvm_nm.network_times import fastest_tenth, layer_calls, spread_rest, time_networks
from tvm_nm.runtime import CompiledModel


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> CompiledModel:
    directory = tmp_path_factory.mktemp("net")
    tvm_nm.compile(small_cnn(), pattern="1x4", density=0.5, output=directory, threads=1)
    return tvm_nm.load(directory)


def test_every_call_is_timed(model: CompiledModel) -> None:
    timer = CallTimer(model)
    begin = time.perf_counter()
    found = timer.run(5)
    wall_us = (time.perf_counter() - begin) * 1e6
    assert found.shape == (5, len(timer.names))
    assert (found >= 0).all()
    assert 0 < found.sum() < wall_us
    assert len([layer for layer in layer_calls(model, timer.names) if layer]) == len(model.layers)


def test_more_stamps_than_fit_at_once(model: CompiledModel, monkeypatch: pytest.MonkeyPatch) -> None:
    timer = CallTimer(model)
    monkeypatch.setattr("tvm_nm.call_clock._CAPACITY", 5 * len(timer.names))
    found = timer.run(7)
    assert found.shape == (7, len(timer.names))


def test_a_clock_costs_calls_next_to_nothing(model: CompiledModel) -> None:
    timer = CallTimer(model)
    nothing = [number for number, name in enumerate(timer.names) if name.startswith("vm.builtin.")]
    assert nothing
    assert np.median(timer.run(50), axis=0)[nothing].min() < 1.0  # an instrument in Python: from 0.4 to 3 us


def test_networks_are_measured_in_turns(model: CompiledModel) -> None:
    first, second = time_networks((model, model), 0.0)
    for found in (first, second):
        assert found.layers_us.shape == (len(model.layers),)
        assert (found.layers_us > 0).all()
        assert found.layers_us.sum() < 1.5 * found.total_us


def test_a_chain_is_one_call(model: CompiledModel, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, *others = model.layers
    first = dataclasses.replace(first, kept_macs=300)
    chained = dataclasses.replace(second, chain=first.name, function=first.function, kept_macs=100)
    manifest = dataclasses.replace(model.manifest, layers=(first, chained, *others))
    joined = CompiledModel(model.directory, manifest)
    functions = ["a", first.function, *(layer.function for layer in others)]
    assert layer_calls(joined, functions) == [(), (first, chained), *((layer,) for layer in others)]

    class Timer:
        names = tuple(functions)

        def __init__(self, _model: CompiledModel) -> None:
            pass

        def run(self, runs: int, *, warm: bool) -> Any:
            assert warm
            return np.tile([7.0, 20.0, *[5.0] * len(others)], (runs, 1))

    monkeypatch.setattr(network_times, "CallTimer", Timer)
    (found,) = time_networks((joined,), 0.0)
    assert found.layers_us == pytest.approx([15.0, 5.0, *[5.0] * len(others)])


def test_a_pooling_belongs_to_its_layer(model: CompiledModel, monkeypatch: pytest.MonkeyPatch) -> None:
    first, *others = model.layers
    first = dataclasses.replace(first, pool="tvm_nm_pool")
    manifest = dataclasses.replace(model.manifest, layers=(first, *others))
    pooled = CompiledModel(model.directory, manifest)
    rest = [layer.function for layer in others]
    # The same function is called once more, for another operator.
    functions = [first.function, "vm.builtin.alloc_tensor", "tvm_nm_pool", "tvm_nm_pool", *rest]
    expected = [(first,), (), (first,), (), *((layer,) for layer in others)]
    assert layer_calls(pooled, functions) == expected

    class Timer:
        names = tuple(functions)

        def __init__(self, _model: CompiledModel) -> None:
            pass

        def run(self, runs: int = 1, *, warm: bool) -> Any:
            del warm
            return np.tile([20.0, 1.0, 3.0, 4.0, *[5.0] * len(others)], (runs, 1))

    monkeypatch.setattr(network_times, "CallTimer", Timer)
    (found,) = time_networks((pooled,), 0.0)
    assert found.layers_us == pytest.approx([23.0, *[5.0] * len(others)])
    monkeypatch.setattr(bench, "CallTimer", Timer)
    times = bench.profile_layers(pooled, runs=2)
    assert [(entry.name, entry.calls, entry.time_us) for entry in times[:2]] == [
        (first.name, 2, 23.0),
        (others[0].name, 1, 5.0),
    ]
    assert [(entry.name, entry.time_us) for entry in times if entry.layer is None] == [
        ("tvm_nm_pool", 4.0),
        ("other", 1.0),
    ]


def test_disturbed_runs_do_not_count() -> None:
    rng = np.random.default_rng(0)
    quiet = 100 + rng.random((400, 3))
    busy = quiet * np.array([1.3, 1.9, 1.5])  # each layer suffers differently
    disturbed = np.where(rng.random((400, 1)) < 0.7, busy, quiet)
    found = fastest_tenth(disturbed, disturbed.sum(axis=1))
    assert found == pytest.approx(quiet.mean(axis=0), rel=0.01)
    assert np.median(disturbed, axis=0)[1] > 180
    assert fastest_tenth([5.0, 1.0, 2.0, 3.0], [5.0, 1.0, 2.0, 3.0]) == pytest.approx(2.0)


def test_layers_and_fixed_time_add_up_to_every_build() -> None:
    """What calls take between layers grows with the weights: one fixed time for all builds would be wrong."""
    layers = np.array([[300.0, 600.0, 10.0], [100.0, 200.0, 10.0], [40.0, 70.0, 10.0]])
    rests = np.array([110.0, 60.0, 45.0])
    weights = np.array([[1.5, 0.5, 0.0], [0.4, 0.1, 0.0], [0.1, 0.1, 0.0]])
    totals = layers.sum(axis=1) + rests
    found, fixed = spread_rest(totals, layers, weights)
    assert fixed == 45.0
    assert found.sum(axis=1) + fixed == pytest.approx(totals)
    assert found[0] - layers[0] == pytest.approx([0.75 * 65, 0.25 * 65, 0.0])
    assert (found[2] == layers[2]).all()


def test_slow_networks_are_run_once_a_round(model: CompiledModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network_times, "_BLOCK_US", 1e-3)
    seen: list[int] = []
    run = CallTimer.run

    def counted(self: CallTimer, runs: int = 1, *, warm: bool = True) -> object:
        seen.append(runs)
        assert not warm
        return run(self, runs, warm=warm)

    monkeypatch.setattr(CallTimer, "run", counted)
    time_networks((model,), 0.0)
    assert seen == [1] * 7


def test_a_busy_machine_is_measured_longer(model: CompiledModel, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = 0
    run = network_times._Contestant.block

    def block(self: Any) -> None:
        nonlocal blocks
        blocks += 1
        run(self)
        if blocks <= 10:
            self._totals[-12:] = [1e6] * len(self._totals[-12:])

    monkeypatch.setattr(network_times._Contestant, "block", block)
    monkeypatch.setattr(network_times, "_PATIENCE", 1e9)
    (found,) = time_networks((model,), 1e-9, known_us=1e5)
    assert blocks == 11  # the first block that nothing disturbed is enough
    assert found.total_us < 1e5
    blocks = 0
    time_networks((model,), 1e-9, known_us=1e7)
    assert blocks == 7
    blocks = 10
    monkeypatch.setattr(network_times, "_PATIENCE", 4)
    time_networks((model,), 1e-9, known_us=0.0)  # never that fast: not for ever
    assert blocks == 17

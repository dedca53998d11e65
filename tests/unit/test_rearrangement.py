"""The search: what it counts as gains are gains, and it finds orders that keep more."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tvm_nm.patterns import parse_pattern
from tvm_nm.rearrangement import SEARCHES, ChannelTie, FreeChannels, check_search, search_orders
from tvm_nm.rearrangement_terms import InputTerm, LayerState, OutputTerm

PATTERNS = ("1x4", "1x4p", "1x3p", "1x4u", "1x4pu", "2:4", "1:4", "3:5", "2:4t3", "1:4t4")


def state(pattern: str, shape: tuple[int, ...] = (12, 10, 3, 3), groups: int = 1, seed: int = 0) -> LayerState:
    weight = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    chosen = parse_pattern(pattern)
    return LayerState.start(weight, chosen, chosen.fixed_density or 0.4, groups)


def kept(layer: LayerState) -> float:
    return layer.kept_share() * float(np.abs(layer.weight).sum(dtype=np.float64))


def both_axes(layer: LayerState, name: str = "a") -> list[FreeChannels]:
    outputs, inputs = np.arange(len(layer.outputs)), np.arange(len(layer.inputs))
    return [
        FreeChannels(len(outputs), (ChannelTie(name, "output", outputs),)),
        FreeChannels(len(inputs), (ChannelTie(name, "input", inputs),)),
    ]


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("groups", [1, 2])
def test_kept_shares_are_those_of_the_pruner(pattern: str, groups: int) -> None:
    layer = state(pattern, groups=groups)
    magnitude = np.abs(layer.weight)
    mask = layer.pattern.mask(magnitude, layer.density, groups)
    assert layer.kept_share() == pytest.approx(magnitude[mask].sum() / magnitude.sum(), rel=1e-5)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([p for p in PATTERNS if (not p.endswith("u") and "x" in p) or "t" in p]),
    st.integers(0, 99),
    st.data(),
)
def test_gains_of_output_exchanges_are_exact(pattern: str, seed: int, data: Any) -> None:
    layer = state(pattern, (11, 10, 1, 3), seed=seed)
    a, b = (data.draw(st.integers(0, 10)) for _ in range(2))
    term = OutputTerm(layer, np.arange(11))
    term.begin()
    gains = term.gains(np.array([a]), np.array([b]))
    assert gains is not None
    before = kept(layer)
    assert term.total() == pytest.approx(before, rel=1e-5)
    values = term.values(np.arange(11))
    layer.outputs[[a, b]] = layer.outputs[[b, a]]
    gained = kept(layer) - before
    assert float(gains[0]) == pytest.approx(gained, abs=1e-4)
    assert values[a, b] + values[b, a] - values[a, a] - values[b, b] <= gained + 1e-4  # a lower bound


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(["2:4", "1:4", "3:5", "2:4t3", "5:8"]), st.integers(0, 99), st.data())
def test_gains_of_input_exchanges_are_exact(pattern: str, seed: int, data: Any) -> None:
    layer = state(pattern, (6, 10, 1, 3), seed=seed)  # the last group is short
    term = InputTerm(layer, np.arange(10), np.random.default_rng(0))
    term.begin()
    a, b = (data.draw(st.integers(0, 9)) for _ in range(2))
    values = term.values(np.arange(10))
    before = kept(layer)
    assert term.total() == pytest.approx(before, rel=1e-5)
    layer.inputs[[a, b]] = layer.inputs[[b, a]]
    groups = term.groups_of(np.array([a, b]))
    gain = 0.0 if groups[0] == groups[1] else values[a, b] + values[b, a] - values[a, a] - values[b, b]
    assert gain == pytest.approx(kept(layer) - before, abs=1e-4)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("method", SEARCHES)
def test_orders_are_permutations_and_are_applied(pattern: str, method: Any) -> None:
    layer = state(pattern, (24, 20, 3, 3))
    before = kept(layer)
    orders = search_orders({"a": layer}, both_axes(layer), method)
    for order, axis in zip(orders, (layer.outputs, layer.inputs), strict=True):
        np.testing.assert_array_equal(order, axis)
        np.testing.assert_array_equal(np.sort(order), np.arange(len(order)))
    if method == "none":
        assert kept(layer) == before
    if method == "swap":
        assert kept(layer) > before


@pytest.mark.parametrize(
    ("pattern", "axis"), [("1x4", "output"), ("1x4p", "output"), ("2:4t4", "output"), ("2:4", "input")]
)
def test_a_hidden_order_is_found(pattern: str, axis: str) -> None:
    """Weights that fit the pattern exactly, with their channels mixed up: the search keeps (nearly) all of them."""
    rng = np.random.default_rng(3)
    chosen = parse_pattern(pattern)
    saliency = rng.uniform(0.5, 1.5, (32, 32, 1, 1))
    weight = (saliency * chosen.mask(rng.random(saliency.shape), chosen.fixed_density or 0.5)).astype(np.float32)
    mixed = weight[rng.permutation(32)] if axis == "output" else weight[:, rng.permutation(32)]
    layer = LayerState.start(mixed, chosen, chosen.fixed_density or 0.5, 1)
    channels = both_axes(layer)[0 if axis == "output" else 1]
    start = layer.kept_share()
    search_orders({"a": layer}, [channels], "swap")
    assert start < 0.9
    assert layer.kept_share() > (0.999 if axis == "output" else start + 0.05)


def test_a_set_with_several_layers_serves_them_together() -> None:
    first, second = state("1x4", (16, 8, 3, 3), seed=1), state("2:4", (8, 16, 1, 1), seed=2)
    ties = (ChannelTie("first", "output", np.arange(16)), ChannelTie("second", "input", np.arange(16)))
    layers = {"first": first, "second": second}
    before = kept(first) + kept(second)
    (order,) = search_orders(layers, [FreeChannels(16, ties)], "swap")
    assert kept(first) + kept(second) > before
    np.testing.assert_array_equal(first.outputs, order)
    np.testing.assert_array_equal(second.inputs, order)


def test_channels_in_several_places_move_together() -> None:
    layer = state("1x4", (16, 8, 3, 3))
    halves = tuple(ChannelTie("a", "output", np.arange(8) + start) for start in (0, 8))
    before = kept(layer)
    (order,) = search_orders({"a": layer}, [FreeChannels(8, halves)], "swap")
    np.testing.assert_array_equal(layer.outputs, np.concatenate([order, order + 8]))
    assert kept(layer) >= before


def test_channels_of_a_group_stay_in_it() -> None:
    layer = state("1x4", (16, 4, 3, 3), groups=2)
    search_orders({"a": layer}, [FreeChannels(8, (ChannelTie("a", "output", np.arange(8, 16)),))], "swap")
    np.testing.assert_array_equal(layer.outputs[:8], np.arange(8))
    assert sorted(layer.outputs[8:]) == list(range(8, 16))
    assert (layer.outputs != np.arange(16)).any()


def test_the_search_is_the_same_every_time() -> None:
    first, second = state("2:4t4", (64, 300, 1, 1)), state("2:4t4", (64, 300, 1, 1))
    for layer in (first, second):
        search_orders({"a": layer}, both_axes(layer), "swap")
    np.testing.assert_array_equal(first.inputs, second.inputs)
    np.testing.assert_array_equal(first.outputs, second.outputs)


def test_weights_of_zero() -> None:
    layer = state("1x4")
    layer.weight[:] = 0
    search_orders({"a": layer}, both_axes(layer), "swap")
    assert layer.kept_share() == 1


def test_unknown_methods() -> None:
    assert check_search("swap") == "swap"
    with pytest.raises(ValueError, match="no such rearrangement: 'best'; there are none, sort, cluster, swap"):
        check_search("best")

"""Norms that are lost by pruning."""

from __future__ import annotations

import numpy as np
import pytest

from tvm_nm.costs import Candidate, CostTable, LayerCosts
from tvm_nm.errors import PlanError
from tvm_nm.importance import add_norms
from tvm_nm.patterns import NM, Dense, OneByN


def make(*layers: LayerCosts) -> CostTable:
    return CostTable("m", "", "", {}, 1, 1, 0.0, layers)


def layer(name: str, *sparse: Candidate) -> LayerCosts:
    return LayerCosts(name, "conv", "", "", 1, (Candidate(Dense(), 1.0, 1.0), *sparse))


def test_losses_are_mean_shares_of_the_layers_norms() -> None:
    weights = {
        "a": np.array([1, -2, 3, -4], np.float32).reshape(1, 4, 1, 1),
        "b": np.full((2, 4, 1, 1), -2, np.float32),
    }
    table = make(
        layer("a", Candidate(NM(2, 4), 0.5, 1.0)),
        layer("b", Candidate(OneByN(2), 0.25, 1.0), Candidate(OneByN(2), 0.5, 1.0)),
        layer("dense"),
    )
    found = add_norms(table, weights, {})
    assert found.metrics == ("l1", "l2")
    a, b, dense = found.layers
    assert a.loss(a.dense, "l1") == 0
    assert a.candidates[1].errors == pytest.approx({"l1": 3 / 10, "l2": 5 / 30})
    assert b.candidates[1].errors == pytest.approx({"l1": 0.75, "l2": 0.75})
    assert a.sensitivity == {"l1": 0.5, "l2": 0.5}
    assert b.loss(b.candidates[1], "l1") == pytest.approx(0.375)
    assert dense.sensitivity == {"l1": 0.0, "l2": 0.0}
    assert sum(found_layer.sensitivity["l2"] for found_layer in found.layers) == pytest.approx(1)


def test_groups_and_other_metrics_are_respected() -> None:
    sparse = Candidate(OneByN(4), 0.5, 1.0, errors={"output": 0.5})
    weight = np.arange(1, 17, dtype=np.float32).reshape(4, 4, 1, 1)
    grouped = add_norms(make(layer("a", sparse)), {"a": weight}, {"a": 2}).layers[0].candidates[1].errors
    whole = add_norms(make(layer("a", sparse)), {"a": weight}, {}).layers[0].candidates[1].errors
    kept = weight[:, 2:].sum()  # the last two inputs are the largest in either case
    assert grouped["l1"] == pytest.approx(1 - kept / weight.sum())
    assert grouped == pytest.approx(whole)
    assert grouped["output"] == 0.5
    tilted = weight * np.array([1, 1, -1, -1], np.float32)[:, None, None, None]
    tilted[2:] = tilted[2:, ::-1]
    grouped = add_norms(make(layer("a", sparse)), {"a": tilted}, {"a": 2}).layers[0].candidates[1].errors
    whole = add_norms(make(layer("a", sparse)), {"a": tilted}, {}).layers[0].candidates[1].errors
    assert grouped["l1"] < whole["l1"]


def test_zero_weights_lose_nothing() -> None:
    table = make(layer("a", Candidate(OneByN(2), 0.5, 1.0)))
    found = add_norms(table, {"a": np.zeros((2, 4, 1, 1), np.float32)}, {})
    assert found.layers[0].loss(found.layers[0].candidates[1], "l1") == 0


def test_errors() -> None:
    table = make(layer("conv1", Candidate(OneByN(2), 0.5, 1.0)))
    with pytest.raises(PlanError, match="the table has layer 'conv1', the model not; near: conv2"):
        add_norms(table, {"conv2": np.ones((2, 2, 1, 1), np.float32)}, {})
    with pytest.raises(PlanError, match=r"'conv1' cannot be pruned to 1x2 at 0\.5: saliency must be finite"):
        add_norms(table, {"conv1": np.full((2, 2, 1, 1), np.nan, np.float32)}, {})

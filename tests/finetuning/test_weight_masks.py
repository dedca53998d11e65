"""Pruned weights stay zero, whatever the optimiser does."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the extra torch is not installed")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from tests.models import small_cnn  # noqa: E402
from tvm_nm.detect import detect_pattern  # noqa: E402
from tvm_nm.errors import PlanError  # noqa: E402
from tvm_nm.patterns import parse_pattern  # noqa: E402
from tvm_nm.plan import LayerChoice, Plan  # noqa: E402
from tvm_nm.torch.gradual import PRUNING_SHARE, gradual_phases  # noqa: E402
from tvm_nm.torch.importer import import_model  # noqa: E402
from tvm_nm.torch.masks import WeightMasks, choose_masks, masks_of_zeros  # noqa: E402


class Restless(torch.optim.Optimizer):
    """Moves every weight in every step, whatever its gradient."""

    def __init__(self, parameters: Iterable[Any]) -> None:
        super().__init__(parameters, {})

    def step(self, closure: Callable[[], Any] | None = None) -> None:
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.add_(torch.randn_like(parameter))


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
    "adamw": lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.1, momentum=0.9),
    "restless": Restless,
}


def layer_names(model: Any) -> list[str]:
    return [name for name in model.layers if name.endswith("Conv")][1:]


def step(model: Any, optimizer: Any) -> None:
    optimizer.zero_grad()
    model.module(torch.randn(4, 3, 16, 16)).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_zeros_stay_zero(name: str) -> None:
    model = import_model(small_cnn())
    choices = {layer: (parse_pattern("2:4"), 0.5) for layer in layer_names(model)}
    masks = WeightMasks(model, choose_masks(model, choices))
    before = {layer: model.weight(layer) for layer in choices}
    optimizer = OPTIMIZERS[name](list(model.module.parameters()))
    masks.lock(optimizer)
    for _ in range(3):
        step(model, optimizer)
    for layer, mask in masks.masks.items():
        assert not model.weight(layer)[~mask].any()
        assert (model.weight(layer)[mask] != before[layer][mask]).mean() > 0.9
        assert str(detect_pattern(model.weight(layer) != 0).pattern) == "2:4"


def test_gradients_and_momentum_of_dropped_weights_are_zero() -> None:
    model = import_model(small_cnn())
    (layer, *_) = layer_names(model)
    masks = WeightMasks(model, choose_masks(model, {layer: (parse_pattern("1x4"), 0.5)}))
    optimizer = OPTIMIZERS["sgd"](list(model.module.parameters()))
    masks.lock(optimizer)
    step(model, optimizer)
    weight = model.layer(layer).weight
    dropped = torch.from_numpy(~masks.masks[layer])
    assert not weight.grad[dropped].any()
    assert weight.grad[~dropped].any()
    momentum = optimizer.state[weight]["momentum_buffer"]
    assert not momentum[dropped].any()
    # Fewer weights later: what had momentum stops.
    masks.replace(choose_masks(model, {layer: (parse_pattern("1x4"), 0.25)}), optimizer)
    later = torch.from_numpy(~masks.masks[layer])
    assert later.sum() > dropped.sum()
    assert not momentum[later].any()
    assert momentum[~later].any()


def test_masks_are_those_of_the_zeros_unless_given() -> None:
    model = import_model(small_cnn())
    assert masks_of_zeros(model) == {}
    (layer, *_) = layer_names(model)
    wanted = choose_masks(model, {layer: (parse_pattern("1x4p"), 0.5)})
    WeightMasks(model, wanted)
    found = masks_of_zeros(model)
    assert list(found) == [layer]
    np.testing.assert_array_equal(found[layer], wanted[layer])


def test_a_mask_that_does_not_fit_is_refused() -> None:
    model = import_model(small_cnn())
    with pytest.raises(PlanError, match="no layer 'nothing'"):
        WeightMasks(model, {"nothing": np.ones((1, 1, 1, 1), np.bool_)})
    (layer, *_) = layer_names(model)
    with pytest.raises(PlanError, match="does not fit"):
        WeightMasks(model, {layer: np.ones((1, 1, 1, 1), np.bool_)})


@settings(deadline=None, max_examples=60)
@given(
    form=st.sampled_from(["2:4", "1:4", "1:8", "2:8t4", "1x4", "1x8p", "1x4u"]),
    density=st.floats(0.1, 0.9),
    steps=st.integers(1, 5),
)
def test_gradual_phases_fall_to_the_plan(form: str, density: float, steps: int) -> None:
    pattern = parse_pattern(form)
    density = density if pattern.fixed_density is None else pattern.fixed_density
    phases = gradual_phases(Plan((LayerChoice("a", pattern, density),)), steps)
    assert 1 <= len(phases) <= steps
    assert phases[-1].choices["a"][0] == pattern
    assert phases[-1].choices["a"][1] == pytest.approx(density)
    densities = [phase.choices["a"][1] for phase in phases]
    assert densities == sorted(densities, reverse=True)
    assert len(set(densities)) == len(densities)
    starts = [phase.start for phase in phases]
    assert starts == sorted(starts)
    assert starts[-1] == (pytest.approx(PRUNING_SHARE) if len(phases) > 1 else 0)
    for eased, share in (phase.choices["a"] for phase in phases):
        assert eased.check_density(share) == pytest.approx(share)  # each is a valid request


def test_gradual_needs_a_step() -> None:
    with pytest.raises(ValueError, match="at least 1 step"):
        gradual_phases(Plan((LayerChoice("a", parse_pattern("2:4"), 0.5),)), 0)

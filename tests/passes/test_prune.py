"""Pruning changes the planned weights and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from tvm import relax

from tvm_nm.detect import detect_pattern
from tvm_nm.errors import PlanError, UnsupportedModelError
from tvm_nm.inventory import LAYERS_ATTR, inventory, layer_weights
from tvm_nm.passes.prune import Prune, prune_masks
from tvm_nm.patterns import NM, Dense, Granularity, OneByN, TileNM
from tvm_nm.plan import LayerChoice, Plan, uniform_plan

NAMES = ["stem", "middle", "grouped", "head"]


def weights(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = {"stem": (16, 3, 3, 3), "middle": (16, 16, 3, 3), "grouped": (16, 8, 1, 1), "head": (10, 16, 1, 1)}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def network(values: dict[str, np.ndarray]) -> tvm.IRModule:
    """conv + bias + relu, a residual block, a grouped conv and a classifier, as the canonical form writes them."""
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((1, 3, 8, 8), "float32"))
    bias = np.linspace(-1, 1, 16, dtype=np.float32).reshape(1, 16, 1, 1)
    with builder.function("main", [x], attrs={"num_input": 1}):
        with builder.dataflow():
            y = builder.emit(relax.op.nn.conv2d(x, relax.const(values["stem"]), padding=1))
            y = builder.emit(relax.op.nn.relu(builder.emit(relax.op.add(y, relax.const(bias)))))
            z = builder.emit(relax.op.nn.conv2d(y, relax.const(values["middle"]), padding=1))
            y = builder.emit(relax.op.add(z, y))
            y = builder.emit(relax.op.nn.conv2d(y, relax.const(values["grouped"]), groups=2))
            y = builder.emit(relax.op.mean(y, axis=(2, 3)))
            head = np.ascontiguousarray(values["head"][:, :, 0, 0].T)
            y = builder.emit(relax.op.matmul(y, relax.const(head)))
            out = builder.emit_output(builder.emit(relax.op.add(y, relax.const(np.ones((1, 10), np.float32)))))
        builder.emit_func_output(out)
    return builder.get().with_attr(LAYERS_ATTR, NAMES)


PLAN = Plan(
    (
        LayerChoice("head", TileNM(2, 4, 5), 0.5),
        LayerChoice("middle", OneByN(4, Granularity.POSITION), 0.25),
        LayerChoice("grouped", NM(1, 4), 0.25),
        LayerChoice("stem", Dense(), 1.0),
    )
)


def test_masks_keep_the_largest_norms_of_each_group() -> None:
    values = weights()
    masks = prune_masks(values, PLAN, {"grouped": 2})
    assert list(masks) == ["head", "middle", "grouped"]
    for choice in PLAN.layers[:3]:
        groups = 2 if choice.name == "grouped" else 1
        expected = choice.pattern.mask(np.abs(values[choice.name]), choice.density, groups)
        np.testing.assert_array_equal(masks[choice.name], expected)


def test_groups_reach_the_pattern() -> None:
    values = {"a": np.random.default_rng(1).standard_normal((12, 8, 1, 1))}
    plan = Plan((LayerChoice("a", OneByN(8), 0.5),))
    mask = prune_masks(values, plan, {"a": 2})["a"]
    assert (mask[:6] == mask[0]).all()
    assert (mask[6:] == mask[6]).all()
    assert (mask[0] != mask[6]).any()
    assert (prune_masks(values, plan)["a"][6:8] == prune_masks(values, plan)["a"][0]).all()


def test_pruned_module_has_masked_weights_and_is_otherwise_the_same() -> None:
    values = weights()
    before = network(values)
    masks = prune_masks(values, PLAN, {"grouped": 2})
    expected = network(
        {name: np.where(masks[name], value, 0) if name in masks else value for name, value in values.items()}
    )
    after = Prune(PLAN)(before)
    tvm.ir.assert_structural_equal(after, expected)
    assert [str(name) for name in after.get_attr(LAYERS_ATTR)] == NAMES
    assert inventory(after) == inventory(before)
    assert int(after["main"].attrs["num_input"]) == 1
    tvm.ir.assert_structural_equal(before, network(values))
    with pytest.raises(ValueError, match="StructuralEqual check failed"):
        tvm.ir.assert_structural_equal(after, before)  # or the comparison would not look into constants


def test_pruned_weights_have_no_negative_zeros() -> None:
    pruned = layer_weights(Prune(PLAN)(network(weights())))
    for name in ("middle", "grouped", "head"):
        zeros = pruned[name][pruned[name] == 0]
        assert zeros.size
        assert not np.signbit(zeros).any()


def test_detection_finds_what_was_planned() -> None:
    mod = network(weights())
    layers = inventory(mod)
    pruned = layer_weights(Prune(uniform_plan(layers, OneByN(16), 0.5, include=["*"], exclude=["head"]))(mod))
    found = {layer.name: detect_pattern(pruned[layer.name] != 0, layer.groups) for layer in layers}
    assert str(found["middle"].pattern) == "1x16"
    assert found["middle"].padded_density == 0.5
    assert str(found["grouped"].pattern) == "1x8"  # 8 channels a group: the block row is short
    assert found["head"].pattern == Dense()


def test_empty_plan_changes_nothing() -> None:
    before = network(weights())
    tvm.ir.assert_structural_equal(Prune(Plan())(before), before)


def test_modules_without_names_use_the_numbered_ones() -> None:
    before = network(weights()).without_attr(LAYERS_ATTR)
    pruned = layer_weights(Prune(Plan((LayerChoice("fc_3", NM(2, 4), 0.5),)))(before))
    assert (pruned["fc_3"] != 0).mean() == 0.5


def test_shared_constants_are_pruned_one_by_one() -> None:
    values = weights()
    constant = relax.const(values["middle"])
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((1, 16, 8, 8), "float32"))
    with builder.function("main", [x]):
        with builder.dataflow():
            y = builder.emit(relax.op.nn.conv2d(x, constant, padding=1))
            out = builder.emit_output(relax.op.nn.conv2d(y, constant, padding=1))
        builder.emit_func_output(out)
    pruned = layer_weights(Prune(Plan((LayerChoice("conv_1", NM(2, 4), 0.5),)))(builder.get()))
    np.testing.assert_array_equal(pruned["conv_0"], values["middle"])
    assert (pruned["conv_1"] != 0).mean() == 0.5


def test_a_layer_that_the_module_lacks() -> None:
    plan = Plan((LayerChoice("midle", NM(2, 4), 0.5),))
    message = "the plan names layer 'midle', which the model does not have; near: middle"
    with pytest.raises(PlanError, match=message):
        Prune(plan)(network(weights()))
    with pytest.raises(PlanError, match=message):
        prune_masks(weights(), plan)


def test_errors_of_the_inventory_come_through() -> None:
    with pytest.raises(UnsupportedModelError, match="no function main"):
        Prune(Plan())(tvm.IRModule())


def test_weights_that_are_not_finite() -> None:
    values = weights()
    values["middle"][3, 2, 1, 0] = np.nan
    with pytest.raises(PlanError, match=r"layer 'middle' cannot be pruned to 2:4: saliency must be finite"):
        Prune(Plan((LayerChoice("middle", NM(2, 4), 0.5),)))(network(values))

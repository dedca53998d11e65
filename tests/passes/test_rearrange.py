"""A rearranged network computes what it computed, whatever its channels are tied to; and its masks keep more."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st
from models import LIGHT, SHARED_NAMES, Net, large_model, light_model, shared_model
from relax_modules import Builder, module
from small_models import SMALL_MODELS
from tvm import relax

from tvm_nm.errors import PlanError
from tvm_nm.frontend import import_onnx
from tvm_nm.inventory import LAYERS_ATTR, inventory, layer_weights
from tvm_nm.passes.channel_rules import follow_channels
from tvm_nm.passes.prune import Prune, prune_masks
from tvm_nm.passes.rearrange import (
    LayerOrder,
    Rearrange,
    class_contents,
    moved_layers,
    rearrange,
    rearrangement_report,
    reordered,
)
from tvm_nm.patterns import parse_pattern
from tvm_nm.plan import LayerChoice, Plan, uniform_plan
from tvm_nm.prune_onnx import prune_onnx
from tvm_nm.reference import reference_model_path
from tvm_nm.reference_run import compare, random_inputs, run_onnx
from tvm_nm.relax_numpy import NumpyModule
from tvm_nm.reorder_onnx import reorder_onnx

op = relax.op


def shuffled(mod: tvm.IRModule, seed: int | None = 0) -> tuple[tvm.IRModule, int]:
    """The module with every set in a random order (rotated if there is no seed), and how many channels could move."""
    flow = follow_channels(mod)
    solution = flow.ties.solve()
    rng = np.random.default_rng(seed)
    sizes = [len(channels.classes) for channels in solution.sets]
    contents = class_contents(
        solution, [np.roll(np.arange(n), 1) if seed is None else rng.permutation(n) for n in sizes]
    )
    return reordered(mod, flow, solution, contents), sum(sizes)


def assert_equal_networks(before: tvm.IRModule, after: tvm.IRModule, seed: int = 1, tolerance: float = 1e-5) -> None:
    rng = np.random.default_rng(seed)
    inputs = [
        rng.standard_normal([int(d) for d in param.ty.shape]).astype(np.float32) for param in before["main"].params
    ]
    found = compare(NumpyModule(after)(*inputs), NumpyModule(before)(*inputs))
    assert found.max_rel <= tolerance, found.describe()


def check(build: Callable[..., Any], *shapes: tuple[int, ...], free: int) -> tvm.IRModule:
    """The network is the same after any rearrangement, and as many channels are free as it is said."""
    mod = module(build, *shapes)
    for seed in (None, 0, 1):
        after, count = shuffled(mod, seed)
        assert_equal_networks(mod, after)
        assert count == free
        if free and seed is None:
            before = layer_weights(mod)
            assert any(not np.array_equal(weight, before[name]) for name, weight in layer_weights(after).items())
    return mod


X = (1, 4, 6, 6)


def test_a_chain_moves_all_but_the_output() -> None:
    def build(b: Builder, x: Any) -> Any:
        x = b.relu(b.bias(b.conv(x, 8)))
        x = b(op.nn.max_pool2d(b(op.nn.leakyrelu(b.bias(b.conv(x, 6)))), (2, 2), (2, 2)))
        return b.bias(b.conv(x, 5))

    check(build, X, free=14)


def test_residual_adds_tie_channels() -> None:
    def build(b: Builder, x: Any) -> Any:
        x = b.relu(b.bias(b.conv(x, 8)))
        y = b.conv(b.relu(b.conv(x, 6)), 8)
        x = b.relu(b.add(y, x))
        x = b.relu(b.add(x, b.conv(x, 8)))
        return b.conv(x, 3)

    check(build, X, free=14)  # 8 in all the residuals together, 6 inside


def test_depthwise_convolutions_go_with_their_input() -> None:
    def build(b: Builder, x: Any) -> Any:
        x = b.relu(b.bias(b.conv(x, 6)))
        x = b.relu(b.bias(b.conv(x, 6, groups=6)))
        x = b.bias(b.conv(x, 12, groups=6))  # channel multiplier 2
        return b.conv(x, 3)

    check(build, X, free=6)


def test_grouped_convolutions_move_within_their_groups() -> None:
    def build(b: Builder, x: Any) -> Any:
        x = b.relu(b.bias(b.conv(x, 8)))
        x = b.bias(b.conv(x, 12, groups=2))
        return b.conv(x, 3)

    mod = check(build, X, free=20)
    solution = follow_channels(mod).ties.solve()
    assert sorted(len(s.classes) for s in solution.sets) == [4, 4, 6, 6]


def test_concatenations_keep_their_parts_apart() -> None:
    def build(b: Builder, x: Any) -> Any:
        left, right = b.relu(b.conv(x, 5)), b.conv(x, 3)
        x = b.bias(b(op.concat([left, x, right, left], axis=1)))
        return b.conv(x, 3)

    check(build, X, free=8)


def test_slices_and_splits_keep_their_channels() -> None:
    def build(b: Builder, x: Any) -> Any:
        x = b.conv(x, 12)
        first = b(op.strided_slice(x, [1], [0], [4]))
        parts = b(op.split(b(op.strided_slice(x, [1], [4], [12])), 2, axis=1))
        rest = b(op.concat([b(relax.TupleGetItem(parts, 1)), first], axis=1))
        odd = b(op.strided_slice(b(relax.TupleGetItem(parts, 0)), [1, 2], [0, 1], [4, 6], [2, 1]))
        return [b.conv(rest, 3), b.conv(odd, 2)]

    # Sets of 4 (first), 4 (rest), 2 (odd), and 2 that nobody reads.
    check(build, X, free=12)


def test_a_shuffle_moves_what_it_takes_together() -> None:
    def build(b: Builder, x: Any) -> Any:
        x = b.bias(b.conv(x, 16))
        x = b.conv(x, 16, groups=2)
        x = b(op.permute_dims(b(op.reshape(x, (1, 2, 8, 6, 6))), (0, 2, 1, 3, 4)))
        x = b.relu(b.bias(b(op.reshape(x, (1, 16, 6, 6)))))
        x = b.conv(x, 16, groups=16)
        return b.conv(x, 6, groups=2)

    mod = check(build, X, free=32)
    solution = follow_channels(mod).ties.solve()
    assert sorted(len(s.classes) for s in solution.sets) == [4, 4, 4, 4, 8, 8]


def test_flatten_moves_blocks_of_the_classifier() -> None:
    def build(b: Builder, x: Any) -> Any:
        x = b.relu(b.bias(b.conv(x, 8)))
        x = b.bias(b.fc(b(op.reshape(x, (1, 8 * 36))), 7))
        return b.fc(b.relu(x), 4)

    check(build, X, free=15)


def test_flatten_of_the_last_axis_first() -> None:
    def build(b: Builder, x: Any) -> Any:
        x = b(op.permute_dims(b.conv(x, 8), (0, 2, 3, 1)))
        return b.fc(b(op.reshape(x, (1, 36 * 8))), 4)

    check(build, X, free=8)


def test_a_flattened_map_that_is_cut_through_its_channels() -> None:
    def build(b: Builder, x: Any) -> Any:
        x = b(op.reshape(b.conv(x, 8), (1, 8 * 36)))
        return b.fc(b(op.strided_slice(x, [1], [0], [8 * 36], [5])), 4)

    # Every fifth pixel: which ones depends on the channel, modulo 5. 0 and 5, 1 and 6, 2 and 7 are cut alike.
    check(build, X, free=6)


def test_squeeze_and_excite() -> None:
    def build(b: Builder, x: Any) -> Any:
        x = b.conv(x, 8)
        s = b(op.mean(x, (2, 3), keepdims=True))
        s = b(op.sigmoid(b.bias(b.conv(b.relu(b.conv(s, 4, 1)), 8, 1))))
        x = b(op.multiply(x, s))
        where = b(op.sigmoid(b.conv(x, 1)))  # by pixel: tied to nothing
        x = b(op.multiply(x, where))
        x = b(op.divide(x, b(op.mean(x, 1, keepdims=True))))
        return b.conv(x, 2)

    check(build, X, free=12)


def test_softmax_over_channels_and_sums_over_them() -> None:
    def build(b: Builder, x: Any) -> Any:
        x = b(op.nn.softmax(b.conv(x, 8), axis=1))
        return [b.conv(x, 2), b(op.sum(x, (1, 2)))]

    check(build, X, free=8)


def test_padded_channels_are_alike() -> None:
    """ResNet's option A: channels of zeros beside those of a shortcut."""

    def build(b: Builder, x: Any) -> Any:
        x = b.conv(x, 4)
        y = b(op.nn.pad(b(op.strided_slice(x, [2, 3], [0, 0], [6, 6], [2, 2])), [0, 0, 2, 2, 0, 0, 0, 0]))
        z = b.conv(x, 8, strides=2)
        u = b(op.concat([relax.const(np.zeros((1, 2, 3, 3), np.float32)), z], axis=1))
        return [b.conv(b.relu(b.add(y, z)), 2), b.conv(u, 2)]

    check(build, X, free=10)  # 4 of the shortcut, 4 beside it, 2 of the second padding


@pytest.mark.parametrize(
    ("name", "build", "reason"),
    [
        ("output", lambda b, x: b.relu(b.conv(x, 8)), "it is an output of the network"),
        ("input", lambda b, x: b.conv(b.relu(b.add(b.conv(x, 4), x)), 2), "add combines it with channels"),
        ("unknown", lambda b, x: b.conv(b(op.cumsum(b.conv(x, 8), 1)), 2), "cumsum may depend on the channels' order"),
        ("window", lambda b, x: b.conv(lrn(b, b.conv(x, 8)), 2), "avg_pool3d may depend on"),
        ("single", lambda b, x: b.conv(b.conv(x, 1), 2), "no other channel is used in the same way"),
        ("argmax", lambda b, x: [b(op.argmax(b.conv(x, 8), 1))], "argmax may depend on"),
    ],
)
def test_channels_that_stay_have_a_reason(name: str, build: Callable[..., Any], reason: str) -> None:
    mod = module(build, X)
    layers = inventory(mod)
    report = rearrange(mod, Plan()).report
    assert [row.name for row in report.layers] == [layer.name for layer in layers]
    assert report.layers[0].outputs_free == 0
    assert report.layers[0].outputs_note.startswith("all stay: ")
    assert reason in report.layers[0].outputs_note
    assert "not computed by a layer" in report.layers[0].inputs_note


def lrn(b: Builder, x: Any) -> Any:
    x = b(op.reshape(x, (1, 1, 8, 6, 6)))
    return b(op.reshape(b(op.nn.avg_pool3d(x, (3, 1, 1), padding=(1, 0, 0))), (1, 8, 6, 6)))


def test_twins_in_other_places_are_told_apart() -> None:
    """Both branches have the same channels by an addition, but a third reads channel 0 of one, 1 of the other."""

    def build(b: Builder, x: Any) -> Any:
        left, right = b.conv(x, 4), b.conv(x, 4)
        both = b(op.concat([left, right], axis=1))
        some = b(op.take(both, relax.const(np.array([0, 5, 2, 3])), axis=1))
        return [b.conv(b.add(left, right), 2), b.conv(some, 2)]

    check(build, X, free=3)  # 0, 2 and 3


# Random networks.


@st.composite
def networks(draw: st.DrawFn) -> onnx.ModelProto:
    """Branches, residuals, concatenations, slices, shuffles, gates, depthwise and grouped convolutions at random."""
    net = Net((draw(st.integers(1, 2)), 4, 6, 6))
    net.rng = np.random.default_rng(draw(st.integers(0, 1 << 16)))
    tensors = [("input", 4)]

    def some() -> tuple[str, int]:
        return tensors[draw(st.integers(max(0, len(tensors) - 4), len(tensors) - 1))]

    for _ in range(draw(st.integers(2, 9))):
        kind = draw(st.sampled_from(STEPS))
        name, channels = some()
        groups = draw(st.sampled_from([g for g in (1, 2, 4) if channels % g == 0]))
        if kind == "conv":
            out = groups * draw(st.integers(1, 4))
            name = net.conv(name, (out, channels // groups, 3, 3), group=groups, pads=[1, 1, 1, 1])
            channels = out
        elif kind == "depthwise" and channels > 1:
            times = draw(st.integers(1, 2))
            name = net.conv(name, (channels * times, 1, 3, 3), group=channels, pads=[1, 1, 1, 1])
            channels *= times
        elif kind == "residual":
            partner, partner_channels = some()
            if partner_channels != channels:
                partner = net.conv(partner, (channels, partner_channels, 1, 1))
            name = net.add(draw(st.sampled_from(["Add", "Mul", "Max"])), name, partner)
        elif kind == "concat":
            partner, partner_channels = some()
            name = net.add("Concat", name, partner, name, axis=1)
            channels = 2 * channels + partner_channels
        elif kind == "slice" and channels > 1:
            start, step = draw(st.integers(0, channels - 1)), draw(st.sampled_from([1, 2, -1]))
            end = -channels - 1 if step < 0 else channels
            bounds = (net.constant(np.array([v])) for v in (start, end, 1, step))
            name = net.add("Slice", name, *bounds)
            channels = len(range(channels)[start::step])
        elif kind == "shuffle":
            shape = np.array([0, groups, channels // groups, 6, 6])
            name = net.add("Transpose", net.add("Reshape", name, net.constant(shape)), perm=[0, 2, 1, 3, 4])
            name = net.add("Reshape", name, net.constant(np.array([0, channels, 6, 6])))
        elif kind == "gate":
            gate = net.add("GlobalAveragePool", name)
            name = net.add("Mul", name, net.add("Sigmoid", net.conv(gate, (channels, channels, 1, 1))))
        elif kind == "scale":
            name = net.batch_norm(net.add("Relu", name), channels)
        elif kind == "prelu":
            name = net.add("PRelu", name, net.weight(channels, 1, 1))
        elif kind == "pad":
            name = net.add("Pad", name, net.constant(np.array([0, 1, 0, 0, 0, 2, 0, 0])))
            channels += 3
        elif kind == "pool":
            name = net.add("MaxPool", name, kernel_shape=[3, 3], pads=[1, 1, 1, 1])
        if channels <= 64:
            tensors.append((name, channels))
    name, channels = tensors[-1]
    if draw(st.booleans()):
        flat = net.add("Flatten", net.add("Relu", name))
        return net.model(net.fc(net.fc(flat, channels * 36, 6), 6, 3))
    return net.model(net.conv(name, (4, channels, 1, 1)), *([some()[0]] if draw(st.integers(0, 4)) == 0 else []))


STEPS = (
    *("conv", "conv", "conv", "depthwise", "residual", "residual", "concat", "slice", "shuffle", "gate", "scale"),
    *("prelu", "pad", "pool"),
)


@settings(max_examples=40, deadline=None)
@given(networks(), st.integers(0, 1 << 16))
def test_random_networks_stay_the_same(model: onnx.ModelProto, seed: int) -> None:
    mod = import_onnx(model, verify=False).module
    after, _ = shuffled(mod, seed)
    assert_equal_networks(mod, after, seed)
    with contextlib.suppress(PlanError):  # a constant by channel behind a slice or a shuffle of channels that moved
        reordered_file(model, seed)


# Whole models, and the search.


@pytest.mark.parametrize("name", SMALL_MODELS)
def test_small_models_stay_the_same(name: str) -> None:
    imported = import_onnx(SMALL_MODELS[name](), verify=False)
    inputs = list(random_inputs(imported.inputs).values())
    found = compare(NumpyModule(shuffled(imported.module)[0])(*inputs), NumpyModule(imported.module)(*inputs))
    assert found.max_rel <= 1e-5, found.describe()


@pytest.mark.parametrize("name", ["squeezenet", "shufflenet"])
def test_light_models_stay_the_same(name: str) -> None:
    check_model(import_onnx(light_model(name), verify=False).module)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in LIGHT if name not in ("squeezenet", "shufflenet")])
def test_larger_light_models_stay_the_same(name: str) -> None:
    check_model(import_onnx(light_model(name), verify=False).module)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mobilenet_v2", "resnet50", "vgg16"])
def test_large_models_stay_the_same(name: str) -> None:
    # With random weights, ResNet-50's outputs in float32 are 1.5e-5 from those in float64, in any order of channels.
    check_model(import_onnx(large_model(name), verify=False).module, 5e-5)


@pytest.mark.parametrize("name", SHARED_NAMES)
def test_trained_models_stay_the_same(name: str) -> None:
    check_model(import_onnx(shared_model(name), verify=False).module)
    assert reordered_file(onnx.load(shared_model(name)), 0)


def reordered_file(model: onnx.ModelProto, seed: int) -> int:
    """Put an ONNX model's channels in a random order; it must stay the same. Returns how many layers moved."""
    imported = import_onnx(model, verify=False)
    flow = follow_channels(imported.module)
    solution = flow.ties.solve()
    rng = np.random.default_rng(seed)
    content = class_contents(solution, [rng.permutation(len(s.classes)) for s in solution.sets])
    groups = {layer.name: layer.groups for layer in inventory(imported.module)}
    orders = moved_layers(flow, solution, content, groups)
    inputs = random_inputs(imported.inputs)
    want = run_onnx(imported.onnx, inputs)
    changed = imported.onnx
    reorder_onnx(changed, orders)
    assert compare(run_onnx(changed, inputs), want).max_rel <= 1e-4
    weights, before = layer_weights(import_onnx(changed, verify=False).module), layer_weights(imported.module)
    for name, order in orders.items():
        np.testing.assert_allclose(weights[name], order.apply(before[name]), rtol=1e-5, atol=1e-7)
    return len(orders)


@pytest.mark.parametrize("name", SMALL_MODELS)
def test_small_model_files_stay_the_same(name: str) -> None:
    if name in ("local_function",):
        with pytest.raises(PlanError, match="no node of the model's main graph"):
            reordered_file(SMALL_MODELS[name](), 0)
        return
    reordered_file(SMALL_MODELS[name](), 0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mobilenet_v2_bn", "resnet50_bn"])
def test_large_model_files_stay_the_same(name: str) -> None:
    assert reordered_file(onnx.load(large_model(name)), 0)


def test_a_constant_that_cannot_be_followed_is_named() -> None:
    net = Net((1, 4, 6, 6))
    inner = net.conv("input", (8, 4, 3, 3), pads=[1, 1, 1, 1])
    sliced = net.add("Slice", inner, *(net.constant(np.array([v])) for v in (2, 7, 1, 1)))
    model = net.model(net.conv(net.add("Mul", sliced, net.weight(5, 1, 1)), (3, 5, 1, 1)))
    with pytest.raises(PlanError, match=r"has values of its own .* leave out --rearrange"):
        reordered_file(model, 0)


def check_model(mod: tvm.IRModule, tolerance: float = 1e-5) -> None:
    after, free = shuffled(mod)
    assert free > 100
    assert_equal_networks(mod, after, tolerance=tolerance)


REFERENCE = import_onnx(reference_model_path(), verify=False).module


@pytest.mark.parametrize("pattern", ["1x4", "1x8p", "1x4u", "2:4", "1:4t8"])
@pytest.mark.parametrize("method", ["sort", "cluster", "swap"])
def test_the_pass_says_what_its_masks_keep(pattern: str, method: Any) -> None:
    chosen = parse_pattern(pattern)
    plan = uniform_plan(inventory(REFERENCE), chosen, chosen.fixed_density or 0.5, include=["*"])
    done = tvm.transform.Sequential([Rearrange(plan, method)])(REFERENCE)
    report = rearrangement_report(done)
    assert report is not None
    assert report.method == method
    assert_equal_networks(REFERENCE, done)
    groups = {layer.name: layer.groups for layer in inventory(REFERENCE)}
    for mod, shares in ((REFERENCE, "kept_before"), (done, "kept_after")):
        weights = layer_weights(mod)
        masks = prune_masks(weights, plan, groups)
        for row in report.layers:
            size = np.abs(weights[row.name])
            assert getattr(row, shares) == pytest.approx(size[masks[row.name]].sum() / size.sum(), rel=1e-5)
    before, after = report.kept
    if method == "swap":
        assert after > before
    tvm.ir.assert_structural_equal(
        Rearrange(plan, method)(REFERENCE).without_attr("tvm_nm.rearrangement"),
        done.without_attr("tvm_nm.rearrangement"),
    )
    assert list(done.get_attr(LAYERS_ATTR)) == list(REFERENCE.get_attr(LAYERS_ATTR))


@pytest.mark.parametrize("pattern", ["1x4", "2:4"])
def test_masks_go_back_to_the_original_model(pattern: str) -> None:
    """The rearranged and pruned module is the ONNX model with the masks in its own order."""
    path = reference_model_path()
    chosen = parse_pattern(pattern)
    plan = uniform_plan(inventory(REFERENCE), chosen, 0.5)
    done = rearrange(REFERENCE, plan)
    pruned = Prune(plan)(done.module)
    masks = {c.name: layer_weights(pruned)[c.name] != 0 for c in plan.layers}
    original = done.original_masks(masks)
    assert any(not np.array_equal(original[name], masks[name]) for name in masks)
    imported = import_onnx(path, verify=False)
    inputs = random_inputs(imported.inputs)
    want = run_onnx(prune_onnx(onnx.load(path), original), inputs)
    assert compare(NumpyModule(pruned)(*inputs.values()), want).max_rel <= 1e-5


@pytest.mark.parametrize(("groups", "shape"), [(1, (6, 4, 3, 3)), (2, (6, 4, 1, 1)), (6, (6, 1, 3, 3))])
def test_orders_are_undone(groups: int, shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    outputs, width = shape[0] // groups, shape[1]
    order = LayerOrder(
        np.concatenate([g * outputs + rng.permutation(outputs) for g in range(groups)]),
        np.concatenate([g * width + rng.permutation(width) for g in range(groups)]),
        groups,
    )
    weight = rng.standard_normal(shape)
    moved = order.apply(weight)
    np.testing.assert_array_equal(order.undo(moved), weight)
    assert moved[1, 0, 0, 0] == weight[order.outputs[1], order.inputs[1 // outputs * width] % width, 0, 0]


def test_nothing_to_do() -> None:
    mod = module(lambda b, x: b.conv(x, 8), X)
    name = inventory(mod)[0].name
    done = rearrange(mod, Plan((LayerChoice(name, parse_pattern("1x4"), 0.5),)))
    assert done.orders == {}
    tvm.ir.assert_structural_equal(done.module.without_attr("tvm_nm.rearrangement"), mod)
    assert rearrangement_report(mod) is None


def test_a_layer_that_the_module_lacks() -> None:
    mod = module(lambda b, x: b.conv(x, 8), X, names=["stem"])
    with pytest.raises(PlanError, match="the plan names layer 'stam', which the model does not have; near: stem"):
        rearrange(mod, Plan((LayerChoice("stam", parse_pattern("1x4"), 0.5),)))

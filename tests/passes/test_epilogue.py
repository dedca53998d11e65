"""What follows a layer is computed in its kernel where nobody else reads it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tvm
from relax_modules import Builder, module
from tvm import relax

from tvm_nm.inventory import layer_calls
from tvm_nm.passes.dataflow import static_shape
from tvm_nm.passes.epilogue import FusedLayer, fuse_epilogues, scalar
from tvm_nm.workload import Epilogue, MaxPool

X = (1, 4, 6, 6)
op = relax.op


def fuse(build: Callable[..., Any], *shapes: tuple[int, ...], bind_tuple: bool = True) -> tuple[FusedLayer, ...]:
    main = (mod := module(build, *(shapes or (X,)), bind_tuple=bind_tuple))["main"]
    bindings = [binding for block in main.body.blocks for binding in block.bindings]
    return fuse_epilogues(layer_calls(mod), bindings, main.body.body)


def only(build: Callable[..., Any], *shapes: tuple[int, ...]) -> FusedLayer:
    (layer,) = fuse(build, *shapes)
    return layer


def test_a_bare_layer() -> None:
    layer = only(lambda b, x: b.conv(x, 8))
    assert layer.absorbed == ()
    assert layer.end.same_as(layer.found.var)
    assert layer.epilogue == Epilogue()
    assert layer.bias.tolist() == [0] * 8
    assert layer.bias.dtype == np.float32


def test_bias_and_relu() -> None:
    seen: list[Any] = []

    def build(b: Builder, x: Any) -> Any:
        constant = b.constant(1, 8, 1, 1)
        seen.extend([constant, b.relu(b.add(b.conv(x, 8), constant))])
        return seen[1]

    layer = only(build)
    assert len(layer.absorbed) == 2
    assert layer.absorbed[0].same_as(layer.found.var)
    assert layer.end.same_as(seen[1])
    assert layer.epilogue == Epilogue(False, 0.0)
    np.testing.assert_array_equal(layer.bias, seen[0].value.numpy().reshape(-1))


def test_bias_residual_and_clip() -> None:
    def build(b: Builder, x: Any, r: Any) -> Any:
        return b(op.clip(b.add(b.bias(b.conv(x, 8)), r), 0, 6))

    layer = only(build, X, (1, 8, 6, 6))
    assert layer.epilogue == Epilogue(True, 0.0, 6.0)
    assert len(layer.absorbed) == 3
    assert layer.residual.name == "x1"


@pytest.mark.parametrize("first", ["layer", "residual"])
def test_the_order_of_an_add_does_not_matter(first: str) -> None:
    def build(b: Builder, x: Any, r: Any) -> Any:
        y = b.bias(b.conv(x, 8))
        return b.add(*((y, r) if first == "layer" else (r, y)))

    layer = only(build, X, (1, 8, 6, 6))
    assert layer.epilogue == Epilogue(True)
    assert layer.residual.name == "x1"


def test_several_biases_add_up() -> None:
    def build(b: Builder, x: Any) -> Any:
        y = b.conv(x, 2)
        for values in ([[[1.0]], [[2.0]]], [[[[10.0]]]], 100.0):
            y = b.add(y, relax.const(np.array(values, np.float32)))
        return y

    layer = only(build)
    assert layer.bias.tolist() == [111.0, 112.0]
    assert len(layer.absorbed) == 3


@pytest.mark.parametrize(
    ("activation", "bounds"),
    [
        (lambda x: op.nn.relu(x), (0.0, None)),
        (lambda x: op.nn.relu6(x), (0.0, 6.0)),
        (lambda x: op.clip(x, -1, 1), (-1.0, 1.0)),
        (lambda x: op.clip(x, float("-inf"), 6), (None, 6.0)),
        (lambda x: op.clip(x, 0, float("inf")), (0.0, None)),
    ],
)
def test_activations(activation: Callable[[Any], Any], bounds: tuple[float | None, float | None]) -> None:
    layer = only(lambda b, x: b(activation(b.conv(x, 8))))
    assert layer.epilogue == Epilogue(False, *bounds)
    assert len(layer.absorbed) == 1


@pytest.mark.parametrize("operator", [op.sigmoid, op.tanh, op.negative, lambda x: op.nn.leakyrelu(x, 0.1)])
def test_other_operators_are_not_absorbed(operator: Callable[[Any], Any]) -> None:
    layer = only(lambda b, x: b(operator(b.conv(x, 8))))
    assert layer.absorbed == ()
    assert layer.epilogue == Epilogue()


def test_nothing_follows_an_activation() -> None:
    layer = only(lambda b, x: b.bias(b.relu(b.conv(x, 8))))
    assert len(layer.absorbed) == 1
    assert layer.epilogue == Epilogue(False, 0.0)
    assert not layer.bias.any()


def test_a_second_activation_stays() -> None:
    layer = only(lambda b, x: b(op.clip(b.relu(b.conv(x, 8)), 0, 6)))
    assert layer.epilogue == Epilogue(False, 0.0)


def test_a_bias_after_the_residual_stays() -> None:
    layer = only(lambda b, x, r: b.bias(b.add(b.conv(x, 8), r)), X, (1, 8, 6, 6))
    assert layer.epilogue == Epilogue(True)
    assert not layer.bias.any()


def test_one_residual_only() -> None:
    layer = only(lambda b, x, r, s: b.add(b.add(b.conv(x, 8), r), s), X, (1, 8, 6, 6), (1, 8, 6, 6))
    assert layer.residual.name == "x1"
    assert len(layer.absorbed) == 1


@pytest.mark.parametrize("shape", [(1, 8, 1, 1), (1, 1, 6, 6), (6,), (1, 8, 6, 1), (2, 8, 6, 6)])
def test_a_residual_of_another_shape_stays(shape: tuple[int, ...]) -> None:
    layer = only(lambda b, x, r: b.relu(b.add(b.conv(x, 8), r)), X, shape)
    assert layer.absorbed == ()


@pytest.mark.parametrize("shape", [(1, 1, 6, 6), (6,), (1, 1, 1, 6), (3, 8, 1, 1), (1, 1, 1, 1, 1), (1, 8, 1, 1, 1)])
def test_constants_that_are_no_bias(shape: tuple[int, ...]) -> None:
    layer = only(lambda b, x: b.relu(b.add(b.conv(x, 8), b.constant(*shape))))
    assert layer.absorbed == ()
    assert not layer.bias.any()


def test_a_constant_that_makes_a_single_channel_many_is_no_bias() -> None:
    layer = only(lambda b, x: b.add(b.conv(x, 1), b.constant(1, 8, 1, 1)))
    assert layer.absorbed == ()


def test_a_constant_of_the_output_shape_is_a_residual() -> None:
    layer = only(lambda b, x: b.relu(b.add(b.conv(x, 8), b.constant(1, 8, 6, 6))))
    assert layer.epilogue == Epilogue(True, 0.0)


def test_a_layer_with_two_users_absorbs_nothing() -> None:
    def build(b: Builder, x: Any) -> list[Any]:
        y = b.conv(x, 8)
        return [b.relu(y), b(op.sigmoid(y))]

    layer = only(build)
    assert layer.absorbed == ()
    assert layer.epilogue == Epilogue()


def test_a_bias_with_two_users_is_the_end() -> None:
    def build(b: Builder, x: Any) -> list[Any]:
        y = b.bias(b.conv(x, 8))
        return [b.relu(y), b(op.sigmoid(y))]

    layer = only(build)
    assert len(layer.absorbed) == 1
    assert layer.epilogue == Epilogue()


def test_an_activation_with_two_users_is_absorbed() -> None:
    def build(b: Builder, x: Any) -> list[Any]:
        y = b.relu(b.bias(b.conv(x, 8)))
        return [b(op.sigmoid(y)), b(op.tanh(y))]

    assert only(build).epilogue == Epilogue(False, 0.0)


@pytest.mark.parametrize("bind_tuple", [True, False])
def test_an_output_of_the_function_is_the_end(bind_tuple: bool) -> None:
    def build(b: Builder, x: Any) -> list[Any]:
        y = b.bias(b.conv(x, 8))
        return [y, b.relu(y)]

    (layer,) = fuse(build, bind_tuple=bind_tuple)
    assert layer.epilogue == Epilogue()
    assert len(layer.absorbed) == 1


def test_what_is_returned_has_another_user_than_its_binding_shows() -> None:
    def build(b: Builder, x: Any) -> list[Any]:
        y = b.output(op.add(b.conv(x, 8), b.constant(1, 8, 1, 1)))
        return [y, b.output(op.nn.relu(y))]

    (layer,) = fuse(build, bind_tuple=False)
    assert layer.epilogue == Epilogue()
    assert len(layer.absorbed) == 1


def test_a_layer_added_to_itself() -> None:
    def build(b: Builder, x: Any) -> Any:
        y = b.conv(x, 8)
        return b.add(y, y)

    assert only(build).absorbed == ()


def test_a_layer_added_to_what_is_made_of_it() -> None:
    def build(b: Builder, x: Any) -> Any:
        y = b.conv(x, 8)
        return b.relu(b.add(y, b(op.sigmoid(y))))

    assert only(build).absorbed == ()


def test_the_later_of_two_layers_absorbs_their_sum() -> None:
    def build(b: Builder, x: Any) -> Any:
        first, second = b.bias(b.conv(x, 8, 1)), b.bias(b.conv(x, 8))
        return b.relu(b.add(first, second))

    first, second = fuse(build)
    assert first.epilogue == Epilogue()
    assert len(first.absorbed) == 1  # its bias
    assert second.epilogue == Epilogue(True, 0.0)
    assert second.residual.same_as(first.end)


def test_the_later_layer_absorbs_the_sum_with_an_activated_one() -> None:
    def build(b: Builder, x: Any) -> Any:
        first = b.relu(b.conv(x, 8, 1))
        return b.relu(b.add(first, b.conv(x, 8)))

    first, second = fuse(build)
    assert first.epilogue == Epilogue(False, 0.0)
    assert second.epilogue == Epilogue(True, 0.0)


def test_an_earlier_layer_absorbs_the_sum_that_the_later_cannot() -> None:
    def build(b: Builder, x: Any) -> Any:
        first = b.conv(x, 8, 1)
        return b.relu(b.add(first, b(op.sigmoid(b.conv(x, 8)))))

    first, second = fuse(build)
    assert first.epilogue == Epilogue(True, 0.0)
    assert second.epilogue == Epilogue()


def test_a_chain_of_residual_blocks() -> None:
    def build(b: Builder, x: Any) -> Any:
        for _ in range(3):
            y = b.relu(b.bias(b.conv(x, 4)))
            x = b.relu(b.add(b.bias(b.conv(y, 4)), x))
        return x

    layers = fuse(build)
    assert [layer.epilogue for layer in layers] == [Epilogue(False, 0.0), Epilogue(True, 0.0)] * 3
    assert [layer.found.layer.index for layer in layers] == list(range(6))
    assert layers[3].residual.same_as(layers[1].end)


def test_fully_connected_layers() -> None:
    def build(b: Builder, x: Any, r: Any) -> Any:
        y = b.relu(b.bias(b.fc(x, 7)))
        y = b.add(b.fc(y, 5), b.constant(5))
        return b.add(y, r)

    first, second = fuse(build, (3, 9), (3, 5))
    assert first.epilogue == Epilogue(False, 0.0)
    assert first.bias.any()
    assert second.epilogue == Epilogue(True)
    assert second.bias.any()


def test_a_bias_of_the_batch_is_no_bias() -> None:
    layer = only(lambda b, x: b.relu(b.add(b.fc(x, 5), b.constant(3, 1))), (3, 9))
    assert layer.absorbed == ()


def test_bounds_are_read_from_constants() -> None:
    clip = module(lambda b, x: b(op.clip(x, -1.5, 2)), X)["main"].body.blocks[0].bindings[0].value
    assert [scalar(argument) for argument in clip.args[1:]] == [-1.5, 2.0]
    assert scalar(tvm.tirx.IntImm("int64", 4)) == 4.0


def max_pool(b: Builder, x: Any, size: int = 2, stride: int = 2, **attributes: Any) -> Any:
    return b(op.nn.max_pool2d(x, (size, size), (stride, stride), **attributes))


@pytest.mark.parametrize("shape", [(1, 4, 6, 6), (3, 4, 7, 9)])
def test_maxima_belong_to_the_layer(shape: tuple[int, ...]) -> None:
    layer = only(lambda b, x: max_pool(b, b.relu(b.bias(b.conv(x, 8)))), shape)
    assert layer.epilogue == Epilogue(False, 0.0, pool=MaxPool())
    assert len(layer.absorbed) == 3
    assert static_shape(layer.end) == (shape[0], 8, shape[2] // 2, shape[3] // 2)


def test_maxima_of_a_bare_layer_and_what_follows_them() -> None:
    layer = only(lambda b, x: b.relu(max_pool(b, b.conv(x, 8))))
    assert layer.epilogue == Epilogue(pool=MaxPool())
    assert len(layer.absorbed) == 1


@pytest.mark.parametrize(
    "pool",
    [
        {"size": 3},
        {"stride": 1},
        {"padding": (1, 1, 1, 1)},
        {"dilation": (2, 2)},
        {"ceil_mode": True},  # of 7x7 pixels: windows that begin in the last row
    ],
    ids=str,
)
def test_other_poolings_stay(pool: dict[str, Any]) -> None:
    layer = only(lambda b, x: max_pool(b, b.relu(b.conv(x, 8)), **pool), (1, 20, 7, 7))
    assert layer.epilogue == Epilogue(False, 0.0)
    assert len(layer.absorbed) == 1


@pytest.mark.parametrize(
    ("pool", "found"),
    [
        ({"size": 3, "padding": (1, 1, 1, 1)}, MaxPool((3, 3), (2, 2), (1, 1, 1, 1))),
        ({"size": 3}, MaxPool((3, 3), (2, 2))),
        ({"size": 3, "stride": 3, "ceil_mode": True}, MaxPool((3, 3), (3, 3), (0, 0, 1, 1))),
        ({"ceil_mode": True}, MaxPool((2, 2), (2, 2), (0, 0, 1, 1))),
        ({"size": 3, "stride": 1, "padding": (0, 2, 1, 0)}, MaxPool((3, 3), (1, 1), (0, 2, 1, 0))),
    ],
    ids=str,
)
def test_any_maxima_belong_to_layers_of_few_channels(pool: dict[str, Any], found: MaxPool) -> None:
    layer = only(lambda b, x: max_pool(b, b.relu(b.conv(x, 8)), **pool), (1, 3, 23, 23))
    assert layer.epilogue == Epilogue(False, 0.0, None, found)
    assert static_shape(layer.end)[2:] == found.output_size(23, 23)


@pytest.mark.parametrize("pool", [{"dilation": (2, 2)}, {"size": 3, "layout": "NHWC"}], ids=str)
def test_what_the_first_layer_takes_no_maxima_of(pool: dict[str, Any]) -> None:
    assert only(lambda b, x: max_pool(b, b.conv(x, 8), **pool), (1, 3, 22, 22)).epilogue == Epilogue()


def test_ceil_mode_makes_no_difference_to_even_sizes() -> None:
    assert only(lambda b, x: max_pool(b, b.conv(x, 8), ceil_mode=True)).epilogue.pool


@pytest.mark.parametrize(
    "conv", [{"kernel": 1}, {"kernel": 5}, {"strides": 2}, {"groups": 2}, {"dilation": 2, "padding": 2}], ids=str
)
def test_maxima_of_layers_without_winograd_kernels_stay(conv: dict[str, Any]) -> None:
    assert not only(lambda b, x: max_pool(b, b.conv(x, 8, **conv)), (1, 20, 12, 12)).epilogue.pool


def test_averages_and_maxima_of_sums_with_a_residual_stay() -> None:
    average = only(lambda b, x: b(op.nn.avg_pool2d(b.conv(x, 8), (2, 2), (2, 2))))
    assert average.epilogue == Epilogue()
    residual = only(lambda b, x, r: max_pool(b, b.relu(b.add(b.conv(x, 8), r))), X, (1, 8, 6, 6))
    assert residual.epilogue == Epilogue(True, 0.0)


def test_maxima_of_what_others_read_stay() -> None:
    def build(b: Builder, x: Any) -> list[Any]:
        y = b.relu(b.conv(x, 8))
        return [max_pool(b, y), b(op.tanh(y))]

    assert only(build).epilogue == Epilogue(False, 0.0)

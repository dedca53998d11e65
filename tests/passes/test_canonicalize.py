from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import tvm
import tvm_ffi
from hypothesis import given, settings
from hypothesis import strategies as st
from models import shared_model
from small_models import SMALL_MODELS
from tvm import relax
from tvm.relax.frontend.onnx import from_onnx

from tvm_nm.inventory import LAYERS_ATTR, inventory
from tvm_nm.passes.canonicalize import Canonicalize
from tvm_nm.relax_numpy import NumpyModule, as_numpy

R = relax.op
rng = np.random.default_rng(0)


def const(*shape: int, low: float | None = None) -> Any:
    array = rng.standard_normal(shape) if low is None else rng.uniform(low, low + 1, shape)
    return relax.const(np.asarray(array, np.float32))


def value(array: Any) -> Any:
    return relax.const(np.asarray(array, np.float32))


def build(body: Callable[..., Any], *shapes: Sequence[int]) -> tvm.IRModule:
    """Module whose "main" takes float32 tensors of the given shapes; `body` also gets the builder's emit."""
    builder = relax.BlockBuilder()
    params = [relax.Var(f"x{i}", relax.TensorType(list(s), "float32")) for i, s in enumerate(shapes)]
    with builder.function("main", params):
        with builder.dataflow():
            result = body(builder.emit, *params)
            out = builder.emit_output(result)
        builder.emit_func_output(out)
    return builder.get()


def canonicalize(mod: tvm.IRModule) -> tvm.IRModule:
    """Run the pass, and check what holds for every module."""
    before = tvm_ffi.structural_hash(mod)
    out = Canonicalize()(mod)
    assert tvm_ffi.structural_hash(mod) == before, "the input was changed"
    relax.analysis.well_formed(out)
    assert_canonical(out)
    tvm.ir.assert_structural_equal(Canonicalize()(out), out)
    inputs = [rng.standard_normal([int(d) for d in p.ty.shape]).astype(np.float32) for p in mod["main"].params]
    for got, want in zip(NumpyModule(out)(*inputs), NumpyModule(mod)(*inputs), strict=True):
        assert got.dtype == want.dtype
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * max(1.0, float(np.abs(want).max(initial=0))))
    return out


def assert_canonical(mod: tvm.IRModule) -> None:
    main = mod["main"]
    assert len(main.body.blocks) <= 1
    used: set[Any] = set(main.body.body.fields if isinstance(main.body.body, relax.Tuple) else [main.body.body])
    for binding in reversed(main.body.blocks[0].bindings if main.body.blocks else []):
        assert isinstance(main.body.blocks[0], relax.DataflowBlock)
        assert binding.var in used, f"{binding.var.name} is dead"
        relax.analysis.post_order_visit(binding.value, lambda e: used.add(e) if isinstance(e, relax.Var) else None)
        call = binding.value
        if not isinstance(call, relax.Call) or not isinstance(call.op, tvm.ir.Op):
            continue
        assert any(not isinstance(a, tvm.ir.GenericConst | relax.ShapeExpr) for a in call.args), f"{call} is constant"
        if call.op.name in ("relax.add", "relax.multiply"):
            assert not isinstance(call.args[0], tvm.ir.GenericConst)


def operators(mod: tvm.IRModule) -> list[str]:
    return [
        b.value.op.name.removeprefix("relax.").removeprefix("nn.")
        for block in mod["main"].body.blocks
        for b in block.bindings
        if isinstance(b.value, relax.Call)
    ]


def calls(mod: tvm.IRModule, name: str) -> list[Any]:
    return [
        b.value
        for block in mod["main"].body.blocks
        for b in block.bindings
        if isinstance(b.value, relax.Call) and b.value.op.name == name
    ]


def constants(mod: tvm.IRModule) -> list[tuple[int, ...]]:
    shapes: list[tuple[int, ...]] = []
    for block in mod["main"].body.blocks:
        for b in block.bindings:
            args = b.value.args if isinstance(b.value, relax.Call) else []
            shapes += [tuple(map(int, a.ty.shape)) for a in args if isinstance(a, tvm.ir.GenericConst)]
    return shapes


def batch_norm(emit: Any, x: Any, channels: int, axis: int = 1, **attributes: Any) -> Any:
    parameters = const(channels, low=0.5), const(channels), const(channels), const(channels, low=0.5)
    return emit(relax.TupleGetItem(emit(R.nn.batch_norm(x, *parameters, axis=axis, training=False, **attributes)), 0))


class TestAffine:
    @given(
        oc=st.integers(1, 4),
        groups=st.sampled_from([1, 2]),
        bias=st.booleans(),
        center=st.booleans(),
        scale=st.booleans(),
    )
    @settings(max_examples=20, deadline=None)
    def test_conv_batch_norm(self, oc: int, groups: int, bias: bool, center: bool, scale: bool) -> None:
        oc *= groups

        def body(emit: Any, x: Any) -> Any:
            y = emit(R.nn.conv2d(x, const(oc, 4 // groups, 3, 3), padding=1, groups=groups))
            if bias:
                y = emit(R.add(y, R.reshape(const(oc), [1, -1, 1, 1])))
            return batch_norm(emit, y, oc, center=center, scale=scale, epsilon=1e-2)

        out = canonicalize(build(body, (1, 4, 5, 5)))
        assert operators(out) == ["conv2d", "add"]
        assert constants(out) == [(oc, 4 // groups, 3, 3), (1, oc, 1, 1)]

    @pytest.mark.parametrize("shape", [(), (1,), (6, 1, 1), (1, 6, 1, 1), (1, 6, 3, 3), (1, 1, 1, 1)])
    def test_conv_scale_and_shift_of_any_shape(self, shape: tuple[int, ...]) -> None:
        def body(emit: Any, x: Any) -> Any:
            k, t = (np.broadcast_to(rng.standard_normal((6, 1, 1) if 6 in shape else ()), shape) for _ in "kt")
            y = emit(R.nn.conv2d(x, const(6, 4, 3, 3)))
            return R.add(value(t), emit(R.multiply(value(k), y)))

        out = canonicalize(build(body, (1, 4, 5, 5)))
        assert operators(out) == ["conv2d", "add"]
        assert constants(out)[1] == (1, 6, 1, 1)

    def test_subtract_and_divide(self) -> None:
        def body(emit: Any, x: Any) -> Any:
            y = emit(R.nn.conv2d(x, const(6, 4, 3, 3)))
            return R.divide(emit(R.subtract(y, const(6, 1, 1))), const(6, 1, 1, low=0.5))

        assert operators(canonicalize(build(body, (1, 4, 5, 5)))) == ["conv2d", "add"]

    def test_spatially_varying_constants_stay(self) -> None:
        def body(emit: Any, x: Any) -> Any:
            y = emit(R.nn.conv2d(x, const(6, 4, 3, 3)))
            return R.multiply(emit(R.add(y, const(1, 6, 3, 3))), const(3, 3))

        assert operators(canonicalize(build(body, (1, 4, 5, 5)))) == ["conv2d", "add", "multiply"]

    def test_broadcast_of_the_convolution_stays(self) -> None:
        out = canonicalize(
            build(lambda emit, x: R.multiply(R.nn.conv2d(x, const(1, 4, 3, 3)), const(1, 6, 1, 1)), (1, 4, 5, 5))
        )
        assert operators(out) == ["conv2d", "multiply"]

    def test_batch_norm_without_layer(self) -> None:
        out = canonicalize(build(lambda emit, x: R.nn.relu(batch_norm(emit, x, 4)), (2, 4, 5, 5)))
        assert operators(out) == ["multiply", "add", "relu"]
        assert constants(out) == [(1, 4, 1, 1)] * 2

    @pytest.mark.parametrize(("shape", "axis"), [((2, 3, 4, 5), 3), ((2, 4), 1), ((2, 3, 4), -1), ((2, 4, 2, 2, 2), 1)])
    def test_batch_norm_along_any_axis(self, shape: tuple[int, ...], axis: int) -> None:
        out = canonicalize(build(lambda emit, x: batch_norm(emit, x, shape[axis], axis=axis), shape))
        assert operators(out) == ["multiply", "add"]

    def test_chain_of_scales_joins(self) -> None:
        def body(emit: Any, x: Any) -> Any:
            y = batch_norm(emit, batch_norm(emit, x, 4), 4)
            return R.add(emit(R.multiply(y, const(4, 1, 1))), const(4, 1, 1))

        assert operators(canonicalize(build(body, (1, 4, 5, 5)))) == ["multiply", "add"]

    def test_training_batch_norm_stays(self) -> None:
        def body(emit: Any, x: Any) -> Any:
            y = emit(R.nn.conv2d(x, const(4, 4, 1, 1)))
            parameters = [const(4, low=0.5) for _ in range(4)]
            return emit(relax.TupleGetItem(emit(R.nn.batch_norm(y, *parameters, axis=1, training=True)), 0))

        out = Canonicalize()(build(body, (1, 4, 5, 5)))
        assert operators(out) == ["conv2d", "batch_norm"]

    def test_batch_norm_whose_statistics_are_read(self) -> None:
        def body(emit: Any, x: Any) -> Any:
            all_three = emit(R.nn.batch_norm(x, *[const(4, low=0.5) for _ in range(4)], axis=1, training=False))
            return relax.Tuple([emit(relax.TupleGetItem(all_three, i)) for i in (0, 1)])

        canonicalize(build(body, (1, 4, 5, 5)))

    def test_scale_in_front(self) -> None:
        def body(emit: Any, x: Any) -> Any:
            return R.nn.conv2d(emit(R.multiply(x, const(4, 1, 1))), const(6, 2, 3, 3), groups=2, padding=1)

        assert operators(canonicalize(build(body, (1, 4, 5, 5)))) == ["conv2d"]

    @pytest.mark.parametrize(("padding", "left"), [(0, ["conv2d", "add"]), (1, ["add", "conv2d"])])
    def test_shift_in_front(self, padding: int, left: list[str]) -> None:
        """Padding comes after the shift, so with padding the border would be wrong."""

        def body(emit: Any, x: Any) -> Any:
            return R.nn.conv2d(emit(R.add(x, const(4, 1, 1))), const(6, 2, 3, 3), groups=2, padding=padding)

        assert operators(canonicalize(build(body, (1, 4, 5, 5)))) == left

    def test_bias_stays_with_its_layer(self) -> None:
        """A linear bottleneck: the bias of the first could go into the second, but belongs to the first."""

        def body(emit: Any, x: Any) -> Any:
            y = batch_norm(emit, emit(R.nn.conv2d(x, const(6, 4, 1, 1))), 6)
            return batch_norm(emit, emit(R.nn.conv2d(y, const(4, 6, 1, 1))), 4)

        assert operators(canonicalize(build(body, (1, 4, 5, 5)))) == ["conv2d", "add", "conv2d", "add"]

    def test_dense(self) -> None:
        def body(emit: Any, x: Any) -> Any:
            y = emit(R.matmul(emit(R.multiply(x, value(0.5))), R.permute_dims(const(6, 8))))
            y = emit(R.multiply(emit(R.add(const(6), y)), const(6)))
            return batch_norm(emit, y, 6)

        out = canonicalize(build(body, (3, 8)))
        assert operators(out) == ["matmul", "add"]
        assert constants(out) == [(8, 6), (1, 6)]

    def test_constants_that_do_nothing(self) -> None:
        def body(emit: Any, x: Any) -> Any:
            return R.nn.relu(emit(R.add(emit(R.multiply(x, value(np.ones((4, 1, 1))))), value(0.0))))

        assert operators(canonicalize(build(body, (1, 4, 5, 5)))) == ["relu"]

    def test_residual_is_no_bias(self) -> None:
        def body(emit: Any, x: Any) -> Any:
            y = emit(R.nn.conv2d(x, const(4, 4, 3, 3), padding=1))
            return batch_norm(emit, emit(R.add(y, x)), 4)

        assert operators(canonicalize(build(body, (1, 4, 5, 5)))) == ["conv2d", "add", "multiply", "add"]

    def test_other_layouts_are_left_alone(self) -> None:
        def body(emit: Any, x: Any) -> Any:
            y = emit(R.nn.conv2d(x, const(6, 3, 3, 4), data_layout="NHWC", kernel_layout="OHWI"))
            return R.multiply(y, const(1, 1, 1, 6))

        out = Canonicalize()(build(body, (1, 5, 5, 4)))
        assert operators(out) == ["conv2d", "multiply"]


class TestSharing:
    def test_two_readers(self) -> None:
        weight = const(4, 4, 3, 3)

        def body(emit: Any, x: Any) -> Any:
            y = emit(R.nn.conv2d(x, weight, padding=1))
            return R.add(batch_norm(emit, y, 4), emit(R.multiply(y, const(4, 1, 1))))

        out = canonicalize(build(body, (1, 4, 5, 5)))
        assert operators(out).count("conv2d") == 1
        np.testing.assert_array_equal(as_numpy(calls(out, "relax.nn.conv2d")[0].args[1]), as_numpy(weight))

    def test_reader_behind_an_identity(self) -> None:
        """The second reader reads an alias of the convolution: still two."""

        def body(emit: Any, x: Any) -> Any:
            y = emit(R.nn.conv2d(x, const(4, 4, 3, 3), padding=1))
            z = emit(R.reshape(y, [1, 4, 5, 5]))
            return R.add(batch_norm(emit, y, 4), R.sigmoid(z))

        assert operators(canonicalize(build(body, (1, 4, 5, 5)))).count("conv2d") == 1

    def test_one_reader_twice(self) -> None:
        def body(emit: Any, x: Any) -> Any:
            y = emit(R.nn.conv2d(x, const(4, 4, 3, 3), padding=1))
            return R.multiply(emit(R.multiply(y, y)), const(4, 1, 1))

        assert operators(canonicalize(build(body, (1, 4, 5, 5)))) == ["conv2d", "multiply", "multiply"]

    def test_output_counts_as_reader(self) -> None:
        def body(emit: Any, x: Any) -> Any:
            y = emit(R.nn.conv2d(x, const(4, 4, 3, 3)))
            return relax.Tuple([y, emit(R.multiply(y, const(4, 1, 1)))])

        assert operators(canonicalize(build(body, (1, 4, 5, 5)))) == ["conv2d", "multiply"]

    def test_shared_bias_add(self) -> None:
        def body(emit: Any, x: Any) -> Any:
            y = emit(R.add(emit(R.nn.conv2d(x, const(4, 4, 3, 3))), const(4, 1, 1)))
            return R.add(emit(R.multiply(y, const(4, 1, 1))), R.nn.relu(y))

        assert operators(canonicalize(build(body, (1, 4, 5, 5)))).count("multiply") == 1

    def test_dead_reader_does_not_count(self) -> None:
        def body(emit: Any, x: Any) -> Any:
            y = emit(R.nn.conv2d(x, const(4, 4, 3, 3)))
            emit(R.sigmoid(y))
            return R.multiply(y, const(4, 1, 1))

        assert operators(canonicalize(build(body, (1, 4, 5, 5)))) == ["conv2d"]


class TestPadding:
    @staticmethod
    def pad(x: Any, *widths: int, **options: Any) -> Any:
        return R.nn.pad(x, [0, 0, 0, 0, *widths], **options)

    def test_into_the_convolution(self) -> None:
        out = canonicalize(
            build(
                lambda emit, x: R.nn.conv2d(self.pad(x, 1, 2, 0, 3), const(4, 4, 3, 3), padding=(1, 0, 2, 1)),
                (1, 4, 5, 5),
            )
        )
        assert operators(out) == ["conv2d"]
        assert [int(p) for p in calls(out, "relax.nn.conv2d")[0].attrs.padding] == [2, 0, 4, 4]

    @pytest.mark.parametrize("options", [{"pad_value": 1.0}, {"pad_mode": "reflect"}])
    def test_other_padding_stays(self, options: dict[str, Any]) -> None:
        mod = build(lambda emit, x: R.nn.conv2d(self.pad(x, 1, 1, 1, 1, **options), const(4, 4, 3, 3)), (1, 4, 5, 5))
        assert operators(Canonicalize()(mod)) == ["pad", "conv2d"]

    def test_channel_padding_stays(self) -> None:
        mod = build(lambda emit, x: R.nn.conv2d(R.nn.pad(x, [0, 0, 1, 1, 0, 0, 0, 0]), const(4, 6, 3, 3)), (1, 4, 5, 5))
        assert operators(canonicalize(mod)) == ["pad", "conv2d"]

    @pytest.mark.parametrize(
        ("activation", "left"),
        [
            (R.nn.relu, ["relu", "max_pool2d"]),
            (lambda x: R.clip(x, 0.0, 6.0), ["clip", "max_pool2d"]),
            (lambda x: R.nn.max_pool2d(R.nn.relu(x), (1, 1)), ["relu", "max_pool2d", "max_pool2d"]),
            (lambda x: R.clip(x, -1.0, 6.0), ["clip", "pad", "max_pool2d"]),
            (lambda x: x, ["pad", "max_pool2d"]),
        ],
    )
    def test_max_pool_only_of_what_is_not_negative(self, activation: Any, left: list[str]) -> None:
        mod = build(
            lambda emit, x: R.nn.max_pool2d(self.pad(emit(activation(x)), 1, 1, 0, 1), (3, 3), (2, 2)), (1, 4, 6, 6)
        )
        assert operators(canonicalize(mod)) == left

    def test_max_pool_with_a_window_of_padding_only(self) -> None:
        mod = build(lambda emit, x: R.nn.max_pool2d(self.pad(R.nn.relu(x), 3, 0, 0, 0), (3, 3)), (1, 4, 6, 6))
        assert operators(canonicalize(mod)) == ["relu", "pad", "max_pool2d"]

    @pytest.mark.parametrize(("own", "counted", "left"), [(0, False, 1), (0, True, 1), (1, True, 1), (1, False, 2)])
    def test_average_pool(self, own: int, counted: bool, left: int) -> None:
        def body(emit: Any, x: Any) -> Any:
            return R.nn.avg_pool2d(self.pad(x, 1, 0, 2, 1), (3, 3), (2, 2), own, count_include_pad=counted)

        assert len(operators(canonicalize(build(body, (1, 4, 6, 6))))) == left

    @pytest.mark.parametrize(
        ("size", "options", "left"),
        [
            ((6, 6), {}, ["mean"]),
            ((6, 6), {"strides": (6, 6), "ceil_mode": True}, ["mean"]),
            ((6, 5), {}, ["avg_pool2d"]),
            ((6, 6), {"padding": (1, 0, 0, 0)}, ["avg_pool2d"]),
            ((3, 3), {"dilation": (2, 2)}, ["avg_pool2d"]),
        ],
    )
    def test_average_of_the_whole_map(self, size: tuple[int, int], options: dict[str, Any], left: list[str]) -> None:
        mod = canonicalize(build(lambda emit, x: R.nn.avg_pool2d(x, size, **options), (1, 4, 6, 6)))
        assert operators(mod) == left

    def test_no_padding_is_dropped(self) -> None:
        assert operators(canonicalize(build(lambda emit, x: R.nn.relu(self.pad(x, 0, 0, 0, 0)), (1, 4, 6, 6)))) == [
            "relu"
        ]

    def test_widths_that_cancel_stay(self) -> None:
        """One pixel added and one cut off leaves the shape, not the values."""
        mod = build(lambda emit, x: R.nn.relu(self.pad(x, 1, -1, 0, 0)), (1, 4, 6, 6))
        assert operators(Canonicalize()(mod)) == ["pad", "relu"]


class TestSimplification:
    def test_dropout(self) -> None:
        def body(emit: Any, x: Any) -> Any:
            return R.nn.relu(emit(relax.TupleGetItem(emit(R.nn.dropout(x)), 0)))

        assert operators(canonicalize(build(body, (1, 4)))) == ["relu"]

    @pytest.mark.parametrize(("op", "word"), [(R.sum, "add"), (R.max, "maximum"), (R.min, "minimum"), (R.mean, "add")])
    def test_variadic(self, op: Any, word: str) -> None:
        def body(emit: Any, x: Any, y: Any, z: Any) -> Any:
            return op(emit(R.stack([x, R.broadcast_to(y, [1, 4, 5, 5]), z], axis=0)), axis=0)

        out = canonicalize(build(body, (1, 4, 5, 5), (1, 4, 1, 1), (1, 4, 5, 5)))
        assert operators(out) == [word, word] + (["multiply"] if op is R.mean else [])

    def test_variadic_where_nobody_has_the_full_shape(self) -> None:
        def body(emit: Any, x: Any) -> Any:
            wide = emit(R.broadcast_to(x, [3, 4, 5, 5]))
            return R.sum(emit(R.stack([wide, wide], axis=0)), axis=0)

        canonicalize(build(body, (1, 4, 1, 1)))

    def test_sum_along_another_axis_is_a_sum(self) -> None:
        out = canonicalize(build(lambda emit, x: R.sum(emit(R.stack([x, x], axis=0)), axis=1), (3, 4)))
        assert operators(out) == ["stack", "sum"]

    def test_sum_of_a_biased_convolution(self) -> None:
        """The operand that is a bias ends up beside its convolution, whatever the order."""

        def body(emit: Any, x: Any) -> Any:
            y = emit(R.nn.conv2d(x, const(4, 4, 1, 1)))
            return R.sum(emit(R.stack([emit(R.broadcast_to(const(1, 4, 1, 1), [1, 4, 5, 5])), y], axis=0)), axis=0)

        out = canonicalize(build(body, (1, 4, 5, 5)))
        assert operators(out) == ["conv2d", "add"]
        assert constants(out)[1] == (1, 4, 1, 1)

    def test_reshapes_join(self) -> None:
        def body(emit: Any, x: Any) -> Any:
            y = emit(R.squeeze(emit(R.expand_dims(x, [0])), [0]))
            return R.nn.relu(emit(R.reshape(emit(R.flatten(y)), [4, 15])))

        out = canonicalize(build(body, (4, 3, 5)))
        assert operators(out) == ["reshape", "relu"]

    def test_transpositions(self) -> None:
        def body(emit: Any, x: Any) -> Any:
            y = emit(R.permute_dims(emit(R.permute_dims(x, [0, 2, 3, 1])), [0, 3, 1, 2]))
            return R.nn.relu(y)

        assert operators(canonicalize(build(body, (2, 3, 4, 5)))) == ["relu"]
        out = canonicalize(build(lambda emit, x: R.permute_dims(x, [0, 2, 3, 1]), (2, 3, 1, 1)))
        assert operators(out) == ["reshape"]
        out = canonicalize(build(lambda emit, x: R.permute_dims(x), (2, 3, 4)))
        assert operators(out) == ["permute_dims"]

    @pytest.mark.parametrize(
        ("body", "left"),
        [
            (lambda e, x: R.maximum(x, value(0)), ["relu"]),
            (lambda e, x: R.maximum(value(0), x), ["relu"]),
            (lambda e, x: R.minimum(e(R.maximum(x, value(0))), value(6)), ["clip"]),
            (lambda e, x: R.maximum(e(R.minimum(x, value([6]))), value(-1)), ["clip"]),
            (lambda e, x: R.minimum(e(R.nn.relu(x)), value(6)), ["clip"]),
            (lambda e, x: R.nn.relu(e(R.nn.relu(x))), ["relu"]),
            (lambda e, x: R.nn.relu(e(R.clip(x, -1.0, 6.0))), ["clip"]),
            (lambda e, x: R.clip(e(R.clip(x, 2.0, 6.0)), 0.0, 1.0), ["clip"]),
            (lambda e, x: R.clip(e(R.clip(x, -6.0, -2.0)), 0.0, 1.0), ["clip"]),
            (lambda e, x: R.clip(x, 0.0, float("inf")), ["relu"]),
            (lambda e, x: R.clip(x, float("-inf"), float("inf")), []),
            (lambda e, x: R.clip(x, float("-inf"), 1.0), ["minimum"]),
            (lambda e, x: R.maximum(x, value(0.5)), ["maximum"]),
            (lambda e, x: R.maximum(e(R.maximum(x, value(0.5))), value(0.7)), ["maximum"]),
            (lambda e, x: R.maximum(x, value(np.zeros((2, 1, 1)))), ["maximum"]),
            (lambda e, x: R.maximum(x, value([[0.0, 1.0]])), ["maximum"]),
            (lambda e, x: R.clip(x, 2, 6), ["clip"]),
        ],
    )
    def test_bounds(self, body: Any, left: list[str]) -> None:
        assert operators(canonicalize(build(body, (3, 2)))) == left

    def test_relu_that_somebody_else_reads_is_not_joined(self) -> None:
        def body(emit: Any, x: Any) -> Any:
            y = emit(R.nn.relu(x))
            return R.add(y, emit(R.minimum(y, value(1))))

        assert operators(canonicalize(build(body, (3, 2)))) == ["relu", "minimum", "add"]

    def test_slice_of_everything(self) -> None:
        def body(emit: Any, x: Any) -> Any:
            y = emit(R.strided_slice(x, [0, 1], [0, 0], [100, 2]))
            return R.strided_slice(y, [1], [1], [-100], [-1])

        assert operators(canonicalize(build(body, (3, 2)))) == ["strided_slice"]

    def test_slices_along_different_axes_join(self) -> None:
        def body(emit: Any, x: Any) -> Any:
            y = emit(R.strided_slice(x, [2], [0], [100], [2]))
            z = emit(R.strided_slice(y, [-1, 0], [-1, 0], [-100, 1], [-2, 1]))
            return R.strided_slice(z, [2], [1], [3])

        out = canonicalize(build(body, (2, 3, 8, 9)))
        assert operators(out) == ["strided_slice", "strided_slice"]

    def test_constants_are_folded(self) -> None:
        def body(emit: Any, x: Any) -> Any:
            shape = emit(R.shape_to_tensor(emit(R.shape_of(x))))
            scale = emit(R.sqrt(emit(R.add(emit(R.concat([const(2, low=1), const(1, low=1)])), value(1)))))
            parts = emit(R.split(const(6), 2))
            y = emit(R.multiply(x, emit(R.multiply(scale, emit(relax.TupleGetItem(parts, 1))))))
            return R.reshape(y, emit(R.tensor_to_shape(emit(R.concat([shape, relax.const([1], "int64")])))))

        assert operators(canonicalize(build(body, (2, 3)))) == ["multiply", "reshape"]

    def test_huge_constants_are_not_made(self) -> None:
        mod = build(lambda emit, x: R.add(x, emit(R.zeros([1 << 13, 1 << 13], "float32"))), (1, 1))
        assert operators(Canonicalize()(mod)) == ["zeros", "add"]


class TestOneDimensional:
    def test_chain(self) -> None:
        def body(emit: Any, x: Any) -> Any:
            y = emit(R.nn.conv1d(R.nn.pad(x, [0, 0, 0, 0, 1, 0]), const(6, 4, 3), strides=2, padding=(1, 2)))
            y = emit(R.nn.leakyrelu(batch_norm(emit, y, 6), 0.1))
            z = emit(R.nn.conv1d(y, const(6, 3, 1), groups=2, dilation=1))
            y = emit(R.concat([emit(R.add(y, emit(R.add(z, R.reshape(const(6), [1, 6, 1]))))), z], axis=1))
            return R.nn.avg_pool1d(emit(R.nn.max_pool1d(y, 3, 2, 1)), 2, ceil_mode=True)

        out = canonicalize(build(body, (2, 4, 20)))
        layers = ["conv2d", "add", "leakyrelu", "conv2d", "add", "add", "concat", "max_pool2d", "avg_pool2d"]
        assert operators(out) == ["reshape", *layers, "reshape"]
        assert [layer.weight_shape for layer in inventory(out)] == [(6, 4, 1, 3), (6, 3, 1, 1)]

    def test_computed_weight_stays(self) -> None:
        out = canonicalize(build(lambda emit, x, w: R.nn.conv1d(x, w), (1, 4, 9), (2, 4, 3)))
        assert operators(out) == ["conv1d"]

    def test_matmul_of_rank_3(self) -> None:
        def body(emit: Any, x: Any) -> Any:
            return R.nn.relu(emit(R.add(emit(R.matmul(x, const(8, 6))), const(6))))

        out = canonicalize(build(body, (2, 5, 8)))
        assert operators(out) == ["reshape", "matmul", "add", "reshape", "relu"]
        assert constants(out) == [(8, 6), (1, 6)]


class TestForeignModules:
    # TVM's importer does not read the others, or reads something else than onnxruntime.
    @pytest.mark.parametrize(
        "name",
        sorted(
            set(SMALL_MODELS)
            - {
                "constant_output",
                "local_function",
                "no_inputs",
                "pools_in_ceil_mode",
                "same_upper_and_lower",
                "weights_in_disguise",
            }
            - {f"resize_of_opset_{opset}" for opset in (9, 10, 11, 13, 18, 19)}
        ),
    )
    def test_what_tvms_importer_gives(self, name: str) -> None:
        model = SMALL_MODELS[name]()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            mod = from_onnx(
                model,
                shape_dict={
                    i.name: [d.dim_value or 1 for d in i.type.tensor_type.shape.dim] for i in model.graph.input
                },
            )
        canonicalize(mod)

    def test_in_a_pipeline(self) -> None:
        def body(emit: Any, x: Any) -> Any:
            return R.nn.relu(batch_norm(emit, emit(R.nn.conv2d(x, const(4, 4, 3, 3), padding=1)), 4))

        mod = build(body, (1, 4, 5, 5))
        x = rng.standard_normal((1, 4, 5, 5)).astype(np.float32)
        passes = [Canonicalize(), relax.transform.LegalizeOps(), relax.transform.FuseOps(), relax.transform.FuseTIR()]
        with tvm.transform.PassContext(opt_level=3):
            compiled = tvm.compile(tvm.transform.Sequential(passes)(mod), tvm.target.Target({"kind": "llvm"}))
        got = relax.VirtualMachine(compiled, tvm.cpu())["main"](tvm.runtime.tensor(x)).numpy()
        np.testing.assert_allclose(got, NumpyModule(mod)(x)[0], rtol=1e-4, atol=1e-4)

    def test_symbolic_shapes(self) -> None:
        """A symbolic batch switches the rules off that need its size; nothing breaks."""
        n = tvm.tirx.Var("n", "int64")
        builder = relax.BlockBuilder()
        x = relax.Var("x", relax.TensorType([n, 4, 5, 5], "float32"))
        with builder.function("main", [x]):
            with builder.dataflow():
                y = batch_norm(builder.emit, builder.emit(R.nn.conv2d(x, const(4, 4, 3, 3))), 4)
                out = builder.emit_output(R.reshape(builder.emit(R.nn.relu(y)), [n, 36]))
            builder.emit_func_output(out)
        mod = builder.get()
        data = rng.standard_normal((3, 4, 5, 5)).astype(np.float32)
        results = []
        for module in (mod, Canonicalize()(mod)):
            vm = relax.VirtualMachine(tvm.compile(module, tvm.target.Target({"kind": "llvm"})), tvm.cpu())
            results.append(vm["main"](tvm.runtime.tensor(data)).numpy())
        np.testing.assert_allclose(results[1], results[0], rtol=1e-4, atol=1e-4)

    def test_function_with_control_flow_is_left_alone(self) -> None:
        builder = relax.BlockBuilder()
        x = relax.Var("x", relax.TensorType([2, 3], "float32"))
        cond = relax.Var("cond", relax.TensorType([], "bool"))
        with builder.function("main", [x, cond]):
            branches = [relax.SeqExpr([], builder.normalize(e)) for e in (x, x)]
            out = builder.emit(relax.If(cond, *branches))
            builder.emit_func_output(out)
        mod = builder.get()
        tvm.ir.assert_structural_equal(Canonicalize()(mod), mod)

    def test_side_effects_are_left_alone(self) -> None:
        builder = relax.BlockBuilder()
        x = relax.Var("x", relax.TensorType([2, 3], "float32"))
        with builder.function("main", [x], pure=False):
            builder.emit(R.print(x, format="{}"))
            builder.emit_func_output(builder.emit(R.multiply(x, value(1.0))))
        mod = builder.get()
        tvm.ir.assert_structural_equal(Canonicalize()(mod), mod)

    def test_several_blocks_and_functions(self) -> None:
        builder = relax.BlockBuilder()
        for name in ("main", "other"):
            x = relax.Var("x", relax.TensorType([1, 4, 5, 5], "float32"))
            with builder.function(name, [x], attrs={"mine": 1}):
                with builder.dataflow():
                    y = builder.emit_output(R.nn.conv2d(x, const(4, 4, 3, 3)))
                z = builder.emit(R.multiply(y, const(4, 1, 1)))
                builder.emit_func_output(z)
        out = canonicalize(builder.get())
        for name in ("main", "other"):
            assert len(out[name].body.blocks) == 1
            assert len(out[name].body.blocks[0].bindings) == 1
            assert int(out[name].attrs["mine"]) == 1

    def test_half_precision_is_left_alone(self) -> None:
        builder = relax.BlockBuilder()
        x = relax.Var("x", relax.TensorType([1, 4, 5, 5], "float16"))
        with builder.function("main", [x]):
            with builder.dataflow():
                weight = relax.const(np.ones((4, 4, 3, 3), np.float16))
                y = builder.emit(R.nn.conv2d(x, weight))
                out = builder.emit_output(R.multiply(y, relax.const(np.ones((4, 1, 1), np.float16))))
            builder.emit_func_output(out)
        assert operators(Canonicalize()(builder.get())) == ["conv2d", "multiply"]

    def test_module_without_main(self) -> None:
        mod = build(lambda emit, x: R.multiply(x, value(1.0)), (2, 3))
        renamed = tvm.IRModule({"f": mod["main"].with_attr("global_symbol", "f")})
        assert len(Canonicalize()(renamed)["f"].body.blocks) == 0


class TestLayerNames:
    def test_they_stay_with_their_layers(self) -> None:
        def body(emit: Any, x: Any) -> Any:
            a = emit(R.nn.conv2d(x, const(4, 4, 3, 3)))
            dead = emit(R.nn.conv2d(x, const(5, 4, 3, 3)))
            del dead
            b = emit(R.nn.conv2d(x, const(6, 4, 3, 3)))
            return R.concat([batch_norm(emit, b, 6), batch_norm(emit, a, 4)], axis=1)

        mod = build(body, (1, 4, 5, 5)).with_attr(LAYERS_ATTR, ["first", "dead", "second"])
        out = canonicalize(mod)
        assert {layer.name: layer.weight_shape[0] for layer in inventory(out)} == {"first": 4, "second": 6}

    def test_no_names_no_attribute(self) -> None:
        assert canonicalize(build(lambda emit, x: R.nn.relu(x), (1, 4))).get_attr(LAYERS_ATTR) is None


@pytest.mark.parametrize("name", ["resnet20_cifar10", "squeezenet1.1_imagenet"])
def test_real_models(name: str) -> None:
    import onnx

    model = onnx.load(shared_model(name))
    shapes = {i.name: [d.dim_value or 1 for d in i.type.tensor_type.shape.dim] for i in model.graph.input}
    canonicalize(from_onnx(model, shape_dict=shapes))

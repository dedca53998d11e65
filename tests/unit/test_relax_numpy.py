"""The evaluator's operators against TVM's own lowering of the same call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tvm
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tvm import relax, topi

from tvm_nm.relax_numpy import NumpyModule, _compile_call, as_constant, as_numpy
from tvm_nm.relax_numpy_ops import OPS

R = relax.op
rng = np.random.default_rng(0)


def check(build: Callable[..., Any], *arrays: np.ndarray, tolerance: float = 1e-5) -> None:
    """Compute one call in NumPy and through the compiler."""
    params = [relax.Var(f"x{i}", relax.TensorType(a.shape, str(a.dtype))) for i, a in enumerate(arrays)]
    call = relax.BlockBuilder().normalize(build(*params))
    values = dict(zip(params, arrays, strict=True))
    mod = tvm.IRModule()
    arguments = [_value(a, values) for a in call.args]
    got, want = OPS[call.op.name](call, *arguments), _compile_call(call, mod)(call, *arguments)
    for g, w in zip(*((r if isinstance(r, tuple) else (r,)) for r in (got, want)), strict=True):
        assert g.dtype == w.dtype
        assert g.shape == w.shape
        np.testing.assert_allclose(g, w, rtol=tolerance, atol=tolerance)


def _value(expr: Any, values: dict[Any, np.ndarray]) -> Any:
    if isinstance(expr, relax.Tuple):
        return tuple(_value(f, values) for f in expr.fields)
    if isinstance(expr, relax.ShapeExpr):
        return tuple(int(d) for d in expr.values)
    if isinstance(expr, relax.Var):
        return values[expr]
    return as_numpy(expr) if isinstance(expr, tvm.ir.GenericConst) else expr.value


def array(*shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(
    "op",
    [
        *(R.abs, R.negative, R.square, R.sign, R.floor, R.ceil, R.exp, R.sin, R.cos, R.tanh, R.sigmoid),
        *(R.nn.relu, R.nn.silu, R.nn.leakyrelu, R.nn.softmax, R.nn.log_softmax, R.isnan, R.flatten),
        *(R.sum, R.mean, R.max, R.min, R.prod, R.variance, R.std, R.argmax, R.argmin),
        lambda x: R.clip(x, -0.5, 0.25),
        lambda x: R.nn.softmax(x, axis=1),
        lambda x: R.nn.log_softmax(x, axis=0),
        lambda x: R.nn.prelu(x, relax.const(array(3)), axis=1),
        lambda x: R.sum(x, axis=[0, -1], keepdims=True),
        lambda x: R.mean(x, axis=[1]),
        lambda x: R.argmax(x, axis=1, keepdims=True),
        lambda x: R.reshape(x, [4, -1]),
        lambda x: R.expand_dims(x, [0, 2]),
        lambda x: R.permute_dims(x, [2, 0, 1]),
        lambda x: R.permute_dims(x),
        lambda x: R.broadcast_to(x, [5, 2, 3, 4]),
        lambda x: R.concat([x, x], axis=1),
        lambda x: R.stack([x, x], axis=2),
        lambda x: R.split(x, 2, axis=2),
        lambda x: R.split(x, [1], axis=1),
        lambda x: R.strided_slice(x, [1, 2], [0, 3], [3, 0], [2, -1]),
        lambda x: R.strided_slice(x, [2], [-1], [-100], [-2]),
        lambda x: R.strided_slice(x, [0, 2], [-1, -3], [100, -1]),
        lambda x: R.take(x, relax.const(np.array([1, 0])), axis=1),
        lambda x: R.tile(x, [1, 2, 1]),
        lambda x: R.astype(x, "int32"),
        lambda x: R.nn.pad(x, [1, 0, 0, 2, 1, 1], "constant", 0.5),
        lambda x: R.nn.batch_flatten(x),
    ],
)
def test_one_operand(op: Any) -> None:
    check(op, array(2, 3, 4))


@pytest.mark.parametrize("op", [R.log, R.sqrt, R.rsqrt])
def test_positive_operand(op: Any) -> None:
    check(op, np.abs(array(2, 3)) + 0.1)


@pytest.mark.parametrize(
    "op",
    [
        *(R.add, R.subtract, R.multiply, R.divide, R.maximum, R.minimum),
        *(R.equal, R.not_equal, R.less, R.less_equal, R.greater, R.greater_equal),
    ],
)
def test_two_operands(op: Any) -> None:
    check(op, array(2, 3, 4), array(3, 1))


def test_power_where_and_logic() -> None:
    check(lambda x: R.power(x, relax.const(0.75, "float32")), np.abs(array(2, 3)) + 0.1)
    check(lambda x, y, c: R.where(c, x, y), array(2, 3), array(2, 3), rng.random((2, 3)) < 0.5)
    check(R.logical_and, rng.random((2, 3)) < 0.5, rng.random((2, 3)) < 0.5)
    check(R.logical_or, rng.random((2, 3)) < 0.5, rng.random((2, 3)) < 0.5)
    check(R.logical_not, rng.random((2, 3)) < 0.5)


@pytest.mark.parametrize(("a", "b"), [((2, 3), (3, 4)), ((5, 2, 3), (3, 4)), ((5, 2, 3), (5, 3, 4)), ((3,), (3, 4))])
def test_matmul(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    check(R.matmul, array(*a), array(*b))


def test_made_from_nothing() -> None:
    check(lambda x: R.full([2, 3], relax.const(1.5, "float32")), array(1))
    check(lambda x: R.zeros([2, 3], "float32"), array(1))
    check(lambda x: R.ones([2], "int64"), array(1))


@given(
    groups=st.integers(1, 3),
    channels=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 4)),
    strides=st.tuples(st.integers(1, 3), st.integers(1, 2)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 3)),
    padding=st.tuples(*[st.integers(0, 2)] * 4),
    batch=st.integers(1, 2),
)
@settings(max_examples=25, deadline=None)
def test_conv2d(
    groups: int,
    channels: tuple[int, int],
    kernel: tuple[int, int],
    strides: tuple[int, int],
    dilation: tuple[int, int],
    padding: tuple[int, ...],
    batch: int,
) -> None:
    x, w = array(batch, groups * channels[0], 8, 11), array(groups * channels[1], channels[0], *kernel)
    check(lambda x, w: R.nn.conv2d(x, w, strides, padding, dilation, groups), x, w, tolerance=1e-4)


def test_conv2d_in_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    """Patches that do not fit the buffer are gathered a few rows at a time, the last strip shorter."""
    monkeypatch.setattr("tvm_nm.relax_numpy_nn._IM2COL_BYTES", 4 * 3 * 9 * 7 * 2)
    check(lambda x, w: R.nn.conv2d(x, w), array(2, 3, 9, 9), array(4, 3, 3, 3), tolerance=1e-4)


def test_conv1d() -> None:
    check(lambda x, w: R.nn.conv1d(x, w, 2, (1, 3), 2, 2), array(2, 4, 11), array(6, 2, 3), tolerance=1e-4)


@example(kind="avg", kernel=(3, 1), strides=(2, 1), padding=(0, 0, 1, 0), ceil_mode=True, include=True)
@given(
    kind=st.sampled_from(["max", "avg"]),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 3)),
    strides=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(*[st.integers(0, 2)] * 4),
    ceil_mode=st.booleans(),
    include=st.booleans(),
)
@settings(max_examples=25, deadline=None)
def test_pool2d(
    kind: str,
    kernel: tuple[int, int],
    strides: tuple[int, int],
    padding: tuple[int, ...],
    ceil_mode: bool,
    include: bool,
) -> None:
    padding = tuple(min(p, k - 1) for p, k in zip(padding, kernel * 2, strict=True))
    op = getattr(R.nn, f"{kind}_pool2d")
    # A window that begins behind the last pixel holds nothing, and TVM then divides by zero: not a case to agree on.
    sizes = (9, 10)
    outs = [
        -(-(n + padding[a] + padding[a + 2] - kernel[a]) // strides[a]) if ceil_mode else 0 for a, n in enumerate(sizes)
    ]
    if any(o * strides[a] >= sizes[a] + padding[a] for a, o in enumerate(outs)):
        return
    check(lambda x: op(x, kernel, strides, padding, (1, 1), ceil_mode, include), array(1, 2, *sizes), tolerance=1e-5)


@pytest.mark.parametrize(
    "op",
    [
        lambda x: R.nn.max_pool2d(x, (2, 2), (1, 1), (0, 0), (2, 3)),
        lambda x: R.nn.adaptive_avg_pool2d(x, (3, 2)),
        lambda x: R.nn.adaptive_avg_pool2d(x),
    ],
)
def test_other_pools(op: Any) -> None:
    check(op, array(2, 3, 7, 8))


def test_pools_of_other_ranks() -> None:
    check(lambda x: R.nn.max_pool1d(x, 3, 2, 1), array(1, 2, 9))
    check(lambda x: R.nn.avg_pool1d(x, 3, 2, 1), array(1, 2, 9))
    check(
        lambda x: R.nn.avg_pool3d(x, (5, 1, 1), (1, 1, 1), (2, 0, 0, 2, 0, 0), count_include_pad=True),
        array(1, 1, 6, 4, 4),
    )


def test_batch_norm() -> None:
    parameters = [array(3), array(3), array(3), np.abs(array(3)) + 0.1]
    check(lambda x, *p: R.nn.batch_norm(x, *p, axis=1, training=False), array(2, 3, 4), *parameters)
    check(
        lambda x, *p: R.nn.batch_norm(x, *p, axis=-1, center=False, scale=False, training=False),
        array(4, 3),
        *parameters,
    )


class TestModule:
    @staticmethod
    def module() -> tvm.IRModule:
        builder = relax.BlockBuilder()
        x = relax.Var("x", relax.TensorType([1, 2, 4, 4], "float32"))
        y = relax.Var("y", relax.TensorType([1, 2, 8, 8], "float32"))
        with builder.function("main", [x, y]):
            with builder.dataflow():
                big = builder.emit(R.image.resize2d(x, (8, 8), method="nearest_neighbor"), name_hint="big")
                low = builder.emit_te(topi.maximum, big, 0.25)
                parts = builder.emit(R.split(builder.emit(R.add(low, y)), 2, axis=1))
                out = builder.emit_output(relax.Tuple([builder.emit(relax.TupleGetItem(parts, 1)), x]))
            builder.emit_func_output(out)
        return builder.get()

    def test_operators_without_numpy_are_compiled(self) -> None:
        x, y = array(1, 2, 4, 4), array(1, 2, 8, 8)
        module = NumpyModule(self.module())
        assert module.input_names == ("x", "y")
        for _ in range(2):  # the second run uses the compiled operators again
            got, same = module(x, y)
            np.testing.assert_allclose(got, (np.maximum(x.repeat(2, 2).repeat(2, 3), 0.25) + y)[:, 1:], rtol=1e-6)
            np.testing.assert_array_equal(same, x)

    def test_watch_sees_every_operator(self) -> None:
        seen = {}
        NumpyModule(self.module())(
            array(1, 2, 4, 4), array(1, 2, 8, 8), watch=lambda name, call, args, out: seen.update({name: (call, out)})
        )
        assert seen["big"][0].op.name == "relax.image.resize2d"
        assert seen["big"][1].shape == (1, 2, 8, 8)
        assert len(seen) == 4

    def test_inputs_are_checked(self) -> None:
        module = NumpyModule(self.module())
        with pytest.raises(ValueError, match="2 inputs expected, 1 given"):
            module(array(1, 2, 4, 4))
        with pytest.raises(ValueError, match=r"input 'y' must be float32 \(1, 2, 8, 8\), got float32 \(1, 2, 8, 9\)"):
            module(array(1, 2, 4, 4), array(1, 2, 8, 9))
        with pytest.raises(ValueError, match="got float64"):
            module(array(1, 2, 4, 4).astype(np.float64), array(1, 2, 8, 8))

    def test_unknown_function(self) -> None:
        with pytest.raises(ValueError, match="no Relax function 'other'"):
            NumpyModule(self.module(), "other")

    def test_control_flow(self) -> None:
        builder = relax.BlockBuilder()
        x, cond = relax.Var("x", relax.TensorType([2], "float32")), relax.Var("c", relax.TensorType([], "bool"))
        with builder.function("main", [x, cond]):
            out = builder.emit(relax.If(cond, *[relax.SeqExpr([], x)] * 2))
            builder.emit_func_output(out)
        with pytest.raises(ValueError, match="straight-line"):
            NumpyModule(builder.get())


@pytest.mark.parametrize("dtype", ["float32", "int64", "bool"])
@pytest.mark.parametrize("shape", [(), (0, 3), (2, 3)])
def test_constants_round_trip(dtype: str, shape: tuple[int, ...]) -> None:
    values = (rng.random(shape) * 5).astype(dtype)
    view = as_numpy(as_constant(values))
    np.testing.assert_array_equal(view, values)
    assert view.dtype == dtype
    assert view.shape == shape


def test_constants_take_views_and_cannot_be_written() -> None:
    values = array(4, 6)
    view = as_numpy(as_constant(values.T[::2]))
    np.testing.assert_array_equal(view, values.T[::2])
    with pytest.raises(ValueError, match="read-only"):
        view[0] = 1

"""Lowering replaces layers and pools by kernels, exploits their zeros, says what it did, and computes the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tvm
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from relax_modules import Builder, module
from tvm import relax

from tvm_nm.errors import UnsupportedModelError
from tvm_nm.inventory import LAYERS_ATTR, inventory, layer_weights
from tvm_nm.layer_report import LayerReport
from tvm_nm.passes.lower import REPORTS_ATTR, Lower, layer_reports
from tvm_nm.passes.prune import Prune
from tvm_nm.passes.select import choose_conv, conv_workload
from tvm_nm.patterns import parse_pattern
from tvm_nm.pipeline import build_executable
from tvm_nm.plan import uniform_plan
from tvm_nm.relax_numpy import NumpyModule
from tvm_nm.schedules.conv import ConvKernel, IndexKind, conv_prim_func
from tvm_nm.schedules.fc import choose_fc_kernel, fc_prim_func, pack_fc
from tvm_nm.schedules.kernel_task import KernelTask
from tvm_nm.schedules.machine import host_target, machine_of, target_from_json
from tvm_nm.schedules.packing import pack_conv
from tvm_nm.schedules.pool import PoolKind, choose_pool_kernel, pool_prim_func
from tvm_nm.schedules.tiling import choose_kernel
from tvm_nm.schedules.tuned import TunedKernel
from tvm_nm.schedules.variants import default_kernel
from tvm_nm.schedules.winograd import WinogradKernel
from tvm_nm.workload import ConvWorkload, Epilogue, MaxPool

TARGET = host_target(1)
# What is chosen depends on the machine; this one is the same everywhere.
AVX512 = target_from_json({"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": "skylake-avx512"}, threads=1)
op = relax.op


def lower(
    mod: tvm.IRModule, target: tvm.target.Target = AVX512, *, always_sparse: bool = True, winograd: bool = False
) -> tvm.IRModule:
    lowered = Lower(target, always_sparse=always_sparse, winograd=winograd)(mod)
    relax.analysis.well_formed(lowered)  # raises
    return lowered


def operators(mod: tvm.IRModule) -> list[str]:
    """Operators of "main" in order, kernels by their function's name without its number."""
    found = []
    for block in mod["main"].body.blocks:
        for binding in block.bindings:
            call = binding.value
            if isinstance(call, relax.Call):
                is_kernel = call.op.name == "relax.call_tir"
                found.append(call.args[0].name_hint.rstrip("0123456789") if is_kernel else call.op.name)
    return found


def kernel_calls(mod: tvm.IRModule) -> list[Any]:
    values = [binding.value for block in mod["main"].body.blocks for binding in block.bindings]
    return [v for v in values if isinstance(v, relax.Call) and v.op.name == "relax.call_tir"]


def run(executable: Any, *inputs: np.ndarray) -> list[np.ndarray]:
    result = relax.VirtualMachine(executable, tvm.cpu())["main"](*(tvm.runtime.tensor(array) for array in inputs))
    return [result.numpy()] if hasattr(result, "numpy") else [part.numpy() for part in result]


def inputs_of(mod: tvm.IRModule, seed: int = 1) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = [tuple(int(size) for size in parameter.ty.shape) for parameter in mod["main"].params]
    return [rng.integers(-3, 4, shape).astype(np.float32) for shape in shapes]


def assert_same_results(mod: tvm.IRModule, tolerance: float = 0.0) -> None:
    """Built, with sparse kernels wherever possible, the module computes what NumPy makes of it."""
    built = build_executable(mod, TARGET, always_sparse=True)
    inputs = inputs_of(mod)
    for found, expected in zip(run(built.executable, *inputs), NumpyModule(mod)(*inputs), strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * np.abs(expected).max())


def test_a_dense_convolution_before_and_after() -> None:
    constants: list[Any] = []

    def build(b: Builder, x: Any) -> Any:
        constants.append(b.constant(1, 16, 1, 1))
        return b.relu(b.add(b.conv(x, 16), constants[0]))

    before = module(build, (1, 8, 10, 10), names=["only"])
    weights = layer_weights(before)["only"]
    work = ConvWorkload(1, 8, 16, 10, 10, (3, 3), padding=(1, 1, 1, 1), epilogue=Epilogue(False, 0.0))
    kernel = choose_kernel(work, machine_of(AVX512))

    builder = relax.BlockBuilder()
    x = relax.Var("x0", relax.TensorType((1, 8, 10, 10), "float32"))
    with builder.function("main", [x]):
        function = builder.add_func(conv_prim_func(kernel), "tvm_nm_conv")
        with builder.dataflow():
            arguments = [
                x,
                relax.const(pack_conv(kernel, weights).values),
                relax.const(constants[0].value.numpy().reshape(-1)),
            ]
            call = relax.call_tir(function, arguments, relax.TensorType((1, 16, 10, 10), "float32"))
            out = builder.emit_output(builder.emit(call))
        builder.emit_func_output(out)
    after = lower(before)
    tvm.ir.assert_structural_equal(after.without_attr(REPORTS_ATTR), builder.get(), map_free_vars=True)


def test_a_sparse_layer_with_a_residual_before_and_after() -> None:
    keep = np.zeros((16, 64, 1, 1), bool)
    keep[:, ::4] = True
    before = module(lambda b, x, r: b.add(b.conv(x, 16, 1, mask=keep), r), (1, 64, 8, 8), (1, 16, 8, 8))
    after = lower(before)
    (call,) = kernel_calls(after)
    work = ConvWorkload(1, 64, 16, 8, 8, (1, 1), epilogue=Epilogue(True))
    kernel = choose_kernel(work, machine_of(AVX512), block=16, index=IndexKind.CHANNEL, kept=16)
    packed = pack_conv(kernel, layer_weights(before)["conv_0"])
    tvm.ir.assert_structural_equal(after[call.args[0]], conv_prim_func(kernel))
    _, values, index, bias, _ = call.args[1].fields
    np.testing.assert_array_equal(values.value.numpy(), packed.values)
    np.testing.assert_array_equal(index.value.numpy(), packed.index)
    assert index.value.numpy().reshape(-1).tolist() == list(range(0, 64, 4))
    assert not bias.value.numpy().any()
    # The kernel may see the pixels reshaped; the module's shapes stay.
    assert tuple(int(size) for size in after["main"].ret_ty.shape) == (1, 16, 8, 8)


def test_a_fully_connected_layer_before_and_after() -> None:
    before = module(lambda b, x: b.bias(b.fc(x, 10)), (2, 20))
    kernel = choose_fc_kernel(2, 20, 10, Epilogue(), machine_of(AVX512))
    (call,) = kernel_calls(after := lower(before))
    tvm.ir.assert_structural_equal(after[call.args[0]], fc_prim_func(kernel))
    weights = layer_weights(before)["fc_0"]
    np.testing.assert_array_equal(call.args[1].fields[1].value.numpy(), pack_fc(kernel, weights[:, :, 0, 0]).values)


def test_a_pool_before_and_after() -> None:
    before = module(lambda b, x: b(op.nn.max_pool2d(x, (3, 3), (2, 2), (1, 1, 1, 1))), (1, 8, 16, 16))
    work = ConvWorkload(1, 8, 8, 16, 16, (3, 3), (2, 2), (1, 1, 1, 1), (1, 1), 8)
    kernel = choose_pool_kernel(work, PoolKind.MAX, (1, 1, 1, 1), machine_of(AVX512))
    (call,) = kernel_calls(after := lower(before))
    tvm.ir.assert_structural_equal(after[call.args[0]], pool_prim_func(kernel))


def test_the_input_module_is_not_changed() -> None:
    def build(b: Builder, x: Any) -> Any:
        return b(op.nn.max_pool2d(b.relu(b.bias(b.conv(x, 16))), (2, 2), (2, 2)))

    before = module(build, (1, 8, 10, 10), names=["a"])
    lower(before)
    tvm.ir.assert_structural_equal(before, module(build, (1, 8, 10, 10), names=["a"]))


def test_attributes_of_module_and_function_stay() -> None:
    mod = module(lambda b, x: b.conv(x, 8), (1, 8, 6, 6), names=["a"]).with_attr("owner", "somebody")
    mod.update_func(mod.get_global_var("main"), mod["main"].with_attr("num_input", 1))
    after = lower(mod)
    assert str(after.get_attr("owner")) == "somebody"
    assert int(after["main"].attrs["num_input"]) == 1
    assert after.get_attr(LAYERS_ATTR) is None  # there are none any more


def test_a_layer_with_two_users_is_computed_once() -> None:
    def build(b: Builder, x: Any) -> list[Any]:
        y = b.conv(x, 8)
        return [b.relu(y), b.add(y, b(op.sigmoid(y)))]

    mod = module(build, (1, 8, 6, 6))
    assert operators(lower(mod)).count("tvm_nm_conv") == 1
    assert_same_results(mod, 1e-6)


def test_results_that_are_bound_one_by_one() -> None:
    def build(b: Builder, x: Any) -> list[Any]:
        y = b.output(op.add(b.conv(x, 8), b.constant(1, 8, 1, 1)))
        return [y, b.output(op.nn.max_pool2d(y, (2, 2)))]

    mod = module(build, (1, 8, 6, 6), bind_tuple=False)
    assert operators(lower(mod)) == ["tvm_nm_conv", "tvm_nm_pool"]
    assert_same_results(mod)


def test_equal_kernels_are_one_function() -> None:
    def build(b: Builder, x: Any) -> Any:
        for _ in range(3):
            x = b.relu(b.bias(b.conv(x, 8)))
        return x

    after = lower(module(build, (1, 8, 6, 6)))
    assert len(kernel_calls(after)) == 3
    assert sum(isinstance(func, tvm.tirx.PrimFunc) for func in after.functions.values()) == 1
    assert len({report.function for report in layer_reports(after)}) == 1


def test_two_layers_into_one_sum() -> None:
    def build(b: Builder, x: Any) -> Any:
        return b.relu(b.add(b.bias(b.conv(x, 16, 1)), b.bias(b.conv(x, 16))))

    mod = module(build, (1, 8, 10, 10))
    after = lower(mod)
    assert [op for op in operators(after) if op != "relax.reshape"] == ["tvm_nm_conv"] * 2
    assert [report.epilogue for report in layer_reports(after)] == ["bias", "bias+add+relu"]
    assert_same_results(mod)


def test_reports_are_in_the_order_of_the_calls() -> None:
    """A layer moves to the end of its chain: its residual may come from a later layer."""

    def build(b: Builder, x: Any) -> Any:
        first = b.conv(x, 8)
        second = b(op.sigmoid(b.conv(x, 8, 1)))
        return b.fc(b(op.reshape(b.add(first, second), (1, 8 * 36))), 4)

    mod = module(build, (1, 8, 6, 6), names=["first", "second", "head"])
    after = lower(mod)
    reports = layer_reports(after)
    assert [report.name for report in reports] == ["second", "first", "head"]
    assert [report.function for report in reports] == [call.args[0].name_hint for call in kernel_calls(after)]
    assert_same_results(mod, 1e-6)


def test_a_report() -> None:
    keep = np.zeros((32, 64, 3, 3), bool)
    keep[:16, :16] = keep[16:, 16:32] = True
    mod = module(
        lambda b, x: b.relu(b.bias(b.conv(x, 32, mask=keep, strides=2))), (1, 64, 28, 28), names=["stage/conv"]
    )
    (report,) = layer_reports(lower(mod, always_sparse=False))
    (layer,) = inventory(mod)
    assert isinstance(report, LayerReport)
    assert (report.name, report.kind, report.pattern, report.density) == ("stage/conv", "conv", "1x16", 0.25)
    assert (report.workload, report.epilogue) == ("64->32 14x14 k3x3 s2x2", "bias+relu")
    assert (report.macs, report.kept_macs) == (layer.macs, layer.macs // 4)
    assert report.packed_bytes == 32 * 16 * 9 * 4 + 2 * 16
    assert report.note == ""
    assert conv_workload(layer, Epilogue()).macs == report.macs


def test_modules_that_were_not_lowered_have_no_reports() -> None:
    assert layer_reports(module(lambda b, x: b.conv(x, 8), (1, 8, 6, 6))) == ()


def mask_of(text: str, shape: tuple[int, ...], density: float | None) -> np.ndarray:
    return parse_pattern(text).mask(np.random.default_rng(5).random(shape), density)


@pytest.mark.parametrize(
    ("text", "density", "found", "index"),
    [
        ("2:4", None, "2:4", "position"),
        ("1:4", None, "1:4", "position"),
        ("2:4t8", None, "1x8p", "position"),
        ("1x4", 0.5, "1x4", "channel"),
        ("1x16", 0.25, "1x16", "channel"),
        ("1x4p", 0.5, "1x4p", "position"),
        ("1x16u", 0.25, "1x16u", "channel"),
    ],
)
def test_patterns_are_found_and_get_a_table(text: str, density: float | None, found: str, index: str) -> None:
    shape = (32, 64, 3, 3)
    mask = mask_of(text, shape, density)
    after = lower(module(lambda b, x: b.conv(x, 32, mask=mask), (1, 64, 14, 14)))
    (report,) = layer_reports(after)
    assert (report.pattern, report.note) == (found, "")
    assert index in report.kernel
    assert report.density == pytest.approx(mask.mean())
    assert report.kept_macs <= 0.6 * report.macs
    assert report.packed_bytes <= 0.75 * mask.size * 4
    (call,) = kernel_calls(after)
    assert [str(argument.ty.dtype) for argument in call.args[1].fields][1:] in (
        ["float32", "uint8", "float32"],
        ["float32", "uint16", "float32"],
    )


def kernel_names(mod: tvm.IRModule, *, winograd: bool) -> list[str]:
    return [report.kernel for report in layer_reports(lower(mod, always_sparse=False, winograd=winograd))]


def test_winograd_is_chosen_where_it_pays() -> None:
    def build(b: Builder, x: relax.Expr) -> relax.Expr:
        return b.conv(b.conv(b.conv(x, 64), 64), 64, 1)

    names = kernel_names(module(build, (1, 4, 56, 56)), winograd=True)
    # Few input channels do not pay for the transforms.
    assert [name.split()[0] for name in names] == ["stem", "winograd", "pixel-vector"]
    names = kernel_names(module(build, (1, 4, 56, 56)), winograd=False)
    assert [name.split()[0] for name in names] == ["stem", "pixel-vector", "pixel-vector"]
    tiny = module(lambda b, x: b.conv(x, 8), (1, 8, 4, 4))
    assert kernel_names(tiny, winograd=True)[0].startswith("pixel-vector")


def test_report_of_a_winograd_layer() -> None:
    (report,) = layer_reports(lower(module(lambda b, x: b.conv(x, 64), (1, 64, 56, 56)), winograd=True))
    assert report.kernel.startswith("winograd 4x4")
    # 36 multiplications instead of 144 for each tile; its 36 weights instead of 9 are not stored.
    assert (report.macs / report.kept_macs, report.packed_bytes) == (4.0, 64 * 64 * 9 * 4)


@pytest.mark.parametrize(("pattern", "reduction"), [("1x16", 8.0), ("1x16p", 2.0)])
def test_winograd_skips_whole_kernels(pattern: str, reduction: float) -> None:
    mask = mask_of(pattern, (64, 64, 3, 3), 0.5)
    (report,) = layer_reports(lower(module(lambda b, x: b.conv(x, 64, mask=mask), (1, 64, 28, 28)), winograd=True))
    assert (report.pattern, report.macs / report.kept_macs) == (pattern, reduction)
    assert report.kernel.startswith("winograd 4x4") is (pattern == "1x16")
    assert ("channel" in report.kernel) is (pattern == "1x16")


@pytest.mark.parametrize("winograd", [True, False])
def test_a_large_stem_is_computed_by_winograd(winograd: bool) -> None:
    mod = module(lambda b, x: first_layer(b, x), (1, 3, 160, 160))
    (report,) = layer_reports(after := lower(mod, winograd=winograd))
    assert report.kernel.startswith("winograd stem 4x4" if winograd else "stem")
    assert operators(after) == ["tvm_nm_conv"]  # its maxima too
    assert report.macs / report.kept_macs == pytest.approx(16 * 49 / 169 if winograd else 1)
    if winograd:
        assert_same_results(mod, 1e-5)


def with_maxima(b: Builder, x: Any) -> Any:
    """A layer that Winograd's algorithm computes, its maxima, and a pointwise layer."""
    x = b(op.nn.max_pool2d(b.relu(b.bias(b.conv(x, 64))), (2, 2), (2, 2)))
    return b.conv(x, 16, 1)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("size", [28, 29])
def test_a_winograd_kernel_takes_the_maxima(size: int, batch: int) -> None:
    mod = module(with_maxima, (batch, 64, size, size))
    after = lower(mod, winograd=True)
    assert operators(after).count("tvm_nm_conv") == 2
    assert "tvm_nm_pool" not in operators(after)
    report, other = layer_reports(after)
    assert (report.epilogue, report.pool, other.epilogue) == ("bias+relu+max2x2", "", "bias")
    assert report.kernel.startswith("winograd 4x4")
    assert "pool" not in report.kernel
    assert report.workload.endswith(f"64->64 {size}x{size} k3x3")
    assert_same_results(mod, 1e-5)


def test_the_maxima_of_a_direct_kernel_are_a_call_of_their_own() -> None:
    mod = module(with_maxima, (1, 64, 29, 28))
    after = lower(mod, winograd=False)
    assert [op for op in operators(after) if op != "relax.reshape"] == ["tvm_nm_conv", "tvm_nm_pool", "tvm_nm_conv"]
    report, _ = layer_reports(after)
    assert (report.epilogue, report.pool) == ("bias+relu+max2x2", "tvm_nm_pool")
    assert report.kernel.endswith(", then a pooling")
    built = build_executable(mod, TARGET, winograd=False)
    inputs = inputs_of(mod)
    (found,) = run(built.executable, *inputs)
    np.testing.assert_array_equal(found, NumpyModule(mod)(*inputs)[0])


def test_a_sparse_winograd_kernel_takes_the_maxima() -> None:
    mask = mask_of("1x16", (64, 64, 3, 3), 0.25)

    def build(b: Builder, x: Any) -> Any:
        return b(op.nn.max_pool2d(b.relu(b.bias(b.conv(x, 64, mask=mask))), (2, 2), (2, 2)))

    mod = module(build, (1, 64, 28, 28))
    (report,) = layer_reports(lower(mod, always_sparse=False, winograd=True))
    assert (report.pattern, report.epilogue, report.kernel[:8]) == ("1x16", "bias+relu+max2x2", "winograd")
    assert_same_results(mod, 1e-5)


def first_layer(b: Builder, x: Any, mask: Any = None, **attributes: Any) -> Any:
    """As ResNets begin."""
    x = b.relu(b.bias(b.conv(x, 32, 7, strides=2, mask=mask)))
    return b(op.nn.max_pool2d(x, (3, 3), (2, 2), **({"padding": (1, 1, 1, 1)} | attributes)))


@pytest.mark.parametrize(
    ("shape", "attributes"),
    [((1, 3, 80, 80), {}), ((2, 3, 67, 83), {"padding": (0, 0, 0, 0), "ceil_mode": True}), ((1, 1, 64, 72), {})],
)
def test_a_first_layer_takes_the_maxima(shape: tuple[int, ...], attributes: dict[str, Any]) -> None:
    mod = module(lambda b, x: first_layer(b, x, **attributes), shape)
    after = lower(mod)
    assert operators(after) == ["tvm_nm_conv"]
    (report,) = layer_reports(after)
    assert report.epilogue.startswith("bias+relu+max3x3s2x2")
    assert (report.pool, report.kernel[:4]) == ("", "stem")
    built = build_executable(mod, TARGET, winograd=False)
    inputs = inputs_of(mod)
    (found,) = run(built.executable, *inputs)
    np.testing.assert_array_equal(found, NumpyModule(mod)(*inputs)[0])


@pytest.mark.parametrize("sparse", [False, True])
def test_a_first_layer_that_cannot_take_them_is_followed_by_a_pooling(sparse: bool) -> None:
    """Rows of 10 pixels are less than a vector; a kernel that skips zeros takes no maxima of such windows."""
    size, mask = (80, None) if sparse else (40, None)
    if sparse:
        mask = mask_of("1x16", (32, 4, 7, 7), 0.25)
    mod = module(lambda b, x: first_layer(b, x, mask), (1, 4, size, size))
    after = lower(mod, always_sparse=sparse)
    assert operators(after) == ["tvm_nm_conv", "tvm_nm_pool"]
    (report,) = layer_reports(after)
    assert (report.epilogue, report.pool) == ("bias+relu+max3x3s2x2p1,1,1,1", "tvm_nm_pool")
    assert report.kernel.endswith(", then a pooling")
    assert (report.pattern == "dense") is not sparse
    assert_same_results(mod, 1e-5)


def test_a_first_layer_that_others_read_takes_no_maxima() -> None:
    def build(b: Builder, x: Any) -> list[Any]:
        y = b.relu(b.conv(x, 32, 7, strides=2))
        return [y, b.output(op.nn.max_pool2d(y, (3, 3), (2, 2)))]

    mod = module(build, (1, 3, 80, 80))
    assert operators(lower(mod)) == ["tvm_nm_conv", "tvm_nm_pool"]
    assert layer_reports(lower(mod))[0].epilogue == "bias+relu"


def test_maxima_of_the_same_size_before_a_depthwise_layer_are_not_lost() -> None:
    def build(b: Builder, x: Any) -> Any:
        x = b(op.nn.max_pool2d(b.relu(b.conv(x, 32)), (3, 3), (1, 1), (1, 1, 1, 1)))
        return b.conv(b.relu(b.conv(x, 32, groups=32)), 16, 1)

    mod = module(build, (1, 3, 40, 40))
    first, *_ = layer_reports(lower(mod, always_sparse=False))
    assert first.epilogue == "bias+relu+max3x3s1x1p1,1,1,1"
    assert "chain" not in first.kernel
    assert_same_results(mod, 1e-5)


def test_a_depthwise_layer_behind_a_pooling_is_in_no_chain() -> None:
    def build(b: Builder, x: Any) -> Any:
        x = b(op.nn.max_pool2d(b.relu(b.conv(x, 32)), (2, 2), (2, 2)))
        return b.conv(b.relu(b.conv(x, 32, groups=32)), 16, 1)

    mod = module(build, (1, 16, 28, 28))
    first, *_ = layer_reports(lower(mod, winograd=True, always_sparse=False))
    assert first.epilogue == "bias+relu+max2x2"
    assert "chain" not in first.kernel
    assert_same_results(mod, 1e-5)


def test_the_saved_pooling_counts_when_a_kernel_is_chosen() -> None:
    """What is as fast as a direct kernel is not worth its weights, unless it saves a pooling."""
    layers = inventory(mod := module(with_maxima, (1, 64, 28, 28)))
    weights = layer_weights(mod)[layers[0].name]

    class Records:
        """Both kernels take as long."""

        def best(self, task: KernelTask) -> TunedKernel:
            return TunedKernel(task, default_kernel(task, machine_of(AVX512)), 100.0, "measured")

    plain, fused = (
        choose_conv(layers[0], weights, Epilogue(False, 0.0, pool=pool), machine_of(AVX512), tuned=Records())
        for pool in (None, MaxPool())
    )
    assert isinstance(plain.kernel, ConvKernel)
    assert isinstance(fused.kernel, WinogradKernel)
    assert fused.kernel.workload.epilogue.pool


def test_a_sparse_layer_must_beat_winograd() -> None:
    mask = mask_of("1x16p", (64, 64, 3, 3), 0.5)
    mod = module(lambda b, x: b.conv(x, 64, mask=mask), (1, 64, 56, 56))
    (direct,) = layer_reports(lower(mod, always_sparse=False))
    (report,) = layer_reports(lower(mod, always_sparse=False, winograd=True))
    assert (direct.pattern, report.pattern) == ("1x16p", "dense")
    assert report.kernel.startswith("winograd")
    assert "the dense kernel's time" in report.note


def test_on_a_pointwise_layer_positions_are_channels() -> None:
    mask = mask_of("2:4", (32, 64, 1, 1), None)
    (report,) = layer_reports(lower(module(lambda b, x: b.conv(x, 32, 1, mask=mask), (1, 64, 14, 14))))
    assert (report.pattern, "channel" in report.kernel) == ("2:4", True)


def note_of(mod: tvm.IRModule, *, always_sparse: bool = False) -> str:
    after = lower(mod, always_sparse=always_sparse)
    (report,) = layer_reports(after)
    assert report.pattern == "dense"
    assert report.kept_macs == report.macs
    assert "none" in report.kernel  # reads every input
    return report.note


def test_dense_layers_need_no_note() -> None:
    assert note_of(module(lambda b, x: b.conv(x, 32), (1, 64, 14, 14))) == ""
    assert note_of(module(lambda b, x: b.fc(x, 32), (1, 64))) == ""


def test_zeros_without_a_pattern_are_noted() -> None:
    mask = np.random.default_rng(0).random((32, 64, 3, 3)) < 0.5
    mask[:, 0] = True  # some channels keep all: no N:M
    mask[0] = True
    assert "no block structure" in note_of(module(lambda b, x: b.conv(x, 32, mask=mask), (1, 64, 14, 14)))


def test_few_zeros_are_noted() -> None:
    mask = np.random.default_rng(0).random((32, 64, 3, 3)) < 0.95
    assert "is above 0.9" in note_of(module(lambda b, x: b.conv(x, 32, mask=mask), (1, 64, 14, 14)))


def test_a_weight_of_zeros() -> None:
    mod = module(lambda b, x: b.bias(b.conv(x, 32, mask=np.zeros((32, 8, 3, 3), bool))), (1, 8, 9, 9))
    assert "every weight is zero" in note_of(mod, always_sparse=True)
    assert_same_results(mod)


def test_a_sparse_kernel_that_would_lose_is_noted() -> None:
    mask = mask_of("4:5", (64, 60, 3, 3), None)  # one channel at a time, with little to skip
    mod = module(lambda b, x: b.conv(x, 64, mask=mask), (1, 60, 28, 28))
    note = note_of(mod)
    assert "4:5" in note
    assert "predicted" in note
    (report,) = layer_reports(lower(mod, always_sparse=True))
    assert (report.pattern, report.note) == ("4:5", "")


def test_a_sparse_kernel_that_wins_needs_no_flag() -> None:
    mask = mask_of("1x16", (128, 128, 3, 3), 0.25)
    (report,) = layer_reports(
        lower(module(lambda b, x: b.conv(x, 128, mask=mask), (1, 128, 14, 14)), always_sparse=False)
    )
    assert report.pattern == "1x16"


@pytest.mark.parametrize(
    ("text", "density", "note"),
    [
        ("1:3", None, "1:3: the FC kernel reads N:M for a batch of 1 and an M that divides 16"),
        ("1x8", 0.5, "1x8: the FC kernel skips blocks of a multiple of 16 outputs"),
    ],
)
def test_fc_patterns_that_are_built_dense(text: str, density: float | None, note: str) -> None:
    mask = mask_of(text, (64, 64, 1, 1), density)[:, :, 0, 0]
    assert note_of(module(lambda b, x: b.fc(x, 64, mask=mask), (1, 64)), always_sparse=True).startswith(note)


def test_a_sparse_fully_connected_layer() -> None:
    mask = mask_of("1x16", (64, 128, 1, 1), 0.25)[:, :, 0, 0]
    mod = module(lambda b, x: b.relu(b.bias(b.fc(x, 64, mask=mask))), (1, 128))
    (report,) = layer_reports(lower(mod, always_sparse=False))
    assert (report.kind, report.pattern, report.kept_macs) == ("fc", "1x16", report.macs // 4)
    assert report.workload == "128->64 fc"
    assert_same_results(mod)


@pytest.mark.parametrize("text", ["2:4", "1:4"])
def test_a_fully_connected_layer_of_n_of_m(text: str) -> None:
    mask = mask_of(text, (64, 128, 1, 1), None)[:, :, 0, 0]
    mod = module(lambda b, x: b.relu(b.bias(b.fc(x, 64, mask=mask))), (1, 128))
    (report,) = layer_reports(lower(mod, always_sparse=False))
    assert (report.kind, report.pattern, report.workload) == ("fc", text, "128->64 fc")
    assert report.kept_macs == report.macs * int(text[0]) // 4
    assert_same_results(mod)


def network(b: Builder, x: Any) -> Any:
    """A stem, a residual block with a projection, depthwise and grouped layers, pools, a concat and a classifier."""
    x = b.relu(b.bias(b.conv(x, 16, strides=2)))
    x = b(op.nn.max_pool2d(x, (3, 3), (2, 2), (0, 0, 0, 0), ceil_mode=True))
    y = b.relu(b.bias(b.conv(x, 32)))
    y = b.relu(b.add(b.bias(b.conv(y, 32)), b.bias(b.conv(x, 32, 1))))
    z = b(op.clip(b.bias(b.conv(y, 32, groups=32)), 0, 6))
    z = b.relu(b.bias(b.conv(z, 48, 1, groups=2)))
    z = b(op.concat([z, y], axis=1))
    z = b.relu(b.conv(z, 40, 3, strides=2, dilation=2, padding=2))
    z = b(op.nn.avg_pool2d(z, (2, 2), (1, 1), (1, 0, 0, 1), count_include_pad=False))
    z = b(op.mean(z, axis=[2, 3]))
    return b.bias(b.fc(b.relu(b.bias(b.fc(z, 64))), 10))


@pytest.mark.parametrize(
    ("text", "density"),
    [
        ("dense", None),
        ("2:4", None),
        ("1:4", None),
        ("1x4", 0.5),
        ("1x16", 0.5),
        ("1x4p", 0.3),
        ("1x16u", 0.5),
        ("2:4t8", None),
    ],
)
def test_whole_networks(text: str, density: float | None) -> None:
    mod = module(network, (2, 3, 33, 29))
    if text != "dense":
        mod = Prune(uniform_plan(inventory(mod), parse_pattern(text), density, include=["*"]))(mod)
    assert any((weight == 0).any() for weight in layer_weights(mod).values()) == (text != "dense")
    after = lower(mod, TARGET)
    assert [name for name in operators(after) if name != "relax.reshape"].count("tvm_nm_conv") == 7
    assert not {"relax.nn.conv2d", "relax.nn.max_pool2d", "relax.nn.avg_pool2d", "relax.matmul"} & set(operators(after))
    assert_same_results(mod, 1e-5)


@st.composite
def graphs(draw: st.DrawFn) -> tvm.IRModule:
    """Random networks of layers, sums and activations with any sharing, on tensors of one shape."""
    kinds = ["conv", "conv", "bias", "bias", "add", "add", "relu", "clip", "negative"]
    steps = [(draw(st.sampled_from(kinds)), draw(st.integers(0, 9)), draw(st.integers(0, 9))) for _ in range(12)]
    outputs = draw(st.integers(1, 3))

    def build(b: Builder, x: Any, y: Any) -> list[Any]:
        values = [x, y]
        for kind, first, second in steps:
            # The latest values are the likeliest operands.
            left = values[-1 - min(first, len(values) - 1) % 3] if first < 8 else values[first % len(values)]
            right = values[-1 - second % len(values)]
            if kind == "conv":
                values.append(b.conv(left, 4, 1))
            elif kind == "bias":
                values.append(b.bias(left))
            elif kind == "add":
                values.append(b.add(left, right))
            elif kind == "relu":
                values.append(b.relu(left))
            elif kind == "clip":
                values.append(b(op.clip(left, -50, 50)))
            else:
                values.append(b(op.negative(left)))
        return values[-outputs:]

    shape = (1, 4, 3, 5)
    return module(build, shape, shape, seed=draw(st.integers(0, 1000)), bind_tuple=draw(st.booleans()))


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(graphs())
def test_random_networks(mod: tvm.IRModule) -> None:
    assert operators(lower(mod)).count("tvm_nm_conv") == len(inventory(mod))
    assert_same_results(mod)


@pytest.mark.slow
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(graphs())
def test_many_random_networks(mod: tvm.IRModule) -> None:
    assert_same_results(mod)


def pooled(average: bool, **attributes: Any) -> Callable[[Builder, Any], Any]:
    operator = op.nn.avg_pool2d if average else op.nn.max_pool2d
    return lambda b, x: b(operator(x, **attributes))


@pytest.mark.parametrize("include_pad", [None, False, True])
@pytest.mark.parametrize("ceil_mode", [False, True])
@pytest.mark.parametrize(
    ("size", "attributes"),
    [
        ((12, 12), {"pool_size": (3, 3), "strides": (2, 2)}),
        ((13, 10), {"pool_size": (2, 3), "strides": (2, 3), "padding": (0, 1, 1, 0)}),
        ((9, 9), {"pool_size": (3, 3), "strides": (2, 2), "padding": (1, 1, 1, 1), "dilation": (2, 2)}),
        ((8, 9), {"pool_size": (3, 2), "strides": (3, 3), "padding": (1, 1, 1, 1)}),
    ],
)
def test_pools_compute_what_relax_says(
    size: tuple[int, int], attributes: dict[str, Any], ceil_mode: bool, include_pad: bool | None
) -> None:
    attributes = {**attributes, "ceil_mode": ceil_mode}
    if include_pad is not None:
        attributes["count_include_pad"] = include_pad
    mod = module(pooled(include_pad is not None, **attributes), (2, 3, *size))
    assert operators(lower(mod)) == ["tvm_nm_pool"]
    inputs = inputs_of(mod)
    found = run(build_executable(mod, TARGET).executable, *inputs)
    # Not NumPy's: this is about what the operator means in Relax.
    expected = run(tvm.compile(relax.transform.LegalizeOps()(mod), TARGET), *inputs)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-6)


def test_what_has_no_kernel_stays() -> None:
    def build(b: Builder, x: Any, w: Any) -> list[Any]:
        low = b(op.astype(x, "float16"))
        weight = relax.const(np.ones((8, 8, 3, 3), np.float16))
        return [
            b(op.nn.conv2d(x, w)),  # the weight is an input
            b(op.astype(b(op.nn.conv2d(low, weight)), "float32")),
            b(op.nn.max_pool2d(x, (2, 2), layout="NHWC")),
            b(op.astype(b(op.nn.max_pool2d(low, (2, 2))), "float32")),
            b(op.matmul(b(op.reshape(x, (2, 4, 36))), b.constant(36, 5))),  # rank 3
            b(op.matmul(b(op.reshape(x, (8, 36))), b(op.reshape(w, (36, 16))))),
        ]

    mod = module(build, (1, 8, 6, 6), (8, 8, 3, 3))
    after = lower(mod)
    assert kernel_calls(after) == []
    assert layer_reports(after) == ()
    assert operators(after) == operators(mod)


def test_symbolic_shapes_are_an_error() -> None:
    batch = tvm.tirx.Var("n", "int64")
    mod = module(lambda b, x: b.conv(x, 8), (batch, 8, 6, 6), names=["conv1"])
    with pytest.raises(UnsupportedModelError, match="layer 'conv1' has a shape that is not static"):
        Lower(AVX512)(mod)

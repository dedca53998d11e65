"""Chains of layers are found, computed by one kernel each, and their tensors stay blocked between them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tvm
from relax_modules import Builder, module
from test_lower import AVX512, TARGET, assert_same_results, inputs_of, operators, run
from tvm import relax

from tvm_nm.inventory import inventory
from tvm_nm.layer_report import LayerReport
from tvm_nm.passes.lower import Lower, layer_reports
from tvm_nm.passes.prune import Prune
from tvm_nm.patterns import parse_pattern
from tvm_nm.pipeline import build_executable, lowering_passes
from tvm_nm.plan import uniform_plan
from tvm_nm.relax_numpy import NumpyModule
from tvm_nm.schedules.machine import host_target, target_from_json

SSE = target_from_json({"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": "x86-64-v2"}, threads=1)
SHAPE = (1, 16, 28, 28)


def clipped(b: Builder, x: Any) -> Any:
    return b(relax.op.clip(x, 0, 6))


def widened(b: Builder, x: Any, hidden: int = 96, stride: int = 1) -> Any:
    """The first two layers of an inverted residual block."""
    x = clipped(b, b.conv(x, hidden, kernel=1))
    return clipped(b, b.conv(x, hidden, kernel=3, groups=hidden, strides=stride))


def residual_block(b: Builder, x: Any, outs: int = 16, stride: int = 1) -> Any:
    y = b.conv(widened(b, x, stride=stride), outs, kernel=1)
    return b.add(y, x) if stride == 1 else y


def lowered(mod: tvm.IRModule, **options: Any) -> tvm.IRModule:
    """The module as it is scheduled, without what is not used."""
    with AVX512:
        return tvm.transform.Sequential(lowering_passes(AVX512, **options))(mod)


def kernels(mod: tvm.IRModule) -> list[str]:
    return [name for name in operators(mod) if name.startswith("tvm_nm")]


def test_blocks_pass_blocked_tensors_on() -> None:
    def build(b: Builder, x: Any) -> Any:
        x = residual_block(b, x, 24, stride=2)
        return b.relu(residual_block(b, residual_block(b, x, 24), 24))

    mod = module(build, SHAPE)
    # Only what leaves the last chain is copied back.
    assert kernels(lowered(mod)) == ["tvm_nm_chain"] * 3 + ["tvm_nm_from_blocked"]
    assert_same_results(mod, 1e-6)


def test_a_residual_of_the_usual_layout_is_copied() -> None:
    mod = module(lambda b, x: residual_block(b, x), SHAPE)
    assert sorted(kernels(lowered(mod))) == ["tvm_nm_chain", "tvm_nm_from_blocked", "tvm_nm_to_blocked"]
    assert_same_results(mod, 1e-6)


def test_a_tensor_with_another_use_ends_a_chain() -> None:
    def shared_wide(b: Builder, x: Any) -> Any:
        wide = clipped(b, b.conv(x, 96, kernel=1))
        narrow = b.conv(clipped(b, b.conv(wide, 96, kernel=3, groups=96)), 16, kernel=1)
        return b.add(b.conv(wide, 16, kernel=1), narrow)

    def shared_filtered(b: Builder, x: Any) -> Any:
        wide = widened(b, x)
        return b.add(b.conv(wide, 16, kernel=1), b.conv(wide, 16, kernel=3))

    assert "tvm_nm_chain" not in kernels(lowered(module(shared_wide, SHAPE)))
    # The first two layers are a chain all the same.
    mod = module(shared_filtered, SHAPE)
    assert kernels(lowered(mod)).count("tvm_nm_chain") == 1
    assert_same_results(mod, 1e-6)


def test_a_chain_begins_with_any_convolution() -> None:
    def build(b: Builder, x: Any) -> Any:
        x = clipped(b, b.conv(x, 32, kernel=3, strides=2))
        x = clipped(b, b.conv(x, 32, kernel=3, groups=32))
        return b.conv(x, 16, kernel=1)

    mod = module(build, (2, 3, 45, 33))
    assert "tvm_nm_chain" in kernels(lowered(mod))
    assert_same_results(mod, 1e-6)


def test_two_threads_and_a_batch() -> None:
    mod = module(lambda b, x: residual_block(b, residual_block(b, x)), (3, 16, 28, 28))
    inputs = inputs_of(mod)
    found = run(build_executable(mod, host_target(2)).executable, *inputs)
    expected = NumpyModule(mod)(*inputs)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-6 * np.abs(other).max())


def test_no_chains_where_they_are_not_wanted() -> None:
    mod = module(lambda b, x: residual_block(b, x), SHAPE)
    assert kernels(lowered(mod, chains=False)) == ["tvm_nm_conv"] * 3
    assert kernels(Lower(SSE)(mod)) == ["tvm_nm_conv"] * 3


def pruned(pattern: str, channels: int, size: int) -> tvm.IRModule:
    """A block between two layers: the first and the last one of a model are spared."""

    def build(b: Builder, x: Any) -> Any:
        x = residual_block(b, b.relu(b.conv(x, channels, kernel=1)), channels)
        return b.conv(b.relu(x), channels)

    mod = module(build, (1, 16, size, size))
    return Prune(uniform_plan(inventory(mod), parse_pattern(pattern), None if pattern == "2:4" else 0.5))(mod)


def reports(mod: tvm.IRModule, **options: Any) -> tuple[LayerReport, ...]:
    return layer_reports(lowered(mod, **options))


def test_the_report_of_a_chain() -> None:
    names = ["wide", "filter", "narrow"]
    mod = module(lambda b, x: residual_block(b, x), SHAPE, names=names)
    first, second, third = reports(mod)
    assert [report.name for report in (first, second, third)] == names
    assert (first.chain, second.chain, third.chain) == ("", "wide", "wide")
    assert len({report.function for report in (first, second, third)}) == 1
    assert all(report.kernel.startswith("chain ") for report in (first, second, third))
    assert [report.kept_macs for report in (first, second, third)] == [r.macs for r in (first, second, third)]


def test_zeros_are_skipped_within_a_chain() -> None:
    mod = pruned("1x16", 64, 14)
    found = reports(mod)[1:4]
    assert [report.pattern for report in found] == ["1x16", "dense", "1x16"]
    assert [report.kept_macs * 2 == report.macs for report in found] == [True, False, True]
    assert_same_results(mod, 1e-6)


@pytest.mark.parametrize("pattern", ["2:4", "1x4"])
def test_patterns_that_a_chain_cannot_skip(pattern: str) -> None:
    mod = pruned(pattern, 16, 112)
    assert "tvm_nm_chain" not in kernels(lowered(mod, always_sparse=True))
    found = reports(mod)[1:4]
    assert [report.kernel.partition(" ")[0] for report in found] == ["chain"] * 3
    assert [report.pattern for report in found] == ["dense"] * 3
    assert found[0].density == 0.5
    assert "in a chain of layers" in found[0].note or "the dense kernel's time" in found[0].note
    (expected,) = NumpyModule(mod)(*inputs_of(mod))
    for chosen in (True, False):
        (one,) = run(build_executable(mod, TARGET, always_sparse=chosen).executable, *inputs_of(mod))
        np.testing.assert_allclose(one, expected, rtol=0, atol=1e-6 * np.abs(expected).max())

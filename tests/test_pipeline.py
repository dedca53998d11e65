"""The pipeline by name, and each pass in somebody else's pipeline."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections import Counter
from typing import Any

import numpy as np
import pytest
import tvm
from loop_nests import assert_all_scheduled
from models import small_cnn
from relax_modules import Builder, module
from tvm import relax
from tvm.relax.backend.cpu_generic import pipeline as cpu_generic
from tvm.relax.frontend.onnx import from_onnx

from tvm_nm.inventory import inventory
from tvm_nm.passes.canonicalize import Canonicalize
from tvm_nm.passes.lower import Lower, layer_reports
from tvm_nm.passes.prune import Prune
from tvm_nm.patterns import parse_pattern
from tvm_nm.pipeline import PIPELINE, build_executable, lowering_passes, scheduling_passes
from tvm_nm.plan import uniform_plan
from tvm_nm.relax_numpy import NumpyModule
from tvm_nm.schedules.apply import ApplyDefaultSchedules, pass_context
from tvm_nm.schedules.machine import host_target

pytestmark = pytest.mark.filterwarnings("ignore:Field 'shape' of 'type'")  # the small model leaves its output open

TARGET = host_target(1)
SHAPE = (1, 3, 12, 12)
op = relax.op


def network(b: Builder, x: Any) -> Any:
    x = b.relu(b.bias(b.conv(x, 16)))
    x = b.relu(b.add(b.bias(b.conv(x, 16)), x))
    x = b(op.nn.max_pool2d(x, (2, 2), (2, 2)))
    return b.bias(b.fc(b(op.reshape(x, (1, 16 * 36))), 10))


def pruned() -> tvm.IRModule:
    mod = module(network, SHAPE)
    return Prune(uniform_plan(inventory(mod), parse_pattern("1x4"), 0.5))(mod)


DATA = np.random.default_rng(0).integers(-3, 4, SHAPE).astype(np.float32)


def run(executable: Any) -> np.ndarray:
    return np.array(relax.VirtualMachine(executable, tvm.cpu())["main"](tvm.runtime.tensor(DATA)).numpy())


def expected() -> np.ndarray:
    return NumpyModule(pruned())(DATA)[0]


@pytest.mark.parametrize("in_context", [True, False])
def test_the_pipeline_by_name(in_context: bool) -> None:
    mod = pruned()
    if in_context:
        with pass_context():
            executable = tvm.compile(mod, TARGET, relax_pipeline=PIPELINE)
    else:
        executable = tvm.compile(mod, TARGET, relax_pipeline=PIPELINE)
    np.testing.assert_array_equal(run(executable), expected())
    tvm.ir.assert_structural_equal(mod, pruned())


def test_the_name_is_known_after_an_import() -> None:
    program = "import tvm_nm.pipeline, tvm; print(tvm.relax.get_pipeline('tvm_nm', target=None))"
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)


def test_the_pipeline_takes_the_current_target() -> None:
    with TARGET:
        lowered = relax.get_pipeline(PIPELINE)(pruned())
    np.testing.assert_array_equal(
        run(tvm.compile(lowered, TARGET, relax_pipeline=tvm.transform.Sequential([]))), expected()
    )


def test_the_pipeline_needs_a_target() -> None:
    with pytest.raises(Exception, match="Target context required"):
        relax.get_pipeline(PIPELINE)(pruned())


def test_build_executable() -> None:
    mod = pruned()
    built = build_executable(mod, TARGET, always_sparse=True)
    np.testing.assert_array_equal(run(built.executable), expected())
    assert [report.name for report in built.layers] == ["conv_0", "conv_1", "fc_2"]
    assert [report.pattern for report in built.layers] == ["dense", "1x4", "dense"]
    assert built.layers[1].epilogue == "bias+add+relu"
    tvm.ir.assert_structural_equal(mod, pruned())


def test_two_threads_compute_the_same() -> None:
    np.testing.assert_array_equal(run(build_executable(pruned(), host_target(2)).executable), expected())


@pytest.mark.skipif(shutil.which("g++") is None, reason="export_library needs g++")
def test_a_built_module_can_be_exported(tmp_path: Any) -> None:
    built = build_executable(pruned(), TARGET)
    built.executable.export_library(str(tmp_path / "m.so"))
    np.testing.assert_array_equal(run(tvm.runtime.load_module(str(tmp_path / "m.so"))), expected())


def scheduled() -> tvm.IRModule:
    with TARGET:
        lowered = tvm.transform.Sequential(lowering_passes(TARGET, always_sparse=True))(pruned())
        return ApplyDefaultSchedules(TARGET)(lowered)


def test_every_function_is_scheduled_and_parallel() -> None:
    """No operator is left as an unscheduled loop nest."""
    mod = scheduled()
    assert sum(isinstance(func, tvm.tirx.PrimFunc) for func in mod.functions.values()) >= 4
    assert_all_scheduled(mod)


def test_scheduling_twice_is_scheduling_once() -> None:
    mod = scheduled()
    tvm.ir.assert_structural_equal(ApplyDefaultSchedules(TARGET)(mod), mod)


def test_only_calls_of_kernels_are_left() -> None:
    for block in scheduled()["main"].body.blocks:
        for binding in block.bindings:
            if isinstance(binding.value, relax.Call):
                assert binding.value.op.name in ("relax.call_tir", "relax.reshape", "relax.memory.view")


# In somebody else's pipeline.


@tvm.transform.module_pass(opt_level=0, name="Probe")
class Probe:
    """A pass of somebody else: counts operators and changes nothing."""

    def __init__(self) -> None:
        self.seen: list[Counter[str]] = []

    def transform_module(self, mod: tvm.IRModule, _context: Any) -> tvm.IRModule:
        counts: Counter[str] = Counter()
        for func in mod.functions.values():
            if isinstance(func, relax.Function):
                relax.analysis.post_order_visit(
                    func,
                    lambda e: counts.update([e.op.name]) if isinstance(getattr(e, "op", None), tvm.ir.Op) else None,
                )
        self.seen.append(counts)
        return mod


@tvm.transform.module_pass(opt_level=0, name="NoRelu")
class NoRelu:
    """A pass of somebody else: writes every relu as a maximum."""

    def transform_module(self, mod: tvm.IRModule, _context: Any) -> tvm.IRModule:
        @relax.expr_functor.mutator
        class Rewrite(relax.PyExprMutator):  # type: ignore[misc]
            def visit_call_(self, call: Any) -> Any:
                call = self.visit_expr_post_order(call)
                if isinstance(call.op, tvm.ir.Op) and call.op.name == "relax.nn.relu":
                    return op.maximum(call.args[0], relax.const(np.float32(0)))
                return call

        rewrite = Rewrite(mod)
        for name, func in mod.functions_items():
            if isinstance(func, relax.Function):
                rewrite.builder_.update_func(name, rewrite.visit_expr(func))
        return rewrite.builder_.get()


def imported() -> tvm.IRModule:
    return from_onnx(small_cnn(), shape_dict={"input": [1, 3, 16, 16]})


def finish(mod: tvm.IRModule) -> tvm.IRModule:
    passes = [
        relax.transform.LegalizeOps(),
        *cpu_generic.dataflow_lower_passes(TARGET),
        *cpu_generic.finalize_passes(TARGET),
    ]
    with TARGET:
        return tvm.transform.Sequential(passes)(mod)


def run_small(mod: tvm.IRModule) -> np.ndarray:
    """Build what is left with TVM's own passes, and run it."""
    executable = tvm.compile(finish(mod), TARGET, relax_pipeline=tvm.transform.Sequential([]))
    data = np.random.default_rng(0).standard_normal((1, 3, 16, 16)).astype(np.float32)
    return np.array(relax.VirtualMachine(executable, tvm.cpu())["main"](tvm.runtime.tensor(data)).numpy())


@pytest.fixture(scope="module")
def reference() -> np.ndarray:
    return run_small(imported())


def test_canonicalize_among_others(reference: np.ndarray) -> None:
    before = imported()
    probe = Probe()
    after = tvm.transform.Sequential([probe, Canonicalize(), probe, relax.transform.DeadCodeElimination()])(before)
    assert sum("batch_norm" in name for name in probe.seen[0]) == 1
    assert not any("batch_norm" in name for name in probe.seen[1])
    tvm.ir.assert_structural_equal(before, imported())
    np.testing.assert_allclose(run_small(after), reference, atol=1e-5)


def test_prune_among_others() -> None:
    before = Canonicalize()(imported())
    plan = uniform_plan(inventory(before), parse_pattern("2:4"))
    probe = Probe()
    after = tvm.transform.Sequential([relax.transform.Normalize(), Prune(plan), probe, NoRelu()])(before)
    assert probe.seen[0]["relax.nn.relu"] > 0
    tvm.ir.assert_structural_equal(before, Canonicalize()(imported()))
    alone = Prune(plan)(before)
    np.testing.assert_allclose(run_small(after), run_small(alone), atol=1e-5)


def test_lower_among_others(reference: np.ndarray) -> None:
    before = Canonicalize()(imported())
    probe = Probe()
    # Behind NoRelu the activations are not the canonical ones: they stay outside of the kernels.
    after = tvm.transform.Sequential([NoRelu(), Lower(TARGET), probe])(before)
    assert probe.seen[0]["relax.call_tir"] == 4
    assert probe.seen[0]["relax.maximum"] > 0
    assert all("relu" not in report.epilogue for report in layer_reports(after))
    tvm.ir.assert_structural_equal(before, Canonicalize()(imported()))
    np.testing.assert_allclose(run_small(after), reference, atol=1e-5)


def test_schedules_among_others(reference: np.ndarray) -> None:
    """On a module that never saw this project's other passes: plain TVM operators and somebody's fusion."""
    fused = [
        relax.transform.DecomposeOpsForInference(),
        relax.transform.LegalizeOps(),
        relax.transform.AnnotateTIROpPattern(),
        relax.transform.FuseOps(),
        relax.transform.FuseTIR(),
    ]
    before = tvm.transform.Sequential(fused)(imported())
    probe = Probe()
    after = tvm.transform.Sequential([probe, ApplyDefaultSchedules(TARGET), probe])(before)
    assert probe.seen[0] == probe.seen[1]
    functions = [f for f in after.functions.values() if isinstance(f, tvm.tirx.PrimFunc)]
    assert functions
    assert all(f.attrs["tirx.is_scheduled"] for f in functions)
    tvm.ir.assert_structural_equal(before, tvm.transform.Sequential(fused)(imported()))
    np.testing.assert_allclose(run_small(after), reference, atol=1e-5)


def test_the_lists_of_passes_can_be_extended() -> None:
    probe = Probe()
    with TARGET, pass_context():
        passes = [*lowering_passes(TARGET), probe, *scheduling_passes(TARGET)]
        mod = tvm.transform.Sequential(passes)(pruned())
        executable = tvm.compile(mod, TARGET, relax_pipeline=tvm.transform.Sequential([]))
    assert probe.seen[0]["relax.call_tir"] == 4
    np.testing.assert_array_equal(run(executable), expected())

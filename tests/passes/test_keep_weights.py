"""Networks whose Winograd weights are expanded once: smaller libraries that compute the same, wherever they run."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tvm
from models import Net
from tvm import relax

from tvm_nm import linker
from tvm_nm.frontend import import_onnx
from tvm_nm.passes.keep_weights import KeepExpandedWeights
from tvm_nm.pipeline import build_executable, lowering_passes, scheduling_passes
from tvm_nm.reference_run import compare, random_inputs, run_onnx
from tvm_nm.runtime import use_threads
from tvm_nm.schedules.apply import pass_context
from tvm_nm.schedules.kept_weights import EXPANDS, ROOM
from tvm_nm.schedules.machine import host_target

# The pool must allow 2 threads whatever the machine has.
os.environ["TVM_NUM_THREADS"] = str(max(2, int(os.environ.get("TVM_NUM_THREADS", "2"))))

CHANNELS = 64
SHAPE = (1, CHANNELS, 28, 28)


def network(layers: int = 3, seed: int = 0) -> onnx.ModelProto:
    """Equal 3x3 layers: they share the function of one kernel."""
    net = Net(SHAPE, seed=seed)
    x = "input"
    for _ in range(layers):
        x = net.add("Relu", net.conv(x, (CHANNELS, CHANNELS, 3, 3), pads=[1] * 4))
    return net.model(x)


def until_rewritten(module: tvm.IRModule) -> tvm.IRModule:
    """Return the module as `KeepExpandedWeights` finds it."""
    target = host_target(1)
    passes = scheduling_passes(target)
    before = [p.info.name for p in passes].index("tvm_nm.KeepExpandedWeights")
    with target, pass_context():
        return tvm.transform.Sequential([*lowering_passes(target), *passes[:before]])(module)


def expansions(mod: tvm.IRModule) -> int:
    return sum(bool((f.attrs or {}).get(EXPANDS, False)) for f in mod.functions.values())


def rooms(mod: tvm.IRModule) -> list[int]:
    """Where the kernels' weights are, in the order of their calls."""
    found = []
    for block in mod["main"].body.blocks:
        for value in (binding.value for binding in block.bindings):
            if isinstance(value, relax.Call) and isinstance(value.op, tvm.ir.GlobalVar):
                names = [param.name for param in mod[value.op].params]
                if ROOM in names:
                    found.append(int(value.args[names.index(ROOM)]))
    return found


def outputs(module: Any, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    result = relax.VirtualMachine(module, tvm.cpu())["main"](*(tvm.runtime.tensor(a) for a in inputs.values()))
    return [np.array(t.numpy()) for t in ([result] if isinstance(result, tvm.runtime.Tensor) else result)]


def test_no_expansion_is_left_and_each_layer_has_a_room() -> None:
    before = until_rewritten(import_onnx(network()).module)
    assert expansions(before) == 1
    after = KeepExpandedWeights()(before)
    relax.analysis.well_formed(after)
    assert expansions(after) == 0
    assert len(rooms(after)) == len(set(rooms(after))) == 3
    assert len([name for name in after.functions if name.name_hint.startswith("tvm_nm_conv")]) == 1


@pytest.mark.parametrize("threads", [1, 2])
def test_it_computes_the_same(threads: int) -> None:
    model = network()
    imported = import_onnx(model)
    built = build_executable(imported.module, host_target(threads))
    assert all(layer.kernel.startswith("winograd") for layer in built.layers)
    assert all(layer.packed_bytes == 4 * CHANNELS * CHANNELS * 9 for layer in built.layers)
    use_threads(threads)
    for seed in range(2):
        inputs = random_inputs(imported.inputs, seed)
        found = compare(outputs(built.executable, inputs), run_onnx(model, inputs))
        assert found.max_rel < 1e-5, found.describe()


def test_a_library_is_as_small_as_its_weights_and_loads_with_plain_tvm(tmp_path: Path) -> None:
    model = network()
    imported = import_onnx(model)
    executable = build_executable(imported.module, host_target(1)).executable
    linker.export_library(executable, tmp_path / "model.so", host_target(1))
    assert (tmp_path / "model.so").stat().st_size < 4 * 3 * CHANNELS * CHANNELS * 9 + 150_000
    inputs = random_inputs(imported.inputs, 0)
    want = run_onnx(model, inputs)
    for _ in range(2):  # at the second time the library is still there, filled
        module = tvm.runtime.load_module(str(tmp_path / "model.so"))
        assert compare(outputs(module, inputs), want).max_rel < 1e-5


@pytest.mark.skipif(not shutil.which("gcc"), reason="needs gcc")
@pytest.mark.parametrize("compiler", [False, True], ids=["own linker", "gcc"])
def test_libraries_that_are_loaded_together_keep_apart(compiler: bool, tmp_path: Path) -> None:
    modules, wants = [], []
    for seed in range(2):
        model, path = network(seed=seed), tmp_path / f"{seed}.so"
        imported = import_onnx(model)
        executable = build_executable(imported.module, host_target(1)).executable
        if compiler:
            linker._link_with_compiler(executable, path, host_target(1))
        else:
            linker.export_library(executable, path, host_target(1))
        modules.append(tvm.runtime.load_module(str(path)))
        inputs = random_inputs(imported.inputs, 0)
        wants.append(run_onnx(model, inputs))
    for _ in range(2):
        for module, want in zip(modules, wants, strict=True):
            assert compare(outputs(module, inputs), want).max_rel < 1e-5


def test_expanded_weights_with_other_uses_are_expanded_in_each_call(caplog: pytest.LogCaptureFixture) -> None:
    before = until_rewritten(import_onnx(network(1)).module)
    main = before["main"]
    (block,) = main.body.blocks
    weights = next(
        binding.value.args[1]
        for binding in block.bindings
        if isinstance(binding.value, relax.Call)
        and isinstance(binding.value.op, tvm.ir.GlobalVar)
        and (before[binding.value.op].attrs or {}).get(EXPANDS, False)
    )
    builder = relax.BlockBuilder()
    returned = builder.normalize(relax.SeqExpr([block], relax.Tuple([main.body.body, weights])))
    before.update_func(
        before.get_global_var("main"), relax.Function(main.params, returned, None, main.is_pure, main.attrs)
    )
    after = KeepExpandedWeights()(before)
    assert expansions(after) == 1
    assert not rooms(after)
    assert "other uses" in caplog.text


def test_a_module_without_expansions_stays_as_it_is() -> None:
    net = Net((1, 8, 6, 6))
    before = until_rewritten(import_onnx(net.model(net.conv("input", (8, 8, 1, 1)))).module)
    assert KeepExpandedWeights()(before).same_as(before)

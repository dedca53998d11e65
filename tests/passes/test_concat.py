from __future__ import annotations

import os
from collections import Counter
from typing import Any

import numpy as np
import onnx
import pytest
import tvm
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import Net, light_model
from tvm import relax

from tvm_nm.frontend import import_onnx
from tvm_nm.passes.concat import CONCAT_ATTR, ConcatInPlace, MarkConcats
from tvm_nm.pipeline import build_executable, lowering_passes, scheduling_passes
from tvm_nm.reference_run import compare, random_inputs, run_onnx
from tvm_nm.runtime import use_threads
from tvm_nm.schedules.apply import pass_context
from tvm_nm.schedules.machine import host_target

# The pool must allow 2 threads whatever the machine has.
os.environ["TVM_NUM_THREADS"] = str(max(2, int(os.environ.get("TVM_NUM_THREADS", "2"))))


def fire(net: Net, x: str, inputs: int, squeezed: int, expanded: int) -> str:
    x = net.add("Relu", net.conv(x, (squeezed, inputs, 1, 1)))
    left = net.add("Relu", net.conv(x, (expanded, squeezed, 1, 1)))
    right = net.add("Relu", net.conv(x, (expanded, squeezed, 3, 3), pads=[1, 1, 1, 1]))
    return net.add("Concat", left, right, axis=1)


def squeezed(channels: int = 16) -> onnx.ModelProto:
    net = Net((1, 16, 28, 28))
    x = fire(net, "input", 16, 16, channels)
    x = net.add("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2])
    x = fire(net, x, 2 * channels, 16, channels)
    return net.model(net.add("GlobalAveragePool", net.conv(x, (8, 2 * channels, 1, 1))))


def dense_block(*, flat: bool, pool: bool = True) -> onnx.ModelProto:
    """A DenseNet block, its concats of everything so far (`flat`) or each of the one before and the new."""
    net = Net((1, 16, 12, 12))
    everything = [net.conv("input", (16, 16, 1, 1))]
    joined, channels = everything[0], 16
    for _ in range(3):
        new = net.conv(net.add("Relu", joined), (16, channels, 3, 3), pads=[1, 1, 1, 1])
        everything.append(new)
        joined = net.add("Concat", *(everything if flat else (joined, new)), axis=1)
        channels += 16
    return net.model(net.add("GlobalAveragePool", joined) if pool else joined)


def explicit(model: onnx.ModelProto, threads: int = 1) -> tvm.IRModule:
    """The module when memory is explicit, before it is planned."""
    target = host_target(threads)
    passes = scheduling_passes(target)
    names = [p.info.name for p in passes]
    with target, pass_context():
        lowered = tvm.transform.Sequential(lowering_passes(target))(import_onnx(model).module)
        return tvm.transform.Sequential(passes[: names.index("tvm_nm.ConcatInPlace") + 1])(lowered)


def calls(mod: tvm.IRModule) -> Counter[str]:
    """How often each operator and kernel is called, kernels without the number behind their name."""
    found: Counter[str] = Counter()
    for block in mod["main"].body.blocks:
        for binding in block.bindings:
            if isinstance(binding.value, relax.Call):
                op = binding.value.op
                name = op.name if isinstance(op, tvm.ir.Op) else op.name_hint.rstrip("0123456789")
                found[name] += 1
    return found


def check(model: onnx.ModelProto, threads: int = 1) -> None:
    imported = import_onnx(model)
    executable = build_executable(imported.module, host_target(threads)).executable
    machine = relax.VirtualMachine(executable, tvm.cpu())
    use_threads(threads)
    for seed in range(2):  # the second run finds the first one's values in memory
        inputs = random_inputs(imported.inputs, seed)
        result = machine["main"](*(tvm.runtime.tensor(array) for array in inputs.values()))
        got = [result] if isinstance(result, tvm.runtime.Tensor) else list(result)
        found = compare([tensor.numpy() for tensor in got], run_onnx(model, inputs))
        assert found.max_rel < 1e-5, found.describe()


def test_fire_modules_need_no_copy() -> None:
    found = calls(explicit(squeezed()))
    assert found["tvm_nm_concat"] == found["tvm_nm_concat_rest"] == 0
    assert found["relax.memory.view"] == 4
    assert found["relax.reshape"] == 0
    assert found["tvm_nm_conv"] == 7
    check(squeezed())


@pytest.mark.parametrize("flat", [True, False])
def test_a_dense_block_is_computed_in_one_buffer(flat: bool) -> None:
    mod = explicit(dense_block(flat=flat))
    found = calls(mod)
    assert found["tvm_nm_concat"] == found["tvm_nm_concat_rest"] == 0
    views = [b.value for block in mod["main"].body.blocks for b in block.bindings if _is_view(b.value)]
    assert len(views) == 6  # four convolutions and two concats
    assert len({view.args[0] for view in views}) == 1
    check(dense_block(flat=flat))


def _is_view(value: Any) -> bool:
    return isinstance(value, relax.Call) and value.op == tvm.ir.Op.get("relax.memory.view")


@pytest.mark.parametrize("flat", [True, False])
def test_what_the_network_returns_is_a_tensor_of_its_own(flat: bool) -> None:
    model = dense_block(flat=flat, pool=False)
    names = [node.output[0] for node in model.graph.node if node.op_type in ("Concat", "Conv")]
    del model.graph.output[:]
    model.graph.output.extend(onnx.helper.make_tensor_value_info(name, 1, None) for name in names)
    assert calls(explicit(model))["relax.memory.view"] == 0
    check(model)


def test_only_slices_at_whole_cache_lines_are_written_in_place() -> None:
    model = squeezed(channels=9)  # 13 x 13 pixels of 9 channels: 6084 bytes; 28 x 28: 28224
    found = calls(explicit(model))
    assert found["tvm_nm_concat_rest"] == 1
    assert found["relax.memory.view"] == 3
    check(model)


def test_inputs_constants_and_repeated_tensors_are_copied() -> None:
    net = Net((1, 16, 8, 8))
    x = net.add("Relu", net.conv("input", (16, 16, 1, 1)))
    x = net.add("Concat", "input", x, x, net.weight(1, 16, 8, 8), axis=1)
    model = net.model(net.conv(x, (8, 64, 1, 1)))
    found = calls(explicit(model))
    assert (found["tvm_nm_concat_rest"], found["relax.memory.view"]) == (1, 1)
    check(model)


def test_a_tensor_of_two_concats_is_in_one_of_them() -> None:
    net = Net((1, 16, 8, 8))
    a, b, c = (net.add("Relu", net.conv("input", (16, 16, 1, 1))) for _ in range(3))
    left, right = net.add("Concat", a, b, axis=1), net.add("Concat", c, b, axis=1)
    model = net.model(net.add("GlobalAveragePool", net.add("Add", left, right)))
    found = calls(explicit(model))
    assert (found["tvm_nm_concat_rest"], found["relax.memory.view"]) == (1, 3)
    check(model)


@pytest.mark.parametrize(("shape", "axis"), [((2, 16, 8, 8), 1), ((1, 16, 8, 8), 2), ((1, 16, 8, 8), -1)])
def test_inputs_that_are_no_slices_are_left_alone(shape: tuple[int, ...], axis: int) -> None:
    net = Net(shape)
    a, b = (net.conv("input", (16, 16, 1, 1)) for _ in range(2))
    model = net.model(net.add("Concat", a, b, axis=axis))
    assert not any(
        CONCAT_ATTR in (f.attrs or ()) for _, f in MarkConcats()(import_onnx(model).module).functions_items()
    )
    check(model)


def test_prefixes_along_another_axis_are_no_prefixes() -> None:
    net = Net((1, 1, 8, 16))
    a, b, c = (net.add("Relu", net.conv("input", (1, 1, 3, 3), pads=[1, 1, 1, 1])) for _ in range(3))
    x, y = net.add("Concat", a, b, axis=1), net.add("Concat", a, b, c, axis=2)
    check(net.model(net.add("GlobalAveragePool", x), net.add("GlobalAveragePool", y)))


def test_modules_without_concats_stay_as_they_are() -> None:
    net = Net((1, 4, 8, 8))
    mod = import_onnx(net.model(net.conv("input", (4, 4, 1, 1)))).module
    tvm.ir.assert_structural_equal(MarkConcats()(mod), mod)
    tvm.ir.assert_structural_equal(ConcatInPlace()(mod), mod)


@st.composite
def graphs(draw: st.DrawFn) -> onnx.ModelProto:
    """Branches, joins and nested concats; some of the tensors on the way are outputs."""
    size = draw(st.sampled_from([(8, 8), (7, 7), (5, 16)]))
    net = Net((draw(st.sampled_from([1, 1, 1, 2])), 16, *size), seed=draw(st.integers(0, 99)))
    tensors = [("input", 16)]
    for _ in range(draw(st.integers(3, 9))):
        x, channels = draw(st.sampled_from(tensors[-4:]))
        kind = draw(st.sampled_from(["concat", "concat", "conv1", "conv3", "relu", "pool", "add"]))
        if kind == "concat":
            parts = draw(st.lists(st.sampled_from(tensors), min_size=2, max_size=4))
            if sum(count for _, count in parts) > 200:
                continue
            x, channels = net.add("Concat", *(name for name, _ in parts), axis=1), sum(count for _, count in parts)
        elif kind in ("conv1", "conv3"):
            kernel = int(kind[-1])
            outputs = draw(st.sampled_from([3, 16, 32]))
            x = net.conv(x, (outputs, channels, kernel, kernel), pads=[kernel // 2] * 4)
            channels = outputs
        elif kind == "relu":
            x = net.add("Relu", x)
        elif kind == "pool":
            x = net.add("MaxPool", x, kernel_shape=[3, 3], pads=[1, 1, 1, 1])
        else:
            others = [name for name, count in tensors if count == channels and name != x]
            if not others:
                continue
            x = net.add("Add", x, draw(st.sampled_from(others)))
        tensors.append((x, channels))
    computed = [name for name, _ in tensors[1:]] or [net.add("Relu", "input")]
    outputs = draw(st.lists(st.sampled_from(computed), max_size=2, unique=True))
    last = net.add("GlobalAveragePool", computed[-1])
    return net.model(*dict.fromkeys([*outputs, last]))


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(model=graphs(), threads=st.sampled_from([1, 2]))
def test_random_graphs_compute_what_onnxruntime_does(model: onnx.ModelProto, threads: int) -> None:
    check(model, threads)


@pytest.mark.slow
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(model=graphs(), threads=st.sampled_from([1, 2]))
def test_many_random_graphs_compute_what_onnxruntime_does(model: onnx.ModelProto, threads: int) -> None:
    check(model, threads)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "copies"), [("squeezenet", 0), ("densenet121", 0), ("inception_v1", 0)])
def test_known_networks_need_no_copies(name: str, copies: int) -> None:
    model = light_model(name)
    found = calls(explicit(model))
    assert found["tvm_nm_concat"] + found["tvm_nm_concat_rest"] == copies
    assert found["relax.memory.view"] > 0
    check(model, 2)


def test_the_result_does_not_depend_on_earlier_memory() -> None:
    """The pooled allocator hands out used memory: nothing may read a slice before it is written."""
    model = squeezed()
    imported = import_onnx(model)
    machine = relax.VirtualMachine(build_executable(imported.module, host_target(1)).executable, tvm.cpu())
    use_threads(1)
    first = tvm.runtime.tensor(random_inputs(imported.inputs, 0)["input"])
    other = tvm.runtime.tensor(np.full((1, 16, 28, 28), np.nan, np.float32))
    want = machine["main"](first).numpy()
    machine["main"](other)
    np.testing.assert_array_equal(machine["main"](first).numpy(), want)

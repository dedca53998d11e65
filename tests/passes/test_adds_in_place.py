"""Residual adds in place: where the memory may be shared, and that it is where it may."""

from __future__ import annotations

import os

import numpy as np
import onnx
import pytest
import tvm
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import Net
from tvm import relax

from tvm_nm.frontend import import_onnx
from tvm_nm.pipeline import build_executable, lowering_passes, scheduling_passes
from tvm_nm.reference_run import compare, random_inputs, run_onnx
from tvm_nm.runtime import use_threads
from tvm_nm.schedules.apply import pass_context
from tvm_nm.schedules.in_place import RESIDUAL
from tvm_nm.schedules.machine import host_target

# The pool must allow 2 threads whatever the machine has.
os.environ["TVM_NUM_THREADS"] = str(max(2, int(os.environ.get("TVM_NUM_THREADS", "2"))))

SHAPE = (1, 16, 7, 7)


def merged(model: onnx.ModelProto) -> int:
    """Count the calls whose residual and output are the same memory once memory is explicit."""
    target = host_target(1)
    passes = scheduling_passes(target)
    names = [p.info.name for p in passes]
    with target, pass_context():
        lowered = tvm.transform.Sequential(lowering_passes(target))(import_onnx(model).module)
        mod = tvm.transform.Sequential(passes[: names.index("tvm_nm.AddInPlace") + 1])(lowered)
    values = {b.var: b.value for block in mod["main"].body.blocks for b in block.bindings}

    def memory(expr: relax.Expr) -> relax.Expr:
        while isinstance(values.get(expr), relax.Var):
            expr = values[expr]
        return expr

    count = 0
    for value in values.values():
        if isinstance(value, relax.Call) and isinstance(value.op, tvm.ir.GlobalVar):
            params = [param.name for param in mod[value.op].params]
            if RESIDUAL in params:
                count += memory(value.args[params.index(RESIDUAL)]).same_as(memory(value.args[-1]))
    return count


def check(model: onnx.ModelProto, threads: int = 1) -> None:
    imported = import_onnx(model)
    executable = build_executable(imported.module, host_target(threads)).executable
    machine = relax.VirtualMachine(executable, tvm.cpu())
    use_threads(threads)
    for seed in range(2):  # the second run finds the first one's values in memory
        inputs = random_inputs(imported.inputs, seed)
        result = machine["main"](*(tvm.runtime.tensor(array) for array in inputs.values()))
        got = [result] if isinstance(result, tvm.runtime.Tensor) else list(result)
        found = compare([np.array(tensor.numpy()) for tensor in got], run_onnx(model, inputs))
        assert found.max_rel < 1e-5, found.describe()


def block(net: Net, x: str, kernel: int = 1, channels: int = 16) -> str:
    """A residual block: two convolutions, the second one's output added to the input."""
    hidden = net.add("Relu", net.conv(x, (24, channels, 1, 1)))
    out = net.conv(hidden, (channels, 24, kernel, kernel), pads=[kernel // 2] * 4)
    return net.add("Relu", net.add("Add", out, x))


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("threads", [1, 2])
def test_blocks_that_follow_each_other_share_one_tensor(kernel: int, threads: int) -> None:
    net = Net(SHAPE)
    x = net.conv("input", (16, 16, 1, 1))
    for _ in range(3):
        x = block(net, x, kernel)
    model = net.model(net.conv(x, (8, 16, 1, 1)))
    assert merged(model) == 3
    check(model, threads)


def test_the_network_s_input_is_not_written_to() -> None:
    net = Net(SHAPE)
    x = block(net, "input")
    model = net.model(net.conv(x, (8, 16, 1, 1)))
    assert merged(model) == 0
    check(model)


def test_a_residual_that_is_used_later_stays() -> None:
    net = Net(SHAPE)
    x = net.conv("input", (16, 16, 1, 1))
    y = block(net, x)
    model = net.model(net.add("Concat", net.conv(y, (8, 16, 1, 1)), net.conv(x, (9, 16, 1, 1)), axis=1))
    assert merged(model) == 0
    check(model)


def test_a_residual_that_is_returned_stays() -> None:
    net = Net(SHAPE)
    x = net.conv("input", (16, 16, 1, 1))
    y = block(net, x)
    model = net.model(y)
    model.graph.output.append(onnx.helper.make_tensor_value_info(x, 1, None))
    assert merged(model) == 0
    check(model)


def test_a_layer_that_adds_its_own_input() -> None:
    net = Net(SHAPE)
    x = net.conv("input", (16, 16, 1, 1))
    y = net.add("Add", net.conv(x, (16, 16, 3, 3), pads=[1] * 4), x)
    model = net.model(net.conv(y, (8, 16, 1, 1)))
    assert merged(model) == 0
    check(model)


def test_a_slice_of_a_concat_stays() -> None:
    net = Net((1, 16, 8, 8))
    x = net.conv("input", (16, 16, 1, 1))
    joined = net.add("Concat", x, net.conv("input", (16, 16, 1, 1)), axis=1)
    first = net.conv(joined, (8, 32, 1, 1))
    y = net.add("Add", net.conv(first, (16, 8, 1, 1)), x)
    model = net.model(net.add("Concat", net.conv(y, (7, 16, 1, 1)), net.conv(joined, (9, 32, 1, 1)), axis=1))
    assert merged(model) == 0
    check(model)


@st.composite
def networks(draw: st.DrawFn) -> onnx.ModelProto:
    """Convolutions, adds and concats between any earlier tensors, some of which are returned."""
    size = draw(st.sampled_from([7, 8]))
    net = Net((1, 16, size, size), seed=draw(st.integers(0, 1000)))
    tensors = ["input", net.conv("input", (16, 16, 1, 1))]
    for _ in range(draw(st.integers(2, 5))):
        pick = st.sampled_from(tensors)
        kernel = draw(st.sampled_from([1, 1, 3]))
        if draw(st.integers(0, 3)) == 0:
            data, channels = net.add("Concat", draw(pick), draw(pick), axis=1), 32
        else:
            data, channels = draw(pick), 16
        out = net.conv(data, (16, channels, kernel, kernel), pads=[kernel // 2] * 4)
        if draw(st.integers(0, 3)):
            out = net.add("Add", out, draw(pick))
        tensors.append(net.add("Relu", out) if draw(st.booleans()) else out)
    model = net.model(net.conv(tensors[-1], (8, 16, 1, 1)))
    for name in draw(st.sets(st.sampled_from(tensors[1:]), max_size=1)):
        model.graph.output.append(onnx.helper.make_tensor_value_info(name, 1, None))
    return model


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(networks(), st.integers(1, 2))
def test_random_networks(model: onnx.ModelProto, threads: int) -> None:
    check(model, threads)


@pytest.mark.slow
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(networks(), st.integers(1, 2))
def test_many_random_networks(model: onnx.ModelProto, threads: int) -> None:
    check(model, threads)

from __future__ import annotations

import numpy as np
import pytest
import tvm
from models import Net
from test_concat import calls, check, explicit
from tvm import relax, te

from tvm_nm.frontend import import_onnx
from tvm_nm.passes.reshapes import AbsorbReshapes, with_argument_shapes
from tvm_nm.pipeline import lowering_passes
from tvm_nm.schedules.apply import ApplyDefaultSchedules
from tvm_nm.schedules.machine import host_target


def scaled() -> tvm.tirx.PrimFunc:
    data = te.placeholder((2, 24), name="data")
    return te.create_prim_func([data, te.compute((2, 24), lambda i, j: data[i, j] * (i + 1), name="out")])


@pytest.mark.parametrize("shapes", [((2, 24), (1, 48)), ((6, 8), (2, 24)), ((2, 3, 8), (48,)), ((2, 24), (2, 24))])
def test_a_function_computes_the_same_in_other_shapes(shapes: tuple[tuple[int, ...], ...]) -> None:
    function = with_argument_shapes(scaled(), shapes)
    assert [tuple(int(size) for size in buffer.shape) for buffer in function.params] == list(shapes)
    built = tvm.compile(tvm.IRModule({"main": function.with_attr("global_symbol", "main")}), host_target(1))
    data = np.arange(48, dtype=np.float32)
    out = tvm.runtime.empty(shapes[1], "float32")
    built["main"](tvm.runtime.tensor(data.reshape(shapes[0])), out)
    want = data.reshape(2, 24) * [[1], [2]]
    np.testing.assert_array_equal(out.numpy(), want.astype(np.float32).reshape(shapes[1]))


def test_functions_whose_shapes_stay_are_not_touched() -> None:
    function = scaled()
    assert with_argument_shapes(function, [(2, 24), (2, 24)]).same_as(function)


def absorbed(net: Net, *outputs: str) -> tvm.IRModule:
    target = host_target(1)
    passes = [*lowering_passes(target), ApplyDefaultSchedules(target), AbsorbReshapes()]
    with target:
        return tvm.transform.Sequential(passes)(import_onnx(net.model(*outputs)).module)


def test_pointwise_layers_between_others_need_no_reshape() -> None:
    net = Net((1, 16, 28, 28))
    x = net.add("Relu", net.conv("input", (16, 16, 3, 3), pads=[1, 1, 1, 1]))
    y = net.add("Relu", net.conv(x, (16, 16, 1, 1)))
    y = net.add("Relu", net.add("Add", net.conv(y, (16, 16, 1, 1)), x))
    x = net.conv(y, (16, 16, 3, 3), pads=[1, 1, 1, 1])
    model = net.model(x)
    assert calls(explicit(model))["relax.reshape"] == 0
    check(model)


def test_one_kernel_for_two_shapes_keeps_its_own() -> None:
    """Both convolutions are one kernel on a row of 144 pixels; a kernel has one declaration."""
    net = Net((1, 16, 12, 12))
    x = net.conv(net.add("Relu", net.conv("input", (16, 16, 1, 1))), (16, 16, 3, 3), pads=[1, 1, 1, 1])
    y = net.add("Reshape", x, net.constant(np.array([1, 16, 9, 16])))
    y = net.conv(net.add("Relu", net.conv(y, (16, 16, 1, 1))), (16, 16, 3, 3), pads=[1, 1, 1, 1])
    model = net.model(x, y)
    found = calls(explicit(model))
    assert found["relax.reshape"] > 0
    check(model)


def test_results_of_the_network_keep_their_shapes() -> None:
    net = Net((1, 16, 12, 12))
    x = net.add("Relu", net.conv("input", (16, 16, 1, 1)))
    y = net.add("Reshape", x, net.constant(np.array([1, -1])))
    check(net.model(x, y))
    check(net.model(y))


def test_the_names_of_kernels_stay() -> None:
    """A report names the kernel of each layer."""
    net = Net((1, 16, 12, 12))
    x = net.conv(net.add("Relu", net.conv("input", (16, 16, 1, 1))), (8, 16, 3, 3))
    names = {var.name_hint for var in absorbed(net, x).get_global_vars()}
    assert {"tvm_nm_conv", "tvm_nm_conv1"} <= names


def test_what_is_no_dataflow_is_left_alone() -> None:
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((4, 4), "float32"))
    with builder.function("main", [x]):
        builder.emit_func_output(builder.emit(relax.op.reshape(x, (16,))))
    mod = builder.get()
    tvm.ir.assert_structural_equal(AbsorbReshapes()(mod), mod)

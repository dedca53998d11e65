"""What the inventory reads off a canonical Relax module."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from tvm import relax

from tvm_nm.errors import UnsupportedModelError
from tvm_nm.inventory import LAYERS_ATTR, Layer, inventory, layer_calls, layer_weights

RNG = np.random.default_rng(0)
STEM = RNG.standard_normal((8, 3, 3, 5)).astype(np.float32)
GROUPED = RNG.standard_normal((12, 4, 3, 3)).astype(np.float32)
FC = RNG.standard_normal((12 * 3 * 5, 10)).astype(np.float32)


def network() -> tvm.IRModule:
    """Two convolutions, a matrix product with a constant and one without."""
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((2, 3, 16, 20), "float32"))
    with builder.function("main", [x]):
        with builder.dataflow():
            y = builder.emit(
                relax.op.nn.conv2d(x, relax.const(STEM), strides=(2, 1), padding=(1, 2, 0, 2), dilation=(1, 1))
            )
            y = builder.emit(relax.op.nn.relu(relax.op.add(y, relax.const(np.ones((1, 8, 1, 1), np.float32)))))
            y = builder.emit(relax.op.nn.conv2d(y, relax.const(GROUPED), strides=2, dilation=(1, 5), groups=2))
            y = builder.emit(relax.op.reshape(y, (2, 12 * 3 * 5)))
            y = builder.emit(relax.op.matmul(y, relax.const(FC)))
            y = builder.emit(relax.op.matmul(y, relax.op.permute_dims(y)))
            out = builder.emit_output(y)
        builder.emit_func_output(out)
    return builder.get()


def test_layers_in_order() -> None:
    assert inventory(network().with_attr(LAYERS_ATTR, ["stem", "grouped", "head"])) == (
        Layer(
            name="stem",
            kind="conv",
            weight_shape=(8, 3, 3, 5),
            groups=1,
            strides=(2, 1),
            padding=(1, 2, 0, 2),
            dilation=(1, 1),
            input_shape=(2, 3, 16, 20),
            output_shape=(2, 8, 8, 20),
            macs=2 * 8 * 8 * 20 * 3 * 3 * 5,
            index=0,
        ),
        Layer(
            name="grouped",
            kind="conv",
            weight_shape=(12, 4, 3, 3),
            groups=2,
            strides=(2, 2),
            padding=(0, 0, 0, 0),
            dilation=(1, 5),
            input_shape=(2, 8, 8, 20),
            output_shape=(2, 12, 3, 5),
            macs=2 * 12 * 3 * 5 * 4 * 3 * 3,
            index=1,
        ),
        Layer(
            name="head",
            kind="fc",
            weight_shape=(10, 180, 1, 1),
            groups=1,
            strides=(1, 1),
            padding=(0, 0, 0, 0),
            dilation=(1, 1),
            input_shape=(2, 180),
            output_shape=(2, 10),
            macs=2 * 10 * 180,
            index=2,
        ),
    )
    assert [layer.parameters for layer in inventory(network())] == [STEM.size, GROUPED.size, FC.size]


@pytest.mark.parametrize("kept", [None, ["a", "b"], ["a", "b", "c", "d"], ["a", "a", "b"]])
def test_names_that_do_not_fit_are_replaced(kept: list[str] | None) -> None:
    mod = network() if kept is None else network().with_attr(LAYERS_ATTR, kept)
    assert [layer.name for layer in inventory(mod)] == ["conv_0", "conv_1", "fc_2"]


def test_weights_are_copies_in_layer_form() -> None:
    mod = network()
    weights = layer_weights(mod)
    np.testing.assert_array_equal(weights["conv_0"], STEM)
    np.testing.assert_array_equal(weights["conv_1"], GROUPED)
    np.testing.assert_array_equal(weights["fc_2"][:, :, 0, 0], FC.T)
    for name, layer in zip(weights, inventory(mod), strict=True):
        assert weights[name].shape == layer.weight_shape
        weights[name][:] = 0
    np.testing.assert_array_equal(layer_weights(mod)["conv_0"], STEM)


def test_calls_convert_both_ways() -> None:
    for found in layer_calls(network()):
        assert found.call.args[1].value.numpy().tolist() == found.as_argument(found.weight).tolist()


def test_what_it_cannot_read_is_named() -> None:
    with pytest.raises(UnsupportedModelError, match="no function main"):
        inventory(tvm.IRModule())
    mod = relax.transform.ConvertLayout({"relax.nn.conv2d": ["NHWC", "OHWI"]})(network())
    folded = relax.transform.FoldConstant()(mod)
    with pytest.raises(UnsupportedModelError, match=r"conv_0.*layout NHWC/OHWI/NHWC"):
        inventory(folded)


def test_symbolic_shapes_are_refused() -> None:
    builder = relax.BlockBuilder()
    batch = tvm.tirx.Var("n", "int64")
    x = relax.Var("x", relax.TensorType((batch, 3, 16, 20), "float32"))
    with builder.function("main", [x]):
        with builder.dataflow():
            out = builder.emit_output(relax.op.nn.conv2d(x, relax.const(STEM)))
        builder.emit_func_output(out)
    with pytest.raises(UnsupportedModelError, match="'conv_0' has a shape that is not static"):
        inventory(builder.get())

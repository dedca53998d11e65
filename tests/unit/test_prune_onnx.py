"""The ONNX model with masked weights: same answers as masking by hand, valid, and otherwise unchanged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from tvm_nm.errors import PlanError, UnsupportedModelError
from tvm_nm.patterns import parse_pattern
from tvm_nm.prune_onnx import prune_onnx

RNG = np.random.default_rng(0)
CONV = RNG.standard_normal((8, 4, 3, 3)).astype(np.float32)
SQUARE = RNG.standard_normal((8, 8, 1, 1)).astype(np.float32)
FC = RNG.standard_normal((6, 8)).astype(np.float32)


def random_mask(*shape: int) -> np.ndarray:
    return RNG.random(shape) < 0.5


def model(
    nodes: list[onnx.NodeProto],
    tensors: dict[str, np.ndarray],
    data: tuple[int, ...] = (1, 4, 8, 8),
    ir_version: int = 10,
    rank: int | None = None,
) -> onnx.ModelProto:
    """A graph from x to y, which has the rank of x unless told."""
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, data)]
    if ir_version < 4:
        inputs += [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, value.shape) for name, value in tensors.items()
        ]
    graph = helper.make_graph(
        nodes,
        "test",
        inputs,
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, list("abcd")[: rank or len(data)])],
        [numpy_helper.from_array(value, name) for name, value in tensors.items()],
    )
    built = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=ir_version)
    onnx.checker.check_model(built)
    return built


def run(built: onnx.ModelProto, seed: int = 0) -> np.ndarray:
    onnx.checker.check_model(built, full_check=True)
    session = ort.InferenceSession(built.SerializeToString(), providers=["CPUExecutionProvider"])
    feed = session.get_inputs()[0]
    shape = [size if isinstance(size, int) else 1 for size in feed.shape]
    data = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return np.asarray(session.run(None, {feed.name: data})[0])


def weights(built: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in built.graph.initializer}


def test_conv_is_pruned_in_place_and_nothing_else_changes() -> None:
    bias = np.arange(8, dtype=np.float32)
    node = helper.make_node("Conv", ["x", "w", "b"], ["y"], name="c", pads=[1, 1, 1, 1])
    before = model([node], {"w": CONV, "b": bias})
    copy = before.SerializeToString(deterministic=True)
    mask = random_mask(*CONV.shape)
    after = prune_onnx(before, {"c": mask})
    assert before.SerializeToString(deterministic=True) == copy
    expected = model([node], {"w": np.where(mask, CONV, 0).astype(np.float32), "b": bias})
    assert after == expected
    assert not np.signbit(weights(after)["w"][~mask]).any()
    np.testing.assert_array_equal(run(after), run(expected))


def test_no_masks_change_nothing() -> None:
    before = model([helper.make_node("Conv", ["x", "w"], ["y"], name="c")], {"w": CONV})
    assert prune_onnx(before, {}) == before


@pytest.mark.parametrize("kind", ["MatMul", "Gemm", "Gemm transposed"])
def test_fully_connected_masks_are_turned_to_the_weight(kind: str) -> None:
    stored = FC if kind == "Gemm transposed" else np.ascontiguousarray(FC.T)
    attributes = {"transB": 1} if kind == "Gemm transposed" else {}
    node = helper.make_node(kind.split()[0], ["x", "w"], ["y"], name="fc", **attributes)
    mask = random_mask(6, 8, 1, 1)
    after = prune_onnx(model([node], {"w": stored}, (2, 8)), {"fc": mask})
    data = np.random.default_rng(0).standard_normal((2, 8)).astype(np.float32)
    np.testing.assert_allclose(run(after), data @ (FC * mask[:, :, 0, 0]).T, rtol=1e-5, atol=1e-6)


def test_one_dimensional_convolution() -> None:
    weight = RNG.standard_normal((8, 4, 3)).astype(np.float32)
    mask = random_mask(8, 4, 1, 3)
    before = model([helper.make_node("Conv", ["x", "w"], ["y"], name="c")], {"w": weight}, (1, 4, 9))
    after = prune_onnx(before, {"c": mask})
    np.testing.assert_array_equal(weights(after)["w"], weight * mask[:, :, 0])
    run(after)


def test_constant_nodes() -> None:
    constant = helper.make_node("Constant", [], ["w"], value=numpy_helper.from_array(CONV, "w"))
    before = model([constant, helper.make_node("Conv", ["x", "w"], ["y"], name="c")], {})
    mask = random_mask(*CONV.shape)
    after = prune_onnx(before, {"c": mask})
    assert [node.op_type for node in after.graph.node] == ["Constant", "Conv"]
    assert not after.graph.initializer
    np.testing.assert_array_equal(
        run(after), run(model([before.graph.node[1]], {"w": np.where(mask, CONV, 0).astype(np.float32)}))
    )


def chain(*names: str) -> list[onnx.NodeProto]:
    """1x1 convolutions in a row that share the weight w."""
    values = ["x", *(f"v{index}" for index in range(len(names) - 1)), "y"]
    return [
        helper.make_node("Conv", [values[index], "w"], [values[index + 1]], name=name)
        for index, name in enumerate(names)
    ]


@pytest.mark.parametrize("ir_version", [3, 10])
def test_shared_weight_gets_a_copy_a_mask(ir_version: int) -> None:
    before = model(chain("a", "b", "c"), {"w": SQUARE}, (1, 8, 4, 4), ir_version)
    first, second = random_mask(*SQUARE.shape), random_mask(*SQUARE.shape)
    after = prune_onnx(before, {"a": first, "b": second, "c": first.copy()})
    names = [node.input[1] for node in after.graph.node]
    assert names[0] == names[2] != names[1]
    assert set(weights(after)) == set(names)  # the original is gone
    np.testing.assert_array_equal(weights(after)[names[0]], SQUARE * first)
    np.testing.assert_array_equal(weights(after)[names[1]], SQUARE * second)
    by_hand = model(chain("a", "b", "c"), {"w": SQUARE * first, "v": SQUARE * second}, (1, 8, 4, 4))
    by_hand.graph.node[1].input[1] = "v"
    np.testing.assert_array_equal(run(after), run(by_hand))


def test_shared_weight_and_mask_stay_shared() -> None:
    mask = random_mask(*SQUARE.shape)
    after = prune_onnx(model(chain("a", "b"), {"w": SQUARE}, (1, 8, 4, 4)), {"a": mask, "b": mask})
    assert list(weights(after)) == ["w"]
    np.testing.assert_array_equal(weights(after)["w"], SQUARE * mask)


def test_readers_without_a_mask_keep_the_original() -> None:
    taken = {"w": SQUARE, "w_pruned": np.ones((1,), np.float32)}
    nodes = [*chain("a", "b")[:1], helper.make_node("Conv", ["v0", "w"], ["u"], name="b")]
    nodes.append(helper.make_node("Mul", ["u", "w_pruned"], ["y"]))
    before = model(nodes, taken, (1, 8, 4, 4))
    mask = random_mask(*SQUARE.shape)
    after = prune_onnx(before, {"b": mask})
    assert after.graph.node[0].input[1] == "w"
    assert after.graph.node[1].input[1] == "w_pruned_2"
    np.testing.assert_array_equal(weights(after)["w"], SQUARE)
    np.testing.assert_array_equal(weights(after)["w_pruned_2"], SQUARE * mask)
    run(after)


def test_weight_that_the_graph_returns_is_left_alone() -> None:
    before = model(chain("a"), {"w": SQUARE}, (1, 8, 4, 4))
    before.graph.output.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, SQUARE.shape))
    after = prune_onnx(before, {"a": random_mask(*SQUARE.shape)})
    np.testing.assert_array_equal(weights(after)["w"], SQUARE)
    assert after.graph.node[0].input[1] == "w_pruned"
    run(after)


def test_weight_that_a_subgraph_reads_is_left_alone() -> None:
    branches = [
        helper.make_graph(
            [helper.make_node(kind, ["w"], [kind])], kind, [], [helper.make_tensor_value_info(kind, 1, SQUARE.shape)]
        )
        for kind in ("Neg", "Abs")
    ]
    nodes = [
        *chain("a")[:1],
        helper.make_node("If", ["flag"], ["z"], name="if", then_branch=branches[0], else_branch=branches[1]),
    ]
    before = model(nodes, {"w": SQUARE, "flag": np.array(True)}, (1, 8, 4, 4))
    before.graph.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, SQUARE.shape))
    after = prune_onnx(before, {"a": random_mask(*SQUARE.shape)})
    np.testing.assert_array_equal(weights(after)["w"], SQUARE)
    run(after)


def test_computed_weights_become_initialisers_and_leave_no_rubbish() -> None:
    nodes = [
        helper.make_node("Constant", [], ["axes"], value_ints=[0]),
        helper.make_node("Transpose", ["stored"], ["turned"], perm=[1, 0, 2, 3]),
        helper.make_node("Mul", ["turned", "scale"], ["w"]),
        helper.make_node("Conv", ["x", "w"], ["v"], name="c"),
        helper.make_node("Mul", ["v", "scale"], ["u"]),
        helper.make_node("Squeeze", ["u", "axes"], ["y"]),
    ]
    stored = np.ascontiguousarray(CONV.transpose(1, 0, 2, 3))
    before = model(nodes, {"stored": stored, "scale": np.array([2], np.float32)}, rank=3)
    mask = random_mask(*CONV.shape)
    after = prune_onnx(before, {"c": mask})
    assert [node.op_type for node in after.graph.node] == ["Constant", "Conv", "Mul", "Squeeze"]
    assert set(weights(after)) == {"scale", "w_pruned"}
    np.testing.assert_array_equal(weights(after)["w_pruned"], 2 * CONV * mask)
    run(after)


def test_nodes_without_a_name_go_by_their_first_output() -> None:
    before = model([helper.make_node("Conv", ["x", "w"], ["y"])], {"w": CONV})
    assert not weights(prune_onnx(before, {"y": np.zeros(CONV.shape, bool)}))["w"].any()


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_types_are_kept(dtype: type) -> None:
    before = model(
        [
            helper.make_node("Cast", ["x"], ["v"], to=helper.np_dtype_to_tensor_dtype(np.dtype(dtype))),
            helper.make_node("Conv", ["v", "w"], ["u"], name="c"),
            helper.make_node("Cast", ["u"], ["y"], to=TensorProto.FLOAT),
        ],
        {"w": CONV.astype(dtype)},
    )
    mask = random_mask(*CONV.shape)
    pruned = weights(prune_onnx(before, {"c": mask}))["w"]
    assert pruned.dtype == dtype
    np.testing.assert_array_equal(pruned, np.where(mask, CONV.astype(dtype), 0))


def test_masks_that_do_not_fit() -> None:
    before = model(
        [helper.make_node("Conv", ["x", "w"], ["v"], name="conv1"), helper.make_node("Relu", ["v"], ["y"], name="act")],
        {"w": CONV},
    )
    mask = np.ones(CONV.shape, bool)
    with pytest.raises(PlanError, match="no node 'conv2'; near: conv1"):
        prune_onnx(before, {"conv2": mask})
    with pytest.raises(PlanError, match="'act' is a Relu; only Conv, Gemm and MatMul"):
        prune_onnx(before, {"act": mask})
    with pytest.raises(PlanError, match=r"'conv1': a mask of shape \(8, 4, 3, 1\) does not fit .* \(8, 4, 3, 3\)"):
        prune_onnx(before, {"conv1": mask[..., :1]})
    fc = model([helper.make_node("MatMul", ["x", "w"], ["y"], name="fc")], {"w": FC.T}, (2, 8))
    with pytest.raises(PlanError, match=r"'fc': a mask of shape \(8, 6, 1, 1\)"):
        prune_onnx(fc, {"fc": np.ones((8, 6, 1, 1), bool)})


def test_doubled_names() -> None:
    before = model(chain("a", "a"), {"w": SQUARE}, (1, 8, 4, 4))
    with pytest.raises(PlanError, match="several nodes named 'a'"):
        prune_onnx(before, {"a": np.ones(SQUARE.shape, bool)})


def test_weights_that_cannot_be_had() -> None:
    node = helper.make_node("MatMul", ["x", "x"], ["y"], name="square")
    with pytest.raises(
        UnsupportedModelError, match=r"'square' \(MatMul\): its weight 'x' depends on 'x', which is no const"
    ):
        prune_onnx(model([node], {}, (4, 4)), {"square": np.ones((4, 4, 1, 1), bool)})
    external = model([helper.make_node("Conv", ["x", "w"], ["y"], name="c")], {"w": CONV})
    external.graph.initializer[0].data_location = TensorProto.EXTERNAL
    with pytest.raises(UnsupportedModelError, match=r"'c' \(Conv\): the data of 'w' are in another file"):
        prune_onnx(external, {"c": np.ones(CONV.shape, bool)})
    failing = model(
        [helper.make_node("Reshape", ["s", "shape"], ["w"]), helper.make_node("Conv", ["x", "w"], ["y"], name="c")],
        {"s": CONV, "shape": np.array([7, 5], np.int64)},
    )
    with pytest.raises(UnsupportedModelError, match=r"'c' \(Conv\): its weight 'w' cannot be computed"):
        prune_onnx(failing, {"c": np.ones(CONV.shape, bool)})


@pytest.fixture
def models() -> Path:
    folder = Path(__file__).parents[2].parent / "shared" / "models"
    if not folder.is_dir():
        pytest.skip("the example models are not beside the repository")
    return folder


@pytest.mark.parametrize("name", ["resnet20_cifar10", "squeezenet1.1_imagenet"])
def test_whole_network_keeps_half_its_weights_and_runs(models: Path, name: str) -> None:
    before = onnx.load(models / f"{name}.onnx")
    tensors = weights(before)
    pattern = parse_pattern("1x4p")
    nodes = {node.name or node.output[0]: node for node in before.graph.node if node.op_type == "Conv"}
    masks = {name: pattern.mask(np.abs(tensors[node.input[1]]), 0.5) for name, node in list(nodes.items())[1:]}
    assert len(masks) > 15
    after = prune_onnx(before, masks)
    assert run(after).shape == run(before).shape
    assert not np.array_equal(run(after), run(before))
    pruned = weights(after)
    assert set(pruned) == set(tensors)
    for layer, mask in masks.items():
        weight = nodes[layer].input[1]
        np.testing.assert_array_equal(pruned[weight], np.where(mask, tensors[weight], 0))

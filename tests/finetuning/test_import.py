"""ONNX models become PyTorch modules that compute the same, and go back unchanged."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest

torch = pytest.importorskip("torch", reason="the extra torch is not installed")

from tests.models import Net, light_model, shared_model, small_cnn  # noqa: E402
from tests.small_models import SMALL_MODELS  # noqa: E402
from tvm_nm.errors import UnsupportedModelError  # noqa: E402
from tvm_nm.reference import reference_model_path  # noqa: E402
from tvm_nm.torch import functions  # noqa: E402
from tvm_nm.torch.importer import import_model  # noqa: E402
from tvm_nm.torch.renormalise import insert_batch_norms  # noqa: E402

# Nothing to train, or operators that only TVM knows.
REFUSED = {
    "no_inputs": "does not depend|no value",
    "constant_output": "no value",
    "integer_output": "ArgMax",
    "computed_weight": "not constant",
    "left_to_tvm": "ConvTranspose",
    "local_function": "Block",
    "transposed_convolutions": "ConvTranspose",
    **{f"resize_of_opset_{opset}": "Upsample" if opset < 10 else "Resize" for opset in (7, 9, 10, 11, 13, 18, 19)},
}


def run_onnx(model: onnx.ModelProto, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, ["CPUExecutionProvider"], disabled_optimizers={"Pad_Fusion"}
    )
    return session.run(None, feed)


def random_feed(model: onnx.ModelProto, batch: int = 2) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    constants = {tensor.name for tensor in model.graph.initializer}
    feed = {}
    for value in model.graph.input:
        if value.name not in constants:
            shape = [dim.dim_value or batch for dim in value.type.tensor_type.shape.dim]
            feed[value.name] = rng.standard_normal(shape).astype(np.float32)
    return feed


def run_torch(module: torch.nn.Module, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
    with torch.no_grad():
        found = module.eval()(*[torch.from_numpy(array) for array in feed.values()])
    return [value.numpy() for value in (found if isinstance(found, tuple) else (found,))]


def assert_same(found: list[np.ndarray], wanted: list[np.ndarray], tolerance: float = 1e-5) -> None:
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert one.shape == other.shape
        assert np.abs(one - other).max(initial=0) <= tolerance * max(1e-6, np.abs(other).max(initial=0))


@pytest.mark.parametrize("name", [name for name in SMALL_MODELS if name not in REFUSED])
def test_module_computes_what_onnxruntime_does_and_goes_back(name: str) -> None:
    model = SMALL_MODELS[name]()
    feed = random_feed(model)
    wanted = run_onnx(model, feed)
    imported = import_model(model)
    assert_same(run_torch(imported.module, feed), wanted)
    back = imported.to_onnx()
    if name != "weights_in_disguise":  # weights that were computed from others become plain ones
        assert [node.op_type for node in back.graph.node] == [node.op_type for node in model.graph.node]
    for one, other in zip(run_onnx(back, feed), wanted, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_trained_is_refused_by_name(name: str) -> None:
    with pytest.raises(UnsupportedModelError, match=REFUSED[name]):
        import_model(SMALL_MODELS[name]())


@pytest.mark.parametrize("name", ["resnet20_cifar10", "squeezenet1.1_imagenet"])
def test_real_models_go_back_bit_by_bit(name: str) -> None:
    model = onnx.load(shared_model(name))
    feed = random_feed(model, batch=1)
    imported = import_model(model)
    assert_same(run_torch(imported.module, feed), run_onnx(model, feed))
    assert imported.to_onnx().SerializeToString() == model.SerializeToString()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["densenet121", "inception_v1", "shufflenet", "bvlc_alexnet"])
def test_models_of_the_onnx_wheel(name: str) -> None:
    model = light_model(name)
    feed = random_feed(model, batch=1)
    assert_same(run_torch(import_model(model).module, feed), run_onnx(model, feed), 1e-4)


def test_a_fixed_batch_may_be_any_in_training() -> None:
    net = Net((1, 3, 6, 6))
    x = net.add("Reshape", net.conv("input", (4, 3, 3, 3)), net.constant(np.array([1, -1])))
    model = net.model(net.fc(x, 64, 5))
    several = np.random.default_rng(0).standard_normal((3, 3, 6, 6)).astype(np.float32)
    found = run_torch(import_model(model).module, {"input": several})[0]
    wanted = np.concatenate([run_onnx(model, {"input": image[None]})[0] for image in several])
    assert_same([found], [wanted])


def test_changed_parameters_arrive_in_the_same_graph() -> None:
    model = small_cnn()
    imported = import_model(model)
    with torch.no_grad():
        for parameter in imported.module.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape))
    imported.module.train()
    imported.module(torch.randn(8, 3, 16, 16))  # moves the running statistics
    back = imported.to_onnx()
    feed = random_feed(model)
    assert_same(run_torch(imported.module, feed), run_onnx(back, feed))
    assert [t.name for t in back.graph.initializer] == [t.name for t in model.graph.initializer]
    assert [list(t.dims) for t in back.graph.initializer] == [list(t.dims) for t in model.graph.initializer]


def test_a_shared_weight_is_one_parameter() -> None:
    model = SMALL_MODELS["tied_weights"]()
    imported = import_model(model)
    weights = {id(imported.layer(name).weight) for name in imported.layers}
    assert len(weights) < len(imported.layers)


def test_inserted_batch_norms_change_nothing_and_fold_away() -> None:
    model = onnx.load(reference_model_path())
    imported = import_model(model)
    layers = dict(imported.layers)
    feed = random_feed(model, batch=4)
    wanted = run_onnx(model, feed)
    count = insert_batch_norms(imported, [torch.from_numpy(feed["input"])])
    assert count == sum(node.op_type == "Conv" for node in model.graph.node)
    assert_same(run_torch(imported.module, feed), wanted, 1e-4)
    assert_same(run_onnx(imported.to_onnx(), feed), wanted, 1e-4)
    assert imported.layers == layers
    # Trained a little, it still goes back: batch norms move, zeros do not.
    name = next(iter(layers))
    with torch.no_grad():
        imported.layer(name).weight[:, :, 0] = 0
    imported.module.train()
    imported.module(torch.from_numpy(feed["input"]))
    back = imported.to_onnx()
    assert_same(run_torch(imported.module, feed), run_onnx(back, feed), 1e-4)
    assert not import_model(back).weight(name)[:, :, 0].any()


def test_a_dead_channel_survives_an_inserted_batch_norm() -> None:
    net = Net(("N", 3, 8, 8))
    model = net.model(net.conv("input", (4, 3, 3, 3)))
    weight = onnx.numpy_helper.to_array(model.graph.initializer[0]).copy()
    weight[1] = 0
    model.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(weight, model.graph.initializer[0].name))
    imported = import_model(model)
    feed = random_feed(model)
    insert_batch_norms(imported, [torch.from_numpy(feed["input"])])
    assert_same(run_onnx(imported.to_onnx(), feed), run_onnx(model, feed), 1e-4)


@pytest.mark.parametrize("bounds", [(0.0, 6.0), (-1.0, None), (None, 2.0), (3.0, 1.0), (None, None)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_clip_and_its_gradient(bounds: tuple[float | None, float | None], dtype: torch.dtype) -> None:
    x = torch.tensor([-4.5, -0.5, 0.5, 2.5, 5.5, 7.5]).to(dtype)
    low, high = bounds
    wanted = x if low is None else torch.clamp(x, min=low)
    wanted = wanted if high is None else torch.clamp(wanted, max=high)
    if x.is_floating_point():
        x.requires_grad_()
    found = functions.clip(x, low, high)
    assert found.dtype == wanted.dtype
    assert torch.equal(found, wanted)
    if x.is_floating_point():
        found.sum().backward()
        assert torch.equal(x.grad, (found == x).to(dtype))

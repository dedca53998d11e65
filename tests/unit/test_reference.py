"""The shipped reference network and its data: what they hold, how big they are, and that the card tells the truth."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from tvm_nm import reference
from tvm_nm.errors import ArtifactError

DATA = Path(reference.__file__).parent / "data"
SCRIPT = Path(__file__).parents[2] / "scripts" / "train_reference.py"


@pytest.fixture(scope="module")
def model() -> onnx.ModelProto:
    return onnx.load(reference.reference_model_path())


@pytest.fixture(scope="module")
def session() -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(reference.reference_model_path(), options, providers=["CPUExecutionProvider"])


def _weights(model: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    return {tensor.name: tensor for tensor in model.graph.initializer}


def test_data_is_small_and_complete() -> None:
    sizes = {path.name: path.stat().st_size for path in DATA.iterdir() if path.is_file()}
    assert set(sizes) == {"LICENSE.fashion-mnist", "fashion_mnist.npz", "reference.json", "reference.onnx"}
    assert sizes["reference.onnx"] < 2_500_000
    assert sum(sizes.values()) < 3_000_000
    licence = (DATA / "LICENSE.fashion-mnist").read_text(encoding="utf-8")
    assert "Copyright (c) 2017 Zalando SE" in licence
    assert "Permission is hereby granted, free of charge" in licence


def test_calibration_images() -> None:
    images = reference.calibration_images()
    assert images.shape == (512, 1, 28, 28)
    assert images.dtype == np.float32
    assert images.flags.c_contiguous
    # The normalisation is that of the whole training set, so a sample of it is close to standard.
    assert abs(images.mean()) < 0.05
    assert abs(images.std() - 1) < 0.05


def test_test_set() -> None:
    images, labels = reference.test_set()
    assert images.shape == (2000, 1, 28, 28)
    assert images.dtype == np.float32
    assert labels.shape == (2000,)
    assert labels.dtype == np.int64
    counts = Counter(labels.tolist())
    assert set(counts) == set(range(len(reference.CLASSES)))
    assert min(counts.values()) > 150
    # The data set's first test images are an ankle boot and a pullover.
    assert [reference.CLASSES[label] for label in labels[:2]] == ["Ankle boot", "Pullover"]


def test_no_calibration_image_is_a_test_image() -> None:
    calibration = {image.tobytes() for image in reference.calibration_images()}
    assert not any(image.tobytes() in calibration for image in reference.test_set()[0])


def test_preprocess_values() -> None:
    pixels = np.zeros((2, 28, 28), np.uint8)
    pixels[1, 3, 5] = 255
    result = reference.preprocess(pixels)
    assert result[0, 0, 0, 0] == pytest.approx(-0.2860 / 0.3530)
    assert result[1, 0, 3, 5] == pytest.approx((1 - 0.2860) / 0.3530)
    assert pixels[1, 3, 5] == 255


@pytest.mark.parametrize(
    "images",
    [np.zeros((2, 28, 28), np.float32), np.zeros((28, 28), np.uint8), np.zeros((1, 1, 28, 28), np.uint8)],
    ids=["float", "one-image", "channel-axis"],
)
def test_preprocess_refuses_other_input(images: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"uint8 images of shape \(N, 28, 28\)"):
        reference.preprocess(images)


def test_model_interface(model: onnx.ModelProto) -> None:
    onnx.checker.check_model(model, full_check=True)
    (opset,) = model.opset_import
    assert opset.version == 17
    shapes = {
        value.name: [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]
        for value in [*model.graph.input, *model.graph.output]
    }
    assert shapes == {"input": ["batch", 1, 28, 28], "logits": ["batch", 10]}


def test_model_is_a_representative_cnn(model: onnx.ModelProto) -> None:
    weights = _weights(model)
    shapes = {node.name: list(weights[node.input[1]].dims) for node in model.graph.node if node.op_type == "Conv"}
    groups = {
        node.name: attribute.i for node in model.graph.node for attribute in node.attribute if attribute.name == "group"
    }
    operators = Counter(node.op_type for node in model.graph.node)
    assert operators["Add"] >= 1
    assert any(count > 1 for count in groups.values())
    dense_3x3 = [name for name, shape in shapes.items() if shape[2:] == [3, 3] and groups[name] == 1]
    assert len(dense_3x3) > len(shapes) / 2
    assert all(shape[0] % 16 == 0 for shape in shapes.values())


def test_node_names_are_module_paths(model: onnx.ModelProto) -> None:
    named = {node.name: node for node in model.graph.node}
    assert len(named) == len(model.graph.node)
    assert named["/block1/first/conv/Conv"].input[1] == "block1.first.conv.weight"
    assert named["/depthwise/conv/Conv"].op_type == "Conv"
    assert named["/classifier/Gemm"].op_type == "Gemm"


def test_card_counts_match_the_model(model: onnx.ModelProto) -> None:
    card = reference.reference_card()
    weights = _weights(model)
    assert 100_000 <= card.parameters <= 1_000_000
    assert card.parameters == sum(int(np.prod(tensor.dims)) for tensor in weights.values())
    inferred = onnx.shape_inference.infer_shapes(model)
    pixels = {
        value.name: int(np.prod([axis.dim_value for axis in value.type.tensor_type.shape.dim][2:]))
        for value in inferred.graph.value_info
    }
    macs = sum(
        int(np.prod(weights[node.input[1]].dims)) * pixels.get(node.output[0], 1)
        for node in model.graph.node
        if node.op_type in ("Conv", "Gemm")
    )
    assert card.macs == macs
    assert 30e6 <= card.macs <= 80e6
    assert card.input_shape == (1, 28, 28)
    assert (card.pixel_mean, card.pixel_std) == (reference.PIXEL_MEAN, reference.PIXEL_STD)
    assert card.dataset_license == "MIT"


def test_accuracy_in_onnxruntime(session: onnxruntime.InferenceSession) -> None:
    accuracy = reference.top1(lambda x: session.run(None, {"input": x})[0], *reference.test_set(), batch=250)
    card = reference.reference_card()
    assert accuracy >= 0.91
    assert card.top1_test >= 0.91
    # Another processor rounds differently, which may turn an image or two.
    assert accuracy == pytest.approx(card.top1_embedded, abs=0.0015)


def test_batch_axis_is_symbolic(session: onnxruntime.InferenceSession) -> None:
    images = reference.calibration_images()[:3]
    together = session.run(None, {"input": images})[0]
    alone = np.concatenate([session.run(None, {"input": image[np.newaxis]})[0] for image in images])
    np.testing.assert_allclose(together, alone, atol=1e-4)


def test_top1_fills_the_last_chunk_and_does_not_count_it() -> None:
    images = np.arange(7, dtype=np.float32).reshape(7, 1)
    labels = np.array([0, 1, 2, 3, 4, 5, 0])
    seen: list[int] = []

    def predict(x: np.ndarray) -> np.ndarray:
        seen.append(len(x))
        return np.eye(7, dtype=np.float32)[x[:, 0].astype(int)]

    assert reference.top1(predict, images, labels, batch=3) == pytest.approx(6 / 7)
    assert seen == [3, 3, 3]


@pytest.mark.parametrize(("count", "batch"), [(3, 1), (4, 0)], ids=["labels", "batch"])
def test_top1_refuses_mismatches(count: int, batch: int) -> None:
    with pytest.raises(ValueError, match="4 labels"):
        reference.top1(lambda x: x, np.zeros((count, 2), np.float32), np.zeros(4, np.int64), batch=batch)


def test_top1_refuses_no_images() -> None:
    with pytest.raises(ValueError, match="0 images"):
        reference.top1(lambda x: x, np.zeros((0, 2), np.float32), np.zeros(0, np.int64))


def test_missing_and_damaged_files_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "_DATA", tmp_path)
    with pytest.raises(ArtifactError, match=r"reference\.onnx is missing"):
        reference.reference_model_path()
    whole = (DATA / "fashion_mnist.npz").read_bytes()
    for content in (b"", whole[:5000], whole[:200_000] + bytes(1000) + whole[201_000:]):
        (tmp_path / "fashion_mnist.npz").write_bytes(content)
        with pytest.raises(ArtifactError, match=r"fashion_mnist\.npz is damaged"):
            reference.calibration_images()
    (tmp_path / "reference.json").write_text(json.dumps({"input_shape": [1, 28, 28]}), encoding="utf-8")
    with pytest.raises(ArtifactError, match=r"reference\.json is not a model card"):
        reference.reference_card()


def test_training_without_torch_says_how_to_get_it() -> None:
    hide = f"import sys, runpy; sys.modules['torch'] = None; runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    environment = os.environ | {"PYTHONPATH": str(SCRIPT.parents[1])}
    result = subprocess.run([sys.executable, "-c", hide], capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 1
    assert "pip install 'tvm-nm[torch]'" in result.stderr
    assert "Traceback" not in result.stderr

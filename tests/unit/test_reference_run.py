from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from models import small_cnn

from tvm_nm.errors import UnsupportedModelError
from tvm_nm.reference_run import TensorSpec, compare, random_inputs, run_onnx

ONE = np.ones((2, 3), np.float32)


def test_run_from_file_and_from_memory(tmp_path: Path) -> None:
    model = small_cnn()
    onnx.save(model, tmp_path / "m.onnx")
    inputs = random_inputs([TensorSpec("input", (2, 3, 16, 16), "float32")])
    outputs = [run_onnx(source, inputs, threads=t)[0] for source, t in ((model, 1), (tmp_path / "m.onnx", 2))]
    assert outputs[0].shape == (2, 10)
    np.testing.assert_allclose(outputs[0], outputs[1], rtol=1e-5, atol=1e-6)


def test_padding_in_front_of_a_max_pool_is_kept() -> None:
    """onnxruntime's optimiser would let the pool ignore the zeros, although they are larger than what is there."""
    from models import Net

    net = Net((1, 1, 4, 4))
    x = net.add("Pad", "input", net.constant(np.array([0, 0, 1, 1, 0, 0, 1, 1])))
    model = net.model(net.add("MaxPool", x, kernel_shape=[3, 3]))
    out = run_onnx(model, {"input": np.full((1, 1, 4, 4), -1, np.float32)})[0]
    np.testing.assert_array_equal(out[0, 0], [[0, 0, 0, 0], [0, -1, -1, 0], [0, -1, -1, 0], [0, 0, 0, 0]])


def test_errors_are_ours(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"nonsense")
    with pytest.raises(UnsupportedModelError, match="onnxruntime cannot run the model"):
        run_onnx(tmp_path / "m.onnx", {})
    with pytest.raises(UnsupportedModelError, match="onnxruntime cannot run the model"):
        run_onnx(small_cnn(), {"input": np.ones((1, 4, 16, 16), np.float32)})


def test_random_inputs() -> None:
    specs = [TensorSpec("a", (2, 3), "float32"), TensorSpec("b", (4,), "int64"), TensorSpec("c", (), "float32")]
    first, again, other = random_inputs(specs), random_inputs(specs), random_inputs(specs, seed=1)
    for spec in specs:
        assert first[spec.name].shape == spec.shape
        assert first[spec.name].dtype == spec.dtype
        np.testing.assert_array_equal(first[spec.name], again[spec.name])
    assert not np.array_equal(first["a"], other["a"])


def test_compare_measures_against_the_largest_value() -> None:
    found = compare([ONE, ONE * 2], [ONE, ONE * np.float32(2.5)])
    assert found.max_abs == pytest.approx(0.5)
    assert found.max_rel == pytest.approx(0.2)
    assert found.output == 1
    assert "output 1 differs by 0.5, 20.00%" in found.describe()


def test_compare_takes_the_worst_output_not_the_largest_difference() -> None:
    found = compare([ONE * 101, ONE * 0.02], [ONE * 100, ONE * 0.01])
    assert found.output == 1
    assert found.max_rel == pytest.approx(1.0)


def test_equal_outputs() -> None:
    assert compare([ONE, np.zeros(3)], [ONE, np.zeros(3)]).max_rel == 0
    assert compare([], []).max_rel == 0
    assert compare([np.empty((0, 3))], [np.empty((0, 3))]).max_rel == 0


@pytest.mark.parametrize(
    ("got", "want", "words"),
    [
        ([ONE], [ONE, ONE], "1 outputs instead of 2"),
        ([ONE], [ONE[:1]], r"shape \(2, 3\) instead of \(1, 3\)"),
        ([ONE * np.nan], [ONE], "NaN or infinite"),
        ([ONE], [ONE * np.inf], "NaN or infinite"),
        ([-ONE * np.inf], [ONE * np.inf], "NaN or infinite"),
        ([ONE], [ONE * 0], "differs by 1"),
    ],
)
def test_infinitely_far(got: list[np.ndarray], want: list[np.ndarray], words: str) -> None:
    import re

    found = compare(got, want)
    assert found.max_rel == np.inf
    assert re.search(words, found.describe())


def test_values_that_are_not_finite_on_both_sides() -> None:
    want = np.array([np.inf, -np.inf, np.nan, 2.0])
    assert compare([want], [want]).max_rel == 0
    assert compare([np.array([np.inf, -np.inf, np.nan, 1.0])], [want]).max_rel == 0.5

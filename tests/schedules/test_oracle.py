"""The oracle agrees with onnxruntime: it says what ONNX means."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
import pytest
from hypothesis import assume, given, settings
from onnx import TensorProto, helper
from oracle import avg_pool, conv, max_pool
from running import integers
from test_conv import workloads
from test_pool import pools

from tvm_nm.workload import ConvWorkload, Epilogue


def onnx_run(op: str, inputs: dict[str, np.ndarray], **attributes: Any) -> np.ndarray:
    node = helper.make_node(op, list(inputs), ["y"], **attributes)
    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in [*inputs, "y"]]
    graph = helper.make_graph([node], "g", infos[:-1], infos[-1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    return np.asarray(onnxruntime.InferenceSession(model.SerializeToString()).run(None, inputs)[0])


def window(work: ConvWorkload, padding: tuple[int, int, int, int]) -> dict[str, Any]:
    return {"kernel_shape": work.kernel, "strides": work.stride, "dilations": work.dilation, "pads": padding}


@settings(max_examples=40, deadline=None)
@given(workloads())
def test_convolutions(work: ConvWorkload) -> None:
    rng = np.random.default_rng(0)
    inputs = {
        "x": integers(work.input_shape, rng),
        "w": integers((work.out_channels, work.in_channels_per_group, *work.kernel), rng),
        "b": integers((work.out_channels,), rng),
    }
    plain = ConvWorkload(*(getattr(work, name) for name in list(work.__slots__)[:-1]), Epilogue())
    expected = onnx_run("Conv", inputs, group=work.groups, **window(work, work.padding))
    np.testing.assert_array_equal(conv(plain, *inputs.values()), expected)
    residual = integers(expected.shape, rng) if work.epilogue.residual else None
    expected = expected + (0 if residual is None else residual)
    low, high = work.epilogue.clip_min, work.epilogue.clip_max
    expected = np.maximum(expected, -np.inf if low is None else low)
    expected = np.minimum(expected, np.inf if high is None else high)
    np.testing.assert_array_equal(conv(work, *inputs.values(), residual), expected)


@settings(max_examples=40, deadline=None)
@given(pools())
def test_pools(pool: tuple[ConvWorkload, tuple[int, int, int, int]]) -> None:
    work, explicit = pool
    assume(work.padding == explicit)
    data = integers(work.input_shape, np.random.default_rng(0))
    expected = onnx_run("MaxPool", {"x": data}, **window(work, explicit))
    assume(np.isfinite(expected).all() and (expected > -1e38).all())
    np.testing.assert_array_equal(max_pool(data, work), expected)
    for include in (False, True):
        expected = onnx_run("AveragePool", {"x": data}, count_include_pad=int(include), **window(work, explicit))
        np.testing.assert_allclose(avg_pool(data, work, explicit, include_pad=include), expected, rtol=1e-6)


@pytest.mark.parametrize(("include", "means"), [(False, [1.5, 3.0, 4.0]), (True, [1.0, 3.0, 2.0])])
def test_an_average_of_windows_that_reach_beyond_the_padding(include: bool, means: list[float]) -> None:
    # Windows (pad, 1, 2), (2, 3, 4), (4, pad, beyond): what is beyond the padding never counts.
    work = ConvWorkload(1, 1, 1, 1, 4, (1, 3), (1, 2), (0, 1, 0, 2))
    data = np.array([[[[1.0, 2.0, 3.0, 4.0]]]], np.float32)
    assert avg_pool(data, work, (0, 1, 0, 1), include_pad=include).tolist() == [[[means]]]

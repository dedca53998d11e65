"""Whatever has no kernel family gets a schedule that computes the same, in parallel where it is worth it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tvm
from loop_nests import assert_all_scheduled, unscheduled_nests
from running import haswell, host_flags
from tvm import relax, tirx

from tvm_nm.schedules.apply import ApplyDefaultSchedules, pass_context
from tvm_nm.schedules.machine import host_target

TARGETS = {"one thread": host_target(1), "two threads": host_target(2), "three threads": host_target(3)}
if "avx2" in host_flags():
    TARGETS["avx2"] = haswell()

op = relax.op
Build = Callable[..., Any]


def constant(*shape: int) -> Any:
    return relax.const(np.random.default_rng(len(shape)).uniform(0.5, 1.5, shape).astype(np.float32))


def channel_shuffle(x: Any, groups: int) -> Any:
    n, c, h, w = (int(d) for d in x.ty.shape)
    split = op.reshape(x, (n, groups, c // groups, h, w))
    return op.reshape(op.permute_dims(split, [0, 2, 1, 3, 4]), (n, c, h, w))


def local_response_norm(x: Any) -> Any:
    window = op.nn.avg_pool3d(
        op.expand_dims(op.multiply(x, x), 1), (5, 1, 1), (1, 1, 1), (2, 0, 0, 2, 0, 0), count_include_pad=True
    )
    scale = op.add(op.multiply(op.squeeze(window, 1), relax.const(np.float32(1e-2))), relax.const(np.float32(1)))
    return op.divide(x, op.power(scale, relax.const(np.float32(0.75))))


CASES: dict[str, tuple[Build, list[tuple[int, ...]]]] = {
    "add + relu": (lambda a, b: op.nn.relu(op.add(a, b)), [(1, 64, 28, 28)] * 2),
    "add of odd sizes": (lambda a, b: op.add(a, b), [(1, 13, 27, 29)] * 2),
    "tiny": (lambda a, b: op.add(a, b), [(1, 3)] * 2),
    "scalars": (lambda a, b: op.add(a, b), [()] * 2),
    "three operators": (
        lambda a: op.sigmoid(op.multiply(op.nn.relu(a), relax.const(np.float32(3)))),
        [(2, 16, 30, 30)],
    ),
    "hard swish": (
        lambda a: op.multiply(
            a, op.divide(op.clip(op.add(a, relax.const(np.float32(3))), 0, 6), relax.const(np.float32(6)))
        ),
        [(1, 64, 28, 28)],
    ),
    "affine by channel": (
        lambda a: op.nn.relu(op.add(op.multiply(a, constant(1, 64, 1, 1)), constant(1, 64, 1, 1))),
        [(1, 64, 28, 28)],
    ),
    "broadcast of a row": (lambda a, b: op.add(a, b), [(32, 40, 17), (1, 1, 17)]),
    "broadcast of both": (lambda a, b: op.multiply(a, b), [(64, 1, 33), (1, 29, 1)]),
    "squeeze and excite": (lambda a, b: op.multiply(a, op.sigmoid(b)), [(1, 48, 28, 28), (1, 48, 1, 1)]),
    "concat": (lambda a, b: op.concat([a, b], axis=1), [(1, 30, 27, 27), (1, 33, 27, 27)]),
    "concat + affine + relu": (
        lambda a, b: op.nn.relu(op.add(op.concat([a, b], axis=1), constant(1, 48, 1, 1))),
        [(1, 16, 28, 28), (1, 32, 28, 28)],
    ),
    "concat of four": (lambda *x: op.concat(list(x), axis=1), [(1, 16, 14, 14)] * 4),
    "split": (lambda a: op.split(a, 2, axis=1)[1], [(1, 64, 28, 28)]),
    "softmax": (lambda a: op.nn.softmax(a, axis=-1), [(1, 1000)]),
    "softmax of a batch": (lambda a: op.nn.softmax(a, axis=-1), [(64, 200)]),
    "softmax over channels": (lambda a: op.nn.softmax(a, axis=1), [(1, 21, 40, 40)]),
    "global mean": (lambda a: op.mean(a, axis=[2, 3], keepdims=True), [(1, 512, 7, 7)]),
    "mean of odd sizes": (lambda a: op.mean(a, axis=[2, 3]), [(3, 37, 9, 11)]),
    "mean of everything": (lambda a: op.mean(a, keepdims=True), [(4, 64, 14, 14)]),
    "scalar mean": (lambda a: op.mean(a), [(1, 4, 14, 14)]),
    "mean of 8 channels": (lambda a: op.mean(a, axis=[2, 3]), [(1, 8, 60, 60)]),
    "softmax of many": (lambda a: op.nn.softmax(a, axis=-1), [(1, 20000)]),
    "argmax of many": (lambda a: op.argmax(a, axis=1), [(1, 20000)]),
    "max over channels": (lambda a: op.max(a, axis=1), [(1, 64, 28, 28)]),
    "sum of the outer axis": (lambda a: op.sum(a, axis=0), [(64, 1000)]),
    "mean of relu": (lambda a: op.mean(op.nn.relu(a), axis=[2, 3]), [(1, 256, 8, 8)]),
    "argmax": (lambda a: op.argmax(a, axis=1), [(32, 1000)]),
    "channel shuffle": (lambda a: channel_shuffle(a, 3), [(1, 96, 14, 14)]),
    "transpose": (lambda a: op.permute_dims(a, [0, 2, 3, 1]), [(1, 64, 17, 17)]),
    "pixel shuffle": (
        lambda a: op.reshape(op.permute_dims(op.reshape(a, (1, 8, 2, 2, 20, 20)), [0, 1, 4, 2, 5, 3]), (1, 8, 40, 40)),
        [(1, 32, 20, 20)],
    ),
    "strided slice": (lambda a: op.strided_slice(a, [2, 3], [0, 1], [32, 32], [2, 2]), [(1, 64, 32, 32)]),
    "pad": (lambda a: op.nn.pad(a, [0, 0, 0, 0, 1, 1, 2, 2]), [(1, 32, 30, 30)]),
    "local response norm": (local_response_norm, [(1, 32, 27, 27)]),
    "resize": (lambda a: op.image.resize2d(a, (40, 40), layout="NCHW", method="nearest_neighbor"), [(1, 16, 20, 20)]),
    "adaptive pool": (lambda a: op.nn.adaptive_avg_pool2d(a, (6, 6)), [(1, 64, 13, 13)]),
    "bilinear resize": (lambda a: op.image.resize2d(a, (40, 40), layout="NCHW", method="linear"), [(1, 16, 20, 20)]),
    "prefix sums": (lambda a: op.cumsum(a, axis=1), [(64, 500)]),
    "layer norm": (lambda a: op.nn.layer_norm(a, constant(96), constant(96), axes=[-1]), [(50, 96)]),
    "matmul of two inputs": (lambda a, b: op.matmul(a, b), [(40, 50), (50, 60)]),
    "batched matmul": (lambda a, b: op.matmul(a, b), [(4, 20, 30), (4, 30, 20)]),
    "3-D convolution": (lambda a: op.nn.conv3d(a, constant(4, 3, 3, 3, 3), padding=1), [(1, 3, 6, 10, 10)]),
    "transposed convolution": (lambda a: op.nn.conv2d_transpose(a, constant(8, 4, 2, 2), strides=2), [(1, 8, 14, 14)]),
}


def module(build: Build, shapes: list[tuple[int, ...]]) -> tvm.IRModule:
    """One expression, fused as the pipeline fuses; PrimFuncs not scheduled."""
    builder = relax.BlockBuilder()
    inputs = [relax.Var(f"x{i}", relax.TensorType(shape, "float32")) for i, shape in enumerate(shapes)]
    with builder.function("main", inputs):
        with builder.dataflow():
            value = builder.normalize(build(*inputs)) if not shapes else builder.emit(build(*inputs))
            out = builder.emit_output(value)
        builder.emit_func_output(out)
    passes = [
        relax.transform.LegalizeOps(),
        relax.transform.AnnotateTIROpPattern(),
        relax.transform.FuseOps(),
        relax.transform.FuseTIR(),
        relax.transform.DeadCodeElimination(),
    ]
    return tvm.transform.Sequential(passes)(builder.get())


def run(mod: tvm.IRModule, target: tvm.target.Target, shapes: list[tuple[int, ...]]) -> np.ndarray:
    with pass_context():
        executable = tvm.compile(mod, target)
    rng = np.random.default_rng(0)
    inputs = [tvm.runtime.tensor(rng.uniform(-2, 2, shape).astype(np.float32)) for shape in shapes]
    return np.array(relax.VirtualMachine(executable, tvm.cpu())["main"](*inputs).numpy())


@pytest.mark.parametrize("name", CASES)
def test_scheduled_is_the_same_and_parallel(name: str) -> None:
    build, shapes = CASES[name]
    target = TARGETS["two threads"]
    before = module(build, shapes)
    after = ApplyDefaultSchedules(target)(before)
    assert_all_scheduled(after)
    np.testing.assert_allclose(run(after, target, shapes), run(before, target, shapes), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize(
    "name",
    ["add + relu", "concat", "softmax over channels", "mean of relu", "channel shuffle", "pad", "3-D convolution"],
)
def test_the_check_finds_unscheduled_nests(name: str) -> None:
    functions = [f for f in module(*CASES[name]).functions.values() if isinstance(f, tirx.PrimFunc)]
    assert any(unscheduled_nests(func, 8192) for func in functions)

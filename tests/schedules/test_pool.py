"""Pooling kernels compute the pooling."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import tvm
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from oracle import avg_pool, max_pool, windows
from running import build, call, haswell, host_flags, integers

from tvm_nm.schedules.machine import host_target, machine_of
from tvm_nm.schedules.pool import PoolKind, choose_pool_kernel, pool_prim_func
from tvm_nm.workload import ConvWorkload

TARGETS = {"one thread": host_target(1), "two threads": host_target(2)}
if "avx2" in host_flags():
    TARGETS["avx2"] = haswell()


@st.composite
def pools(draw: st.DrawFn) -> tuple[ConvWorkload, tuple[int, int, int, int]]:
    """A pool and its explicit padding; the workload's is larger where ceil mode reaches further."""
    kernel = draw(st.one_of(st.sampled_from([(2, 2), (3, 3)]), st.tuples(st.integers(1, 5), st.integers(1, 5))))
    stride = draw(st.one_of(st.just(kernel), st.tuples(st.integers(1, 3), st.integers(1, 3))))
    dilation = draw(st.one_of(st.just((1, 1)), st.tuples(st.integers(1, 2), st.integers(1, 2))))
    most = st.tuples(*(st.integers(0, k - 1) for k in kernel * 2))
    explicit = draw(st.one_of(st.just((0, 0, 0, 0)), most))
    reach = draw(st.sampled_from([(0, 0), (0, 0), *[(i, j) for i in range(2) for j in range(2)]]))
    padding = (explicit[0], explicit[1], explicit[2] + reach[0], explicit[3] + reach[1])
    least = [max(1, d * (k - 1) + 1) for d, k in zip(dilation, kernel, strict=True)]
    channels = draw(st.sampled_from([1, 2, 5, 16]))
    work = ConvWorkload(
        draw(st.sampled_from([1, 1, 2])),
        channels,
        channels,
        least[0] + draw(st.integers(0, 20)),
        least[1] + draw(st.integers(0, 20)),
        kernel,
        stride,
        padding,
        dilation,
        channels,
    )
    return work, explicit


def check(work: ConvWorkload, explicit: tuple[int, int, int, int], kind: PoolKind, target: tvm.target.Target) -> None:
    # All negative: a padding of zeros would win every maximum.
    data = integers(work.input_shape, np.random.default_rng(work.height)) - 4
    if kind is PoolKind.MAX:
        expected = max_pool(data, work)
    else:
        expected = avg_pool(data, work, explicit, include_pad=kind is PoolKind.AVERAGE_INCLUDE_PAD)
    kernel = choose_pool_kernel(work, kind, explicit, machine_of(target))
    out = call(build(pool_prim_func(kernel), target), [data], expected.shape)
    if kind is PoolKind.MAX:
        np.testing.assert_array_equal(out, expected)
    else:
        np.testing.assert_allclose(out, expected, rtol=1e-6)


@settings(max_examples=35, deadline=None, suppress_health_check=list(HealthCheck))
@given(pools(), st.sampled_from(PoolKind), st.sampled_from(sorted(TARGETS)))
def test_random_pools(pool: tuple[ConvWorkload, tuple[int, int, int, int]], kind: PoolKind, target: str) -> None:
    work, explicit = pool
    # A window without any input has no mean and no largest element.
    ones = np.ones((1, 1, work.height, work.width))
    single = replace(work, batch=1, in_channels=1, out_channels=1, groups=1)
    assume(windows(ones, single, 0.0).any(axis=(2, 3)).all())
    check(work, explicit, kind, TARGETS[target])


@pytest.mark.parametrize("kind", PoolKind)
@pytest.mark.parametrize(
    ("channels", "size", "kernel", "stride", "padding"),
    [
        (16, 56, 3, 2, (1, 1, 1, 1)),  # ResNet
        (16, 55, 3, 2, (0, 0, 0, 0)),  # AlexNet
        (16, 28, 2, 2, (0, 0, 0, 0)),  # VGG
        (8, 14, 3, 1, (1, 1, 1, 1)),  # Inception
        (64, 7, 7, 1, (0, 0, 0, 0)),  # global
        (4, 13, 9, 2, (4, 4, 4, 4)),  # more taps than are unrolled
    ],
)
def test_pools_of_real_networks(
    channels: int, size: int, kernel: int, stride: int, padding: tuple[int, int, int, int], kind: PoolKind
) -> None:
    work = ConvWorkload(
        1, channels, channels, size, size, (kernel, kernel), (stride, stride), padding, (1, 1), channels
    )
    check(work, padding, kind, TARGETS["one thread"])


def test_padding_never_wins_a_maximum() -> None:
    work = ConvWorkload(1, 1, 1, 4, 4, (3, 3), (1, 1), (1, 1, 1, 1))
    kernel = choose_pool_kernel(work, PoolKind.MAX, (1, 1, 1, 1), machine_of(TARGETS["one thread"]))
    data = np.full((1, 1, 4, 4), -3e38, np.float32)
    out = call(build(pool_prim_func(kernel), TARGETS["one thread"]), [data], (1, 1, 4, 4))
    np.testing.assert_array_equal(out, data)

"""How variants are timed: what the layer before leaves in the caches."""

from __future__ import annotations

import numpy as np
import pytest
import tvm

from tvm_nm.tuning.trying import _maps, _Scrub

TARGET = {"kind": "llvm", "mtriple": "x86_64-linux-gnu"}


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("shape", [(1, 6, 7, 7), (2, 3, 1, 5), (1, 2, 5, 3, 16), (1, 10)], ids=str)
def test_inputs_are_written_whole_whatever_the_parts(shape: tuple[int, ...], threads: int) -> None:
    source = np.random.default_rng(0).random(shape, np.float32)
    to = tvm.runtime.tensor(np.zeros(shape, np.float32))
    _Scrub(TARGET, threads).copy(_maps(tvm.runtime.tensor(source)), _maps(to))
    np.testing.assert_array_equal(to.numpy(), source)

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tvm_nm.masks import PackedMasks


@given(shape=st.lists(st.integers(1, 9), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_packed_masks_come_back_as_they_were(shape: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    masks = {name: rng.random(shape) < 0.5 for name in ("a", "b")}
    masks["fortran"] = np.asfortranarray(masks["a"])
    packed = PackedMasks(masks.items())
    assert list(packed) == ["a", "b", "fortran"]
    assert len(packed) == 3
    for name, mask in masks.items():
        assert packed[name].dtype == np.bool_
        np.testing.assert_array_equal(packed[name], mask)


def test_no_masks_are_false() -> None:
    assert not PackedMasks()

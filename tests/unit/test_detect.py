"""Detection finds the pattern that made a mask, tolerates extra zeros and explains what it cannot explain."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tvm_nm.detect import DENSE_ABOVE, TOLERANCE, block_row_union, detect_pattern
from tvm_nm.masks import block_row_sizes, mask_density
from tvm_nm.patterns import NM, Dense, Granularity, OneByN, SparsityPattern, TileNM, parse_pattern


def executed(pattern: SparsityPattern, mask: np.ndarray, groups: int) -> float:
    """Share of weights that a kernel of this pattern executes on the mask, from the definition."""
    union = block_row_union(mask, pattern.block, groups)
    if isinstance(pattern, OneByN) and pattern.granularity is Granularity.KERNEL:
        union = np.broadcast_to(union.any(axis=(2, 3), keepdims=True), union.shape)
    return float(union.reshape(len(union), -1).sum(axis=1).max() / mask[0].size)


def explains(pattern: SparsityPattern, mask: np.ndarray, groups: int) -> bool:
    """Whether the mask is exactly one of the pattern's masks."""
    if isinstance(pattern, NM):
        # Of all masks of the pattern, the one that favours the kept weights.
        return bool((pattern.mask(mask.astype(float)) == mask).all())
    rows = block_row_union(mask, pattern.block, groups)
    return bool((np.repeat(rows, block_row_sizes(len(mask), pattern.block, groups), axis=0) == mask).all())


sparse_patterns = st.one_of(
    st.integers(2, 32).flatmap(lambda m: st.builds(NM, st.integers(1, m - 1), st.just(m))),
    st.integers(2, 16).flatmap(lambda m: st.builds(TileNM, st.integers(1, m - 1), st.just(m), st.integers(2, 32))),
    st.builds(OneByN, st.integers(2, 32), st.sampled_from(Granularity), st.booleans()),
)


@settings(max_examples=300, deadline=None)
@given(
    pattern=sparse_patterns,
    density=st.floats(0.05, 0.9),
    groups=st.sampled_from([1, 1, 1, 2, 3]),
    channels=st.integers(1, 40),
    inputs=st.integers(1, 40),
    kernel=st.sampled_from([(1, 1), (3, 3), (1, 5)]),
    seed=st.integers(0, 2**32 - 1),
)
def test_finds_what_made_the_mask(
    pattern: SparsityPattern,
    density: float,
    groups: int,
    channels: int,
    inputs: int,
    kernel: tuple[int, int],
    seed: int,
) -> None:
    weight = np.random.default_rng(seed).standard_normal((groups * channels, inputs, *kernel)).astype(np.float32)
    mask = pattern.mask(np.abs(weight), None if pattern.fixed_density is not None else density, groups)
    found = detect_pattern(mask, groups)
    kept = mask_density(mask)
    assert found.density == kept
    if kept > DENSE_ABOVE:
        assert found.pattern == Dense()
        assert found.padded_density == 1
        return
    if channels == 1 and not isinstance(pattern, NM | TileNM):
        return  # nothing to share: a block row is one unstructured channel
    assert found.pattern is not None, found.reason
    assert found.reason == ""
    assert found.pattern.block >= min(pattern.block, channels)
    assert explains(found.pattern, mask, groups)
    assert found.padded_density == pytest.approx(executed(found.pattern, mask, groups))
    if not isinstance(pattern, OneByN) or pattern.balanced:
        assert found.padded_density == kept
        assert not isinstance(found.pattern, OneByN) or found.pattern.balanced


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("1x2", "1x2"),
        ("1x4", "1x4"),
        ("1x12", "1x12"),
        ("1x16", "1x16"),
        ("1x32", "1x32"),
        ("1x4p", "1x4p"),
        ("1x16p", "1x16p"),
        ("1:2", "1:2"),
        ("2:4", "2:4"),
        ("4:8", "4:8"),
        ("3:16", "3:16"),
        ("5:7", "5:7"),
        ("2:4t8", "1x8p"),
    ],
)
@pytest.mark.parametrize("groups", [1, 2])
def test_reported_names(text: str, found: str, groups: int) -> None:
    weight = np.random.default_rng(1).standard_normal((128, 64, 3, 3))
    pattern = parse_pattern(text)
    mask = pattern.mask(np.abs(weight), pattern.fixed_density or 0.5, groups)
    assert str(detect_pattern(mask, groups).pattern) == found


@pytest.mark.parametrize("text", ["1x16", "1x16p", "1x4pu", "2:4", "1:4"])
def test_kept_weights_that_happen_to_be_zero(text: str) -> None:
    rng = np.random.default_rng(2)
    pattern = parse_pattern(text)
    mask = pattern.mask(rng.random((64, 64, 3, 3)), pattern.fixed_density or 0.5)
    holed = mask & (rng.random(mask.shape) > 0.05)
    found = detect_pattern(holed)
    assert found.pattern is not None
    assert found.pattern.block == pattern.block
    assert found.density < mask_density(mask)
    assert found.padded_density == pytest.approx(executed(found.pattern, holed, 1))
    if not isinstance(pattern, OneByN) or pattern.balanced:
        assert found.padded_density <= found.density * (1 + TOLERANCE)
    too_many = mask & (rng.random(mask.shape) > 0.3)
    assert detect_pattern(too_many).pattern is None


def test_whole_kernels_need_the_mask_to_be_constant_over_positions() -> None:
    mask = OneByN(8).mask(np.random.default_rng(3).random((32, 32, 3, 3)), 0.5)
    assert detect_pattern(mask).pattern == OneByN(8, Granularity.KERNEL)
    mask[:, :, 0, 0] = mask[:, :, 2, 2] = False  # positions that no kernel uses are worth skipping
    found = detect_pattern(mask)
    assert found.pattern == OneByN(8, Granularity.POSITION)
    assert found.padded_density == found.density


def test_unbalanced_rows_are_padded_to_the_longest() -> None:
    saliency = np.random.default_rng(4).random((64, 32, 1, 1))
    saliency[:16] *= 4
    mask = OneByN(16, balanced=False).mask(saliency, 0.25)
    found = detect_pattern(mask)
    assert found.pattern == OneByN(16, Granularity.KERNEL, balanced=False)
    assert found.density == 0.25
    assert found.padded_density == mask[:16].mean() > 0.5


def test_rows_that_differ_little_count_as_balanced() -> None:
    mask = OneByN(16).mask(np.random.default_rng(5).random((64, 100, 1, 1)), 0.5)
    mask[:16, np.flatnonzero(~mask[0, :, 0, 0])[:2]] = True
    found = detect_pattern(mask)
    assert found.pattern == OneByN(16)
    assert found.padded_density == 0.52


def test_dense_and_empty() -> None:
    mask = np.ones((8, 8, 3, 3), dtype=bool)
    mask[0, 0] = False
    found = detect_pattern(mask)
    assert found.pattern == Dense()
    assert found.padded_density == 1
    assert "above 0.9" in found.reason
    found = detect_pattern(np.zeros((8, 8, 3, 3), dtype=bool))
    assert found.pattern is None
    assert found.density == found.padded_density == 0
    assert found.reason == "every weight is zero"


def test_unstructured_mask_has_no_pattern_but_a_reason() -> None:
    mask = np.random.default_rng(6).random((64, 64, 3, 3)) < 0.3
    found = detect_pattern(mask)
    counts = mask.reshape(64, -1).sum(axis=1)
    assert found.pattern is None
    assert found.density == pytest.approx(0.3, abs=0.01)
    assert found.padded_density == counts.max() / 576
    assert f"output channels keep {counts.min()} to {counts.max()} of 576 weights" in found.reason
    assert "blocks of 2 output channels would keep 0.51" in found.reason


def test_unstructured_rows_of_equal_length_have_no_pattern() -> None:
    rng = np.random.default_rng(7)
    mask = np.zeros((64, 100), dtype=bool)
    for row in mask:
        row[rng.choice(100, 25, replace=False)] = True
    found = detect_pattern(mask.reshape(64, 100, 1, 1))
    assert found.pattern is None
    assert found.padded_density == found.density


def test_depthwise_has_nothing_to_share() -> None:
    mask = np.random.default_rng(8).random((32, 1, 3, 3)) < 0.5
    found = detect_pattern(mask, groups=32)
    assert found.pattern is None
    assert "1 output channel" in found.reason


def test_blocks_do_not_straddle_groups() -> None:
    row = np.random.default_rng(9).random((1, 16, 3, 3)) < 0.5
    mask = np.repeat(row, 24, axis=0)
    assert detect_pattern(mask, groups=1).pattern == OneByN(24, Granularity.POSITION)
    assert detect_pattern(mask, groups=4).pattern == OneByN(6, Granularity.POSITION)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3), st.integers(1, 20), st.integers(1, 24), st.integers(0, 2**32 - 1))
def test_block_row_union(groups: int, per_group: int, n: int, seed: int) -> None:
    mask = np.random.default_rng(seed).random((groups * per_group, 3, 2, 2)) < 0.3
    union = block_row_union(mask, n, groups)
    sizes = block_row_sizes(len(mask), n, groups)
    starts = np.cumsum([0, *sizes[:-1]])
    expected = np.stack([mask[start : start + size].any(axis=0) for start, size in zip(starts, sizes, strict=True)])
    np.testing.assert_array_equal(union, expected)


def test_bad_arguments() -> None:
    mask = np.ones((4, 4, 1, 1), dtype=bool)
    with pytest.raises(ValueError, match="shape"):
        detect_pattern(mask[0])
    with pytest.raises(ValueError, match="groups"):
        detect_pattern(mask, groups=3)
    with pytest.raises(ValueError, match="at least 1"):
        block_row_union(mask, 0)


RESNET50 = [
    (count, shape)
    for width, blocks, previous in ((64, 3, 64), (128, 4, 256), (256, 6, 512), (512, 3, 1024))
    for count, shape in (
        (1, (width * 4, previous, 1, 1)),
        (1, (width, previous, 1, 1)),
        (blocks - 1, (width, width * 4, 1, 1)),
        (blocks, (width, width, 3, 3)),
        (blocks, (width * 4, width, 1, 1)),
    )
]


@pytest.mark.parametrize("text", ["unstructured", "1x16", "1x2p", "7:32"])
def test_resnet50_takes_less_than_two_seconds(text: str) -> None:
    rng = np.random.default_rng(0)
    masks = []
    for count, shape in RESNET50:
        saliency = rng.random(shape, dtype=np.float32)
        pattern = None if text == "unstructured" else parse_pattern(text)
        mask = saliency < 0.5 if pattern is None else pattern.mask(saliency, pattern.fixed_density or 0.5)
        masks += [mask] * count
    assert len(masks) == 52
    start = time.perf_counter()
    found = {str(detect_pattern(mask).pattern) for mask in masks}
    assert time.perf_counter() - start < 2
    assert found <= {text, text.rstrip("p"), "None"}
    assert ("None" in found) is (text == "unstructured")

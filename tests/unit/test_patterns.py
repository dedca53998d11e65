"""Masks against a plain-Python oracle, text forms, and what is refused."""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tvm_nm.masks import block_row_sizes, mask_density, reduce_block_rows, round_half_up, tail_quota
from tvm_nm.patterns import NM, Dense, Granularity, OneByN, SparsityPattern, TileNM, parse_pattern

KERNEL, POSITION = Granularity.KERNEL, Granularity.POSITION


def nm_pairs() -> st.SearchStrategy[tuple[int, int]]:
    return st.integers(2, 32).flatmap(lambda m: st.tuples(st.integers(1, m - 1), st.just(m)))


def patterns() -> st.SearchStrategy[SparsityPattern]:
    return st.one_of(
        st.just(Dense()),
        nm_pairs().map(lambda nm: NM(*nm)),
        st.builds(lambda nm, tile: TileNM(*nm, tile), nm_pairs(), st.integers(2, 32)),
        st.builds(OneByN, st.integers(2, 32), st.sampled_from(Granularity), st.booleans()),
    )


@st.composite
def saliencies(draw: st.DrawFn) -> tuple[np.ndarray, int]:
    """Small layers of whole-number saliency (sums are exact), with as many ties as the draw likes."""
    groups = draw(st.integers(1, 3))
    shape = (
        groups * draw(st.integers(1, 9)),
        draw(st.integers(1, 9)),
        draw(st.integers(1, 3)),
        draw(st.integers(1, 3)),
    )
    levels = draw(st.sampled_from([1, 2, 5, 1000]))
    values = np.random.default_rng(draw(st.integers(0, 2**32 - 1))).integers(0, levels, shape)
    return values.astype(np.float32), groups


densities = st.floats(0.01, 1.0)


def best(scores: dict[tuple[int, ...], Fraction], count: int) -> set[tuple[int, ...]]:
    """The `count` keys of largest score, the first key among equals."""
    return set(sorted(scores, key=lambda key: (-scores[key], key))[:count])


def oracle(pattern: SparsityPattern, saliency: np.ndarray, density: float | None, groups: int) -> np.ndarray:
    """The definition, one weight at a time."""
    channels, inputs, height, width = saliency.shape
    mask = np.zeros(saliency.shape, dtype=bool)
    if isinstance(pattern, Dense):
        return ~mask
    per_group = channels // groups
    rows = [
        range(group * per_group + start, min(group * per_group + start + pattern.block, (group + 1) * per_group))
        for group in range(groups)
        for start in range(0, per_group, pattern.block)
    ]

    def score(row: range, positions: list[tuple[int, int, int]]) -> Fraction:
        return Fraction(sum(int(saliency[(channel, *position)]) for channel in row for position in positions))

    def keep(row: range, positions: list[tuple[int, int, int]]) -> None:
        for channel, position in itertools.product(row, positions):
            mask[(channel, *position)] = True

    if isinstance(pattern, NM | TileNM):
        for row, start, kh, kw in itertools.product(rows, range(0, inputs, pattern.m), range(height), range(width)):
            group = range(start, min(start + pattern.m, inputs))
            exact = Fraction(len(group) * pattern.n, pattern.m)
            count = max(1, math.floor(exact + Fraction(1, 2)))
            for (ic,) in best({(ic,): score(row, [(ic, kh, kw)]) for ic in group}, count):
                keep(row, [(ic, kh, kw)])
        return mask
    assert isinstance(pattern, OneByN)
    assert density is not None
    whole = list(itertools.product(range(height), range(width)))
    blocks: list[list[tuple[int, int, int]]] = [
        [(ic, *at) for at in positions]
        for ic in range(inputs)
        for positions in ([whole] if pattern.granularity is KERNEL else [[at] for at in whole])
    ]
    if pattern.balanced:
        count = max(1, round_half_up(density * len(blocks)))
        for row in rows:
            for (index,) in best({(i,): score(row, block) for i, block in enumerate(blocks)}, count):
                keep(row, blocks[index])
    else:
        scores = {(r, i): score(row, block) / len(row) for r, row in enumerate(rows) for i, block in enumerate(blocks)}
        for r, index in best(scores, max(1, round_half_up(density * len(scores)))):
            keep(rows[r], blocks[index])
    return mask


@settings(max_examples=300, deadline=None)
@given(patterns(), saliencies(), densities)
def test_mask_is_the_definition(pattern: SparsityPattern, layer: tuple[np.ndarray, int], density: float) -> None:
    saliency, groups = layer
    chosen = None if pattern.fixed_density is not None else density
    mask = pattern.mask(saliency, chosen, groups)
    assert mask.dtype == np.bool_
    assert mask.shape == saliency.shape
    expected = oracle(pattern, saliency, chosen, groups)
    if isinstance(pattern, OneByN) and not pattern.balanced:
        # Means over 3 channels may tie in float32 where they do not in the oracle: the masks are equally good.
        assert blocks_kept(pattern, mask, groups) == blocks_kept(pattern, expected, groups)
        assert mean_kept(pattern, saliency, mask, groups) == pytest.approx(
            mean_kept(pattern, saliency, expected, groups), rel=1e-5
        )
        return
    np.testing.assert_array_equal(mask, expected)


def blocks_kept(pattern: SparsityPattern, mask: np.ndarray, groups: int) -> int:
    """Positions kept, counted once a block row."""
    starts = np.cumsum([0, *block_row_sizes(len(mask), pattern.block, groups)[:-1]])
    return int(mask[starts].sum())


def mean_kept(pattern: SparsityPattern, saliency: np.ndarray, mask: np.ndarray, groups: int) -> float:
    """What the unbalanced ranking maximises: the sum over kept blocks of their mean saliency per channel."""
    sizes = block_row_sizes(len(mask), pattern.block, groups)
    return float((saliency.astype(np.float64) * mask / np.repeat(sizes, sizes)[:, None, None, None]).sum())


@settings(max_examples=100, deadline=None)
@given(saliencies(), densities, st.sampled_from([2, 4, 8]), st.sampled_from(Granularity))
def test_unbalanced_mask_is_the_definition_for_powers_of_two(
    layer: tuple[np.ndarray, int], density: float, n: int, granularity: Granularity
) -> None:
    saliency, groups = layer
    saliency = np.concatenate([saliency] * 8)  # OC / groups is a multiple of 8: no short row, means are exact
    pattern = OneByN(n, granularity, balanced=False)
    np.testing.assert_array_equal(pattern.mask(saliency, density, groups), oracle(pattern, saliency, density, groups))


@settings(max_examples=100, deadline=None)
@given(patterns(), saliencies(), densities)
def test_channels_of_a_block_row_share_the_choice(
    pattern: SparsityPattern, layer: tuple[np.ndarray, int], density: float
) -> None:
    saliency, groups = layer
    mask = pattern.mask(saliency, None if pattern.fixed_density is not None else density, groups)
    starts = np.cumsum([0, *block_row_sizes(len(mask), pattern.block, groups)])
    for start, stop in itertools.pairwise(starts):
        assert (mask[start:stop] == mask[start]).all()
        assert start // (len(mask) // groups) == (stop - 1) // (len(mask) // groups)


@pytest.mark.parametrize("granularity", Granularity)
def test_balanced_rows_keep_equally_many(granularity: Granularity) -> None:
    saliency = np.random.default_rng(0).random((48, 20, 3, 3))
    saliency[:16] *= 100  # an unbalanced ranking would give these rows everything
    mask = OneByN(16, granularity).mask(saliency, 0.25)
    assert set(mask.reshape(48, -1).sum(axis=1)) == {45}
    assert mask_density(mask) == 0.25
    unbalanced = OneByN(16, granularity, balanced=False).mask(saliency, 0.25)
    assert mask_density(unbalanced) == 0.25
    assert unbalanced[:16].mean() == 0.75
    assert not unbalanced[16:].any()  # rows may end up empty


def test_short_block_row_competes_by_its_mean() -> None:
    saliency = np.array([3, 3, 3, 3, 2, 4], dtype=np.float32).reshape(6, 1, 1, 1)
    mask = OneByN(4, balanced=False).mask(saliency, 0.5)  # sums 12 and 6, means 3 and 3: the first wins the tie
    assert mask.ravel().tolist() == [True] * 4 + [False] * 2
    saliency[5] = 5
    mask = OneByN(4, balanced=False).mask(saliency, 0.5)
    assert mask.ravel().tolist() == [False] * 4 + [True] * 2


def test_ties_keep_the_lower_index() -> None:
    flat = np.ones((4, 8, 1, 1))
    assert NM(2, 4).mask(flat)[0].ravel().tolist() == [True, True, False, False] * 2
    assert OneByN(2).mask(flat, 0.25)[0].ravel().tolist() == [True] * 2 + [False] * 6
    assert OneByN(2, balanced=False).mask(flat, 0.25)[:, :4].any(axis=(1, 2, 3)).tolist() == [True, True, False, False]


@pytest.mark.parametrize(
    ("size", "n", "m", "kept"),
    [(1, 2, 4, 1), (2, 2, 4, 1), (3, 2, 4, 2), (1, 1, 32, 1), (3, 3, 4, 2), (31, 31, 32, 30)],
)
def test_tail_quota(size: int, n: int, m: int, kept: int) -> None:
    assert tail_quota(size, n, m) == kept
    saliency = np.random.default_rng(size).random((2, size, 1, 1))
    assert NM(n, m).mask(saliency).sum(axis=1).ravel().tolist() == [kept, kept]


def test_every_layer_keeps_something() -> None:
    saliency = np.zeros((5, 3, 2, 2))
    for text in ("1x4", "1x4p", "1x4u", "1x4pu"):
        assert parse_pattern(text).mask(saliency, 1e-6).any(), text
    assert OneByN(4).mask(saliency, 1e-6).any(axis=(1, 2, 3)).all()


@settings(max_examples=300)
@given(patterns())
def test_text_form_round_trips(pattern: SparsityPattern) -> None:
    assert parse_pattern(str(pattern)) == pattern
    assert parse_pattern(f"  {str(pattern).upper()} ") == pattern


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("dense", Dense()),
        ("2:4", NM(2, 4)),
        ("2:4t8", TileNM(2, 4, 8)),
        ("1x16", OneByN(16, KERNEL)),
        ("1x4p", OneByN(4, POSITION)),
        ("1x16u", OneByN(16, KERNEL, balanced=False)),
        ("1x4pu", OneByN(4, POSITION, balanced=False)),
    ],
)
def test_text_forms_of_the_documentation(text: str, pattern: SparsityPattern) -> None:
    assert parse_pattern(text) == pattern
    assert str(pattern) == text


@pytest.mark.parametrize(
    "text",
    ["", "4:2", "0:4", "4:4", "2:33", "2:4t1", "2:4t33", "2:4t", "1x1", "1x33", "2x4", "1x4up", "1x", "1x٤", "1x4pp"],
)
def test_bad_text_is_refused_with_the_valid_forms(text: str) -> None:
    with pytest.raises(ValueError, match=r"bad sparsity pattern.*valid forms: dense, 2:4 ") as error:
        parse_pattern(text)
    assert repr(text) in str(error.value)


@pytest.mark.parametrize(
    "build", [lambda: NM(2.0, 4), lambda: NM(True, 4), lambda: OneByN(4.0), lambda: TileNM(1, 4, "8")]
)
def test_sizes_must_be_integers(build: object) -> None:
    with pytest.raises(ValueError, match="integer"):
        build()  # type: ignore[operator]


def test_patterns_are_immutable_and_hashable() -> None:
    assert len({NM(2, 4), NM(2, 4), OneByN(4), OneByN(4, POSITION), Dense(), Dense()}) == 4
    with pytest.raises(dataclasses.FrozenInstanceError):
        NM(2, 4).n = 3  # type: ignore[misc]


@pytest.mark.parametrize("density", [0.0, -0.5, 1.5, math.nan, math.inf])
@pytest.mark.parametrize("pattern", [OneByN(4), NM(2, 4), Dense()])
def test_density_out_of_range(pattern: SparsityPattern, density: float) -> None:
    with pytest.raises(ValueError, match="density"):
        pattern.check_density(density)


def test_density_must_go_with_the_pattern() -> None:
    with pytest.raises(ValueError, match="1x4 needs a density"):
        OneByN(4).mask(np.ones((4, 4, 1, 1)))
    with pytest.raises(ValueError, match=r"2:4 has density 0.5, not 0.25"):
        NM(2, 4).mask(np.ones((4, 4, 1, 1)), 0.25)
    with pytest.raises(ValueError, match="dense has density 1"):
        Dense().check_density(0.5)
    assert NM(1, 3).check_density(0.33333334) == 1 / 3
    assert TileNM(2, 4, 8).check_density(None) == 0.5


@pytest.mark.parametrize(
    ("saliency", "groups", "message"),
    [
        (np.ones((4, 4)), 1, "shape"),
        (np.ones((4, 0, 1, 1)), 1, "shape"),
        (-np.ones((4, 4, 1, 1)), 1, "non-negative"),
        (np.full((4, 4, 1, 1), np.nan), 1, "finite"),
        (np.full((4, 4, 1, 1), np.inf), 1, "finite"),
        (np.ones((4, 4, 1, 1)), 3, "groups"),
        (np.ones((4, 4, 1, 1)), 0, "groups"),
    ],
)
def test_bad_saliency_is_refused(saliency: np.ndarray, groups: int, message: str) -> None:
    for pattern in (OneByN(2), Dense(), NM(2, 4)):
        with pytest.raises(ValueError, match=message):
            pattern.mask(saliency, pattern.fixed_density or 0.5, groups)


def test_saliency_is_left_alone_and_may_be_integers_or_strided() -> None:
    saliency = np.random.default_rng(0).integers(0, 9, (8, 12, 3, 3))
    before = saliency.copy()
    for pattern in (OneByN(4), NM(2, 4), TileNM(2, 4, 4)):
        mask = pattern.mask(saliency, pattern.fixed_density or 0.5)
        strided = np.asfortranarray(saliency.astype(np.float64))
        np.testing.assert_array_equal(pattern.mask(strided, pattern.fixed_density or 0.5), mask)
    np.testing.assert_array_equal(saliency, before)


def test_round_half_up_forgives_binary_fractions() -> None:
    assert [round_half_up(value) for value in (0.5, 1.5, 2.5, 2.4999)] == [1, 2, 3, 2]
    assert round_half_up(0.35 * 90) == 32  # 31.499999999999996


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 4), st.integers(1, 40), st.integers(1, 33))
def test_block_rows_are_reduced_in_order(groups: int, per_group: int, n: int) -> None:
    sizes = block_row_sizes(groups * per_group, n, groups)
    assert sizes.sum() == groups * per_group
    assert len(sizes) == groups * math.ceil(per_group / n)
    values = np.arange(groups * per_group * 2).reshape(-1, 2)
    expected = np.add.reduceat(values, np.cumsum([0, *sizes[:-1]]), axis=0)
    np.testing.assert_array_equal(reduce_block_rows(np.add, values, n, groups), expected)


@pytest.mark.parametrize("text", ["2:4", "7:32", "2:4t8", "1x16", "1x4p", "1x16u", "1x4pu"])
def test_largest_layer_of_resnet50_takes_less_than_a_second(text: str) -> None:
    saliency = np.random.default_rng(0).random((512, 512, 3, 3), dtype=np.float32)
    pattern = parse_pattern(text)
    start = time.perf_counter()
    mask = pattern.mask(saliency, pattern.fixed_density or 0.5)
    assert time.perf_counter() - start < 1
    assert mask_density(mask) == (pattern.fixed_density or 0.5)

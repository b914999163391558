# SPDX-License-Identifier: Apache-2.0
"""Tests of the exact nearest neighbor search: it finds what comparing all with all finds."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from openvino_export.memory.search import CELLS, SMALLEST_CELL, NearestNeighbors, product

Array = NDArray[np.float32]


def assert_exact(bank: Array, queries: Array) -> None:
    """Compare with all distances in double precision."""
    distances, index = NearestNeighbors(bank).search(queries)
    differences = queries[:, None].astype(np.float64) - bank[None]
    every = np.sqrt((differences**2).sum(axis=2))
    # As precisely as the values themselves are known.
    rounding = 1e-5 * every.min(axis=1) + 1e-6 * np.abs(np.concatenate([bank, queries])).max()
    assert (distances - every.min(axis=1) <= rounding).all()
    assert (np.abs(every[np.arange(len(queries)), index] - distances) <= rounding).all()
    assert distances.dtype == np.float32


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    count=st.integers(1, 6000),
    dimension=st.integers(1, 160),
    rank=st.integers(1, 160),
    clusters=st.integers(1, 50),
    tightness=st.sampled_from([0.0, 1e-4, 0.1, 1.0]),
    scale=st.sampled_from([1e-6, 1.0, 1e6]),
    offset=st.sampled_from([0.0, 1.0, 1e3]),
)
def test_equals_comparing_all(
    seed: int,
    count: int,
    dimension: int,
    rank: int,
    clusters: int,
    tightness: float,
    scale: float,
    offset: float,
) -> None:
    """For duplicates, clusters, data of low rank, far from the origin, tiny and huge, and queries away from all."""
    rng = np.random.default_rng(seed)
    rank = min(rank, dimension)
    mixing = rng.normal(size=(rank, dimension))
    centers = rng.normal(size=(clusters, rank))

    def draw(n: int) -> Array:
        points = centers[rng.integers(clusters, size=n)] + tightness * rng.normal(size=(n, rank))
        return ((points @ mixing + offset) * scale).astype(np.float32)

    bank = draw(count)
    away = (rng.normal(size=(20, dimension)) * 30 * scale).astype(np.float32)
    assert_exact(bank, np.concatenate([draw(60), bank[rng.integers(count, size=20)], away]))


def test_as_many_cells_as_the_bank_fills() -> None:
    """A full bank is divided, a small one is not; both are exact, and so is a query of an unseen kind."""
    rng = np.random.default_rng(0)
    basis = rng.normal(size=(20, 152))
    count = CELLS * SMALLEST_CELL + 7
    bank = rng.normal(size=(count, 20)) @ basis + 0.1 * rng.normal(size=(count, 152))
    bank = bank.astype(np.float32)
    queries = (rng.normal(size=(200, 20)) @ basis).astype(np.float32)
    queries[::10] *= 5
    full = NearestNeighbors(bank)
    assert len(full.blocks) > CELLS // 2
    assert full.lengths.sum() == len(bank)
    assert len(NearestNeighbors(bank[:40]).blocks) == 1
    assert_exact(bank, queries)
    assert_exact(bank[:40], queries)
    assert_exact(bank, queries[:1])


def test_most_distances_are_never_computed() -> None:
    """On patches that lie near a few directions, as those of images do, the bounds leave few vectors to compare."""
    rng = np.random.default_rng(1)
    scales = 0.9 ** np.arange(152)
    bank = (rng.normal(size=(10_000, 152)) * scales).astype(np.float32)
    search = NearestNeighbors(bank)
    queries = bank[:256] + (0.2 * rng.normal(size=(256, 152)) * scales).astype(np.float32)
    points, near, nearest, _ = search._begin(queries)
    assert near.mean() < 0.5
    rows, _ = search._candidates(points, near)
    assert len(rows) < 0.01 * len(queries) * len(bank)
    assert (np.abs(search.search(queries)[0] - np.sqrt(nearest)) > 1e-3).any(), "the own cell does not suffice"


def test_no_more_bounds_at_once_than_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many queries are searched for in parts, with the same result."""
    rng = np.random.default_rng(4)
    bank, queries = (rng.normal(size=(count, 12)).astype(np.float32) for count in (3000, 501))
    search = NearestNeighbors(bank)
    whole = search.search(queries)
    sizes = []
    candidates = search._candidates

    def watched(points: Array, near: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        sizes.append(len(points) * len(bank))
        return candidates(points, near)

    monkeypatch.setattr(search, "_candidates", watched)
    monkeypatch.setattr("openvino_export.memory.search.LARGEST_TABLE", 2**17)
    parts = search.search(queries)
    assert len(sizes) == 12
    assert max(sizes) <= 2**17
    assert all(np.array_equal(one, other) for one, other in zip(parts, whole, strict=True))


def test_of_equal_vectors_the_first_is_found() -> None:
    """As in torch, so that images that vote by what two variants share are judged by the same of them."""
    rng = np.random.default_rng(5)
    bank = rng.normal(size=(400, 12)).astype(np.float32)
    again = rng.integers(400, size=3000)
    queries = bank[again[:200]] + np.float32(1e-3)
    assert np.array_equal(NearestNeighbors(np.concatenate([bank, bank[again]])).search(queries)[1], again[:200])
    backwards = NearestNeighbors(np.concatenate([bank[again], bank])).search(queries)[1]
    assert np.array_equal(backwards, [np.flatnonzero(again == number)[0] for number in again[:200]])


def test_no_query() -> None:
    """Nothing is found for nothing."""
    distances, index = NearestNeighbors(np.ones((5, 3), np.float32)).search(np.empty((0, 3), np.float32))
    assert distances.shape == index.shape == (0,)


def test_several_callers_at_once() -> None:
    """Each gets its own result."""
    rng = np.random.default_rng(2)
    bank = rng.normal(size=(5000, 24)).astype(np.float32)
    search = NearestNeighbors(bank)
    queries = [bank[first : first + 300] + np.float32(0.01) for first in range(0, 3000, 300)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(search.search, queries * 3))
    for query, (distances, _) in zip(queries * 3, found, strict=True):
        assert distances == pytest.approx(np.full(300, 0.01 * np.sqrt(24)), rel=1e-3) or (distances < 0.05).all()
        assert np.array_equal(distances, search.search(query)[0])


def test_products_in_pieces() -> None:
    """A product is the same in one piece and in many."""
    rng = np.random.default_rng(3)
    for rows, inner, columns in ((1, 1, 1), (1000, 48, 90), (77, 152, 47), (3, 500, 2000)):
        left, right = (rng.normal(size=shape).astype(np.float32) for shape in ((rows, inner), (inner, columns)))
        assert np.allclose(product(left, right), left @ right, atol=1e-3)

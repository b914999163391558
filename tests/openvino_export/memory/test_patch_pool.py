# SPDX-License-Identifier: Apache-2.0
"""Tests of the pool: bounded, with the certificate of all that streamed through it."""

import tracemalloc

import numpy as np
import pytest

from openvino_export.memory import update as updates
from openvino_export.memory.memory_bank import MemoryBank
from openvino_export.memory.update import Update

from .banks import Ledger, check, distances_between, draw, learned


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_certificate_with_an_approximate_index(monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    """A pool that is large enough for the inverted lists of faiss, which miss some neighbors."""
    monkeypatch.setattr(updates, "SMALLEST_POOL", 9000)
    update = Update(MemoryBank(1000, dtype))
    images: Ledger = {name: [draw("curve", name, seed, 700, 6) for seed in range(14)] for name in "ab"}
    for name, each in images.items():
        for image in each:
            update.add(image, name)
        assert type(update.pools[name]._index).__name__ == "IndexIVFFlat"
    update.commit()
    check(update.bank, images)


@pytest.mark.usefixtures("small_pool")
def test_known_patches_take_no_room_in_the_pool() -> None:
    """Once the pool was thinned, what lies within its merge radius is only counted, also in the next image."""
    update = Update(MemoryBank(30))
    for seed in range(12):
        update.add(draw("lobes", "a", seed, 60), "a")
    pool = update.pools["a"]
    points = pool.points
    assert pool.merge_radius > 0
    image = 50 + draw("lobes", "a", 12, 20)
    for added in (True, False):
        update.add(image, "a")
        assert (len(pool.points) > len(points)) == added
        points = pool.points


@pytest.mark.usefixtures("small_pool")
def test_certificate_far_from_the_origin() -> None:
    """There faiss loses the digits of the distances, once a search is large enough to be a matrix product."""
    rng = np.random.default_rng(0)
    sheet = np.random.default_rng(7).normal(size=(2, 152))
    images = {"a": [(30 + rng.normal(size=(1040, 2)) @ sheet).astype(np.float32) for _ in range(3)]}
    check(learned(MemoryBank(500), images), images)


def test_prequential_score_by_the_index(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once the pool is large and indexed, the score of an image still is the distance to it."""
    monkeypatch.setattr(updates, "SMALLEST_POOL", 9000)
    update = Update(MemoryBank(1000))
    for seed in range(14):
        update.add(draw("curve", "a", seed, 700, 6), "a")
    pool = update.pools["a"]
    assert type(pool._index).__name__ == "IndexIVFFlat"
    points, image = pool.points, draw("curve", "a", 99, 700, 6)
    assert pool.absorb(image) == pytest.approx(distances_between(image, points).max(), rel=1e-4)


def test_image_larger_than_budget_and_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes through the pool in parts, in any float type."""
    monkeypatch.setattr(updates, "SMALLEST_POOL", 80)
    image = draw("lobes", "a", 0, 1000)
    bank = learned(MemoryBank(20), {"a": [image.astype(np.float64)]})
    assert len(bank) == 20
    assert bank.variants["a"].cover_radii.dtype == np.float32
    check(bank, {"a": [image]})


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("shape", ["lobes", "black"])
def test_repeated_patches_add_no_vectors(monkeypatch: pytest.MonkeyPatch, dtype: str, shape: str) -> None:
    """Without a hash, often enough that the pool overflows, in one update and in later ones."""
    monkeypatch.setattr(updates, "SMALLEST_POOL", 600)
    image = draw(shape, "a", 0, 100)
    bank = learned(MemoryBank(200, dtype), {"a": [image] * 15})
    vectors = bank.vectors()
    assert len(vectors) == len(np.unique(image.astype(dtype), axis=0))
    assert bank.variants["a"].merge_radius == 0  # nothing was lost
    check(bank, {"a": [image]})
    update = Update(bank)
    for _ in range(3):
        for _ in range(10):
            update.add(image, "a")
        report = update.commit()
        assert (report.added, report.removed) == ({}, {})
    np.testing.assert_array_equal(np.unique(update.bank.vectors(), axis=0), np.unique(vectors, axis=0))


@pytest.mark.usefixtures("small_pool")
def test_open_pools_are_bounded() -> None:
    """Together they take no more room than some full ones; what was learned is not lost."""
    update = Update(MemoryBank(30))
    images = {name: [draw("curve", name, seed, 50, 4) for seed in range(9)] for name in "abcdefgh"}
    opened = 0
    for seed in range(9):
        for name, each in images.items():
            update.add(each[seed], name)
            opened = max(opened, len(update.pools))
            assert sum(len(pool.points) for pool in update.pools.values()) <= 4 * updates.pool_capacity(update.bank)
    assert opened > 1
    assert update.commit().variants == dict.fromkeys("abcdefgh", 9)
    check(update.bank, images)


def test_memory_does_not_grow_with_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten times the images take no more memory at the peak, of NumPy and of the index of faiss."""
    monkeypatch.setattr(updates, "SMALLEST_POOL", 800)

    def peaks(images: int) -> tuple[int, int]:
        update, indexed = Update(MemoryBank(100)), 0
        tracemalloc.start()
        for seed in range(images):
            update.add(draw("lobes", "a", seed, 64, 24), "a", image_hash=seed)
            indexed = max(indexed, update.pools["a"]._index.ntotal)
        update.commit()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak, indexed

    peaks(2)  # imports and caches
    peak, indexed = peaks(30)
    peak_of_many, indexed_of_many = peaks(300)
    assert indexed_of_many <= 800 + 64
    assert indexed > 0
    assert peak_of_many < 1.05 * peak

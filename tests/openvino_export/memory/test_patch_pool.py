# SPDX-License-Identifier: Apache-2.0
"""Tests of the pool: bounded, with the certificate of all that streamed through it."""

import tracemalloc

import numpy as np
import pytest

from openvino_export.memory import patch_pool
from openvino_export.memory import update as updates
from openvino_export.memory.memory_bank import MemoryBank
from openvino_export.memory.patch_pool import PatchPool
from openvino_export.memory.update import Update
from openvino_export.memory.variant import describe

from .banks import ROUNDING, Ledger, check, distances_between, draw, filled, learned


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
    check(bank, {"a": [image] * 15})
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
    monkeypatch.setattr(patch_pool, "LEARNED_IMAGES", 8)

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


# Where a vector came from


@pytest.mark.parametrize("capacity", [60, 5000])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_vectors_know_their_image_and_its_neighbors(monkeypatch: pytest.MonkeyPatch, dtype: str, capacity: int) -> None:
    """Whatever was thinned, and in a later update: no patch of another image is nearer than the one that stands in."""
    monkeypatch.setattr(updates, "SMALLEST_POOL", capacity)
    images = [draw("lobes", "a", seed, 40) for seed in range(9)]
    bank = MemoryBank(30 if capacity == 60 else 500, dtype)
    for part in (images[:1], images[1:6], images[6:]):
        bank = learned(bank, {"a": part})
        variant = bank.variants["a"]
        seen = images[: variant.images]
        held = [image.astype(dtype).astype(np.float32) for image in seen]
        for vector, origin, stand_in in zip(variant.vectors, variant.origins, variant.stand_ins, strict=True):
            assert (held[origin] == vector).all(axis=1).any()
            others = [distances_between(vector[None], image).min() for i, image in enumerate(held) if i != origin]
            assert min(others, default=np.inf) <= stand_in * ROUNDING + 1e-3
            # When it came, those before it were there to compare with, but for what the pool was thinned by.
            if origin and capacity == 5000:
                assert stand_in <= distances_between(vector[None], np.concatenate(held[:origin])).max() + 1e-2
    assert len({*variant.origins}) > 3


def pool_of(dimension: int, capacity: int) -> PatchPool:
    """A pool of a variant that is not known."""
    return PatchPool("a", None, dimension, capacity, np.dtype(np.float32))


def absorb(pool: PatchPool, *patches: tuple[float, float]) -> list[tuple[float, float, float]]:
    """Take in an image, and return all points with what stands in for them."""
    image = np.array(patches, np.float32)
    pool.absorb(image)
    pool.count_images(*describe(image), images=1)
    return sorted(
        (*point, float(stand_in)) for point, stand_in in zip(pool.points.tolist(), pool.stand_ins, strict=True)
    )


def test_images_stand_in_for_each_other() -> None:
    """What comes, for the nearest that is there; and that for what comes. By hand."""
    pool, inf = pool_of(2, 99), np.inf
    assert absorb(pool, (0, 0), (10, 0), (0, 1)) == [(0, 0, inf), (0, 1, inf), (10, 0, inf)]
    assert absorb(pool, (2, 0), (2.5, 0)) == [(0, 0, 2), (0, 1, inf), (2, 0, 2), (2.5, 0, 2.5), (10, 0, inf)]
    assert absorb(pool, (10, 3), (0, 0)) == [
        (0, 0, 0),
        (0, 0, 0),
        (0, 1, inf),
        (2, 0, 2),
        (2.5, 0, 2.5),
        (10, 0, 3),
        (10, 3, 3),
    ]


def test_an_image_does_not_stand_in_for_itself() -> None:
    """Also if it is so large that it comes in parts, nor do images of which nobody knows which they are."""
    pool = pool_of(4, 40)
    image = draw("lobes", "a", 0, 100)
    pool.absorb(image)
    pool.count_images(*describe(image), images=1)
    assert np.isinf(pool.stand_ins).all()
    unknown = pool_of(4, 40)
    for _ in range(2):
        unknown.absorb_points(image, np.zeros(100, "f4"), np.full(100, -1, np.int32), np.full(100, np.inf, np.float32))
    assert np.isinf(unknown.stand_ins).all()
    pool.absorb(draw("lobes", "a", 1, 100))
    assert np.isfinite(pool.stand_ins).any()


def test_images_to_judge_by_are_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many images come, those that are kept are from the first to the last, and as many as may be."""
    monkeypatch.setattr(patch_pool, "LEARNED_IMAGES", 16)
    pool = PatchPool("a", filled().variants["a"], 4, 500, np.dtype(np.float32))
    for count in range(1, 200):
        image = draw("lobes", "a", count, 6)
        pool.absorb(image, (2, 3), (20, 30))
        pool.count_images(*describe(image), images=1)
        kept = sorted(sample.origin for sample in pool.samples)
        assert len(kept) == min(count, 16)
        gaps = np.diff([2, *kept, 3 + count])  # three were known
        assert gaps.max() <= 1 + 3 * count / 16
    sample = max(pool.samples, key=lambda each: each.origin)
    np.testing.assert_array_equal(sample.patches, draw("lobes", "a", sample.origin - 2, 6).astype(np.float16))
    assert (sample.grid, sample.map_size) == ((2, 3), (20, 30))

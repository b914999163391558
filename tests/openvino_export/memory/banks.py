# SPDX-License-Identifier: Apache-2.0
"""What the tests of the memory share: patches of many kinds, banks, and the promises that they are held to.

Coverage is computed here from all patches ever learned, in double precision and by brute force.
"""

import copy
import json
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache

import numpy as np
import torch
from hypothesis import settings
from numpy.typing import NDArray

from openvino_export.memory import state
from openvino_export.memory.leave_one_out import CALIBRATION_PATCHES, Sample, kept_patches
from openvino_export.memory.memory_bank import MemoryBank
from openvino_export.memory.update import Update
from openvino_export.memory.variant import Calibration, Variant

Array = NDArray[np.float32]
Ledger = dict[str, list[Array]]  # patches of each image by variant

REPEATABLE = settings(derandomize=True, deadline=None, max_examples=40, database=None)
ROUNDING = 1 + 1e-5


def lobes(seed: int, count: int, dimension: int, rng: np.random.Generator) -> Array:
    """Three lobes of very different density, which stay where they are for a seed."""
    centers = np.random.default_rng(seed).normal(size=(3, dimension)) * 10
    which = rng.choice(3, count, p=[0.8, 0.15, 0.05])
    return centers[which] + rng.normal(size=(count, dimension)) * np.array([0.1, 1, 3])[which, None]


def curve(seed: int, count: int, dimension: int, rng: np.random.Generator) -> Array:
    """A closed curve through all dimensions."""
    phases = np.random.default_rng(seed).uniform(0, 6, dimension)
    return 5 * np.sin(rng.uniform(0, 2 * np.pi, (count, 1)) * np.arange(1, dimension + 1) + phases)


def repeated(seed: int, count: int, dimension: int, rng: np.random.Generator) -> Array:
    """Few points, each many times."""
    return rng.choice(np.random.default_rng(seed).normal(size=(7, dimension)), count)


def lattice(seed: int, count: int, dimension: int, rng: np.random.Generator) -> Array:
    """Nothing but ties."""
    return seed % 5 + rng.integers(0, 3, (count, dimension)).astype(float)


def far_off(seed: int, count: int, dimension: int, rng: np.random.Generator) -> Array:
    """Lobes far from the origin, where differences of squares lose all digits."""
    return 500 + lobes(seed, count, dimension, rng) / 10


def black(seed: int, count: int, dimension: int, rng: np.random.Generator) -> Array:
    """Zeros, as an image without light may give."""
    del seed, rng
    return np.zeros((count, dimension))


SHAPES = {function.__name__: function for function in (lobes, curve, repeated, lattice, far_off, black)}


def draw(shape: str, variant: str, seed: int, count: int, dimension: int = 4, magnitude: float = 1.0) -> Array:
    """Patches of one image of a variant."""
    place = sum(map(ord, variant))
    points = SHAPES[shape](place, count, dimension, np.random.default_rng([place, seed]))
    return (points * magnitude).astype(np.float32)


def learned(bank: MemoryBank, images: Ledger) -> MemoryBank:
    """The bank after an update with images of some variants."""
    update = Update(bank)
    for name, each in images.items():
        for patches in each:
            update.add(patches, name)
    update.commit()
    return update.bank


def filled(size: int = 60, variants: str = "ab", *, dtype: str = "float32", validated: bool = False) -> MemoryBank:
    """A bank of some variants, of three images each, and of six that were not learned, two of them anomalous."""
    update = Update(MemoryBank(size, dtype))
    for name in variants:
        for seed in range(3):
            update.add(draw("lobes", name, seed, 40), name, image_hash=100 * ord(name) + seed)
    update.flush()
    if validated:
        for name in variants:
            images = [draw("lobes", name, seed, 40) + 4 * (seed >= 54) for seed in range(50, 56)]
            update.validate(name, not_learned(update.bank.variants[name], images, np.arange(6) >= 4))
    update.commit()
    return update.bank


def not_learned(variant: Variant, images: Sequence[Array], labels: NDArray[np.bool_] | None = None) -> Calibration:
    """What is kept of images that are not learned, all of them good by default."""
    kept = [kept_patches(variant, Sample(-1, image)) for image in images]
    return Calibration(
        patches=np.stack([patches for patches, _ in kept]),
        origins=np.full(len(kept), -1, np.int32),
        labels=np.zeros(len(kept), bool) if labels is None else labels,
        factors=np.stack([factors for _, factors in kept]),
        scores=np.zeros(len(kept), np.float32),
    )


def judged(scores: dict[str, list[float]], defects: list[float] | None = None, rate: float = 0.02) -> MemoryBank:
    """A bank of variants of which good images score so, and of the first also some defects."""
    bank = filled(100, "".join(scores))
    for name, good in scores.items():
        every = [*good, *(defects or [])] if name == next(iter(scores)) else good
        calibration = Calibration(
            patches=np.zeros((len(every), CALIBRATION_PATCHES, 4), np.float16),
            origins=np.arange(len(every), dtype=np.int32),
            labels=np.arange(len(every)) >= len(good),
            factors=np.ones((len(every), 2), np.float32),
            scores=np.array(every, np.float32),
        )
        bank = bank.with_changes(name, calibration=calibration)
    return bank.with_decision(false_alarm_rate=rate)


def of_vectors(vectors: Array, origins: NDArray[np.int32], stand_ins: Array) -> Variant:
    """A variant of these vectors, of which nothing else is known."""
    return replace(
        filled(variants="a").variants["a"],
        vectors=vectors,
        radii=np.full(len(vectors), np.inf, np.float32),
        origins=origins,
        stand_ins=stand_ins,
    )


def clusters(kinds: int, seed: int, count: int = 150, dimension: int = 6, spread: float = 1.0) -> Array:
    """Patches of an image of a product that has so many kinds of patches."""
    centers = 4 * np.random.default_rng(0).normal(size=(kinds, dimension))
    rng = np.random.default_rng([kinds, seed])
    patches = centers[rng.integers(0, kinds, count)] + spread * rng.normal(size=(count, dimension))
    return patches.astype(np.float32)


@cache
def clusters_bank(kinds: int, images: int, size: int) -> MemoryBank:
    """A bank of one product, which never changes."""
    return learned(MemoryBank(size), {"a": [clusters(kinds, seed) for seed in range(images)]})


def judged_by(bank: MemoryBank) -> Calibration:
    """By what the variant judges itself."""
    found = bank.variants["a"].calibration
    assert found is not None
    return found


def distances_between(patches: Array, vectors: Array) -> NDArray[np.float64]:
    """Distance of each patch to its nearest vector."""
    return all_distances(patches, vectors).min(axis=1)


def all_distances(patches: Array, vectors: Array) -> NDArray[np.float64]:
    """Distance of each patch to each vector, taken directly."""
    both = (torch.from_numpy(points.astype(np.float64)) for points in (patches, vectors))
    return torch.cdist(*both, compute_mode="donot_use_mm_for_euclid_dist").numpy()


def check(bank: MemoryBank, images: Ledger, lowest_origin: int = 0) -> None:
    """The budget, the certificate and what vectors say of themselves, for all images that are in the bank."""
    assert len(bank) == len(bank.vectors()) <= bank.size
    assert set(bank.variants) == set(images)
    for name, each in images.items():
        variant = bank.variants[name]
        parts = (variant.vectors, variant.radii, variant.cover_radii, variant.origins, variant.stand_ins)
        assert {len(part) for part in parts} == {len(variant.gains)}
        assert len(variant.gains) >= 1
        assert variant.vectors.dtype == bank.dtype
        assert 0 <= variant.merge_radius < np.inf
        assert variant.images == len(each)
        assert set(variant.origins) <= set(range(lowest_origin, len(each)))
        assert (variant.stand_ins >= 0).all()
        assert variant.gains[0] == np.inf
        assert (variant.gains >= 0).all()
        assert (np.diff(variant.gains[1:]) <= 0).all()
        cover_radii = variant.cover_radii.astype(np.float64) * ROUNDING
        distances = all_distances(np.concatenate(each), variant.vectors)
        # Stronger than the certificate: every patch lies within the cover of one vector.
        assert (distances - cover_radii).min(axis=1).max() <= 0
        assert distances.min(axis=1).max() <= cover_radii.max() <= bank.radius_bound()


def same(one: MemoryBank | Update, other: MemoryBank | Update) -> bool:
    """Whether two banks, or updates, are the same, bit by bit."""
    arrays, plain = state.to_arrays(one)
    other_arrays, other_plain = state.to_arrays(other)
    return plain == other_plain and all(
        array.dtype == other_arrays[key].dtype and array.tobytes() == other_arrays[key].tobytes()
        for key, array in arrays.items()
    )


def reloaded(known: MemoryBank | Update) -> Update:
    """A bank or an update after a round trip."""
    arrays, plain = state.to_arrays(known)
    return state.from_arrays(copy.deepcopy(arrays), json.loads(json.dumps(plain)))


@contextmanager
def unchanged(*banks: MemoryBank) -> Generator[None]:
    """Check that banks stay as they were, bit by bit, whatever is done on top of them."""
    before = [copy.deepcopy(bank) for bank in banks]
    try:
        yield
    finally:
        assert all(same(bank, old) for bank, old in zip(banks, before, strict=True))


@contextmanager
def as_if_not_called(update: Update) -> Generator[None]:
    """Check that an update stays as it was: its bank, its pools and what it will report."""

    def everything() -> object:
        derived = {"known", "_index", "_quantizer"}
        pools = [
            {key: value for key, value in vars(pool).items() if key not in derived} for pool in update.pools.values()
        ]
        own = {key: value for key, value in vars(update).items() if key not in {"bank", "pools", "report"}}
        return state.to_arrays(update), pools, own, vars(update.report)

    before = copy.deepcopy(everything())
    try:
        yield
    finally:
        np.testing.assert_equal(everything(), before)

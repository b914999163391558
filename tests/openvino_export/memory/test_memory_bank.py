# SPDX-License-Identifier: Apache-2.0
"""Tests of the bank: its budget, its bound, and how it finds variants and vectors."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from openvino_export.memory import state
from openvino_export.memory import update as updates
from openvino_export.memory.memory_bank import MemoryBank
from openvino_export.memory.update import Update

from .banks import REPEATABLE, all_distances, check, distances_between, draw, filled, learned, unchanged


@pytest.mark.parametrize("size", [0, -3])
def test_size_must_be_positive(size: int) -> None:
    """At construction."""
    with pytest.raises(ValueError, match=f"at least 1, got {size}"):
        MemoryBank(size)


def test_precision_must_be_known() -> None:
    """Integers would cut off what matters."""
    with pytest.raises(ValueError, match="got 'int8'"):
        MemoryBank(9, "int8")


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_bank_never_changes(dtype: str) -> None:
    """Not by what is learned, merged and calibrated on top of it, nor through the arrays that it gives."""
    bank = filled(dtype=dtype, calibrated=True)
    with unchanged(bank):
        update = Update(bank)
        update.calibrate("b", np.ones((1, 16, 4), np.float32), np.array([False]))
        for seed in range(3):
            update.add(50 + draw("lobes", "a", seed, 90), "a", image_hash=seed)
            update.add(draw("lobes", "c", seed, 90), "c")
        update.flush()
        update.calibrate("a", np.ones((1, 16, 4), np.float32), np.array([False]))
        update.merge(filled(90, "bd"))
        update.commit()
        bank.vectors()[:] = np.nan
        bank.owners()[:] = 7
        assert np.isfinite(bank.search(draw("lobes", "a", 0, 9))[0]).all()
    assert [*bank.variants] == ["a", "b"]
    assert [*update.bank.variants] == ["a", "b", "c", "d"]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_what_a_bank_says_of_itself(dtype: str) -> None:
    """Its vectors variant after variant, with their owners; the nearest of them; all of its bytes."""
    bank = filled(dtype=dtype, calibrated=True)
    counts = [len(variant.radii) for variant in bank.variants.values()]
    assert bank.owners().tolist() == [0] * counts[0] + [1] * counts[1]
    np.testing.assert_array_equal(bank.vectors()[counts[0] :], bank.variants["b"].vectors.astype(np.float32))
    assert (bank.vectors().dtype, bank.dimension(), len(bank)) == (np.float32, 4, sum(counts))
    patches = np.concatenate([draw("lobes", name, 7, 30) for name in "abz"])
    distances, index = bank.search(patches)
    every = all_distances(patches, bank.vectors())
    np.testing.assert_allclose(distances, every.min(axis=1), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(every[np.arange(90), index], distances, rtol=1e-4, atol=1e-4)
    assert bank.nbytes() == sum(array.nbytes for array in state.to_arrays(bank)[0].values())


def test_an_empty_bank() -> None:
    """Knows no variant and bounds nothing."""
    bank = MemoryBank(9)
    assert bank.identify(draw("lobes", "a", 9, 20)) is None
    assert (len(bank), bank.dimension(), bank.radius_bound(), bank.nbytes()) == (0, None, 0, 0)
    assert bank.vectors().shape == (0, 0)
    assert bank.owners().shape == (0,)


# The budget


@REPEATABLE
@given(order=st.permutations("abcd"), size=st.integers(4, 120), dtype=st.sampled_from(["float32", "float16"]))
def test_order_of_variants_does_not_matter(order: list[str], size: int, dtype: str) -> None:
    """Learned one after the other, variants share the budget in the same way in any order."""
    banks = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(updates, "SMALLEST_POOL", 40)
        for names in (sorted(order), order):
            bank = MemoryBank(size, dtype)
            for name in names:
                images = [draw("lobes", name, seed, 30 * (1 + ord(name) % 3)) for seed in range(3)]
                bank = learned(bank, {name: images})
            banks.append(bank)
    for name in order:
        np.testing.assert_array_equal(banks[0].variants[name].vectors, banks[1].variants[name].vectors)


def test_order_does_not_matter_after_the_pool_overflowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A complex variant that the pool made coarser leaves room, which a plain one fills in either order."""
    monkeypatch.setattr(updates, "SMALLEST_POOL", 640)
    rng = np.random.default_rng(0)
    patches = {
        "complex": rng.normal(size=(660, 6)).astype(np.float32),
        "plain": rng.uniform(0, 1, (500, 1)).astype(np.float32) * np.ones(6, np.float32),
    }
    banks = []
    for order in (list(patches), list(patches)[::-1]):
        bank = MemoryBank(300)
        for name in order:
            bank = learned(bank, {name: [patches[name][i : i + 30] for i in range(0, len(patches[name]), 30)]})
        assert len(bank) == 300
        banks.append(bank)
    assert len(banks[0].variants["complex"].radii) == 160  # a quarter of the pool
    for name in patches:
        np.testing.assert_array_equal(banks[0].variants[name].vectors, banks[1].variants[name].vectors)


def test_budget_is_divided_by_scaled_radius() -> None:
    """The same product under a hundredfold scale gets the same share, a plainer one a smaller share."""
    points = {
        "small": [draw("curve", "x", 0, 400)],
        "large": [100 * draw("curve", "x", 0, 400)],
        "plain": [np.linspace(0, 5, 400, dtype=np.float32)[:, None] * np.ones(4, np.float32)],
    }
    bank = learned(MemoryBank(200), points)
    small, large, plain = (len(variant.radii) for variant in bank.variants.values())
    assert abs(small - large) <= 2
    assert plain < small
    # What was cut off first lay at the same radius / scale.
    scaled = [variant.merge_radius / variant.scale for variant in bank.variants.values()]
    np.testing.assert_allclose(scaled, scaled[0], rtol=0.1)
    check(MemoryBank(20, variants=bank.variants), points)


def test_full_bank_stays_full() -> None:
    """Also when images that it knows come again without a hash."""
    bank = MemoryBank(100)
    for _ in range(2):
        bank = learned(bank, {name: [draw("lobes", name, seed, 60) for seed in range(3)] for name in "abc"})
        assert len(bank) == 100


def test_bound_stays_near_the_truth(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is of use only so; a variant that grows for 200 updates would make long chains of charges."""
    monkeypatch.setattr(updates, "SMALLEST_POOL", 88)
    ratios = []
    for seed in range(4):
        rng = np.random.default_rng(seed)
        bank, images = MemoryBank(40), []
        for session in range(200):
            images.append(rng.uniform(0, 1 + 0.03 * session, (60, 3)).astype(np.float32))
            bank = learned(bank, {"a": images[-1:]})
        ratios.append(bank.radius_bound() / distances_between(np.concatenate(images), bank.vectors()).max())
    assert np.mean(ratios) < 4


# Identification


def test_variant_without_spread_is_found() -> None:
    """An image of nothing but one color still is an image of its product."""
    bank = learned(MemoryBank(50), {"x": [draw("black", "x", 0, 60)]})
    assert bank.identify(draw("black", "x", 1, 60)) == "x"
    assert bank.identify(draw("black", "x", 1, 60) + np.linspace(-1, 1.2, 60, dtype=np.float32)[:, None]) == "x"
    assert bank.identify(draw("black", "x", 1, 60) + 1) is None


def test_scale_outlives_the_vectors_it_was_measured_on() -> None:
    """A variant that was cut to a single vector still knows its own from strangers."""
    bank = MemoryBank(1)
    for _ in range(2):
        bank = learned(bank, {"x": [draw("curve", "x", 0, 60) / 100]})
    assert len(bank) == 1
    assert bank.variants["x"].scale < 0.2
    assert bank.identify(draw("curve", "x", 0, 60) / 100 + 0.5) is None

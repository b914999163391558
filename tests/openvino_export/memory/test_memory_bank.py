# SPDX-License-Identifier: Apache-2.0
"""Tests of the bank: its budget, its bound, and how it finds variants and vectors."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from openvino_export.memory import state
from openvino_export.memory import update as updates
from openvino_export.memory.memory_bank import MemoryBank, shares_by_need
from openvino_export.memory.thresholds import thresholds
from openvino_export.memory.update import Update

from .banks import (
    REPEATABLE,
    Array,
    all_distances,
    check,
    distances_between,
    draw,
    filled,
    learned,
    not_learned,
    same,
    unchanged,
)


@pytest.mark.parametrize("size", [0, -3])
def test_size_must_be_positive(size: int) -> None:
    """At construction."""
    with pytest.raises(ValueError, match=f"at least 1 and below .*, got {size}"):
        MemoryBank(size)


def test_precision_must_be_known() -> None:
    """Integers would cut off what matters."""
    with pytest.raises(ValueError, match="got 'int8'"):
        MemoryBank(9, "int8")


@pytest.mark.parametrize("rate", [0.0, -0.1, 0.51, np.nan])
def test_the_rate_must_be_one(rate: float) -> None:
    """At construction and later; the bank stays as it was."""
    with pytest.raises(ValueError, match=f"above 0 and at most 0.5, got {rate}"):
        MemoryBank(9, false_alarm_rate=rate)
    bank = filled()
    for name in ("a", None):
        with unchanged(bank), pytest.raises(ValueError, match=f"above 0 and at most 0.5, got {rate}"):
            bank.with_decision(name, false_alarm_rate=rate)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_bank_never_changes(dtype: str) -> None:
    """Not by what is learned, merged, validated and set on top of it, nor through the arrays that it gives."""
    bank = filled(dtype=dtype, validated=True)
    images = not_learned(bank.variants["a"], [np.ones((9, 4), np.float32)])
    with unchanged(bank):
        update = Update(bank)
        update.validate("b", images)
        for seed in range(3):
            update.add(50 + draw("lobes", "a", seed, 90), "a", image_hash=seed)
            update.add(draw("lobes", "c", seed, 90), "c")
        update.flush()
        update.validate("a", images)
        update.merge(filled(90, "bd"))
        update.commit()
        bank.with_decision(false_alarm_rate=0.3)
        bank.with_decision("a", threshold=3.0)
        bank.with_changes("b", wanted=7)
        bank.vectors()[:] = np.nan
        bank.owners()[:] = 7
        assert np.isfinite(bank.search(draw("lobes", "a", 0, 9))[0]).all()
    assert [*bank.variants] == ["a", "b"]
    assert [*update.bank.variants] == ["a", "b", "c", "d"]


def test_another_decision_is_made_by_the_same_vectors() -> None:
    """The index is not built again; the variant that is meant changes, and no other."""
    bank = filled(validated=True)
    assert len(bank.index.search(draw("lobes", "a", 0, 9))[0]) == 9
    for other in (bank.with_decision("a", threshold=3.0), bank.with_changes("a", by_hand=(3.0, np.nan))):
        assert other.index is bank.index
        assert (other.variants["a"].vectors is bank.variants["a"].vectors, [*other.variants]) == (True, ["a", "b"])
        assert other.variants["b"] is bank.variants["b"]
        assert thresholds(other, "a").image.value == 3


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_what_a_bank_says_of_itself(dtype: str) -> None:
    """Its vectors variant after variant, with their owners; the nearest of them; all of its bytes."""
    bank = filled(dtype=dtype, validated=True)
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
    """Learned one after the other, variants share the budget in the same way in any order, and decide alike."""
    banks = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(updates, "SMALLEST_POOL", 40)
        for names in (sorted(order), order):
            bank = MemoryBank(size, dtype)
            for name in names:
                images = [draw("lobes", name, seed, 30 * (1 + ord(name) % 3)) for seed in range(3)]
                bank = learned(bank, {name: images})
            banks.append(bank)
    assert_alike(*banks)


def assert_alike(one: MemoryBank, other: MemoryBank) -> None:
    """Compare two banks bit by bit, but for the order of variants, and for covers, which also tell of former cuts."""
    assert sorted(one.variants) == sorted(other.variants)
    plain = [
        MemoryBank(
            bank.size,
            bank.dtype.name,
            {name: replace(each, cover_radii=np.zeros(0)) for name, each in sorted(bank.variants.items())},
        )
        for bank in (one, other)
    ]
    assert same(*plain)
    for name in one.variants:
        assert thresholds(one, name) == thresholds(other, name)


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
    alone = learned(MemoryBank(300), {"complex": np.split(patches["complex"], 22)})
    assert len(alone) == 160  # a quarter of the pool
    assert_alike(*banks)


# The shares


def shares(gains: dict[str, list[float]], size: int) -> dict[str, int]:
    """How the budget is divided among variants whose vectors are worth this."""
    variant = filled().variants["a"]
    return shares_by_need({name: replace(variant, gains=np.array(g, np.float32)) for name, g in gains.items()}, size)


@st.composite
def worth_and_size(draw: st.DrawFn) -> tuple[dict[str, list[float]], int]:
    """What the vectors of some variants are worth, many the same, and a budget that holds a part of them."""
    highest = draw(st.integers(0, 3))
    values = st.lists(st.integers(0, highest).map(float), max_size=30)
    gains = {name: [np.inf, *sorted(draw(values))[::-1]] for name in draw(st.permutations("abcde"))}
    return gains, draw(st.integers(len(gains), sum(map(len, gains.values())) + 1))


@REPEATABLE
@given(worth_and_size())
def test_one_threshold_cuts_all_variants(drawn: tuple[dict[str, list[float]], int]) -> None:
    """The budget is filled with the vectors that are worth most, and no variant is left without any."""
    gains, size = drawn
    found = shares(gains, size)
    assert [*found] == [*gains]
    assert sum(found.values()) == min(size, sum(map(len, gains.values())))
    kept = [value for name, share in found.items() for value in gains[name][:share]]
    left = [value for name, share in found.items() for value in gains[name][share:]]
    assert min(found.values()) >= 1
    assert min(kept) >= max(left, default=0)


@REPEATABLE
@given(worth_and_size())
@example(({"a": [np.inf, *[0.0] * 40], "b": [np.inf, *[0.0] * 40]}, 22))
def test_what_is_worth_the_same_goes_round(drawn: tuple[dict[str, list[float]], int]) -> None:
    """Of the vectors at the threshold each variant that lacks some has as many as any other, or one less."""
    gains, size = drawn
    found = shares(gains, size)
    threshold = max((value for name, share in found.items() for value in gains[name][share:]), default=-1.0)
    at_it = {name: gains[name][:share].count(threshold) for name, share in found.items()}
    lacking = [name for name, share in found.items() if threshold in gains[name][share:]]
    for name in lacking:
        assert at_it[name] >= max(at_it.values()) - 1
        assert at_it[name] <= min((at_it[other] for other in lacking if other < name), default=size)


def test_budget_is_divided_by_need() -> None:
    """The same product under another scale gets the same share, one of more kinds of patches a larger one."""
    rng = np.random.default_rng(0)
    centers = 20 * rng.normal(size=(60, 4))

    def images(kinds: int) -> list[Array]:
        return [(centers[np.arange(120) % kinds] + rng.normal(size=(120, 4))).astype(np.float32) for _ in range(12)]

    points = {"small": images(12), "rich": images(60), "poor": images(2)}
    points["large"] = [100 * image for image in points["small"]]
    bank = learned(MemoryBank(400), points)
    counts = {name: len(variant.radii) for name, variant in bank.variants.items()}
    whole = {name: learned(MemoryBank(400), {name: each}).variants[name].gains for name, each in points.items()}
    assert abs(counts["small"] - counts["large"]) <= 2
    assert counts["poor"] < counts["small"] < counts["rich"]
    # What one variant has is worth more than what another lacks.
    had = [whole[name][count - 1] for name, count in counts.items()]
    lacking = [whole[name][count] for name, count in counts.items()]
    assert min(had) >= max(lacking)
    assert sum(counts.values()) == 400
    for name, each in bank.variants.items():
        np.testing.assert_array_equal(each.gains, whole[name][: counts[name]])
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


def test_spread_outlives_the_vectors_it_was_measured_on() -> None:
    """A variant that was cut to a single vector still knows its own from strangers."""
    bank = MemoryBank(1)
    for _ in range(2):
        bank = learned(bank, {"x": [draw("curve", "x", 0, 60) / 100]})
    assert len(bank) == 1
    assert bank.identify(draw("curve", "x", 0, 60) / 100 + 0.5) is None

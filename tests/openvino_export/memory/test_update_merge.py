# SPDX-License-Identifier: Apache-2.0
"""Tests of what one bank takes over from another."""

from dataclasses import replace

import numpy as np
import pytest

from openvino_export.memory.memory_bank import MemoryBank
from openvino_export.memory.thresholds import thresholds
from openvino_export.memory.update import Update

from .banks import (
    Array,
    all_distances,
    as_if_not_called,
    check,
    clusters,
    draw,
    filled,
    learned,
    not_learned,
    same,
    unchanged,
)


def merged(bank: MemoryBank, other: MemoryBank) -> MemoryBank:
    """The bank after an update with what another knows, both of which stay as they were."""
    update = Update(bank)
    with unchanged(bank, other):
        update.merge(other)
        update.commit()
    return update.bank


def test_merge_joins_what_two_banks_know() -> None:
    """Variants of one, of the other and of both, and their images."""
    bank, other = filled(variants="ab"), filled(80, variants="bc", validated=True)
    update = Update(bank)
    update.add(draw("lobes", "d", 0, 40), "d", image_hash=1)
    with unchanged(bank, other):
        update.merge(other)
        report = update.commit()
    assert report.variants == {"b": 3, "c": 3, "d": 1}
    variants = update.bank.variants
    assert {name: variant.images for name, variant in variants.items()} == {"a": 3, "b": 6, "c": 3, "d": 1}
    for value in (1, 100 * ord("a"), 100 * ord("b"), 100 * ord("c")):
        assert update.knows(value)
    assert len(update.bank.image_hashes) == 10  # those of b are the same
    patches = {name: [draw("lobes", name, seed, 40) for seed in range(3)] for name in "abc"}
    check(update.bank, {**patches, "b": patches["b"] * 2, "d": [draw("lobes", "d", 0, 40)]})


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_merge_takes_what_sets_thresholds(dtype: str) -> None:
    """All of a variant that is new here, also what was set by hand; thresholds are the same as there."""
    bank, other = filled(variants="a", dtype=dtype), filled(60, variants="bcd", dtype=dtype, validated=True)
    other = other.with_decision("b", threshold=2.5).with_decision("c", false_alarm_rate=0.3)
    found = merged(MemoryBank(200, dtype).with_variants(bank.variants), other)
    for name in "bcd":
        assert thresholds(found, name) == thresholds(other, name)
        assert same(*(MemoryBank(60, dtype).with_variants({name: each.variants[name]}) for each in (found, other)))
    assert same(merged(MemoryBank(60, dtype), other), other)


@pytest.mark.parametrize("size", [80, 5000])
def test_merge_takes_the_images_of_a_shared_variant(size: int) -> None:
    """Learned ones are numbered after those that were here, validation images join; scores are those of all vectors."""
    images = [clusters(5, seed, 40) for seed in range(12)]
    banks = []
    for part in (images[:7], images[7:]):
        update = Update(learned(MemoryBank(size), {"a": part}))
        update.validate("a", not_learned(update.bank.variants["a"], [clusters(5, 50 + len(part), 40)]))
        banks.append(update.bank)
    bank = merged(*banks)
    variant = bank.variants["a"]
    known = variant.calibration
    assert known is not None
    assert sorted(known.origins) == [-1, -1, *range(12)]
    assert thresholds(bank, "a").images == 14
    ratios = []
    for origin, score in zip(known.origins, known.scores, strict=True):
        if origin >= 0:
            own = np.where(variant.origins == origin, variant.stand_ins.astype(float), 0)
            expected = (all_distances(images[origin], variant.vectors) ** (4 / 3) + own ** (4 / 3)).min(axis=1).max()
            expected **= 3 / 4
            assert score <= expected * 1.01
            ratios.append(score / expected)
    assert np.mean(ratios) > 0.9
    for vector, origin in zip(variant.vectors, variant.origins, strict=True):
        assert (images[origin] == vector).all(axis=1).any()
    check(bank, {"a": images})
    whole = learned(MemoryBank(size), {"a": images}).variants["a"].calibration
    assert whole is not None
    learned_scores = known.scores[known.origins >= 0]
    assert learned_scores.mean() == pytest.approx(whole.scores.mean(), rel=0.1)


@pytest.mark.parametrize("size", [300, 5000])
def test_images_that_both_have_learned_do_not_vouch_for_each_other(size: int) -> None:
    """Two sites that went on from the same bank: thresholds are about those of a bank that has learned all images."""
    images = [clusters(8, seed) for seed in range(30)]
    base = learned(MemoryBank(size), {"a": images[:20]})
    one, other = (learned(base, {"a": part}) for part in (images[20:25], images[25:]))
    whole = thresholds(learned(MemoryBank(size), {"a": images}), "a").image.value
    assert thresholds(merged(one, other), "a").image.value == pytest.approx(whole, rel=0.05)
    assert thresholds(merged(base, base), "a").image.value == pytest.approx(thresholds(base, "a").image.value, rel=0.05)


def test_merge_keeps_how_it_decides() -> None:
    """The rate and the threshold of a variant are those of this site."""
    bank = filled(validated=True).with_decision(false_alarm_rate=0.3).with_decision("a", threshold=2.0)
    other = filled(80, validated=True).with_decision(false_alarm_rate=0.1).with_decision("a", threshold=9.0)
    other = other.with_decision("b", false_alarm_rate=0.2)
    found = merged(bank, other)
    assert thresholds(found, "a").image.value == 2
    assert [thresholds(found, name).false_alarm_rate for name in "ab"] == pytest.approx([0.3, 0.3])


def test_merge_with_an_empty_bank() -> None:
    """Either way nothing is lost, and a smaller budget is kept."""
    bank = filled(validated=True)
    update = Update(bank)
    with unchanged(bank):
        update.merge(MemoryBank(5))
        report = update.commit()
    assert same(update, bank)
    assert (report.variants, report.added, report.removed) == ({}, {}, {})
    update = Update(MemoryBank(60))
    update.merge(bank)
    report = update.commit()
    assert same(update, bank)
    assert report.added == {name: len(variant.radii) for name, variant in bank.variants.items()}
    small = merged(MemoryBank(8), bank)
    check(small, {name: [draw("lobes", name, seed, 40) for seed in range(3)] for name in "ab"})


def test_merge_refuses_another_dimension() -> None:
    """Also against a pool that is all there is; the update ends as if there had been no other bank."""
    other = learned(MemoryBank(9), {"a": [np.ones((3, 5), np.float32)]})
    for bank in (filled(validated=True), MemoryBank(60)):
        update, twin = Update(bank), Update(bank)
        for each in (update, twin):
            each.add(draw("lobes", "a", 0, 9), "a")
        with (
            as_if_not_called(update),
            unchanged(bank, other),
            pytest.raises(ValueError, match="dimension 5, the memory bank has 4"),
        ):
            update.merge(other)
        for each in (update, twin):
            each.add(draw("lobes", "a", 1, 9), "a")
            each.commit()
        assert same(update, twin)


@pytest.mark.parametrize("thinned", [False, True])
def test_cover_radii_of_another_bank_are_charged(thinned: bool) -> None:
    """A vector that another bank's vector repeats takes over what that one stands for, as a duplicate or as known."""
    own = np.array([[0, 0], [1, 0], [0.4, 0]] if thinned else [[0, 0]], np.float32)
    others = np.array([[0, 0], [9, 0], [1, 0]], np.float32)
    bank, other = learned(MemoryBank(2), {"a": [own]}), learned(MemoryBank(1), {"a": [others]})
    assert (bank.variants["a"].merge_radius > 0) == thinned
    check(merged(bank, other), {"a": [own, others]})


def test_cover_radii_within_an_image_are_charged() -> None:
    """A patch that another patch of the same image makes superfluous leaves it what it stands for."""
    own = np.array([[0, 0], [1, 0], [0.4, 0]], np.float32)
    bank = learned(MemoryBank(2), {"a": [own]})
    variant = learned(MemoryBank(2), {"a": [np.array([[5, 0], [5.3, 0]], np.float32)]}).variants["a"]
    cover_radii = np.array([7, variant.cover_radii[1]], np.float32)
    other = MemoryBank(2, variants={"a": replace(variant, cover_radii=cover_radii)})
    check(merged(bank, other), {"a": [own, np.array([[12, 0]], np.float32)]})


def test_mean_and_spread_are_those_of_all_images() -> None:
    """Whether learned in one update, in several, or by another bank."""
    images: list[Array] = [draw("lobes", "x", seed, 60, 16) for seed in range(6)]
    means = [image.mean(axis=0) for image in images]
    spread = np.mean([np.linalg.norm(image - mean, axis=1).mean() for image, mean in zip(images, means, strict=True)])
    bank = learned(learned(MemoryBank(50), {"x": images[:3]}), {"x": images[3:4]})
    variant = merged(bank, learned(MemoryBank(50), {"x": images[4:]})).variants["x"]
    np.testing.assert_allclose(variant.prototype, np.mean(means, axis=0), rtol=1e-4)
    assert variant.spread == pytest.approx(spread, rel=1e-4)

# SPDX-License-Identifier: Apache-2.0
"""Tests of what one bank takes over from another."""

from dataclasses import replace

import numpy as np
import pytest

from openvino_export.memory.memory_bank import MemoryBank
from openvino_export.memory.update import Update

from .banks import Array, as_if_not_called, check, draw, filled, learned, same, unchanged


def merged(bank: MemoryBank, other: MemoryBank) -> MemoryBank:
    """The bank after an update with what another knows, both of which stay as they were."""
    update = Update(bank)
    with unchanged(bank, other):
        update.merge(other)
        update.commit()
    return update.bank


def test_merge_joins_what_two_banks_know() -> None:
    """Variants of one, of the other and of both, their images and their calibration."""
    bank, other = filled(variants="ab"), filled(80, variants="bc", calibrated=True)
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
    assert variants["b"].calibration == other.variants["b"].calibration
    assert variants["c"].calibration == other.variants["c"].calibration
    patches = {name: [draw("lobes", name, seed, 40) for seed in range(3)] for name in "abc"}
    check(update.bank, {**patches, "d": [draw("lobes", "d", 0, 40)]})


def test_merge_takes_what_sets_thresholds() -> None:
    """Scores of images before they were learned, of a variant that both know too."""
    bank, other = filled(), filled()
    own, others = (each.variants["a"].prequential_scores for each in (bank, other))
    assert len(others)
    assert merged(bank, other).variants["a"].prequential_scores.tolist() == [*own, *others]


def test_merge_keeps_its_own_calibration() -> None:
    """The thresholds of a variant are those of this site."""
    bank, other = filled(calibrated=True), filled(80, calibrated=True)
    assert merged(bank, other).variants["a"].calibration is bank.variants["a"].calibration


def test_merge_with_an_empty_bank() -> None:
    """Either way nothing is lost, and a smaller budget is kept."""
    bank = filled(calibrated=True)
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
    for bank in (filled(calibrated=True), MemoryBank(60)):
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

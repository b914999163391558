# SPDX-License-Identifier: Apache-2.0
"""Tests of shown defects: what is like them scores higher, and nothing that thresholds rest on does."""

from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from openvino_export.memory.defects import (
    DEFECT_VECTORS,
    LARGEST_RAISE,
    MOST_PATCHES,
    REACH,
    limited,
    raised,
    together,
)
from openvino_export.memory.memory_bank import MemoryBank
from openvino_export.memory.thresholds import thresholds
from openvino_export.memory.update import Update
from openvino_export.memory.variant import Defects

from .banks import REPEATABLE, clusters, clusters_bank, filled, not_learned, reloaded, same

Array = NDArray[np.float32]
GRID = (10, 15)


def defective(seed: int, kind: int = 0, strength: float = 4.0) -> Array:
    """An image of the product of `clusters` with a defect of a kind on four patches, shape ``(10, 15, 6)``."""
    image = clusters(5, seed).reshape(*GRID, 6)
    direction = np.random.default_rng(100 + kind).normal(size=6)
    image[4:6, 7:9] += (strength * direction / np.linalg.norm(direction)).astype(np.float32)
    return image


def mask() -> Array:
    """Where that is."""
    marked = np.zeros(GRID, np.float32)
    marked[4:6, 7:9] = 1
    return marked


def bank_of(images: int = 20) -> MemoryBank:
    """A bank of that product."""
    return clusters_bank(5, images, 2500).with_decision(false_alarm_rate=0.2)


def shown(bank: MemoryBank, *images: Array, region: Array | None = None) -> MemoryBank:
    """The bank once images were shown as defective."""
    update = Update(bank)
    for image in images:
        update.show_defect(image, name(bank), region=region, map_size=(40, 60))
    update.commit()
    return update.bank


def name(bank: MemoryBank) -> str:
    """The only variant of a bank."""
    return next(iter(bank.variants))


def score(bank: MemoryBank, image: Array) -> float:
    """Image score."""
    patches = image.reshape(-1, image.shape[-1])
    return float(raised(patches, bank.search(patches)[0], bank.variants[name(bank)].defects).max())


@pytest.mark.filterwarnings("error")
@REPEATABLE
@given(seed=st.integers(0, 999), count=st.integers(1, 30), infinite=st.booleans())
def test_raised_distances(seed: int, count: int, infinite: bool) -> None:
    """By the ratio of the distances to good and defective patches, within the reach, never lowered; by brute force."""
    rng = np.random.default_rng(seed)
    patches = rng.normal(size=(20, 5)).astype(np.float32)
    vectors = rng.normal(size=(count, 5)).astype(np.float32)
    patches[0], distances = vectors[0], rng.uniform(0, 3, 20).astype(np.float32)
    reaches = np.full(count, np.inf, np.float32) if infinite else rng.uniform(0.1, 3, count).astype(np.float32)
    found = raised(patches, distances, Defects(vectors, reaches, 1))
    for patch, distance, value in zip(patches, distances, found, strict=True):
        gaps = np.maximum(np.linalg.norm(vectors.astype(float) - patch, axis=1), 1e-6)
        factor = np.clip(min(distance / gaps.min(), (reaches / gaps).max()), 1, LARGEST_RAISE)
        assert value == pytest.approx(distance * factor, rel=1e-3)
    np.testing.assert_array_equal(raised(patches, distances, None), distances)
    np.testing.assert_array_equal(raised(patches, distances, Defects(vectors[:0], reaches[:0], 1)), distances)


def some(count: int) -> Defects:
    """So many defective patches."""
    return Defects(np.arange(4.0 * count, dtype=np.float32).reshape(count, 4), np.ones(count, np.float32), 1)


def test_what_is_shown_and_what_is_like_it_is_found() -> None:
    """A defect that is missed, and others of its kind; those of another kind are as before."""
    bank = bank_of()
    threshold = thresholds(bank, name(bank)).image.value
    kinds = {kind: [defective(1000 + seed, kind, 3.0) for seed in range(20)] for kind in (0, 1)}
    before = {kind: [score(bank, image) for image in images] for kind, images in kinds.items()}
    missed = [image for image, value in zip(kinds[0], before[0], strict=True) if value < threshold]
    after = shown(bank, *missed[:4], region=mask())
    assert thresholds(after, name(after)).image.value == pytest.approx(threshold, rel=1e-5)
    now = {kind: [score(after, image) for image in images] for kind, images in kinds.items()}
    assert all(score(after, image) > threshold for image in missed[:4])
    found, found_before = (sum(value > threshold for value in values[0]) for values in (now, before))
    assert found >= found_before + 4 + 1
    assert (np.array(now[1]) >= np.array(before[1])).all()
    assert np.mean(np.array(now[1]) > before[1]) < 0.5


@REPEATABLE
@given(
    strengths=st.lists(st.floats(0, 9), min_size=1, max_size=4),
    marked=st.booleans(),
    rate=st.sampled_from([0.1, 0.3, 0.5]),
)
def test_thresholds_and_bank_stay(strengths: list[float], marked: bool, rate: float) -> None:
    """Whatever is shown, good images that are known score as before, and so do the certificate and the vectors."""
    bank = bank_of().with_decision(false_alarm_rate=rate)
    images = [defective(2000 + i, i, strength) for i, strength in enumerate(strengths)]
    after = shown(bank, *images, region=mask() if marked else None)
    own = name(bank)
    for kind in ("image", "pixel"):
        now, before = (getattr(thresholds(each, own), kind) for each in (after, bank))
        assert (now.value, now.steepness) == pytest.approx((before.value, before.steepness), rel=1e-5)
    assert after.radius_bound() == bank.radius_bound()
    np.testing.assert_array_equal(after.vectors(), bank.vectors())
    calibration = bank.variants[own].calibration
    assert calibration is not None
    patches = calibration.patches.reshape(-1, 6).astype(np.float32)
    distances = np.full(len(patches), 5.0, np.float32)
    np.testing.assert_array_equal(raised(patches, distances, after.variants[own].defects), distances)


def test_a_defect_limits_a_threshold_that_is_extrapolated() -> None:
    """Where good images are too few to tell, half-way between the highest of them and the defect; never higher."""
    bank = clusters_bank(5, 4, 2500).with_decision(false_alarm_rate=0.001)
    before = thresholds(bank, name(bank)).image.value
    highest = max(bank.variants[name(bank)].calibration.scores)  # type: ignore[union-attr]
    images = [defective(1, strength=strength) for strength in np.linspace(1, 20, 60)]
    scores = [float(bank.search(image.reshape(-1, 6))[0].max()) for image in images]
    image, plain = next(pair for pair in zip(images, scores, strict=True) if 1.1 * highest < pair[1] < before)
    after = thresholds(shown(bank, image), name(bank)).image.value
    assert after == pytest.approx(np.sqrt(highest * plain), rel=1e-2)
    far = thresholds(shown(bank, defective(2, strength=900)), name(bank)).image.value
    assert far == pytest.approx(before, rel=1e-5)


def test_a_good_image_shortens_the_reach() -> None:
    """What was shown as a defect and is learned as good later is good; so is what was validated as good."""
    bank = bank_of()
    image = defective(7, strength=3.0)
    threshold = thresholds(bank, name(bank)).image.value
    after = shown(bank, image, region=mask())
    assert score(after, image) > threshold
    update = Update(after)
    update.add(image, name(bank), map_size=(40, 60))
    update.commit()
    assert score(update.bank, image) < threshold
    defects = update.bank.variants[name(bank)].defects
    assert defects is not None
    assert (len(defects.reaches), defects.images) == (0, 1)
    update = Update(after)
    validated = not_learned(after.variants[name(bank)], [image.reshape(-1, 6)])
    update.validate(name(bank), validated)
    now = update.bank.variants[name(bank)].defects
    patches = validated.patches[0].astype(np.float32)
    distances = np.ones(len(patches), np.float32)
    assert (raised(patches, distances, after.variants[name(bank)].defects) > distances).any()
    np.testing.assert_array_equal(raised(patches, distances, now), distances)


def test_validation_keeps_what_was_shown() -> None:
    """Validation images are replaced by others; defects that were shown remain, and limit as before."""
    bank = shown(bank_of(), defective(7, strength=9.0))
    update = Update(bank)
    for _ in range(2):
        update.validate(name(bank), not_learned(bank.variants[name(bank)], [clusters(5, 50), clusters(5, 51)]))
    calibration = update.bank.variants[name(bank)].calibration
    assert calibration is not None
    assert (calibration.origins == -1).sum() == 2
    assert calibration.labels[calibration.origins == -2].tolist() == [True]


def test_in_any_order() -> None:
    """What is known of defects is the same, also after a merge of what two have seen."""
    bank, images = bank_of(), [defective(3000 + i, i) for i in range(3)]
    banks = [shown(bank, *order) for order in permutations(images)]
    merged = Update(shown(bank, images[0]))
    merged.merge(shown(bank, *images[1:]))
    for other in (*banks[1:], merged.bank):
        one, two = (each.variants[name(bank)].defects for each in (banks[0], other))
        assert one is not None
        assert two is not None
        np.testing.assert_array_equal(one.vectors, two.vectors)
        np.testing.assert_allclose(one.reaches, two.reaches, rtol=1e-5)
        assert one.images == two.images == 3


def test_memory_is_bounded() -> None:
    """By image and over all variants; those that differ most remain, and learning goes on."""
    update = Update(filled(100, "ab"))
    for seed in range(40):
        for variant in "ab":
            image = np.random.default_rng([seed, ord(variant)]).normal(size=(6, 6, 4)) * 30
            update.show_defect(image.astype(np.float32), variant, region=np.ones((6, 6), np.float32))
    counts = [len(each.defects.reaches) for each in update.bank.variants.values() if each.defects]
    assert counts == [DEFECT_VECTORS // 2] * 2
    few = filled(100, "c").with_variants({"c": replace(filled(100, "c").variants["c"], defects=some(1))})
    update.merge(few)
    counts = [len(each.defects.reaches) for each in update.bank.variants.values() if each.defects]
    assert counts == [127, 127, 1], "who has few keeps them"
    one = shown(bank_of(), defective(1, strength=9.0), region=np.ones(GRID, np.float32))
    assert len(one.variants[name(one)].defects.reaches) <= MOST_PATCHES  # type: ignore[union-attr]
    assert update.commit().shown == {"a": 40, "b": 40}


def test_saved_and_loaded() -> None:
    """Bit by bit, those of several variants apart; the bytes are counted."""
    update = Update(filled(100, "abc"))
    for variant, count in (("c", 2), ("a", 1)):
        for seed in range(count):
            image = np.random.default_rng(seed).normal(size=(4, 4, 4)).astype(np.float32) * 30
            update.show_defect(image, variant, map_size=(16, 16))
    again = reloaded(update.bank).bank
    assert same(again, update.bank)
    assert [each.defects and each.defects.images for each in again.variants.values()] == [1, None, 2]
    for key, variant in again.variants.items():
        if variant.defects is not None:
            np.testing.assert_array_equal(variant.defects.vectors, update.bank.variants[key].defects.vectors)  # type: ignore[union-attr]
    without = again.with_changes("c", defects=None).nbytes()
    assert again.nbytes() - without == again.variants["c"].defects.vectors.nbytes * 5 // 4  # type: ignore[union-attr]


def test_what_is_still_called_good_is_named() -> None:
    """An image without a visible defect, and one that was learned as good."""
    bank = bank_of()
    update = Update(bank)
    update.show_defect(clusters(5, 3).reshape(*GRID, 6), name="good.png")
    update.show_defect(defective(5, strength=20), name="bad.png")
    report = update.commit()
    assert report.still_good == ["good.png"]
    assert any("good.png was shown as defective and is still called good" in sentence for sentence in report.advice)
    assert "2 defective images of" in str(report)


def test_shown_twice() -> None:
    """Is shown once."""
    bank = shown(bank_of(), defective(5), region=mask())
    update = Update(bank)
    update.show_defect(defective(5), name(bank), region=mask(), map_size=(40, 60))
    report = update.commit()
    assert (report.shown, report.known_images) == ({}, 1)
    assert update.bank.variants[name(bank)].defects.images == 1  # type: ignore[union-attr]


def test_shown_under_another_name() -> None:
    """An image that another variant judges is named with it, for what was shown does nothing for it."""
    update = Update(bank_of())
    for seed in range(5):
        update.add(clusters(5, seed) + 30, "other")
    update.show_defect(defective(5, strength=3.0), "other", region=mask(), name="part.png")
    assert update.commit().still_good == ["part.png (judged as a, not other)"]


def test_merge_of_a_variant_of_one_image() -> None:
    """That was shown a defect: its number is none of those that are learned."""
    banks = []
    for seed in range(2):
        update = Update(MemoryBank(300))
        update.add(clusters(5, seed), "a")
        update.show_defect(defective(seed, strength=9.0), "a", map_size=(40, 60))
        update.commit()
        banks.append(update.bank)
    update = Update(banks[0])
    update.merge(banks[1])
    calibration = update.bank.variants["a"].calibration
    assert calibration is not None
    assert sorted(calibration.origins.tolist()) == [-2, -2, 0, 1]


def test_validation_does_not_push_out_what_was_shown() -> None:
    """Each kind has a number of its own that is kept."""
    bank = shown(bank_of(), *(defective(seed, strength=9.0) for seed in range(5)))
    images = [defective(100 + seed, strength=9.0).reshape(-1, 6) for seed in range(40)]
    update = Update(bank)
    update.validate(name(bank), not_learned(bank.variants[name(bank)], images, np.ones(40, bool)))
    origins = update.bank.variants[name(bank)].calibration.origins  # type: ignore[union-attr]
    assert ((origins == -2).sum(), (origins == -1).sum()) == (5, 32)


def test_another_size_while_pools_are_open() -> None:
    """Variants in pools count, and pools grow with the bank."""
    update = Update(MemoryBank(40))
    for variant in "abc":
        update.add(clusters(5, 0), variant)
    with pytest.raises(ValueError, match="at least 3, one vector for each variant, got 2"):
        update.resize(2)
    update.resize(20_000)
    assert {pool.capacity for pool in update.pools.values()} == {40_000}
    update.commit()
    assert update.bank.size == 20_000
    for wrong in (0.5, "20", 0):
        with pytest.raises(ValueError, match="memory_size must be"):
            update.bank.with_size(wrong)  # type: ignore[arg-type]


def test_an_open_pool_is_closed_first() -> None:
    """A product may be learned and shown a defect of in one update."""
    update = Update(MemoryBank(300))
    for seed in range(9):
        update.add(clusters(5, seed), "a")
    assert update.show_defect(defective(20), map_size=(40, 60)) == "a"
    assert update.commit().variants == {"a": 9}


def test_errors() -> None:
    """Of a variant that is not known, of none that is recognised, of what is not finite, and of too many variants."""
    update = Update(bank_of())
    before = update.bank
    with pytest.raises(ValueError, match=r"no variant 'lid' is known\. Learn good images of it first; known are a"):
        update.show_defect(defective(1), "lid")
    with pytest.raises(ValueError, match="no variant '' is known"):
        Update(MemoryBank(9)).show_defect(defective(1))
    with pytest.raises(ValueError, match="NaN"):
        update.show_defect(defective(1) * np.float32(np.nan))
    with pytest.raises(ValueError, match="have dimension 4"):
        update.show_defect(defective(1)[..., :4])
    assert update.bank is before
    names = [chr(0x4E00 + i) for i in range(DEFECT_VECTORS + 1)]
    one = filled(600, "a").variants["a"]
    variants = {each: replace(one, defects=some(1) if each != names[-1] else None) for each in names}
    update = Update(MemoryBank(600, variants=variants))
    with pytest.raises(ValueError, match=f"at most {DEFECT_VECTORS} variants"):
        update.show_defect(np.ones((3, 3, 4), np.float32), names[-1])
    update.merge(filled(300, "b"))
    with pytest.raises(ValueError, match=f"at most {DEFECT_VECTORS} variants"):
        update.merge(filled(300, "c").with_changes("c", defects=some(1)))


def test_reach_of_each() -> None:
    """It ends before the nearest good patch; those that end at once are dropped; two that are known join."""
    vectors = np.array([[0, 0], [10, 0], [20, 0]], np.float32)
    defects = Defects(vectors + np.float32(5), np.array([np.inf, 1, np.inf], np.float32), 2)
    good = np.array([[5, 15], [25, 5]], np.float32)
    kept = limited(defects, good)
    assert kept is not None
    np.testing.assert_allclose(kept.reaches, [REACH * 10, 1], rtol=1e-5)
    np.testing.assert_array_equal(kept.vectors, defects.vectors[:2])
    assert limited(None, good) is None
    assert limited(defects, good[:0]) is defects
    both = together(kept, defects)
    assert both is not None
    assert (len(both.reaches), both.images) == (3, 4)
    assert together(None, kept) is kept

# SPDX-License-Identifier: Apache-2.0
"""Tests of the thresholds of variants: what they follow from, and that they follow the bank as it changes."""

import math
from dataclasses import asdict, replace

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from openvino_export.memory.memory_bank import MemoryBank
from openvino_export.memory.thresholds import (
    EXPECTED_SPREAD,
    SURE_IMAGES,
    Threshold,
    check_rate,
    f1_threshold,
    image_thresholds,
    thresholds,
    upper_limit,
)

from .banks import REPEATABLE, clusters, clusters_bank, draw, filled, judged, learned, reloaded, unchanged

# Who decides


def test_rates_of_the_bank_and_of_a_variant() -> None:
    """The variant's own counts; one for all ends it."""
    scores = np.linspace(1, 2, 40).tolist()
    bank = judged({"a": scores, "b": scores}, rate=0.1)
    first = thresholds(bank, "a")
    assert (first.false_alarm_rate, first.images, first.smallest_rate()) == (0.1, 40, 1 / 41)
    assert first.image.value == pytest.approx(upper_limit(np.array(scores, np.float32), 0.1, EXPECTED_SPREAD)[0])
    own = bank.with_decision("a", false_alarm_rate=0.3)
    assert thresholds(own, "a").false_alarm_rate == pytest.approx(0.3)
    assert thresholds(own, "a").image.value < first.image.value
    assert thresholds(own, "b") == thresholds(bank, "b") == first
    every = own.with_decision(false_alarm_rate=0.05)
    assert thresholds(every, "a") == thresholds(every, "b")
    assert thresholds(every, "b").false_alarm_rate == pytest.approx(0.05)
    assert thresholds(own.with_decision("a"), "a") == first
    assert thresholds(own.with_decision(), "a") == first


def test_thresholds_by_hand() -> None:
    """They are sure, however few images there are; masks and what scores mean are as before, and so are others."""
    bank = judged({"a": [1.0, 1.5, 1.2], "b": [1.0, 1.1]})
    before = {name: thresholds(bank, name) for name in "ab"}
    assert not before["a"].is_sure()
    by_hand = bank.with_decision("a", threshold=3.5)
    found = thresholds(by_hand, "a")
    assert found == replace(before["a"], image=Threshold(3.5, before["a"].image.steepness), by_hand=True)
    assert found.is_sure()
    assert thresholds(by_hand, "b") == before["b"]
    assert image_thresholds(by_hand) == {"a": 3.5, "b": before["b"].image.value}
    for back in (by_hand.with_decision("a"), by_hand.with_decision(), by_hand.with_decision(false_alarm_rate=0.02)):
        assert {name: thresholds(back, name) for name in "ab"} == before
    every = bank.with_decision(threshold=7.0)
    assert image_thresholds(every) == {"a": 7, "b": 7}
    # With a rate it would be the bank's to decide again.
    again = thresholds(by_hand.with_decision("a", false_alarm_rate=0.3), "a")
    assert (again.by_hand, again.image.value < 2) == (False, True)


def test_masks_by_hand() -> None:
    """Leave the image threshold as it was."""
    bank = judged({"a": [1.0, 1.5, 1.2]})
    before = thresholds(bank, "a")
    found = thresholds(bank.with_changes("a", by_hand=(np.nan, 2.5)), "a")
    assert found == replace(before, pixel=Threshold(2.5, before.pixel.steepness))


@pytest.mark.parametrize("threshold", [0.0, -1.0, math.inf, math.nan])
def test_bad_thresholds_are_refused(threshold: float) -> None:
    """The bank stays as it was."""
    bank = filled()
    with unchanged(bank), pytest.raises(ValueError, match=f"above 0 and finite, got {threshold}"):
        bank.with_decision("a", threshold=threshold)


def test_unknown_variants_are_refused() -> None:
    """With the names of those that are known."""
    with pytest.raises(ValueError, match="no variant 'c'; known are a, b"):
        filled().with_decision("c", threshold=1.0)
    with pytest.raises(ValueError, match="known are none"):
        MemoryBank(9).with_decision("c")


@pytest.mark.parametrize("rate", [0.0, -0.1, 0.5001, 1.0, math.nan, math.inf])
def test_bad_rates_are_refused(rate: float) -> None:
    """More than every other good image is no rate to inspect by."""
    with pytest.raises(ValueError, match=f"false_alarm_rate must be above 0 and at most 0.5, got {rate}"):
        check_rate(rate)


@pytest.mark.parametrize("rate", [1e-9, 0.02, 0.5])
def test_good_rates_are_taken(rate: float) -> None:
    """As they are."""
    assert check_rate(rate) == rate


# Known defects


@REPEATABLE
@given(
    good=st.lists(st.floats(0.5, 2, width=32), min_size=1, max_size=40),
    defects=st.lists(st.floats(0.25, 8, width=32), max_size=4),
    rate=st.sampled_from([0.001, 0.02, 0.1, 0.4]),
)
def test_defects_lower_what_is_extrapolated(good: list[float], defects: list[float], rate: float) -> None:
    """Half-way to the highest good score, never below it, and never what good images support."""
    before = thresholds(judged({"a": good}, rate=rate), "a")
    after = thresholds(judged({"a": good}, defects, rate=rate), "a")
    assert (after.images, after.pixel, after.image.steepness) == (len(good), before.pixel, before.image.steepness)
    higher = [defect for defect in defects if defect > max(good)]
    if rate * (len(good) + 1) >= 1 or not higher:
        assert after == before
    else:
        half_way = math.sqrt(max(good) * min(higher))
        assert after.image.value == pytest.approx(min(before.image.value, half_way), rel=1e-6)
        assert after.image.value >= max(good) * (1 - 1e-6)


# Few images


def test_a_single_image_gives_a_guess() -> None:
    """By its own patches: finite, not sure, and higher for a lower rate; of a single patch nothing is known."""
    images = [draw("curve", "a", 0, 200), 100 * draw("curve", "a", 0, 200)]
    guesses = []
    for image in images:
        bank = learned(MemoryBank(300), {"a": [image]})
        found = thresholds(bank, "a")
        assert (found.images, found.smallest_rate(), found.is_sure(), found.by_hand) == (0, 1.0, False, False)
        assert found.image == found.pixel
        assert 0 < found.image.steepness < math.inf
        rarer = thresholds(bank.with_decision(false_alarm_rate=0.001), "a").image.value
        assert bank.variants["a"].radii[1:].mean() < found.image.value < rarer < np.inf
        guesses.append(found.image.value)
    assert guesses[1] == pytest.approx(100 * guesses[0], rel=1e-3)
    nothing = thresholds(learned(MemoryBank(300), {"a": [images[0][:1]]}), "a")
    assert np.isinf(nothing.image.value)
    assert not nothing.is_sure()


@pytest.mark.parametrize("count", [1, SURE_IMAGES - 1, SURE_IMAGES, 20])
def test_enough_images_are_sure(count: int) -> None:
    """Of those that say something; defects do not, nor images that there is nothing to compare with."""
    found = thresholds(judged({"a": [1.0] * count}, [5.0] * 9), "a")
    assert (found.images, found.is_sure()) == (count, count >= SURE_IMAGES)
    found = thresholds(judged({"a": [1.0] * count + [math.inf] * 9}), "a")
    assert (found.images, found.is_sure()) == (count, count >= SURE_IMAGES)


def test_other_variants_tell_how_much_scores_spread() -> None:
    """As long as an own variant has few images: the middle of those that have enough, but not the variant itself."""
    narrow, wide = np.linspace(1, 1.05, 20).tolist(), np.linspace(1, 3, 20).tolist()
    few, enough = [1.0, 1.1, 1.2], np.linspace(1, 1.2, SURE_IMAGES).tolist()

    def threshold(own: list[float], **others: list[float]) -> float:
        return thresholds(judged({"a": own, **others}), "a").image.value

    alone, with_narrow, with_wide = threshold(few), threshold(few, b=narrow), threshold(few, b=wide)
    assert with_narrow < alone < with_wide
    spread = float(np.log(np.array(wide, np.float32)).std(ddof=1))
    assert with_wide == pytest.approx(upper_limit(np.array(few, np.float32), 0.02, spread)[0])
    assert threshold(few, b=narrow, c=wide, d=wide) == pytest.approx(with_wide, rel=1e-6)
    assert threshold(few, b=narrow, c=narrow, d=wide) == pytest.approx(with_narrow, rel=1e-6)
    assert threshold(few, b=wide[: SURE_IMAGES - 1]) == alone
    assert threshold(enough, b=wide) == threshold(enough)


def test_masks_have_thresholds_of_their_own() -> None:
    """By how much the highest value of each good map differs from the score of the image."""
    scores = np.linspace(1, 2, 30).astype(np.float32)
    bank = judged({"a": scores.tolist()}, [9.0], rate=0.1)
    calibration = bank.variants["a"].calibration
    assert calibration is not None
    factors = np.stack([np.full(31, 2.0), np.linspace(0.5, 1.5, 31)], axis=1).astype(np.float32)
    bank = bank.with_changes("a", calibration=replace(calibration, factors=factors))
    found = thresholds(bank, "a")
    assert found.image.value == pytest.approx(upper_limit(scores, 0.1, EXPECTED_SPREAD)[0], rel=1e-6)
    maps = scores * factors[:30, 1] / 2
    assert found.pixel.value == pytest.approx(upper_limit(maps, 0.1, EXPECTED_SPREAD)[0], rel=1e-6)
    assert found.pixel.value < found.image.value


# As the bank changes


def test_thresholds_follow_the_bank() -> None:
    """When other variants take room, good images score higher, and so do the thresholds; those by hand stay."""
    bank = clusters_bank(12, 16, 600).with_decision(false_alarm_rate=0.1)
    before = thresholds(bank, "a")
    others = {name: [draw("lobes", name, seed, 150, 6) for seed in range(10)] for name in "bcd"}
    coarser = learned(bank, others)
    assert len(coarser.variants["a"].radii) < 0.7 * len(bank.variants["a"].radii)
    after = thresholds(coarser, "a")
    assert after.image.value > 1.01 * before.image.value
    assert after.pixel.value > before.pixel.value
    assert (after.images, after.false_alarm_rate) == (16, 0.1)
    calibration = coarser.variants["a"].calibration
    assert calibration is not None
    assert after.image.value == pytest.approx(upper_limit(calibration.scores, 0.1, EXPECTED_SPREAD)[0])
    # In one update or in three.
    stepwise = bank
    for name, images in others.items():
        stepwise = learned(stepwise, {name: images})
    assert thresholds(stepwise, "a") == after
    by_hand = bank.with_decision("a", threshold=5.0).with_decision("a", threshold=4.0, false_alarm_rate=0.3)
    kept = thresholds(learned(by_hand, {**others, "a": [clusters(12, 50)]}), "a")
    assert (kept.image.value, kept.false_alarm_rate, kept.by_hand, kept.images) == (4.0, 0.3, True, 17)


def test_thresholds_outlast_a_file() -> None:
    """To the bit, whatever set them."""
    bank = learned(filled(120, "abc", validated=True), {"d": [draw("lobes", "d", 0, 40)], "e": [np.ones((1, 4), "f4")]})
    bank = bank.with_decision(false_alarm_rate=1 / 3).with_decision("a", false_alarm_rate=0.1)
    bank = bank.with_decision("b", threshold=1 / 7).with_changes("c", by_hand=(np.nan, 2.5))
    again = reloaded(bank).bank
    for name in "abcde":
        np.testing.assert_equal(asdict(thresholds(again, name)), asdict(thresholds(bank, name)))
    assert thresholds(again, "a").false_alarm_rate == pytest.approx(0.1, rel=1e-15)
    assert image_thresholds(again)["b"] == pytest.approx(1 / 7, rel=1e-15)


# As Anomalib finds them


@REPEATABLE
@given(
    scores=st.lists(st.integers(0, 6), min_size=1, max_size=14),
    data=st.data(),
    factor=st.sampled_from([1.0, 1e-8, 1e8, -1.0]),
)
@example(scores=[0, 0], data=None, factor=1.0)
def test_f1_threshold_is_the_best(scores: list[int], data: st.DataObject | None, factor: float) -> None:
    """No other decision by score has a larger F1, ties included."""
    labels = np.array(
        data.draw(st.lists(st.booleans(), min_size=len(scores), max_size=len(scores))) if data else [True, True]
    )
    values = (np.array(scores) * factor).astype(np.float32)

    def f1(threshold: np.float32) -> float:
        called = values > threshold
        return 2 * (called & labels).sum() / (called.sum() + labels.sum())

    threshold = np.float32(f1_threshold(values, labels))
    if not labels.any():
        assert threshold == values.max()
    else:
        candidates = [np.float32(-np.inf), *values]
        assert f1(threshold) == max(f1(candidate) for candidate in candidates)


def test_f1_threshold_between_neighboring_scores() -> None:
    """Scores that differ in the last bit only are told apart, whichever of them is even."""
    low, middle, high = (1 + i * 2**-23 for i in range(3))
    for pair in ((low, middle), (middle, high)):
        assert pair[0] <= f1_threshold(np.array(pair, np.float32), np.array([False, True])) < pair[1]

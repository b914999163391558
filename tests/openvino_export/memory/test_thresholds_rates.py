# SPDX-License-Identifier: Apache-2.0
"""Tests of what a false-alarm rate means: how often good images exceed a threshold, and what their scores say."""

import math

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from scipy.stats import norm

from openvino_export.memory.memory_bank import MemoryBank
from openvino_export.memory.thresholds import EXPECTED_SPREAD, normalized, thresholds, upper_limit

from .banks import REPEATABLE, clusters, judged, learned

SCORES = st.lists(st.floats(0.125, 8, width=32), min_size=1, max_size=30)
RATES = st.floats(1e-6, 0.5)


@REPEATABLE
@given(count=st.integers(8, 200), rank=st.floats(1, 200), law=st.sampled_from(["log-normal", "uniform"]))
@example(count=8, rank=1.0, law="uniform")
@example(count=8, rank=1.5, law="log-normal")
@example(count=200, rank=1.0, law="log-normal")
def test_good_images_exceed_it_at_the_rate(count: int, rank: float, law: str) -> None:
    """On the mean over many draws, whatever the law, as far down as so many images support."""
    rate = min(rank / (count + 1), 0.5)
    rng = np.random.default_rng(count)
    uniform = rng.uniform(size=(600, count))
    scores = np.exp(0.2 * norm.ppf(uniform)) if law == "log-normal" else 1 + uniform
    limits = np.array([upper_limit(each, rate, 0.15)[0] for each in scores])
    exceeded = norm.sf(np.log(limits) / 0.2) if law == "log-normal" else np.clip(2 - limits, 0, 1)
    sampling = math.sqrt(rate * (1 - rate) / (count + 2) / len(scores))
    assert exceeded.mean() == pytest.approx(rate, rel=0.015, abs=4 * sampling)


@REPEATABLE
@given(scores=SCORES, rates=st.lists(RATES, min_size=2, max_size=2).map(sorted), spread=st.floats(0.05, 0.5))
def test_fewer_false_alarms_take_a_higher_threshold(scores: list[float], rates: list[float], spread: float) -> None:
    """Never a lower one, within what images support and beyond; and there never below the highest score."""
    lower, higher = (upper_limit(np.array(scores), rate, spread)[0] for rate in rates)
    assert lower >= higher
    highest, rounding = max(scores), 1 + 1e-12
    for rate, limit in zip(rates, (lower, higher), strict=True):
        if rate * (len(scores) + 1) < 1:
            assert limit * rounding >= highest
        else:
            assert min(scores) <= limit * rounding
            assert limit <= highest * rounding


@REPEATABLE
@given(scores=SCORES, spread=st.floats(0.05, 0.5))
def test_extrapolation_begins_at_the_highest_score(scores: list[float], spread: float) -> None:
    """Without a jump; from there the rate falls by the factor e with each step of the tail."""
    smallest, values = 1 / (len(scores) + 1), np.array(scores)
    for rate in (smallest * (1 - 1e-9), smallest, smallest * (1 + 1e-9)):
        assert upper_limit(values, rate, spread)[0] == pytest.approx(max(scores), rel=1e-6)
    for steps in (0.5, 1, 3):
        limit, tail = upper_limit(values, smallest * math.exp(-steps), spread)
        assert limit == pytest.approx(max(scores) * math.exp(steps * tail), rel=1e-9)


def test_the_tail_is_wider_for_few_images() -> None:
    """And for scores that spread more, or that are expected to; of many images only their own spread counts."""
    few, many = np.array([1, 1.1, 1.2]), np.tile([1, 1.1, 1.2], 100)
    tails = [upper_limit(scores, 1e-4, expected)[1] for scores in (few, many) for expected in (0.1, 0.3)]
    assert tails[1] > 2 * tails[0]
    assert tails[0] > 1.5 * tails[2]
    assert tails[3] == pytest.approx(tails[2], rel=0.2)
    assert upper_limit(many**2, 1e-4, 0.1)[1] == pytest.approx(2 * tails[2], rel=0.05)


@REPEATABLE
@given(scores=SCORES, rate=RATES, factor=st.floats(1e-3, 1e3))
def test_a_threshold_scales_with_scores(scores: list[float], rate: float, factor: float) -> None:
    """So that all backbones and layers are alike."""
    limit, tail = upper_limit(np.array(scores), rate, 0.15)
    scaled, same_tail = upper_limit(factor * np.array(scores), rate, 0.15)
    assert scaled == pytest.approx(factor * limit, rel=1e-9)
    assert same_tail == pytest.approx(tail, rel=1e-9)


def test_scores_of_zero_have_a_limit() -> None:
    """As where all images of a product are the same."""
    limit, tail = upper_limit(np.zeros(9, np.float32), 0.02, 0.15)
    assert 0 < limit < 1e-9
    assert 0 < tail < 1


@pytest.mark.parametrize("kinds", [3, 12])
def test_images_to_come_exceed_it_at_the_rate(kinds: int) -> None:
    """On the mean over some banks: learned images tell, where there is room for all that they have."""
    exceeded: dict[float, list[float]] = {0.1: [], 0.25: []}
    for first in range(0, 240, 30):
        images = [clusters(kinds, seed, 80) for seed in range(first, first + 30)]
        bank = learned(MemoryBank(10_000), {"a": images})
        scores = np.array([
            bank.search(clusters(kinds, seed, 80))[0].max() for seed in range(1000 + 5 * first, 1150 + 5 * first)
        ])
        for rate, shares in exceeded.items():
            limit = thresholds(bank.with_decision(false_alarm_rate=rate), "a").image.value
            shares.append(float((scores > limit).mean()))
    for rate, shares in exceeded.items():
        assert 0.5 * rate < np.mean(shares) < 1.5 * rate


# Normalised scores


@REPEATABLE
@given(
    scores=SCORES,
    rate=st.floats(0.005, 0.3),
    factors=st.lists(st.floats(0.25, 4, width=32), min_size=2, max_size=6, unique=True).map(sorted),
)
def test_normalised_scores_tell_how_rare_they_are(scores: list[float], rate: float, factors: list[float]) -> None:
    """0.5 at the threshold, rising, in [0, 1), and above it the rate by which the tail of good scores falls off."""
    threshold, steepness = vars(thresholds(judged({"a": scores}, rate=rate), "a").image).values()
    tail = upper_limit(np.array(scores, np.float32), rate, EXPECTED_SPREAD)[1]
    assert normalized(np.array([threshold], np.float32), threshold, steepness) == pytest.approx(0.5, abs=1e-5)
    raw = np.array([factor * threshold for factor in factors], np.float32)
    found = normalized(raw, threshold, steepness)
    assert found.dtype == np.float32
    assert ((found >= 0) & (found <= 1)).all()
    distinct = np.abs(found - 0.5) < 0.5 - 1e-5  # float32 cannot hold what is nearer to the ends
    assert (np.diff(found[distinct]) > 0).all()
    for factor, score in zip(factors, found[distinct], strict=False) if distinct.all() else ():
        assert (score > 0.5) == (factor > 1) or factor == 1
        if factor > 1:
            assert rate ** -np.log2(1 - float(score)) == pytest.approx(rate * factor ** (-1 / tail), rel=2e-2)


def test_normalised_scores_at_the_ends() -> None:
    """Nothing is lowest, whatever is far beyond highest; unknown thresholds give no score."""
    raw = np.array([[0, 1e-30], [2, 1e30]], np.float32)
    found = normalized(raw, 2.0, 3.0)
    assert found.tolist() == [[0, pytest.approx(0, abs=1e-30)], [0.5, pytest.approx(1)]]
    assert np.isnan(normalized(raw, np.nan, 3.0)).all()


def test_a_score_means_the_same_for_all_variants() -> None:
    """With 2 %, 0.75 means 0.04 %, also where scores spread ten times as much."""
    for scores in (np.linspace(1, 1.1, 60), np.linspace(1, 3, 60)):
        bank = judged({"a": scores.tolist()})
        image = thresholds(bank, "a").image
        rarer = thresholds(bank.with_decision(false_alarm_rate=0.0004), "a").image.value
        # Above the smallest rate that images support, they tell themselves; below it the tail does.
        at_smallest = thresholds(bank.with_decision(false_alarm_rate=1 / 61), "a").image.value
        tail = upper_limit(scores, 0.02, EXPECTED_SPREAD)[1]
        assert rarer == pytest.approx(at_smallest * math.exp(tail * math.log(1 / 61 / 0.0004)), rel=1e-5)
        raw = np.array([image.value * 50**tail], np.float32)
        assert normalized(raw, image.value, image.steepness) == pytest.approx(0.75, abs=1e-4)


def test_scores_far_below_do_not_raise_the_limit() -> None:
    """As those of twins of a learned image, or of none at all."""
    scores = np.random.default_rng(0).normal(30, 1, 12).astype(np.float32)
    limit = upper_limit(scores, 0.02, 0.15)[0]
    for low in (3.0, 0.0):
        lower = scores.copy()
        lower[:2] = low
        assert upper_limit(lower, 0.02, 0.15)[0] < 1.4 * limit

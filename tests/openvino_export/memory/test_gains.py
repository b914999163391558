# SPDX-License-Identifier: Apache-2.0
"""Tests of what a vector is worth, by which the budget is divided."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from openvino_export.memory import leave_one_out
from openvino_export.memory.leave_one_out import ENOUGH, image_curves, joined, log_spread, worth
from openvino_export.memory.memory_bank import MemoryBank, shares_by_need

from .banks import REPEATABLE, clusters, clusters_bank, judged_by, learned, not_learned, of_vectors


@pytest.mark.parametrize(("kinds", "images", "size"), [(3, 10, 60), (12, 16, 1024), (12, 1, 500), (2, 3, 1), (2, 3, 2)])
def test_gains_never_rise(kinds: int, images: int, size: int) -> None:
    """From infinity, one of each vector; and the number that is wanted is one of those that could be."""
    variant = clusters_bank(kinds, images, size).variants["a"]
    for known in (variant, replace(variant, calibration=None)):
        each, wanted, _ = worth(known)
        assert (each.shape, each.dtype) == (variant.radii.shape, np.float32)
        assert each[0] == np.inf
        assert (np.diff(each[1:]) <= 0).all()
        assert ((each[1:] >= 0) & (each[1:] < np.inf)).all()
        assert wanted >= 1


@REPEATABLE
@given(bend=st.floats(-2, 2), fall=st.floats(-6, 4), size=st.integers(1, 300))
@example(bend=-2.0, fall=3.0, size=300)
def test_gains_never_rise_whatever_is_fitted(bend: float, fall: float, size: int) -> None:
    """Also where the curve falls faster and faster, or rises."""
    whole = of_vectors(np.zeros((size, 2), np.float32), np.zeros(size, np.int32), np.zeros(size, np.float32))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(leave_one_out, "_fit", lambda _: (bend, fall, 0.0, math.nan))
        each, wanted, _ = worth(whole)
    assert each[0] == np.inf
    assert (np.diff(each[1:]) <= 0).all()
    assert ((each[1:] > 0) & (each[1:] < np.inf)).all()
    assert 1 <= wanted <= size


COEFFICIENTS = st.tuples(st.floats(0, 0.5), st.floats(-6, -0.1))


@REPEATABLE
@given(curves=st.lists(COEFFICIENTS, min_size=2, max_size=3), share=st.floats(0.05, 0.95))
def test_the_budget_lowers_the_sum_as_far_as_it_can(curves: list[tuple[float, float]], share: float) -> None:
    """No other division among variants of such curves has a smaller sum of the powers."""
    whole = of_vectors(np.zeros((120, 2), np.float32), np.zeros(120, np.int32), np.zeros(120, np.float32))
    variants, powers = {}, []
    steps = np.log(np.arange(1, 121))
    with pytest.MonkeyPatch.context() as patch:
        for name, (bend, fall) in zip("abc", curves, strict=False):
            # A curve that rises again is flat from there on.
            fall = min(fall, -2 * bend * steps[-1])  # noqa: PLW2901
            patch.setattr(leave_one_out, "_fit", lambda _, found=(bend, fall, 0.0, math.nan): found)
            each, wanted, _ = worth(whole)
            variants[name] = replace(whole, gains=each)
            levels = bend * steps**2 + fall * steps
            excess = levels - levels[-1]
            powers.append((1 + excess) ** leave_one_out.SHARE_POWER)
            assert excess[wanted - 1] <= ENOUGH
            assert wanted == 1 or excess[wanted - 2] > ENOUGH
    size = max(len(variants), int(share * 120 * len(variants)))
    shares = shares_by_need(variants, size)
    found = sum(power[count - 1] for power, count in zip(powers, shares.values(), strict=True))
    best = powers[0]  # smallest sum for each number of vectors from one of each on
    for power in powers[1:]:
        table = np.full(len(best) + 119, np.inf)
        for i, value in enumerate(power):
            table[i : i + len(best)] = np.minimum(table[i : i + len(best)], best + value)
        best = table
    assert found <= 1.05 * best[size - len(variants)]


def test_what_is_wanted_is_enough() -> None:
    """With as many vectors, images score about one spread more than with all; with few, far more."""
    variant, known = clusters_bank(12, 16, 5000).variants["a"], judged_by(clusters_bank(12, 16, 5000))
    wanted = worth(variant).wanted
    assert variant.wanted == wanted
    logs = np.log(image_curves(variant, known, [50, wanted, len(variant.radii)]))
    spread = math.sqrt(log_spread(logs[:, -1], leave_one_out.TYPICAL_SPREAD) * leave_one_out.TYPICAL_SPREAD)
    excess = (logs.mean(axis=0) - logs[:, -1].mean()) / spread
    assert 0.5 < excess[1] < 1.5
    assert excess[0] > 3


def test_defects_do_not_tell_what_is_needed() -> None:
    """Only good images do, learned or not."""
    variant = clusters_bank(12, 16, 1024).variants["a"]
    known = judged_by(clusters_bank(12, 16, 1024))
    images = [clusters(12, seed) + 9 * (seed > 92) for seed in range(90, 96)]
    good = not_learned(variant, images[:3])
    both = not_learned(variant, images, np.arange(6) > 2)
    both_worth = [worth(replace(variant, calibration=joined([known, more]))).gains for more in (good, both)]
    np.testing.assert_array_equal(*both_worth)
    assert not np.array_equal(both_worth[0], variant.gains)


def test_richer_variants_get_more() -> None:
    """Of a shared budget; before there is an image to compare with, both get the same."""
    shares = {}
    for count in (1, 16):
        parts = {f"{kinds}": [5 * clusters(kinds, seed, spread=0.2) for seed in range(count)] for kinds in (3, 40)}
        bank = learned(MemoryBank(200), parts)
        assert len(bank) == 200
        shares[count] = [len(variant.radii) for variant in bank.variants.values()]
    assert abs(shares[1][0] - shares[1][1]) <= 1
    assert shares[16][1] > 1.1 * shares[16][0]


@pytest.mark.parametrize("size", [400, 800])
def test_a_share_does_not_shrink_by_learning_on(size: int) -> None:
    """Images that come one by one, after other variants have taken room, leave a variant about what it had at once."""
    images = {name: [5 * clusters(kinds, 100 * kinds + i) for i in range(24)] for name, kinds in (("a", 8), ("b", 20))}
    at_once = learned(MemoryBank(size), images)
    bank = learned(MemoryBank(size), {name: each[:12] for name, each in images.items()})
    for i in range(12, 24):
        for name, each in images.items():
            bank = learned(bank, {name: each[i : i + 1]})
    for name, variant in at_once.variants.items():
        later = bank.variants[name]
        assert len(later.radii) == pytest.approx(len(variant.radii), rel=0.2)
        assert later.wanted > 0.6 * variant.wanted
        assert later.floor <= variant.floor + 0.1

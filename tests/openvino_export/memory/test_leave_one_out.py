# SPDX-License-Identifier: Apache-2.0
"""Tests of what images would score had they not been learned: by brute force, and against images that were not."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from openvino_export.anomaly_map import anomaly_maps
from openvino_export.memory import leave_one_out
from openvino_export.memory.leave_one_out import (
    CALIBRATION_PATCHES,
    CALIBRATION_SHARES,
    LEARNED_IMAGES,
    VALIDATION_IMAGES,
    Sample,
    calibration_of,
    joined,
    kept_patches,
    no_images,
    prefix_distances,
    rank,
    scored,
)
from openvino_export.memory.memory_bank import MemoryBank
from openvino_export.memory.variant import Calibration, Variant, cut

from .banks import (
    REPEATABLE,
    SHAPES,
    Array,
    all_distances,
    clusters,
    clusters_bank,
    distances_between,
    draw,
    judged_by,
    learned,
    not_learned,
    of_vectors,
)


def expected_distances(patches: Array, origins: NDArray[np.int32], variant: Variant) -> NDArray[np.float64]:
    """Distance of each patch to each vector, those of its own image moved away."""
    own = (origins[:, None] == variant.origins) & (origins[:, None] >= 0)
    farther = np.where(own, variant.stand_ins.astype(np.float64), 0)
    power = leave_one_out.STAND_IN_POWER
    return (all_distances(patches, variant.vectors) ** power + farther**power) ** (1 / power)


# Distances


@REPEATABLE
@given(
    shape=st.sampled_from(sorted(SHAPES)),
    count=st.integers(1, 30),
    size=st.integers(1, 30),
    images=st.integers(1, 4),
    stand_ins=st.lists(st.sampled_from([0.0, 0.5, 3.0, np.inf]), min_size=30, max_size=30),
    marks=st.lists(st.integers(0, 30), min_size=1, max_size=5).map(sorted),
    dtype=st.sampled_from(["float32", "float16"]),
    seed=st.integers(0, 99),
)
def test_distances_are_those_of_brute_force(
    shape: str, count: int, size: int, images: int, stand_ins: list[float], marks: list[int], dtype: str, seed: int
) -> None:
    """By any first vectors, own ones farther by what stands in; -1 is no image, neither of patches nor of vectors."""
    rng = np.random.default_rng(seed)
    patches, vectors = (draw(shape, "a", 2 * seed + i, n).astype(dtype) for i, n in enumerate((count, size)))
    vectors[::3] = patches[np.arange(0, size, 3) % count]  # own patches among them
    origins = rng.integers(-1, images, count).astype(np.int32)
    variant = of_vectors(
        vectors, rng.integers(-1, images, size).astype(np.int32), np.array(stand_ins[:size], np.float32)
    )
    marks = [min(mark, size) for mark in marks]
    found = prefix_distances(patches, origins, variant, marks)
    every = expected_distances(patches, origins, variant)
    assert found.shape == (count, len(marks))
    assert found.dtype == np.float32
    # Differences of squares lose digits far from the origin.
    rounding = 3e-3 * max(1.0, float(np.abs(patches).max()))
    for column, mark in zip(found.T, marks, strict=True):
        expected = every[:, :mark].min(axis=1, initial=np.inf)
        np.testing.assert_array_equal(np.isinf(column), np.isinf(expected))
        np.testing.assert_allclose(column, expected, atol=rounding)


def test_own_vectors_count_as_farther() -> None:
    """By hand: by the distance of what stands in, if no vector of another image is nearer."""
    variant = of_vectors(
        np.array([[0, 0], [5, 0], [0, 12]], np.float32), np.array([0, 1, -1], np.int32), np.array([2, np.inf, 1], "f4")
    )
    patches = np.array([[1, 0], [1, 0], [1, 0], [5, 12]], np.float32)
    found = prefix_distances(patches, np.array([0, 1, -1, 1], np.int32), variant, [0, 1, 2, 3])
    expected = [
        [np.inf, *[(1 + 2 ** (4 / 3)) ** (3 / 4)] * 3],
        [np.inf, 1, 1, 1],
        [np.inf, 1, 1, 1],
        [np.inf, 13, 13, 5],  # its own is infinitely far
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


# What is kept of an image


@pytest.mark.parametrize("learned_too", [True, False])
@pytest.mark.parametrize(
    ("size", "share"), [(40, 1), (128, 1), (1024, 1), (256, 1 / 2), (2048, 1 / 2), (1024, 1 / 8), (4096, 1 / 4)]
)
def test_kept_patches_give_the_score_of_all(size: int, share: float, learned_too: bool) -> None:
    """Of a variant with all vectors, and once a share is left, by which its patches were looked for."""
    assert share in CALIBRATION_SHARES
    for expected, kept in scores_of_kept(size, share, learned_too):
        assert kept == pytest.approx(expected, rel=2e-3)  # they are kept in half precision


@pytest.mark.parametrize("learned_too", [True, False])
@pytest.mark.parametrize("share", CALIBRATION_SHARES)
@pytest.mark.parametrize("size", [600, 4096])
def test_kept_patches_give_nearly_the_score_of_all(size: int, share: float, learned_too: bool) -> None:
    """Of any number of vectors: never more, and hardly less on the mean."""
    both = np.array(scores_of_kept(size, share, learned_too))
    ratios = both[:, 1] / both[:, 0]
    assert ratios.max() <= 1 + 2e-3
    assert ratios.mean() > 0.94


def scores_of_kept(size: int, share: float, learned_too: bool) -> list[tuple[float, float]]:
    """Scores of images by a share of a variant's vectors: of all of their patches, and of those that are kept."""
    variant = clusters_bank(12, 30, size).variants["a"]
    assert len(variant.radii) == size
    shorter = cut(variant, math.ceil(share * size))
    found = []
    for seed in range(12):
        origin = seed if learned_too else -1
        image = clusters(12, seed if learned_too else 100 + seed)
        patches, factors = kept_patches(variant, Sample(origin, image))
        assert (patches.shape, factors.tolist()) == ((CALIBRATION_PATCHES, 6), [1, 1])
        scores = expected_distances(image, np.full(150, origin, np.int32), shorter).min(axis=1)
        one = replace(not_learned(variant, [image]), origins=np.array([origin], np.int32), patches=patches[None])
        found.append((scores.max(), scored(shorter, one).scores[0]))
    return found


@pytest.mark.parametrize("count", [1, 3, 40])
def test_few_patches_are_repeated(count: int) -> None:
    """An image of fewer patches than are kept; none comes in that was not there."""
    variant = clusters_bank(12, 16, 1024).variants["a"]
    image = clusters(12, 99, count)
    patches, factors = kept_patches(variant, Sample(-1, image))
    assert patches.shape == (CALIBRATION_PATCHES, 6)
    assert all((patch == image.astype(np.float16)).all(axis=1).any() for patch in patches)
    assert factors.tolist() == [1, 1]
    score = distances_between(image, variant.vectors).max()
    assert distances_between(patches, variant.vectors).max() == pytest.approx(score, rel=2e-3)


@pytest.mark.parametrize("value", [1.0, 1e6])
def test_patches_are_kept_in_half_precision(value: float) -> None:
    """If that holds them."""
    variant = of_vectors(np.zeros((1, 4), np.float32), np.zeros(1, np.int32), np.zeros(1, np.float32))
    image = np.full((3, 4), value, np.float32)
    known = calibration_of(variant, None, [Sample(1, image)])
    assert known.patches.dtype == (np.float16 if value == 1 else np.float32)
    assert known.scores == pytest.approx([2 * value], rel=1e-3)
    mixed = joined([known, calibration_of(variant, None, [Sample(2, image / value)])])
    assert scored(variant, mixed).scores == pytest.approx([2 * value, 2], rel=1e-3)


def test_maps_are_smoother_than_patches() -> None:
    """The second factor says by how much; without places, or without another image, it is 1."""
    image, other = (draw("lobes", "a", seed, 24) for seed in range(2))
    variant = learned(MemoryBank(200), {"a": [image, other]}).variants["a"]
    distances = expected_distances(image, np.zeros(24, np.int32), variant).min(axis=1).reshape(4, 6)
    factors = kept_patches(variant, Sample(0, image, (4, 6), (40, 60)))[1]
    expected = anomaly_maps(distances.astype(np.float32), 40, 60).max() / distances.max()
    assert factors == pytest.approx([1, expected], rel=1e-4)
    assert expected < 0.95
    for sample in (Sample(0, image), Sample(0, image, (4, 6))):
        assert kept_patches(variant, sample)[1].tolist() == [1, 1]
    alone = learned(MemoryBank(200), {"a": [image]}).variants["a"]
    assert kept_patches(alone, Sample(0, image, (4, 6), (40, 60)))[1].tolist() == [1, 1]


def test_scores_are_multiplied_by_the_first_factor() -> None:
    """It is that of a file of before, where thresholds were raised."""
    variant = clusters_bank(12, 16, 1024).variants["a"]
    plain = not_learned(variant, [clusters(12, seed) for seed in (90, 91)])
    factors = np.array([[1.5, 7], [3, 1]], np.float32)
    expected = scored(variant, plain).scores * [1.5, 3]
    np.testing.assert_allclose(scored(variant, replace(plain, factors=factors)).scores, expected, rtol=1e-6)


# Scores of learned images


@pytest.mark.parametrize("kinds", [3, 30])
@pytest.mark.parametrize(("size", "lowest", "highest"), [(10_000, 0.95, 1.05), (600, 0.9, 1.02), (200, 0.92, 1.02)])
def test_learned_images_score_as_those_to_come(kinds: int, size: int, lowest: float, highest: float) -> None:
    """Within a few per cent, though they score less by all vectors; a little less where there is no room for all."""
    bank = clusters_bank(kinds, 24, size)
    known = judged_by(bank)
    assert sorted(known.origins) == [*range(24)]
    unseen = [bank.search(clusters(kinds, seed))[0].max() for seed in range(100, 400)]
    assert lowest < known.scores.mean() / np.mean(unseen) < highest
    plain = [bank.search(clusters(kinds, seed))[0].max() for seed in range(24)]
    assert np.mean(plain) < (0.01 if size == 10_000 else 0.97) * known.scores.mean()


def test_a_single_image_says_nothing() -> None:
    """It has no score without itself; with another both have one."""
    assert np.isinf(judged_by(clusters_bank(12, 1, 500)).scores).all()
    both = judged_by(clusters_bank(12, 2, 500)).scores
    assert np.isfinite(both).all()
    assert (both > 0).all()


def test_the_first_image_is_kept_as_well_as_others() -> None:
    """Nearly: nothing told which of its patches are the farthest when it was learned in an update of its own."""
    images = [clusters(12, seed) for seed in range(8)]
    bank = learned(learned(MemoryBank(5000), {"a": images[:1]}), {"a": images[1:]})
    variant, known = bank.variants["a"], judged_by(bank)
    for origin, score in zip(known.origins, known.scores, strict=True):
        expected = expected_distances(images[origin], np.full(150, origin), variant).min(axis=1).max()
        assert score == pytest.approx(expected, rel=0.1 if origin == 0 else 5e-3)


@pytest.mark.parametrize("updates", [1, 3])
def test_calibration_holds_the_images_that_were_learned(updates: int) -> None:
    """By number, with the scores that brute force gives; of some updates those before count on."""
    images = [clusters(12, seed) for seed in range(12)]
    bank = MemoryBank(5000)
    for part in np.array_split(np.arange(12), updates):
        bank = learned(bank, {"a": [images[i] for i in part]})
    variant, known = bank.variants["a"], judged_by(bank)
    assert sorted(known.origins) == [*range(12)]
    assert not known.labels.any()
    for origin, score in zip(known.origins, known.scores, strict=True):
        expected = expected_distances(images[origin], np.full(150, origin), variant).min(axis=1).max()
        # What was kept of an image was chosen by the vectors of that time.
        assert expected * (1 - 3e-3 if updates == 1 else 0.7) <= score <= expected * (1 + 3e-3)


def test_scores_follow_the_vectors_that_are_left() -> None:
    """When other variants take room, images are scored again by those that stay."""
    bank = clusters_bank(12, 16, 450)
    before = judged_by(bank)
    more = {name: [draw("lobes", name, seed, 150, 6) for seed in range(8)] for name in "bcd"}
    bank = learned(bank, more)
    variant, after = bank.variants["a"], judged_by(bank)
    assert len(variant.radii) < 300
    np.testing.assert_array_equal(after.patches, before.patches)
    assert (after.scores >= before.scores * (1 - 1e-4)).all()
    assert after.scores.mean() > 1.03 * before.scores.mean()
    ratios = []
    for origin, score, patches in zip(after.origins, after.scores, after.patches, strict=True):
        by_kept, by_all = (
            expected_distances(each, np.full(len(each), origin, np.int32), variant).min(axis=1).max()
            for each in (patches, clusters(12, origin))
        )
        assert score == pytest.approx(by_kept, rel=5e-3)
        ratios.append(score / by_all)
    assert max(ratios) <= 1 + 2e-3
    assert np.mean(ratios) > 0.95
    np.testing.assert_array_equal(scored(variant, after).scores, after.scores)


def test_no_images_is_the_start() -> None:
    """Joined with others it adds nothing; it can be scored itself."""
    variant = clusters_bank(12, 16, 1024).variants["a"]
    empty = no_images(6)
    assert scored(variant, joined([empty, empty])).scores.shape == (0,)
    known = judged_by(clusters_bank(12, 16, 1024))
    again = joined([empty, known])
    for key, value in vars(known).items():
        np.testing.assert_array_equal(getattr(again, key), value)


# How many images are kept


def some(origins: list[int], labels: list[bool] | None = None) -> Calibration:
    """A calibration of images that differ in their patches."""
    count = len(origins)
    return Calibration(
        np.arange(count, dtype=np.float32)[:, None, None] * np.ones((1, CALIBRATION_PATCHES, 2), np.float32),
        np.array(origins, np.int32),
        np.zeros(count, bool) if labels is None else np.array(labels),
        np.ones((count, 2), np.float32) * np.arange(count)[:, None],
        np.arange(count, dtype=np.float32),
    )


def test_few_learned_images_are_kept() -> None:
    """The same of many in one part as in several, spread evenly over all."""
    whole = joined([some([*range(1000)])])
    assert len(whole.labels) == LEARNED_IMAGES
    assert np.diff(np.sort(whole.origins), prepend=0, append=999).max() < 3 * 1000 / LEARNED_IMAGES
    parts = joined([joined([some([*range(700)])]), some([*range(700, 1000)])])
    assert sorted(parts.origins) == sorted(whole.origins)
    # All that belongs to an image stays with it.
    np.testing.assert_array_equal(whole.patches[:, 0, 0], whole.origins)
    np.testing.assert_array_equal(whole.factors[:, 0], whole.origins)
    np.testing.assert_array_equal(whole.scores, whole.origins)


@pytest.mark.parametrize("count", [20, 200])
def test_few_validation_images_are_kept(count: int) -> None:
    """Of each label from the first to the last, in their order, beside those that were learned."""
    labels = np.arange(count) % 4 == 0
    kept = joined([some([-1] * count, labels.tolist()), some([5, 3])])
    assert sorted(kept.origins[kept.origins >= 0]) == [3, 5]
    others = kept.origins < 0
    for label in (False, True):
        numbers = kept.scores[others & (kept.labels == label)]
        of_label = np.flatnonzero(labels == label)
        assert len(numbers) == min(VALIDATION_IMAGES, len(of_label))
        assert (numbers[0], numbers[-1]) == (of_label[0], of_label[-1])
        assert (np.diff(numbers) > 0).all()
        assert np.isin(numbers, of_label).all()


@pytest.mark.parametrize("count", [10, 100, 5000])
def test_rank_spreads_images_evenly(count: int) -> None:
    """However many there are, those of the lowest ranks lie as far from each other, up to a small factor."""
    ranks = rank(np.arange(count))
    assert ranks == pytest.approx([rank(i) for i in range(count)])
    assert len(np.unique(ranks)) == count
    assert ((ranks >= 0) & (ranks < 1)).all()
    for kept in (2, 5, 8, 64):
        chosen = np.sort(np.argsort(ranks)[:kept])
        assert np.diff(chosen, prepend=-1, append=count).max() <= 3 * max(1, count / kept)

# SPDX-License-Identifier: Apache-2.0
"""Tests of the thresholds of variants, which follow the bank as it changes."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from openvino_export.anomaly_map import anomaly_maps
from openvino_export.memory.augment import augmented_views
from openvino_export.memory.k_center import nearest
from openvino_export.memory.memory_bank import MemoryBank
from openvino_export.memory.thresholds import (
    CALIBRATION_IMAGES,
    CALIBRATION_PATCHES,
    calibrated,
    calibrated_from_views,
    calibration_patches,
    f1_threshold,
    thresholds,
)
from openvino_export.memory.variant import cut

from .banks import REPEATABLE, Array, distances_between, draw, filled, learned, reloaded, unchanged, waves


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


def test_thresholds_follow_the_bank() -> None:
    """The same while the bank is the same; when it gets coarser, known images score higher, and thresholds rise."""
    bank = filled(calibrated=True)
    before = thresholds(bank, "a")
    assert before["pixel"] == (0.1, 0.2, 0.7)
    assert thresholds(bank, "a") == before
    calibration = bank.variants["a"].calibration
    assert calibration is not None
    scores = distances_between(calibration.patches.reshape(-1, 4), bank.vectors()).reshape(6, -1).max(axis=1)
    assert before["image"][1:] == pytest.approx((scores.min(), scores.max()), rel=1e-5)
    assert scores[:4].max() <= before["image"][0] < scores[4:].min()
    bank = learned(bank, {name: [draw("lobes", name, 0, 40)] for name in "cdefgh"})
    coarser = distances_between(calibration.patches.reshape(-1, 4), bank.vectors()).reshape(6, -1).max(axis=1)
    factor = coarser.mean() / scores.mean()
    assert factor > 1
    after = thresholds(bank, "a")
    assert after["image"][1:] == pytest.approx((coarser.min(), coarser.max()), rel=1e-5)
    assert after["pixel"] == pytest.approx([factor * value for value in before["pixel"]], rel=1e-5)


def test_thresholds_without_calibration() -> None:
    """What the last images scored before they were learned; unknown if there was but one."""
    bank = calibrated(filled(), "b", np.empty((0, CALIBRATION_PATCHES, 4), np.float32), np.empty(0, bool))
    for name in "ab":
        bound = bank.variants[name].normal_score_bound()
        assert bound > 0
        assert thresholds(bank, name) == {"image": (bound, 0, bound), "pixel": (bound, 0, bound)}
    bank = learned(bank, {"c": [draw("lobes", "c", 0, 40)]})
    assert np.isnan(list(thresholds(bank, "c").values())).all()


# Calibration by validation images


def test_calibration_is_bounded() -> None:
    """Of each label images from the first to the last are kept, in place of the former ones."""
    count = 5 * CALIBRATION_IMAGES
    patches = np.arange(count)[:, None, None] * np.ones((1, CALIBRATION_PATCHES, 4), np.float32)
    labels = np.arange(count) % 5 == 0
    calibration = calibrated(filled(calibrated=True), "a", patches, labels).variants["a"].calibration
    assert calibration is not None
    assert calibration.labels.sum() == (~calibration.labels).sum() == CALIBRATION_IMAGES
    kept = calibration.patches[:, 0, 0]
    assert (kept.min(), kept.max()) == (0, count - 1)
    assert (np.diff(kept) > 0).all()
    np.testing.assert_array_equal(calibration.labels, kept % 5 == 0)
    assert np.isnan(calibration.pixel).all()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_calibration_with_large_values(dtype: str) -> None:
    """Out of the range of float16, in which patches are kept otherwise."""
    patches = np.full((2, CALIBRATION_PATCHES, 4), 1.0, np.float32)
    bank = calibrated(filled(dtype=dtype), "a", patches, np.array([False, True]))
    assert bank.variants["a"].calibration.patches.dtype == np.float16
    patches[1] = 1e6
    bank = calibrated(bank, "a", patches, np.array([False, True]))
    threshold, lowest, highest = thresholds(bank, "a")["image"]
    assert lowest < threshold < highest == pytest.approx(2e6, rel=1e-3)


@pytest.mark.parametrize(
    "change",
    [lambda p: p[:, :, :3], lambda p: p[:, 1:], lambda p: p[1:], lambda p: p * np.nan],
    ids=["dimension", "patches", "images", "NaN"],
)
def test_bad_calibration_is_refused(change: Callable[[Array], Array]) -> None:
    """The former one stays."""
    bank = filled(calibrated=True)
    patches = np.ones((3, CALIBRATION_PATCHES, 4), np.float32)
    with unchanged(bank), pytest.raises(ValueError, match="must be finite and of shape"):
        calibrated(bank, "a", change(patches), np.zeros(3, bool))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("count", [2, 300])
def test_calibration_patches_give_the_score_that_will_be(dtype: str, count: int) -> None:
    """Of the whole variant, and once a half, a quarter or an eighth of its vectors are left; also of few patches."""
    bank = learned(MemoryBank(400, dtype), {"a": [draw("curve", "a", seed, 300) for seed in range(4)]})
    images = [draw("curve", "a", seed, count) for seed in range(10, 16)]
    kept = [calibration_patches(bank, "a", image, nearest(image, bank.vectors())[0]) for image in images]
    assert {patches.shape for patches in kept} == {(CALIBRATION_PATCHES, 4)}
    whole = calibrated(bank, "a", np.stack(kept), np.zeros(6, bool)).variants["a"]
    for share in (1, 2, 4, 8):
        part = MemoryBank(400, dtype, {"a": cut(whole, math.ceil(len(whole.radii) / share))})
        expected = [nearest(image, part.vectors())[0].max() for image in images]
        lowest, highest = thresholds(part, "a")["image"][1:]
        # Patches are kept in half precision.
        assert (lowest, highest) == pytest.approx((min(expected), max(expected)), rel=5e-3)


@pytest.mark.parametrize("bound", [0.0, 1e-3, 50.0])
def test_thresholds_are_raised_to_the_bound(bound: float) -> None:
    """By a factor that stays when the bank is saved."""
    patches = np.random.default_rng(0).normal(size=(4, CALIBRATION_PATCHES, 4)).astype(np.float32)
    given = filled(), "a", patches, np.zeros(4, bool), (3.0, 1.0, 3.0)
    plain = thresholds(calibrated(*given), "a")
    factor = max(1.0, bound / plain["image"][0])
    raised = thresholds(reloaded(calibrated(*given, bound)).bank, "a")
    for kind in ("image", "pixel"):
        threshold, lowest, highest = plain[kind]
        assert raised[kind] == pytest.approx((factor * threshold, lowest, factor * highest), rel=1e-5)


# Calibration by views


def embed(images: Array) -> Array:
    """Means over blocks of 8 x 8 pixels."""
    batch, channels, height, width = images.shape
    blocks = images.reshape(batch, channels, height // 8, 8, width // 8, 8)
    return np.ascontiguousarray(blocks.mean(axis=(3, 5)).transpose(0, 2, 3, 1))


@pytest.mark.parametrize(("wide", "strength"), [(True, 2.5), (False, 1.0)])
def test_thresholds_from_views(wide: bool, strength: float) -> None:
    """From views that were not learned, raised to what a second image scored before it was learned."""
    image = waves(64, 64)
    unset = learned(MemoryBank(500), {"waves": [embed(image[None])[0].reshape(-1, 3)]})
    with unchanged(unset):
        bank = calibrated_from_views(unset, "waves", [image], embed, wide)
    patches = embed(augmented_views(image, 16, 16, strength))
    distances = np.linalg.norm(patches[..., None, :] - bank.vectors(), axis=-1).min(axis=-1)
    maps = anomaly_maps(distances, 64, 64)
    first = thresholds(bank, "waves")
    highest = distances.max(axis=(1, 2))
    assert first["image"] == pytest.approx((highest.max(), highest.min(), highest.max()), rel=1e-3)
    assert first["pixel"] == pytest.approx((maps.max(), maps.min(), maps.max()), rel=1e-3)

    other = 3 * image
    patches = embed(other[None])[0].reshape(-1, 3)
    score = distances_between(patches, bank.vectors()).max()
    bank = calibrated_from_views(learned(bank, {"waves": [patches]}), "waves", [image], embed, wide)
    second = thresholds(bank, "waves")
    calibration = bank.variants["waves"].calibration
    assert calibration is not None
    assert len(calibration.labels) == 32
    assert calibration.margin > 1
    assert second["image"][0] == pytest.approx(score, rel=1e-5)
    assert second["pixel"][0] == pytest.approx(calibration.margin * calibration.pixel[0], rel=1e-5)
    # What was raised is not raised again.
    again = calibrated_from_views(bank, "waves", [image], embed, wide).variants["waves"].calibration
    assert again is not None
    assert again.pixel == pytest.approx(calibration.pixel, rel=1e-3)

    bank = calibrated(bank, "waves", np.ones((2, CALIBRATION_PATCHES, 3), np.float32), np.array([False, True]))
    assert calibrated_from_views(bank, "waves", [other], embed, wide) is bank


def test_few_patches_fill_the_calibration() -> None:
    """An image of fewer patches than are kept repeats the last of them."""
    bank = learned(MemoryBank(10), {"small": [np.zeros((4, 3), np.float32) + np.arange(4)[:, None]]})
    bank = calibrated_from_views(bank, "small", [waves(16, 16)], embed, wide=True)
    assert bank.variants["small"].calibration.patches.shape == (16, CALIBRATION_PATCHES, 3)

# SPDX-License-Identifier: Apache-2.0
"""Tests of what is read of files of schema 2: their thresholds stay until a variant has learned enough to judge."""

from typing import Any

import numpy as np
import pytest

from openvino_export.memory import state
from openvino_export.memory.memory_bank import MemoryBank
from openvino_export.memory.thresholds import FALSE_ALARM_RATE, SURE_IMAGES, f1_threshold, thresholds
from openvino_export.memory.update import Update

from .banks import check, distances_between, draw, filled, learned, not_learned, reloaded, same

NOVELTIES = [9.0, 1.0, 2.5, 2.0]  # what images scored before they were learned


def former(known: MemoryBank | Update, *, margin: float = 1.25, pixel: float = 3.0) -> tuple[Any, Any]:
    """A state as that version would have saved it; validation images have scored half as much when they were taken."""
    arrays, plain = state.to_arrays(known)
    arrays = {key: np.array(value) for key, value in arrays.items() if not key.endswith(("origins", "stand_ins"))}
    for key in [key for key in arrays if key in {"gains", "calibration_factors"} or "_sample_" in key]:
        del arrays[key]
    count = len(plain["variants"])
    arrays["calibration_scores"] = arrays["calibration_scores"] / 2
    arrays["calibration_pixels"] = np.tile([pixel, 0.5, 9.0], (count, 1))
    arrays["calibration_margins"] = np.full(count, margin)
    arrays["novelties"] = np.array(NOVELTIES * count, np.float32)
    for entry in plain["variants"]:
        for key in ("wanted", "false_alarm_rate", "by_hand", "former"):
            del entry[key]
        entry |= {"scale": 1.0, "novelties": len(NOVELTIES)}
    for position, stream in enumerate(plain["streams"]):
        del stream["samples"]
        arrays[f"stream_{position}_novelties"] = np.array(NOVELTIES, np.float32)
    del plain["false_alarm_rate"]
    return arrays, plain | {"schema_version": 2}


def only_validated(dtype: str = "float32") -> MemoryBank:
    """A bank of which the images that set thresholds were not learned, as in that version."""
    bank = filled(dtype=dtype, validated=True)
    arrays, plain = state.to_arrays(bank)
    chosen = arrays["calibration_origins"] < 0
    arrays |= {key: value[chosen] for key, value in arrays.items() if key.startswith("calibration_")}
    for entry in plain["variants"]:
        entry["calibration_images"] = 6
    return state.from_arrays(arrays, plain).bank


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_vectors_are_the_same(dtype: str) -> None:
    """Of images that nobody knows any more; the bank goes on to learn, and can be saved again."""
    bank = only_validated(dtype)
    read = state.from_arrays(*former(bank)).bank
    assert (read.size, read.dtype, read.false_alarm_rate) == (bank.size, bank.dtype, FALSE_ALARM_RATE)
    np.testing.assert_array_equal(read.image_hashes, bank.image_hashes)
    for name, variant in read.variants.items():
        before = bank.variants[name]
        for key in ("vectors", "radii", "cover_radii", "prototype"):
            np.testing.assert_array_equal(getattr(variant, key), getattr(before, key))
        assert (variant.images, variant.spread, variant.merge_radius) == (3, before.spread, before.merge_radius)
        assert set(variant.origins) == {-1}
        assert np.isinf(variant.stand_ins).all()
        assert variant.gains[0] == np.inf
        assert (np.diff(variant.gains[1:]) < 0).all()
        assert (variant.wanted, variant.false_alarm_rate, variant.by_hand) == (0, None, None)
    assert same(reloaded(read), read)
    more = learned(read, {"c": [draw("lobes", "c", 0, 40)]})
    assert len(more) == len(bank) == 60
    images = {name: [draw("lobes", name, seed, 40) for seed in range(3)] for name in "ab"}
    check(more, {**images, "c": [draw("lobes", "c", 0, 40)]}, lowest_origin=-1)


def test_validated_thresholds_stay() -> None:
    """Those of validation images by their scores now, with the factor that they were raised by, as in that version."""
    bank = only_validated()
    read = state.from_arrays(*former(bank)).bank
    for name, variant in read.variants.items():
        calibration = variant.calibration
        assert calibration is not None
        scores = distances_between(calibration.patches.reshape(-1, 4), bank.vectors()).reshape(6, -1).max(axis=1)
        found = thresholds(read, name)
        assert found.image.value == pytest.approx(1.25 * f1_threshold(scores, calibration.labels), rel=1e-5)
        assert found.pixel.value == pytest.approx(1.25 * 3.0 * 2, rel=1e-5)  # scores are twice as high as they were
        assert (found.images, found.by_hand) == (4, False)
        np.testing.assert_array_equal(calibration.origins, np.full(6, -1))


def test_thresholds_without_masks_or_images() -> None:
    """Of pixels only where they were known; without validation images the highest score of the later half decides."""
    read = state.from_arrays(*former(only_validated(), pixel=np.nan)).bank
    found, own = thresholds(read, "a"), thresholds(read.with_changes("a", former=None), "a")
    assert found.pixel == own.pixel
    assert found.image != own.image
    arrays, plain = former(filled())
    plain["variants"] = [{**entry, "calibration_images": 0} for entry in plain["variants"]]
    arrays |= {key: value[:0] for key, value in arrays.items() if key in {"calibration_patches", "calibration_labels"}}
    arrays["calibration_scores"] = arrays["calibration_scores"][:0]
    read = state.from_arrays(arrays, plain).bank
    found = thresholds(read, "a")
    assert (found.image.value, found.pixel.value, found.images) == (2.5, 2.5, 0)


def test_thresholds_follow_the_vectors_until_a_variant_judges_itself() -> None:
    """They move as the scores of validation images do; from enough learned images on, these decide."""
    read = state.from_arrays(*former(only_validated())).bank
    first = thresholds(read, "a")
    others = {name: [draw("lobes", name, seed, 40) for seed in range(3)] for name in "cdef"}
    coarser = learned(read, others)
    calibration = [bank.variants["a"].calibration for bank in (read, coarser)]
    factor = np.mean(calibration[1].scores) / np.mean(calibration[0].scores)
    assert factor > 1.02
    assert thresholds(coarser, "a").image.value == pytest.approx(factor * first.image.value, rel=1e-5)
    assert thresholds(coarser, "a").pixel.value == pytest.approx(factor * first.pixel.value, rel=1e-5)
    images = [draw("lobes", "a", seed, 40) for seed in range(20, 20 + SURE_IMAGES)]
    some = learned(read, {"a": images[:-1]})
    assert some.variants["a"].former is not None
    enough = learned(some, {"a": images[-1:]})
    own = enough.with_changes("a", former=None)
    assert thresholds(enough, "a") == thresholds(own, "a")
    assert thresholds(some, "a").image != thresholds(some.with_changes("a", former=None), "a").image
    assert thresholds(enough, "a").images == SURE_IMAGES + 4


def test_other_validation_images_leave_them_or_end_them() -> None:
    """They do not move a former threshold by what they score themselves."""
    read = state.from_arrays(*former(only_validated())).bank
    update = Update(read)
    update.validate("a", not_learned(read.variants["a"], [draw("lobes", "a", 60, 40) + 9 for _ in range(9)]))
    own = thresholds(update.bank.with_changes("a", former=None), "a").image.value
    assert thresholds(update.bank, "a").image.value in {own, thresholds(read, "a").image.value}


def test_an_update_goes_on() -> None:
    """One that was saved in the middle: its patches are learned, without what would let them judge."""
    update = Update(only_validated())
    for seed in range(3):
        for name in "ac":
            update.add(draw("lobes", name, 10 + seed, 40), name, image_hash=10 * ord(name) + seed)
    read = state.from_arrays(*former(update))
    assert read.knows(10 * ord("c") + 2)
    for name, pool in read.pools.items():
        assert set(pool.origins) == {-1}
        assert pool.samples == []
        np.testing.assert_array_equal(pool.points, update.pools[name].points)
    read.add(draw("lobes", "c", 13, 40), "c")
    assert read.commit().variants == {"a": 3, "c": 4}
    images = {name: [draw("lobes", name, seed, 40) for seed in range(3)] for name in "ab"}
    for name in "ac":
        images[name] = [*images.get(name, []), *(draw("lobes", name, 10 + seed, 40) for seed in range(3))]
    check(read.bank, {**images, "c": [*images["c"], draw("lobes", "c", 13, 40)]}, lowest_origin=-1)


@pytest.mark.parametrize(
    "key",
    [
        *(f"calibration_{key}" for key in ("patches", "labels", "scores", "pixels", "margins")),
        *("novelties", "vectors", "radii", "covers", "prototypes"),
    ],
)
def test_what_lacks_a_part_is_refused(key: str) -> None:
    """The message names it."""
    arrays, plain = former(only_validated())
    del arrays[key]
    with pytest.raises(ValueError, match=f"damaged: '{key}' is missing"):
        state.from_arrays(arrays, plain)


@pytest.mark.filterwarnings("ignore:.*ean of empty slice:RuntimeWarning", "ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize(
    "key",
    [
        *(f"calibration_{key}" for key in ("patches", "labels", "scores")),
        *("calibration_pixels", "calibration_margins", "novelties"),
        *("vectors", "radii", "covers", "prototypes"),
    ],
)
def test_what_is_too_short_is_refused(key: str) -> None:
    """The message says that the file is damaged."""
    arrays, plain = former(only_validated())
    arrays[key] = arrays[key][:1]
    with pytest.raises(ValueError, match=f"damaged: .*{key}"):
        state.from_arrays(arrays, plain)

# SPDX-License-Identifier: Apache-2.0
"""Tests of what is kept of images: their places, and those that are not learned but set thresholds."""

from dataclasses import replace

import numpy as np
import pytest

from openvino_export.memory.leave_one_out import Sample, kept_patches
from openvino_export.memory.memory_bank import MemoryBank
from openvino_export.memory.thresholds import thresholds
from openvino_export.memory.update import Update

from .banks import distances_between, draw, filled, not_learned, same, unchanged

# Images in their places


@pytest.mark.parametrize("map_size", [(0, 0), (50, 80)])
def test_places_change_no_vector(map_size: tuple[int, int]) -> None:
    """They tell how high a map is in comparison to its image: that much differs, and nothing else."""
    flat, placed = Update(MemoryBank(60)), Update(MemoryBank(60))
    for seed in range(9):
        image = draw("lobes", "a", seed, 40)
        flat.add(image, "a", map_size=map_size)
        placed.add(image.reshape(5, 8, 4), "a", map_size=map_size)
    flat.commit()
    placed.commit()
    one, other = (update.bank.variants["a"].calibration for update in (flat, placed))
    assert one is not None
    assert other is not None
    known = any(map_size)
    assert (one.factors == 1).all()
    assert (other.factors[:, 1] < 1).all() == known
    assert same(placed, flat) != known
    variant = placed.bank.variants["a"]
    for origin, factors in zip(other.origins, other.factors, strict=True):
        sample = Sample(origin, draw("lobes", "a", origin, 40), (5, 8), map_size)
        np.testing.assert_allclose(factors, kept_patches(variant, sample)[1], rtol=1e-3)
    leveled = placed.bank.with_changes("a", calibration=replace(other, factors=one.factors))
    assert same(leveled, flat.bank)
    decided = thresholds(placed.bank.with_decision(false_alarm_rate=0.2), "a")
    assert (decided.pixel.value < decided.image.value) == known


# Validation images


def test_validation_images_take_the_place_of_former_ones() -> None:
    """Beside those that were learned, for this variant only, with scores by the vectors as they are."""
    update = Update(filled(validated=True))
    before = update.bank
    images = [draw("lobes", "a", seed, 40) for seed in range(60, 63)]
    with unchanged(before):
        update.validate("a", not_learned(before.variants["a"], images, np.array([False, True, False])))
    assert update.bank.variants["b"] is before.variants["b"]
    known, former = (bank.variants["a"].calibration for bank in (update.bank, before))
    assert known is not None
    assert former is not None
    assert sorted(known.origins) == [-1, -1, -1, 0, 1, 2]
    assert known.labels[known.origins < 0].tolist() == [False, True, False]
    assert not known.labels[known.origins >= 0].any()
    expected = [distances_between(image, before.variants["a"].vectors).max() for image in images]
    np.testing.assert_allclose(known.scores[known.origins < 0], expected, rtol=5e-3)
    np.testing.assert_allclose(known.scores[known.origins >= 0], former.scores[former.origins >= 0], rtol=1e-5)
    assert thresholds(update.bank, "a").images == 5
    assert thresholds(before, "a").images == 7


def test_validation_while_a_pool_is_open() -> None:
    """What it sets remains, beside the images that were learned, with scores by all vectors in the end."""
    update = Update(filled())
    update.add(draw("lobes", "a", 9, 40), "a")
    images = [draw("lobes", "a", seed, 40) for seed in range(60, 63)]
    with unchanged(update.bank):
        update.validate("a", not_learned(update.bank.variants["a"], images))
    before = thresholds(update.bank, "a").images
    update.commit()
    variant = update.bank.variants["a"]
    assert variant.calibration is not None
    assert sorted(variant.calibration.origins) == [-1, -1, -1, 0, 1, 2, 3]
    assert (before, thresholds(update.bank, "a").images) == (6, 7)
    scores = variant.calibration.scores[variant.calibration.origins < 0]
    expected = [distances_between(image, variant.vectors).max() for image in images]
    np.testing.assert_allclose(scores, expected, rtol=0.05)


def test_an_unknown_height_of_a_map_is_that_of_others() -> None:
    """As of the first image, which was learned alone: taken for the height of its patches, it would set the limit."""
    update = Update(MemoryBank(60))
    for seed in range(9):
        update.add(draw("lobes", "a", seed, 40).reshape(5, 8, 4), "a", map_size=(50, 80))
    update.commit()
    known = update.bank.variants["a"].calibration
    assert known is not None
    factors = known.factors.copy()
    factors[0, 1] = 1
    filled_in = factors.copy()
    filled_in[0, 1] = np.median(factors[1:, 1])
    one, other = (
        thresholds(update.bank.with_changes("a", calibration=replace(known, factors=each)), "a").pixel.value
        for each in (factors, filled_in)
    )
    assert one == other


def test_validation_of_a_variant_whose_vectors_have_no_origin() -> None:
    """As those of a former version: the patches that are kept are still the farthest."""
    variant = filled(60).variants["a"]
    unknown = replace(
        variant,
        origins=np.full(len(variant.radii), -1, np.int32),
        stand_ins=np.full(len(variant.radii), np.inf, np.float32),
    )
    # All patches but one are known; that one is near to them, and so among the least of those that differ.
    image = np.concatenate([variant.vectors, variant.vectors[5:6] + np.float32(0.05)])
    kept, _ = kept_patches(unknown, Sample(-1, image))
    farthest = distances_between(image, unknown.vectors).max()
    assert farthest > 0.05
    assert distances_between(kept.astype(np.float32), unknown.vectors).max() == pytest.approx(farthest, rel=5e-2)

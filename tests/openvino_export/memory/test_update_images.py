# SPDX-License-Identifier: Apache-2.0
"""Tests of learning images: many as their patches, few with views of them, in batches of any size."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from openvino_export.images import image_hash
from openvino_export.memory.augment import NUM_VIEWS, augmented_views
from openvino_export.memory.memory_bank import MemoryBank
from openvino_export.memory.thresholds import CALIBRATION_PATCHES, RECENT_IMAGES, calibrated_from_views
from openvino_export.memory.update import FEW_IMAGES, Update

from .banks import REPEATABLE, Array, as_if_not_called, check, distances_between, draw, reloaded, same, unchanged

SIDE = 8


def embed(images: Array) -> Array:
    """The cheapest embedding: each pixel is a patch."""
    return np.ascontiguousarray(images.transpose(0, 2, 3, 1))


def patches_of(images: Array) -> Array:
    """Patches of images of shape ``(B, 3, H, W)``."""
    return embed(images).reshape(-1, 3)


def image_of(name: str, seed: int) -> Array:
    """An image of a product."""
    return draw("lobes", name, seed, SIDE * SIDE, 3).T.reshape(3, SIDE, SIDE).copy()


def known_bank(size: int = 300) -> MemoryBank:
    """A bank that has learned three images of two products."""
    update = Update(MemoryBank(size), embed)
    for name, seeds in (("a", (20, 21)), ("b", (20,))):
        update.add(np.stack([image_of(name, seed) for seed in seeds]), name)
    update.commit()
    return update.bank


# Products, and whether their name is told; those without a name are found.
STREAM = st.lists(
    st.tuples(st.sampled_from(["a", "b", "c"]), st.booleans(), st.integers(0, 5)), min_size=1, max_size=14
)


def batches(stream: list[tuple[str, bool, int]], ends: list[bool]) -> list[tuple[Array, str | None]]:
    """Images of the same name that follow each other, in one batch unless it ends there."""
    found: list[tuple[list[Array], str | None]] = []
    for (product, named, seed), end in zip(stream, ends, strict=False):
        name = product if named else None
        if not found or end or found[-1][1] != name:
            found.append(([], name))
        found[-1][0].append(image_of(product, seed))
    return [(np.stack(images), name) for images, name in found]


@REPEATABLE
@given(stream=STREAM, ends=st.lists(st.booleans(), min_size=14, max_size=14), known=st.booleans())
def test_many_images_are_learned_as_their_patches(
    stream: list[tuple[str, bool, int]], ends: list[bool], known: bool
) -> None:
    """With the same hashes, bit by bit, repeated ones too; the last of each variant set its thresholds."""
    bank = known_bank() if known else MemoryBank(300)
    recent: dict[str, list[Array]] = {}
    update, by_patches = Update(bank, embed), Update(bank)
    for images, name in batches(stream, ends):
        assert update.add(images, name) is None
        for image in images:
            found = by_patches.add(patches_of(image[None]), name, image_hash=image_hash(image))
            if found is not None:
                recent.setdefault(found, []).append(image)
        assert same(update, by_patches)
    one, other = update.commit(), by_patches.commit()
    assert (one.variants, one.known_images) == (other.variants, other.known_images)
    expected = by_patches.bank
    for name, images in recent.items():
        expected = calibrated_from_views(expected, name, images[-RECENT_IMAGES:], embed, wide=False)
    assert same(update.bank, expected)


@REPEATABLE
@given(stream=STREAM, ends=st.lists(st.booleans(), min_size=14, max_size=14), known=st.booleans(), few=st.booleans())
def test_batches_of_any_size_end_alike(
    stream: list[tuple[str, bool, int]], ends: list[bool], known: bool, few: bool
) -> None:
    """Images that wait, because they may be few, end as they would have one by one."""
    bank = known_bank() if known else MemoryBank(300)
    together, single = Update(bank, embed, few), Update(bank, embed, few)
    for images, name in batches(stream, ends):
        together.add(images, name)
    for images, name in batches(stream, [True] * len(stream)):
        single.add(images, name)
    one, other = together.commit(), single.commit()
    assert (one.variants, one.known_images) == (other.variants, other.known_images)
    assert same(together.bank, single.bank)


@pytest.mark.parametrize("known", [0, 2])
@pytest.mark.parametrize("count", range(1, 7))
@pytest.mark.parametrize("named", [True, False])
def test_few_images_are_learned_with_views(count: int, known: int, named: bool) -> None:
    """Up to four of a variant, counting those that are known by its name; more are learned as they are."""
    images = np.stack([image_of("a", seed) for seed in range(known + count)])
    before = Update(MemoryBank(5000), embed)
    before.add(images[:known], "a")
    before.flush()
    update, plain = Update(before.bank, embed, few_shot_views=True), Update(before.bank, embed)
    for each in (update, plain):
        each.add(images[known:], "a" if named else None)
        each.flush()
    few = count + (known if named else 0) <= FEW_IMAGES
    assert same(update, plain) != few
    ((name, variant),), (other,) = update.bank.variants.items(), plain.bank.variants.values()
    # Views are neither counted as images nor part of the mean.
    assert (variant.images, variant.spread, len(variant.prequential_scores)) == (
        known + count,
        other.spread,
        known + count - 1,
    )
    np.testing.assert_array_equal(variant.prototype, other.prototype)
    np.testing.assert_array_equal(update.bank.image_hashes, plain.bank.image_hashes)
    if few:
        views = [patches_of(augmented_views(image, NUM_VIEWS, image_hash(image))) for image in images[known:]]
        check(update.bank, {name: [*(patches_of(image[None]) for image in images), *views]})
        assert distances_between(np.concatenate(views), plain.bank.vectors()).max() > plain.bank.radius_bound()


def test_scores_of_few_images_are_distances_to_images_and_views() -> None:
    """Each taken before the image and its views were learned."""
    update = Update(MemoryBank(5000), embed, few_shot_views=True)
    known: list[Array] = []
    expected = []
    for seed in range(FEW_IMAGES):
        image = image_of("a", seed)
        update.add(image[None], "a")
        if known:
            expected.append(distances_between(patches_of(image[None]), np.concatenate(known)).max())
        known += [patches_of(image[None]), patches_of(augmented_views(image, NUM_VIEWS, image_hash(image)))]
    update.flush()
    assert update.bank.variants["a"].prequential_scores == pytest.approx(expected, rel=1e-5)


def test_known_images_are_not_embedded() -> None:
    """Nor those of which the patches are given, as on the edge, where the guard has looked at them."""
    embedded = []

    def watched(images: Array) -> Array:
        embedded.append(len(images))
        return embed(images)

    bank = known_bank()
    update = Update(bank, watched)
    images = np.stack([image_of("a", seed) for seed in (20, 1, 21, 2, 1)])
    update.add(images, "a")
    update.add(images, "a")
    new = np.stack([image_of("a", seed) for seed in (3, 4)])
    update.add(new, "a", patches=embed(new).reshape(2, -1, 3))
    assert embedded == [3]
    assert update.report.known_images == 8
    assert update.images("a") == 6
    update.flush()
    check(update.bank, {"a": [patches_of(images), patches_of(new)], "b": [patches_of(image_of("b", 20)[None])]})


def test_thresholds_that_were_set_stay() -> None:
    """Those of validation images, in the same update; views come in where there were none."""
    update = Update(known_bank(), embed)
    for name in "ab":
        update.add(image_of(name, 1)[None], name)
    update.flush()
    patches = np.random.default_rng(0).normal(size=(3, CALIBRATION_PATCHES, 3)).astype(np.float32)
    update.calibrate("a", patches, np.zeros(3, bool), (0.1, 0.2, 0.3))
    update.commit()
    counts = {name: len(variant.calibration.labels) for name, variant in update.bank.variants.items()}
    # Those of `b` count on, 16 views of an image, beside as many of the next.
    assert counts == {"a": 3, "b": 32}
    update.add(image_of("a", 2)[None], "a")
    update.commit()
    assert len(update.bank.variants["a"].calibration.labels) == 3 + RECENT_IMAGES


@pytest.mark.parametrize("few_shot_views", [False, True])
@pytest.mark.parametrize("is_flushed", [False, True])
@pytest.mark.parametrize(("before", "after"), [(1, 10), (3, 10), (6, 10), (2, 3), (3, 3)])
@pytest.mark.parametrize("name", ["c", None])
def test_an_update_goes_on_where_it_was_saved(
    name: str | None, before: int, after: int, is_flushed: bool, few_shot_views: bool
) -> None:
    """Given all images again, it ends bit by bit, with thresholds, as one that was never interrupted.

    So it does when its images wait, and when they are in the bank already.
    """
    images = np.stack([image_of("c", seed) for seed in range(after)])
    whole, interrupted = (Update(known_bank(), embed, few_shot_views) for _ in range(2))
    for update in (whole, interrupted):
        update.add(images[:before], name)
        if is_flushed:
            update.flush()
    again = reloaded(interrupted).continued(embed, few_shot_views)
    assert again.is_open()
    whole.add(images[before:], name)
    waits = few_shot_views and not is_flushed and before <= FEW_IMAGES
    for part in (slice(before, after), slice(before)) if waits else (slice(after),):  # those that wait come at any time
        again.add(images[part], name)
    reports = whole.commit(), again.commit()
    if not is_flushed:  # what was in the bank by then is not reported again
        assert reports[0].variants == reports[1].variants
    assert same(whole, again)
    assert not again.is_open()


def test_what_waits_is_in_the_saved_update() -> None:
    """Whoever judges by it, without a network at hand, has those images too."""
    update = Update(known_bank(), embed, few_shot_views=True)
    update.add(np.stack([image_of("c", seed) for seed in range(3)]), "c")
    saved = reloaded(update).continued()
    saved.flush()
    assert saved.bank.variants["c"].images == 3
    patches = np.concatenate([patches_of(image_of("c", seed)[None]) for seed in range(3)])
    assert distances_between(patches, saved.bank.variants["c"].vectors).max() <= saved.bank.radius_bound()


# What is refused


@pytest.mark.parametrize("few", [False, True])
def test_a_refused_batch_leaves_nothing_behind(few: bool) -> None:
    """Not even of its images that are good, nor of those that wait; the update ends as if it had never come."""
    images = np.stack([image_of("a", seed) for seed in range(3)])
    bad = images.copy()
    bad[2, 1, 3, 4] = np.nan
    update, twin = (Update(known_bank(), embed, few) for _ in range(2))
    for each in (update, twin):
        each.add(image_of("b", 1)[None], "b")
        each.add(image_of("a", 9)[None], "a")
    for batch, name, message in (
        (bad, "a", "NaN or infinite"),
        (bad, None, "NaN or infinite"),
        (images, "", "must not be empty"),
    ):
        with as_if_not_called(update), unchanged(update.bank), pytest.raises(ValueError, match=message):
            update.add(batch, name)
    for each in (update, twin):
        each.add(images[:1], "a")
    assert update.commit().variants == twin.commit().variants
    assert same(update, twin)


def test_no_room_for_the_variant_of_images() -> None:
    """Those that wait have their place, also before they are learned and while a bank is merged."""
    other = Update(MemoryBank(9))
    other.add(patches_of(image_of("d", 0)[None]), "d")
    other.commit()
    update = Update(known_bank(3), embed, few_shot_views=True)
    update.add(image_of("c", 0)[None], "c")
    for refused in (
        lambda: update.add(image_of("d", 0)[None], "d"),
        lambda: update.add(patches_of(image_of("d", 0)[None]), "d"),
        lambda: update.merge(other.bank),
    ):
        with as_if_not_called(update), pytest.raises(ValueError, match="3 vectors cannot hold 4 variants"):
            refused()
    assert update.commit().variants == {"c": 1}
    assert [*update.bank.variants] == ["a", "b", "c"]


def test_no_room_beside_a_variant_that_is_found() -> None:
    """Images without a name turn out to be of a new variant; the bank that is merged then has no place left."""
    other = Update(MemoryBank(9))
    other.add(patches_of(image_of("d", 0)[None]), "d")
    other.commit()
    update = Update(known_bank(3), embed, few_shot_views=True)
    update.add(image_of("c", 0)[None])
    with unchanged(other.bank), pytest.raises(ValueError, match="3 vectors cannot hold 4 variants"):
        update.merge(other.bank)
    assert update.commit().variants == {"variant_1": 1}
    assert {name: len(variant.radii) for name, variant in update.bank.variants.items()} == {
        "a": 1,
        "b": 1,
        "variant_1": 1,
    }

# SPDX-License-Identifier: Apache-2.0
"""Tests of views, hashes and the thresholds that views set."""

import numpy as np
import pytest

from openvino_export.anomaly_map import anomaly_maps
from openvino_export.memory.augment import augmented_views, calibrate_from_views, image_hash
from openvino_export.memory.k_center import nearest
from openvino_export.memory.memory_bank import CALIBRATION_PATCHES, MemoryBank


def smooth_image(height: int, width: int) -> np.ndarray:
    """Return an image of waves a quarter of its height long."""
    rows, columns = np.mgrid[:height, :width] * (8 * np.pi / height)
    return np.stack([np.sin(rows), np.cos(columns), np.sin(rows + columns)]).astype(np.float32)


def test_views_are_reproducible() -> None:
    """The same seed gives the same views, without touching the global generator."""
    image = smooth_image(40, 56)
    before = np.random.get_state()[1].tolist()  # noqa: NPY002
    views = augmented_views(image, 3, seed=-7)
    assert np.random.get_state()[1].tolist() == before  # noqa: NPY002
    assert views.shape == (3, 3, 40, 56)
    assert views.dtype == np.float32
    assert np.array_equal(views, augmented_views(image, 3, seed=-7))
    assert not np.array_equal(views, augmented_views(image, 3, seed=8))
    assert not np.array_equal(views[0], views[1])


def test_views_are_slight_changes() -> None:
    """Of the strength wanted, around the middle of the image, with none of it missing at the borders."""
    image = smooth_image(64, 96)
    changes = [np.abs(augmented_views(image, 32, seed=0, strength=s) - image).mean() for s in (0.125, 0.5, 2.0)]
    assert 0 < 2 * changes[0] < changes[1] < changes[2] / 1.5 < 0.5
    # An even image stays even: no border of another value comes in, neither do changes of light add noise.
    even = augmented_views(np.full((3, 48, 48), 2, np.float32), 32, seed=1, strength=2.5)
    assert even.std(axis=(1, 2, 3)).max() < 1e-5
    assert 1.4 < even.min() < 1.6
    assert 2.4 < even.max() < 2.6
    # A dot in the middle is moved by 2.5 % of the side at most, while rotation and scale leave it there.
    dot = np.zeros((3, 101, 101), np.float32)
    dot[:, 50, 50] = 1
    rows, columns = np.nonzero(augmented_views(dot, 32, seed=2).max(axis=(0, 1)) > 0.2)
    assert max(np.abs(rows - 50).max(), np.abs(columns - 50).max()) == 3


def test_hashes_tell_images_apart() -> None:
    """One grey level of one pixel is enough; rounding errors are not."""
    levels = np.random.default_rng(0).integers(0, 256, (3, 32, 32))
    image = ((levels / 255 - 0.45) / 0.23).astype(np.float32)
    assert image_hash(image) == image_hash(image + np.float32(1e-9))
    changed = image.copy()
    changed[1, 3, 4] += 1 / 255 / 0.23
    assert image_hash(changed) != image_hash(image)
    assert image_hash(image[..., ::-1]) != image_hash(image)
    # Hashes are kept in checkpoints, so they stay what they are.
    assert image_hash(np.arange(12, dtype=np.float32).reshape(3, 2, 2) / 7) == -665047435142560193


def embed(images: np.ndarray) -> np.ndarray:
    """Return means over blocks of 8 x 8 pixels as an embedding."""
    batch, channels, height, width = images.shape
    blocks = images.reshape(batch, channels, height // 8, 8, width // 8, 8)
    return np.ascontiguousarray(blocks.mean(axis=(3, 5)).transpose(0, 2, 3, 1))


def test_thresholds_from_views() -> None:
    """From views that were not learned, raised to what a second image scored before it was learned."""
    image = smooth_image(64, 64)
    bank = MemoryBank(500)
    bank.learn(embed(image[None])[0].reshape(-1, 3), "waves")
    bank.commit()
    calibrate_from_views(bank, "waves", [image], embed, lambda patches: nearest(patches, bank.vectors))
    views = augmented_views(image, 16, 16, strength=2.5)
    patches = embed(views)
    distances = np.linalg.norm(patches[..., None, :] - bank.vectors, axis=-1).min(axis=-1)
    maps = anomaly_maps(distances, 64, 64)
    first = bank.thresholds("waves")
    highest = distances.max(axis=(1, 2))
    assert first["image"] == pytest.approx((highest.max(), highest.min(), highest.max()), rel=1e-3)
    assert first["pixel"] == pytest.approx((maps.max(), maps.min(), maps.max()), rel=1e-3)

    other = 3 * image
    patches = embed(other[None])[0].reshape(-1, 3)
    novelty = np.linalg.norm(patches[:, None] - bank.vectors, axis=-1).min(axis=-1).max()
    bank.learn(patches, "waves")
    bank.commit()
    calibrate_from_views(bank, "waves", [image], embed, lambda patches: nearest(patches, bank.vectors))
    second = bank.thresholds("waves")
    calibration = bank.variants["waves"].calibration
    assert calibration is not None
    assert len(calibration.labels) == 32
    assert calibration.margin > 1
    assert second["image"][0] == pytest.approx(novelty, rel=1e-5)
    assert second["pixel"][0] == pytest.approx(calibration.margin * calibration.pixel[0], rel=1e-5)

    bank.calibrate("waves", np.ones((2, CALIBRATION_PATCHES, 3), np.float32), np.array([False, True]))
    kept = bank.variants["waves"]
    calibrate_from_views(bank, "waves", [other], embed, lambda patches: nearest(patches, bank.vectors))
    assert bank.variants["waves"] is kept


def test_few_patches_fill_the_calibration() -> None:
    """An image of fewer patches than are kept repeats the last of them."""
    image = smooth_image(16, 16)
    bank = MemoryBank(10)
    bank.learn(np.zeros((4, 3), np.float32) + np.arange(4)[:, None], "small")
    bank.commit()
    calibrate_from_views(bank, "small", [image], embed, lambda patches: nearest(patches, bank.vectors))
    assert bank.variants["small"].calibration.patches.shape == (16, CALIBRATION_PATCHES, 3)

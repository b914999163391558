# SPDX-License-Identifier: Apache-2.0
"""Tests of the views that few images are stretched to."""

import numpy as np

from openvino_export.memory.augment import augmented_views

from .banks import waves


def test_views_are_reproducible() -> None:
    """The same seed gives the same views, without touching the global generator."""
    image = waves(40, 56)
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
    image = waves(64, 96)
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

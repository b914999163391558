# SPDX-License-Identifier: Apache-2.0
"""Tests of the farthest-first traversal: it picks what the plain loop picks."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from openvino_export.memory import k_center
from openvino_export.memory.k_center import BLOCK_SIZE, farthest_first

from .banks import REPEATABLE, SHAPES, Array, distances_between, draw


def plain_farthest_first(
    points: Array,
    size: int,
    distances: Array | None,
    stop: float,
) -> tuple[list[int], list[float]]:
    """The plain loop in double precision."""
    left = np.full(len(points), np.inf) if distances is None else distances.astype(np.float64)
    picks: list[int] = []
    radii: list[float] = []
    while len(picks) < min(size, len(points)):
        pick = int(left.argmax()) if picks or distances is not None else 0
        if left[pick] <= stop:
            break
        picks.append(pick)
        radii.append(left[pick])
        left = np.minimum(left, np.linalg.norm(points.astype(np.float64) - points[pick], axis=1))
        left[pick] = -1
    return picks, radii


@pytest.mark.parametrize("count", [1, 2, BLOCK_SIZE, BLOCK_SIZE + 1, 4 * BLOCK_SIZE])
@pytest.mark.parametrize("start", ["empty", "set"])
@pytest.mark.parametrize("stop", [-1.0, 1.5])
def test_farthest_first_is_the_plain_loop(count: int, start: str, stop: float) -> None:
    """Without ties the picks are the same, above and below the size of a block."""
    rng = np.random.default_rng(count)
    points = rng.normal(size=(count, 6)).astype(np.float32)
    distances = distances_between(points, rng.normal(size=(3, 6))).astype(np.float32) if start == "set" else None
    for size in {0, 1, count // 3, count}:
        picks, radii = farthest_first(points, size, distances, stop)
        expected, expected_radii = plain_farthest_first(points, size, distances, stop)
        assert picks.tolist() == expected
        np.testing.assert_allclose(radii, expected_radii, rtol=1e-4, atol=1e-3)


@REPEATABLE
@given(
    shape=st.sampled_from(sorted(SHAPES)),
    count=st.integers(0, 60),
    size=st.integers(0, 70),
    start=st.booleans(),
    stop=st.sampled_from([-1.0, 0.0, 1.0]),
    block=st.sampled_from([1, 7, BLOCK_SIZE]),
    seed=st.integers(0, 99),
)
def test_farthest_first_picks_the_farthest(
    shape: str, count: int, size: int, start: bool, stop: float, block: int, seed: int
) -> None:
    """With ties and duplicates too, every pick is a farthest point, and a smaller size gives a prefix."""
    points = draw(shape, "a", seed, count)
    distances = distances_between(points, points[:2] + 1).astype(np.float32) if start and count else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(k_center, "BLOCK_SIZE", block)
        picks, radii = farthest_first(points, size, distances, stop)
        shorter = farthest_first(points, size // 2, distances, stop)
    assert len(set(picks.tolist())) == len(picks) == len(radii) <= min(size, count)
    np.testing.assert_array_equal(shorter[0], picks[: size // 2])
    np.testing.assert_array_equal(shorter[1], radii[: size // 2])
    rounding = 2e-3 * max(1.0, np.abs(points).max(initial=0))
    left = np.full(count, np.inf) if distances is None else distances.astype(np.float64)
    for pick, radius in zip(picks, radii, strict=True):
        assert left[pick] == radius or abs(left[pick] - radius) <= rounding
        assert left[pick] >= left.max() - rounding
        left = np.minimum(left, np.linalg.norm(points.astype(np.float64) - points[pick], axis=1))
    if len(picks) < min(size, count):
        assert left[np.setdiff1d(np.arange(count), picks)].max() <= max(stop, 0) + rounding

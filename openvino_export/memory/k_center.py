# SPDX-License-Identifier: Apache-2.0
"""k-center selection with NumPy and faiss, without torch: Gonzalez' farthest-first traversal (1985), exact and fast."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Generator

    from numpy.typing import NDArray

    Array = NDArray[np.float32]

# Farthest-first works on this many points with the largest stale distances at a time; 256 and 1024 were slower.
BLOCK_SIZE = 512


def farthest_first(
    points: Array,
    size: int,
    distances: Array | None = None,
    stop: float = -1.0,
) -> tuple[NDArray[np.int64], Array]:
    """Exact farthest-first traversal, several times faster than the plain loop.

    Distances to a growing set only shrink, so a stale one is an upper bound. The points with the largest bounds are
    refreshed by one matrix product and picked among themselves until the best of them falls below all others' bounds.

    Args:
        points: Shape `(n, d)`.
        size: Number of points to pick, at most `n`.
        distances: Distance of each point to a set picked before; without it the traversal starts at point 0.
        stop: Pick no point whose distance is this or less.

    Returns:
        Indices of the picks in order, and the distance of each to all before it; infinite for a start at point 0.
    """
    size = min(size, len(points))
    picks = np.empty(size, dtype=np.int64)
    radii = np.empty(size, dtype=np.float32)
    if size == 0:
        return picks, radii
    squares = np.einsum("ij,ij->i", points, points)
    if distances is None:
        picks[0], radii[0], count = 0, np.inf, 1
        bounds = np.maximum(squares + squares[0] - 2 * (points @ points[0]), 0)
        bounds[0] = -1
    else:
        count = 0
        bounds = np.square(distances, dtype=np.float32)
    refreshed = np.full(len(points), count, dtype=np.int64)  # number of picks that a bound takes into account
    limit = stop * stop if stop >= 0 else -0.5  # picked points have the bound -1
    while count < size:
        block = np.arange(len(points))
        others = -1.0
        if len(points) > BLOCK_SIZE:
            block = np.argpartition(bounds, -BLOCK_SIZE)[-BLOCK_SIZE:]
            others = bounds[block].min()
        current, members = bounds[block], points[block]
        oldest = refreshed[block].min()
        if oldest < count:
            latest = points[picks[oldest:count]]
            products = members @ latest.T
            products *= -2
            products += squares[picks[oldest:count]]
            fresh = np.maximum(products.min(axis=1) + squares[block], 0)
            current = np.where(current < 0, current, np.minimum(current, fresh))
        among = members @ members.T
        among *= -2
        among += squares[block]
        among += squares[block][:, None]
        np.maximum(among, 0, out=among)
        best = np.inf
        while count < size:
            position = int(current.argmax())
            best = current[position]
            if best < others or best <= limit:
                break
            picks[count], radii[count] = block[position], np.sqrt(best)
            count += 1
            np.minimum(current, among[position], out=current)
            current[position] = -1
        bounds[block], refreshed[block] = current, count
        if best <= limit and best >= others:
            break
    return picks[:count], radii[:count]


def nearest(queries: Array, references: Array) -> tuple[Array, NDArray[np.int64]]:
    """Distance of each query to its nearest reference, shape `(n,)`, and the index of that reference."""
    import faiss

    references = np.ascontiguousarray(references, dtype=np.float32)
    index = faiss.knn(np.ascontiguousarray(queries, dtype=np.float32), references, 1)[1][:, 0]
    # The search subtracts large squares; the distance itself is taken directly.
    return np.linalg.norm(queries - references[index], axis=1), index


@contextmanager
def single_threaded() -> Generator[None, None, None]:
    """Have faiss work on one thread: its threads and NumPy's wait for each other, which doubles a search's time."""
    import faiss

    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(threads)  # torch may share them

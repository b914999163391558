# SPDX-License-Identifier: Apache-2.0
"""Exact nearest neighbors of the patches of an image in a memory bank, on a CPU, without comparing all with all.

Three bounds, the cheap ones first, leave less than one in a hundred of the distances to be computed; ours, from known
facts:

* Points are projected on the leading principal axes of the bank; the length of what remains is one more coordinate.
  No distance is larger there (Cauchy and Schwarz), so it is a lower bound.
* There, the bank is divided into cells. The true distance to the vector of a query's own cell that is nearest there is
  an upper bound. The vectors of another cell lie beyond some plane between the centers of both; if that is farther from
  the query than the upper bound, the cell is not looked at (the hyperplane bound of metric trees).
* Of the cells that are left, one matrix product each gives the lower bounds. Only the vectors with a lower bound below
  the upper one are compared in all dimensions.

Every bound allows for the rounding of float32, so that the result is that of comparing all, up to rounding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .k_center import single_threaded

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float32]

# Measured on banks of 10,000 vectors of tf_efficientnet_lite0, see docs/edge.md.
AXES = 47
CELLS = 128
CELL_ITERATIONS = 3
SMALLEST_CELL = 32  # on average
# Matrix products of no more than this many multiplications stay on the thread that asks OpenBLAS for them. Its own
# threads would go on spinning when they are done, and keep OpenVINO's from the processor.
LARGEST_PRODUCT = 4 * 65536
# About so many lower bounds are held at once at most, 64 MiB; more for a single query of a larger bank.
LARGEST_TABLE = 2**24
# Relative error of a squared distance that is computed as a difference of squares; with a margin of ten.
ROUNDING = 1e-5


class NearestNeighbors:
    """Search in vectors that do not change; safe to be used by several threads at once.

    Args:
        vectors: Shape `(n, d)`, at least one.

    Example:
        >>> bank = np.random.default_rng(0).normal(size=(1000, 64)).astype(np.float32)
        >>> distances, indices = NearestNeighbors(bank).search(bank[:5])
        >>> indices.tolist()
        [0, 1, 2, 3, 4]
    """

    def __init__(self, vectors: Array) -> None:
        self.mean = vectors.mean(axis=0, dtype=np.float64).astype(np.float32)
        centered = vectors - self.mean
        axes = min(AXES, vectors.shape[1])
        # Its eigenvectors are orthonormal whatever the rounding; scaled, for squares could be too large.
        scaled = centered / max(float(np.abs(centered).max()), 1e-30)
        self.basis = np.linalg.eigh(scaled.T @ scaled)[1][:, : -axes - 1 : -1].astype(np.float32).copy()
        self.back = self.basis.T.copy()
        points = self._project(vectors)
        centers, cells = _divide(points, max(1, min(CELLS, len(points) // SMALLEST_CELL)))
        self.order = np.argsort(cells, kind="stable")
        self.vectors = np.ascontiguousarray(vectors[self.order], dtype=np.float32)
        points = points[self.order]
        self.lengths = np.bincount(cells, minlength=len(centers))
        ends = np.cumsum(self.lengths)
        self.starts = ends - self.lengths
        parts = [slice(*ends) for ends in zip(self.starts, ends, strict=True)]
        squares = np.einsum("ij,ij->i", points, points)
        self.points, self.largest = points, float(squares.max())
        # A query ends with a one, which adds the square, and with what the sum may reach at most, which is subtracted.
        blocks = np.concatenate([-2 * points, squares[:, None], np.full((len(points), 1), -1, np.float32)], axis=1)
        self.blocks = [blocks[part].T.copy() for part in parts]
        self.centers = np.concatenate([-2 * centers, np.einsum("ij,ij->i", centers, centers)[:, None]], axis=1).T.copy()
        self.twice_apart = 2 * np.linalg.norm(centers[:, None] - centers, axis=2)
        # By how much vectors of a cell (column) are nearer to its center than to another's (row), at least; in squares.
        to_centers = product(np.concatenate([points, np.ones((len(points), 1), np.float32)], axis=1), self.centers)
        self.nearer = np.stack(
            [(to_centers[part] - to_centers[part, cell, None]).min(axis=0) for cell, part in enumerate(parts)], axis=1
        )
        self.members = np.full((len(centers), self.lengths.max()), -1, np.int64)
        self.members[np.arange(self.lengths.max()) < self.lengths[:, None]] = np.arange(len(points))

    @single_threaded()
    def search(self, queries: Array) -> tuple[Array, NDArray[np.int64]]:
        """Find the nearest vector of each query, on the calling thread: its parts are too short to be shared.

        Args:
            queries: Shape `(m, d)`, finite.

        Returns:
            Distance of each query to its nearest vector, and the index of that vector, each of shape `(m,)`.
        """
        queries = np.ascontiguousarray(queries, dtype=np.float32)
        parts = np.array_split(queries, max(1, -(-len(queries) * len(self.vectors) // LARGEST_TABLE)))
        found = [self._search(part) for part in parts]
        return np.concatenate([np.sqrt(nearest) for nearest, _ in found]), np.concatenate([i for _, i in found])

    def _search(self, queries: Array) -> tuple[Array, NDArray[np.int64]]:
        """Squared distances and indices of the nearest vectors."""
        points, near, nearest, index = self._begin(queries)
        rows, columns = self._candidates(points, near)
        distances = _distances(queries, rows, self.vectors, columns)
        np.minimum.at(nearest, rows, distances)
        best = distances == nearest[rows]
        # Of vectors that are equally near the first, as in torch: two variants may share some.
        first = np.full(len(queries), len(self.order))
        np.minimum.at(first, rows[best], self.order[columns[best]])
        return nearest, np.where(first < len(self.order), first, self.order[index])

    def _begin(self, queries: Array) -> tuple[Array, NDArray[np.bool_], Array, NDArray[np.int64]]:
        """Project queries, and compare each with the vector of its own cell that is nearest there.

        Returns:
            The projected queries, whose products with a block are positive where a vector is not nearer; which cells
            may hold a nearer vector, shape `(m, cells)`; squared distance to the vector compared with, and its index.
        """
        projected = self._project(queries)
        squares = np.einsum("ij,ij->i", projected, projected)
        points = np.concatenate([projected, np.ones((len(queries), 2), np.float32)], axis=1)
        rounding = ROUNDING * (squares + self.largest)
        to_centers = product(points[:, :-1], self.centers)
        own = to_centers.argmin(axis=1)
        every = np.arange(len(queries))
        index = _nearest(projected, self.points, self.members[own])
        nearest = _distances(queries, every, self.vectors, index)
        # The planes are where the squared distances to two centers differ by as much as for no vector of the cell.
        to_centers -= (to_centers[every, own] + 4 * rounding)[:, None]
        to_centers += self.nearer[own]
        reach = self.twice_apart[own]
        reach *= (np.sqrt(nearest) + 1e-3 * np.sqrt(rounding))[:, None]
        points[:, -1] = nearest - squares + rounding
        return points, to_centers <= reach, nearest, index

    def _candidates(self, points: Array, near: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Pairs of a query and a vector of a near cell that may be nearer than the nearest so far."""
        visits = near.T.ravel().nonzero()[0]  # all cells in turn
        visitors = visits % max(1, len(points))
        ends = np.searchsorted(visits, len(points) * np.arange(1, len(self.blocks) + 1))
        table_ends = np.cumsum(np.diff(ends, prepend=0) * self.lengths)
        table = np.empty(table_ends[-1], np.float32)
        visiting = points.take(visitors, axis=0)
        first = place = 0
        for block, last, end in zip(self.blocks, ends.tolist(), table_ends.tolist(), strict=True):
            if last > first:
                product(visiting[first:last], block, table[place:end].reshape(last - first, -1))
            first, place = last, end
        found = (table <= 0).nonzero()[0]
        cells = np.repeat(np.arange(len(ends)), np.diff(np.searchsorted(found, table_ends), prepend=0))
        lengths = self.lengths[cells]
        rows, columns = np.divmod(found - table_ends[cells], lengths)  # counted from the end of the cell's part
        return visitors[ends[cells] + rows], self.starts[cells] + columns

    def _project(self, vectors: Array) -> Array:
        """Coordinates on the principal axes and the length of the rest, shape `(n, axes + 1)`."""
        centered = vectors - self.mean
        projected = product(centered, self.basis)
        # The rest itself, since the difference of the squared lengths would be lost in rounding.
        centered -= product(projected, self.back)
        return np.concatenate([projected, np.sqrt(np.einsum("ij,ij->i", centered, centered))[:, None]], axis=1)


def product(left: Array, right: Array, out: Array | None = None) -> Array:
    """Matrix product, computed on the calling thread."""
    (rows, inner), columns = left.shape, right.shape[1]
    out = np.empty((rows, columns), np.float32) if out is None else out
    step = max(1, LARGEST_PRODUCT // (inner * columns))
    whole = rows - rows % step
    if whole:
        np.matmul(left[:whole].reshape(-1, step, inner), right, out=out[:whole].reshape(-1, step, columns))
    if whole < rows:
        np.matmul(left[whole:], right, out=out[whole:])
    return out


def _divide(points: Array, count: int) -> tuple[Array, NDArray[np.int64]]:
    """Centers of at most `count` cells, none empty, and the cell of each point; a few steps of k-means."""
    import faiss

    # The bank holds each variant in farthest-first order, so that this takes early and late picks of all.
    centers = points[np.linspace(0, len(points) - 1, count).astype(int)]
    for _ in range(CELL_ITERATIONS):
        with single_threaded():
            cells = faiss.knn(points, np.ascontiguousarray(centers), 1)[1][:, 0]
        sizes = np.bincount(cells, minlength=len(centers))
        used = np.flatnonzero(sizes)
        starts = (np.cumsum(sizes) - sizes)[used]
        sums = np.add.reduceat(points[np.argsort(cells, kind="stable")], starts, axis=0)
        centers = sums / sizes[used, None].astype(np.float32)
        cells = np.searchsorted(used, cells)
    return centers, cells


def _nearest(queries: Array, vectors: Array, chosen: NDArray[np.int64]) -> NDArray[np.int64]:
    """Index of the nearest of the vectors `chosen` for each query; -1 ends a row."""
    import faiss

    library: Any = faiss
    distances = np.empty(len(queries), np.float32)
    indices = np.empty(len(queries), np.int64)
    library.knn_L2sqr_by_idx(
        *(faiss.swig_ptr(np.ascontiguousarray(array)) for array in (queries, vectors, chosen)),
        vectors.shape[1],
        len(queries),
        len(vectors),
        chosen.shape[1],
        1,
        faiss.swig_ptr(distances),
        faiss.swig_ptr(indices),
        chosen.shape[1],
    )
    return indices


def _distances(queries: Array, rows: NDArray[np.int64], vectors: Array, columns: NDArray[np.int64]) -> Array:
    """Squared distance of each pair of a query and a vector."""
    import faiss

    library: Any = faiss
    distances = np.empty(len(rows), np.float32)
    pointers = (faiss.swig_ptr(array) for array in (queries, rows, vectors, columns, distances))
    library.pairwise_indexed_L2sqr(vectors.shape[1], len(rows), *pointers)
    return distances

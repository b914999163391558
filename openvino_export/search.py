# SPDX-License-Identifier: Apache-2.0
"""Exact nearest neighbors of the patches of an image in a memory bank, on a CPU, without comparing all with all.

Three bounds, the cheap ones first, leave less than one in a hundred of the distances to be computed; ours, from two
known facts, the triangle inequality and that projecting on an orthonormal basis lengthens no vector:

* Points are projected on the leading principal axes of the bank; the length of what remains is one more coordinate.
  No distance is larger there (Cauchy and Schwarz), so it is a lower bound.
* There, the bank is divided into cells. The true distances to the vectors of a query's own cell give an upper bound of
  the distance to its nearest neighbor, and a cell whose ball lies farther away is not looked at.
* Of the other cells, one matrix product gives the lower bounds. Only the vectors with a lower bound below the upper
  one are compared in all dimensions.

Every bound allows for the rounding of float32, so that the result is that of comparing all, up to rounding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from anomalib_ext.models.components.k_center import single_threaded

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
        ends = np.cumsum(np.bincount(cells, minlength=len(centers)))
        self.bounds = list(zip([0, *ends[:-1].tolist()], ends.tolist(), strict=True))
        squares = np.einsum("ij,ij->i", points, points)
        self.largest = float(squares.max())
        # A query ends with a one, which adds the square, and with what the sum may reach at most, which is subtracted.
        blocks = np.concatenate([-2 * points, squares[:, None], np.full((len(points), 1), -1, np.float32)], axis=1)
        self.blocks = [blocks[first:last].T.copy() for first, last in self.bounds]
        self.centers = np.concatenate([-2 * centers, np.einsum("ij,ij->i", centers, centers)[:, None]], axis=1).T.copy()
        self.radii = np.array([
            np.linalg.norm(points[first:last] - center, axis=1).max()
            for (first, last), center in zip(self.bounds, centers, strict=True)
        ])
        self.members = np.full((len(centers), max(last - first for first, last in self.bounds)), -1, np.int64)
        for cell, (first, last) in enumerate(self.bounds):
            self.members[cell, : last - first] = np.arange(first, last)

    @single_threaded()
    def search(self, queries: Array) -> tuple[Array, NDArray[np.int64]]:
        """Find the nearest vector of each query, on the calling thread: its parts are too short to be shared.

        Args:
            queries: Shape `(m, d)`, finite.

        Returns:
            Distance of each query to its nearest vector, and the index of that vector, each of shape `(m,)`.
        """
        queries = np.ascontiguousarray(queries, dtype=np.float32)
        points, near, nearest, index = self._begin(queries)
        if len(self.blocks) > 1:
            rows, columns = self._candidates(points, near)
            _improve(queries, self.vectors, nearest, index, rows, columns)
        return np.sqrt(nearest), self.order[index]

    def _begin(self, queries: Array) -> tuple[Array, NDArray[np.bool_], Array, NDArray[np.int64]]:
        """Project queries, and compare them with the vectors of their own cell.

        Returns:
            The projected queries, whose products with a block are positive where a vector is not nearer; which cells
            may hold a nearer vector, shape `(m, cells)`; squared distance to the nearest in the own cell, and its
            index.
        """
        projected = self._project(queries)
        squares = np.einsum("ij,ij->i", projected, projected)
        points = np.concatenate([projected, np.ones((len(queries), 2), np.float32)], axis=1)
        rounding = ROUNDING * (squares + self.largest)
        to_centers = product(points[:, :-1], self.centers)
        own = to_centers.argmin(axis=1)
        nearest, index = _compare(queries, self.vectors, self.members[own])
        to_centers += (squares - rounding)[:, None]
        np.sqrt(np.maximum(to_centers, 0, out=to_centers), out=to_centers)
        near = to_centers <= self.radii + (np.sqrt(nearest) + 1e-3 * np.sqrt(rounding))[:, None]
        near[np.arange(len(queries)), own] = False  # is compared already
        points[:, -1] = nearest - squares + rounding
        return points, near, nearest, index

    def _candidates(self, points: Array, near: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Pairs of a query and a vector of a near cell that may be nearer than the nearest so far."""
        rows, columns = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        for cell, ((first, last), visited) in enumerate(zip(self.bounds, near.T.copy(), strict=True)):
            visitors = visited.nonzero()[0]
            if len(visitors):
                below = product(points.take(visitors, axis=0), self.blocks[cell]) <= 0
                row, column = np.divmod(below.ravel().nonzero()[0], last - first)
                rows.append(visitors[row])
                columns.append(column + first)
        return np.concatenate(rows), np.concatenate(columns)

    def _project(self, vectors: Array) -> Array:
        """Coordinates on the principal axes and the length of the rest, shape `(n, axes + 1)`."""
        centered = vectors - self.mean
        projected = product(centered, self.basis)
        # The rest itself, since the difference of the squared lengths would be lost in rounding.
        centered -= product(projected, self.back)
        return np.concatenate([projected, np.sqrt(np.einsum("ij,ij->i", centered, centered))[:, None]], axis=1)


def product(left: Array, right: Array) -> Array:
    """Matrix product, computed on the calling thread."""
    (rows, inner), columns = left.shape, right.shape[1]
    step = max(1, LARGEST_PRODUCT // (inner * columns))
    whole = rows - rows % step
    result = np.empty((rows, columns), np.float32)
    if whole:
        np.matmul(left[:whole].reshape(-1, step, inner), right, out=result[:whole].reshape(-1, step, columns))
    if whole < rows:
        np.matmul(left[whole:], right, out=result[whole:])
    return result


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


def _compare(queries: Array, vectors: Array, chosen: NDArray[np.int64]) -> tuple[Array, NDArray[np.int64]]:
    """Squared distance to the nearest of the vectors `chosen` for each query, and its index; -1 ends a row."""
    import faiss

    library: Any = faiss
    distances = np.empty(len(queries), np.float32)
    indices = np.empty(len(queries), np.int64)
    chosen = np.ascontiguousarray(chosen)
    library.knn_L2sqr_by_idx(
        *(faiss.swig_ptr(array) for array in (queries, vectors, chosen)),
        vectors.shape[1],
        len(queries),
        len(vectors),
        chosen.shape[1],
        1,
        faiss.swig_ptr(distances),
        faiss.swig_ptr(indices),
        chosen.shape[1],
    )
    return distances, indices


def _improve(
    queries: Array,
    vectors: Array,
    nearest: Array,
    index: NDArray[np.int64],
    rows: NDArray[np.int64],
    columns: NDArray[np.int64],
) -> None:
    """Compare pairs of a query and a vector, and keep what is nearer."""
    counts = np.bincount(rows, minlength=len(queries))
    starts = np.cumsum(counts) - counts
    # NumPy sorts 16 bits by radix.
    columns = columns[np.argsort(rows.astype(np.uint16 if len(queries) < 2**16 else np.int64), kind="stable")]
    by_count = np.argsort(counts, kind="stable")
    # Queries of similar counts together, so that few places of a table remain empty.
    for part in np.array_split(by_count[np.searchsorted(counts[by_count], 1) :], 8):
        if len(part):
            place = np.arange(counts[part[-1]])
            table = columns[np.minimum(starts[part, None] + place, len(columns) - 1)]
            table[place >= counts[part, None]] = -1
            distances, found = _compare(queries[part], vectors, table)
            better = distances < nearest[part]
            nearest[part[better]], index[part[better]] = distances[better], found[better]

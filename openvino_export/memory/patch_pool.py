# SPDX-License-Identifier: Apache-2.0
"""The pool through which the patches of one variant stream on their way into the bank. The rule is ours.

* Patches stream through a pool of bounded size. A patch within the merge radius of the pool is known and only counted;
  the pool is thinned by farthest-first to a quarter when it is full, which widens the merge radius.
* What a variant keeps when it is thinned or cut says `variant.py`.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

import numpy as np

from .k_center import farthest_first, nearest, single_threaded
from .leave_one_out import LEARNED_IMAGES, Sample, compact, rank
from .variant import SENIORITY, Variant, charge, cover_radii_after_cut, rounded

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    Array = NDArray[np.float32]

REMEMBERED_IMAGES = 65_536
# With fewer points, dividing them into lists makes no search faster.
DIVIDED_INDEX = 2048
LISTS = 128


class PatchPool:
    """Patches of one variant on their way into the bank, in bounded memory.

    Args:
        name: Name of the variant.
        known: The variant as the bank holds it, if it does.
        dimension: Length `d` of a patch embedding.
        capacity: Largest number of points.
        dtype: Precision in which the bank keeps vectors.

    Attributes:
        points: Patch embeddings, shape `(n, d)`.
        radii: Insertion radius of each point, shape `(n,)`; 0 for points that farthest-first has not seen yet.
        cover_radii: As of :class:`Variant`, and so are `origins` and `stand_ins`.
        merge_radius: Distance up to which a patch counts as known.
        images: Number of images learned, without those of `known`.
        hashes: Hashes of these images.
        samples: Some of these images, of which the variant keeps what it judges itself by.
        seconds: Time spent on selection.
    """

    def __init__(self, name: str, known: Variant | None, dimension: int, capacity: int, dtype: np.dtype) -> None:
        self.name = name
        self.known = known
        self.capacity = capacity
        self.dtype = dtype
        self.points = np.empty((0, dimension), np.float32)
        self.radii = np.empty(0, np.float32)
        self.cover_radii = np.empty(0, np.float32)
        self.origins = np.empty(0, np.int32)
        self.stand_ins = np.empty(0, np.float32)
        self.merge_radius = 0.0
        self.images = 0
        self.prototype = np.zeros(dimension, np.float32)
        self.spread = 0.0
        self.hashes: deque[int] = deque(maxlen=REMEMBERED_IMAGES)
        self.samples: list[Sample] = []
        self.seconds = 0.0
        if known is not None:
            self.points = known.vectors.astype(np.float32)
            self.radii, self.cover_radii, self.merge_radius = known.radii, known.cover_radii.copy(), known.merge_radius
            self.origins, self.stand_ins = known.origins, known.stand_ins.copy()
            self.prototype, self.spread = known.prototype, known.spread
        self._index = self._build_index()

    def count(self) -> int:
        """Number of images of the variant, those that it knew before included."""
        return self.images + (self.known.images if self.known else 0)

    def absorb(self, patches: Array, grid: tuple[int, int] = (0, 0), map_size: tuple[int, int] = (0, 0)) -> None:
        """Take in an image; arguments are those of :class:`Sample`."""
        origin = self.count()
        self.absorb_points(
            patches,
            np.zeros(len(patches), np.float32),
            np.full(len(patches), origin, np.int32),
            np.full(len(patches), np.inf, np.float32),
        )
        self.samples.append(Sample(origin, compact(patches), grid, map_size))
        self.samples = sorted(self.samples, key=lambda sample: rank(sample.origin))[:LEARNED_IMAGES]

    @single_threaded()
    def absorb_points(self, points: Array, cover_radii: Array, origins: NDArray[np.int32], stand_ins: Array) -> None:
        """Take in patches of shape `(n, d)` that may stand for others; arguments as of :class:`Variant`."""
        for start in range(0, len(points), self.capacity):
            chunk = slice(start, start + self.capacity)
            # As the bank will hold them, so that what is learned again coincides with what is there.
            held, moved = rounded(points[chunk], self.dtype)
            held = np.ascontiguousarray(held, dtype=np.float32)
            self._absorb(held, cover_radii[chunk] + moved, origins[chunk], stand_ins[chunk].copy())

    def to_arrays(self) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        """State as arrays and as plain data, see `state.py`; without `known`, capacity and dtype."""
        arrays: dict[str, NDArray[Any]] = {
            "points": self.points,
            "radii": self.radii,
            "covers": self.cover_radii.copy(),  # which change in place, and so do
            "stand_ins": self.stand_ins.copy(),
            "origins": self.origins,
            "prototype": self.prototype,
            "hashes": np.array(self.hashes, np.int64),
        }
        arrays |= {f"sample_{i}": sample.patches for i, sample in enumerate(self.samples)}
        plain = {"name": self.name, "resolution": self.merge_radius, "images": self.images, "spread": self.spread}
        samples = [[sample.origin, *sample.grid, *sample.map_size] for sample in self.samples]
        return arrays, {**plain, "divided_at": self._divided_at, "samples": samples}

    def restore(self, arrays: Mapping[str, NDArray[Any]], plain: Mapping[str, Any]) -> None:
        """Take up the state that :meth:`to_arrays` gave, so that what follows goes as if it had never been saved."""
        self.points, self.radii, self.cover_radii, self.origins, self.stand_ins, self.prototype = (
            np.array(arrays[key]) for key in ("points", "radii", "covers", "origins", "stand_ins", "prototype")
        )
        self.merge_radius, self.images, self.spread = plain["resolution"], plain["images"], plain["spread"]
        self.hashes = deque(arrays["hashes"].tolist(), maxlen=REMEMBERED_IMAGES)
        self.samples = [
            Sample(origin, np.array(arrays[f"sample_{i}"]), (rows, columns), (height, width))
            for i, (origin, rows, columns, height, width) in enumerate(plain["samples"])
        ]
        self._index = self._build_index(plain["divided_at"])

    def _absorb(self, patches: Array, cover_radii: Array, origins: NDArray[np.int32], stand_ins: Array) -> None:
        squares, found = self._index.search(patches, 1)
        index = found[:, 0]
        # The index may miss the nearest point, which costs at most a vector too many in the pool.
        distances = np.where(index < 0, np.float32(np.inf), np.sqrt(np.maximum(squares[:, 0], 0)))
        # Each may stand in for the other, if they are of different images.
        others = np.flatnonzero(index >= 0)
        others = others[self.origins[index[others]] != origins[others]]
        stand_ins[others] = np.minimum(stand_ins[others], distances[others])
        np.minimum.at(self.stand_ins, index[others], distances[others])
        if self.merge_radius > 0:
            known = distances <= self.merge_radius
            # The index subtracts large squares; what is charged is taken directly.
            exact = np.linalg.norm(patches[known] - self.points[index[known]], axis=1)
            np.maximum.at(self.cover_radii, index[known], exact + cover_radii[known])
            patches, cover_radii, distances = patches[~known], cover_radii[~known], distances[~known]
            origins, stand_ins = origins[~known], stand_ins[~known]
            picks, _ = farthest_first(patches, len(patches), distances, stop=self.merge_radius)
            rest = np.setdiff1d(np.arange(len(patches)), picks)
            new, new_cover_radii = patches[picks], cover_radii[picks]
            charge(new, new_cover_radii, patches[rest], cover_radii[rest])  # within the merge radius of a pick
            patches, cover_radii, origins, stand_ins = new, new_cover_radii, origins[picks], stand_ins[picks]
        if len(patches):
            self._index.add(patches)
        self.points = np.concatenate([self.points, patches])
        self.radii = np.concatenate([self.radii, np.zeros(len(patches), np.float32)])
        self.cover_radii = np.concatenate([self.cover_radii, cover_radii])
        self.origins = np.concatenate([self.origins, origins])
        self.stand_ins = np.concatenate([self.stand_ins, stand_ins])
        if len(self.points) > self.capacity:
            self.select(self.capacity // 4)
            self._index = self._build_index()
        elif not self._divided_at and len(self.points) >= DIVIDED_INDEX:
            self._index = self._build_index()

    def count_images(self, prototype: Array, spread: float, images: int) -> None:
        """Count images of this mean embedding and spread."""
        weight = images / max(self.count() + images, 1)
        self.prototype = (self.prototype + weight * (prototype - self.prototype)).astype(np.float32)
        self.spread += weight * (spread - self.spread)
        self.images += images

    @single_threaded()
    def select(self, size: int) -> None:
        """Reduce the pool to at most `size` points in order of insertion radius, seniors keeping their seat."""
        points, cover_radii = self.points, self.cover_radii
        seated = (self.radii >= SENIORITY * self.merge_radius) & (self.merge_radius > 0)
        rest = np.flatnonzero(~seated)
        distances = nearest(points[rest], points[seated])[0] if seated.any() and len(rest) else None
        picks, radii = farthest_first(points[rest], size + 1, distances)
        chosen = np.concatenate([np.flatnonzero(seated), rest[picks]])
        radii = np.concatenate([self.radii[seated], radii])
        by_radius = np.argsort(-radii, kind="stable")
        chosen, radii = chosen[by_radius], radii[by_radius]
        others = np.setdiff1d(np.arange(len(points)), chosen)
        first = _is_first(points[chosen], radii)
        repeated, chosen, radii = chosen[~first], chosen[first], radii[first]
        order = np.concatenate([chosen, others])
        kept_cover_radii = cover_radii[chosen]
        charge(points[chosen], kept_cover_radii, points[repeated], cover_radii[repeated])
        points, cover_radii = points[order], np.concatenate([kept_cover_radii, cover_radii[others]])
        origins, stand_ins = self.origins[order], self.stand_ins[order]
        keep = min(size, len(chosen))
        if len(points) > keep:
            # The rest lies within the radius of the first point too many, or repeats a point.
            self.merge_radius = max(self.merge_radius, float(radii[keep]) if keep < len(radii) else 0.0)
            cover_radii = cover_radii_after_cut(points, cover_radii, radii, keep, self.merge_radius)
            points, radii = points[:keep].copy(), radii[:keep].copy()
            origins, stand_ins = origins[:keep].copy(), stand_ins[:keep].copy()
        self.points, self.radii, self.cover_radii = points, radii, cover_radii
        self.origins, self.stand_ins = origins, stand_ins

    def result(self, size: int) -> Variant:
        """The variant with at most `size` vectors, without what it judges itself by. The pool is used up."""
        self.select(size)
        return Variant(
            vectors=self.points.astype(self.dtype, copy=False),
            radii=self.radii,
            cover_radii=self.cover_radii,
            origins=self.origins,
            stand_ins=self.stand_ins,
            gains=np.zeros(len(self.radii), np.float32),
            merge_radius=self.merge_radius,
            images=self.count(),
            prototype=self.prototype,
            spread=self.spread,
        )

    def _build_index(self, divided_at: int | None = None) -> Any:  # noqa: ANN401  # faiss is imported late and untyped
        """Index of the points.

        Args:
            divided_at: Number of points by which it is divided into lists, the others only being added; 0 for no
                lists. By default all, if they are many enough.
        """
        import faiss

        dimension = self.points.shape[1]
        if divided_at is None:
            divided_at = len(self.points) if len(self.points) >= DIVIDED_INDEX else 0
        flat = faiss.IndexFlatL2(dimension)
        index: Any = flat
        if divided_at:
            # The first picks of farthest-first are well spread: as good as trained centroids, and nearly free.
            flat.add(self.points[farthest_first(self.points[:divided_at], LISTS)[0]])
            index = faiss.IndexIVFFlat(flat, dimension, LISTS)
            index.nprobe = 4
        self._quantizer = flat  # faiss does not keep it alive
        self._divided_at = divided_at
        index.add(self.points)
        return index


def _is_first(points: Array, radii: Array) -> NDArray[np.bool_]:
    """Mask of the points, in order of radius, that do not repeat an earlier one up to rounding."""
    import faiss

    norm = float(np.linalg.norm(points, axis=1).mean())
    first = np.ones(len(points), dtype=bool)
    # A matrix product cannot tell radii this small from zero, so these are looked at again.
    suspects = np.flatnonzero(radii <= 1e-2 * norm)
    if len(suspects):
        neighbors = faiss.knn(points[suspects], points, min(4, len(points)))[1]
        gaps = np.linalg.norm(points[neighbors] - points[suspects][:, None], axis=2)
        first[suspects] = ~((gaps <= 1e-6 * norm) & (neighbors < suspects[:, None])).any(axis=1)
    return first

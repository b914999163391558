# SPDX-License-Identifier: Apache-2.0
"""A product variant in the memory bank, and the stream of patches that one is selected from.

The rule is ours, around farthest-first traversal:

* A variant keeps its vectors in order of insertion radius, the distance at which farthest-first picked them. A prefix
  of a farthest-first order is the farthest-first order of that size, so making room is cutting tails.
* Patches stream through a pool of bounded size. A patch within the resolution of the pool is known and only counted;
  the pool is thinned by farthest-first to a quarter when it is full, which coarsens the resolution.
* Seniors, vectors whose radius is at least twice the resolution, keep their seat in every later selection, and
  whatever is dropped is charged to its nearest senior. `covers` records the largest distance charged to a vector.
  Chains of charges stay short that way, and their largest value certifies the coverage of all that was ever learned.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from openvino_export.memory.k_center import farthest_first, nearest, single_threaded

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    Array = NDArray[np.float32]

# The scale of a variant is the mean insertion radius of its first picks, as many as even a small bank keeps.
SCALE_PICKS = 100
SENIORITY = 2.0
REMEMBERED_IMAGES = 65_536
# With fewer points, dividing them into lists makes no search faster.
DIVIDED_INDEX = 2048
LISTS = 128
# Of so many images, the later half sets the thresholds of a variant that has no validation set.
NOVELTIES = 64


@dataclass(frozen=True)
class Calibration:
    """What remains of the images that set a variant's thresholds.

    Attributes:
        patches: Patches of each image that give its score, shape `(n, CALIBRATION_PATCHES, d)`.
        labels: Whether each image is anomalous, shape `(n,)`.
        scores: Image score of each when it was taken, shape `(n,)`.
        pixel: Pixel threshold, minimum and maximum of the anomaly maps at that time; NaN where unknown.
        margin: Factor on the thresholds, where these images score lower than those that are to be judged.
    """

    patches: Array
    labels: NDArray[np.bool_]
    scores: Array
    pixel: tuple[float, float, float] = (np.nan, np.nan, np.nan)
    margin: float = 1.0


@dataclass(frozen=True)
class Variant:
    """The part of the bank that belongs to one product variant, in order of falling insertion radius.

    Attributes:
        vectors: Patch embeddings, shape `(n, d)`, float32 or float16.
        radii: Insertion radius of each vector, shape `(n,)`; the first is infinite.
        covers: Largest distance from each vector to a learned patch that it stands for, shape `(n,)`.
        scale: Mean insertion radius of the first picks, the unit in which the budget is divided.
        resolution: Distance up to which a patch counts as known; 0 until the first vector was dropped.
        images: Number of images learned.
        prototype: Mean patch embedding, shape `(d,)`.
        spread: Mean distance of a patch to the prototype.
        calibration: Images that set the thresholds, if there were any.
        novelties: Score of the last learned images before each was learned, shape `(n,)`, `n` at most NOVELTIES; the
            first image has none.
    """

    vectors: Array
    radii: Array
    covers: Array
    scale: float
    resolution: float
    images: int
    prototype: Array
    spread: float
    calibration: Calibration | None = None
    novelties: Array = field(default_factory=lambda: np.empty(0, np.float32))

    @property
    def reach(self) -> float:
        """Score that a normal image may have: the largest of the later half of the novelties, 0 if there are none."""
        # At first, every image lies far from the few before it.
        return float(self.novelties[len(self.novelties) // 2 :].max(initial=0))


class VariantStream:
    """Patches of one variant on their way into the bank, in bounded memory."""

    def __init__(self, name: str, known: Variant | None, dimension: int, capacity: int, dtype: np.dtype) -> None:
        self.name = name
        self.known = known
        self.capacity = capacity
        self.dtype = dtype
        self.points = np.empty((0, dimension), np.float32)
        self.radii = np.empty(0, np.float32)  # 0 for points that farthest-first has not seen yet
        self.covers = np.empty(0, np.float32)
        self.resolution = 0.0
        self.images = 0
        self.prototype = np.zeros(dimension, np.float32)
        self.spread = 0.0
        self.hashes: deque[int] = deque(maxlen=REMEMBERED_IMAGES)
        self.novelties: deque[float] = deque(maxlen=NOVELTIES)
        self.seconds = 0.0
        if known is not None:
            self.points = known.vectors.astype(np.float32)
            self.radii, self.covers, self.resolution = known.radii, known.covers.copy(), known.resolution
            self.prototype, self.spread = known.prototype, known.spread
            self.novelties.extend(known.novelties.tolist())
        self._index = self._build_index()

    @single_threaded()
    def absorb(self, patches: Array, covers: Array | None = None) -> float:
        """Take in patches of shape `(n, d)`; `covers` says what they already stand for.

        Returns:
            Largest distance of a patch to what was known before, as the score of an image is; infinite if nothing was.
        """
        covers = np.zeros(len(patches), np.float32) if covers is None else covers
        novelty = 0.0
        for start in range(0, len(patches), self.capacity):
            chunk = slice(start, start + self.capacity)
            # As the bank will hold them, so that what is learned again coincides with what is there.
            held, moved = rounded(patches[chunk], self.dtype)
            novelty = max(
                novelty,
                self._absorb(np.ascontiguousarray(held, dtype=np.float32), covers[chunk] + moved),
            )
        return novelty

    def to_arrays(self) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        """State as arrays and as plain data, as `MemoryBank.to_arrays`; without `known`, capacity and dtype."""
        arrays: dict[str, NDArray[Any]] = {
            "points": self.points,
            "radii": self.radii,
            "covers": self.covers.copy(),  # which change in place
            "prototype": self.prototype,
            "hashes": np.array(self.hashes, np.int64),
            "novelties": np.array(self.novelties, np.float32),
        }
        keys = ("name", "resolution", "images", "spread")
        return arrays, {**{key: getattr(self, key) for key in keys}, "divided_at": self._divided_at}

    def restore(self, arrays: Mapping[str, NDArray[Any]], plain: Mapping[str, Any]) -> None:
        """Take up the state that :meth:`to_arrays` gave, so that what follows goes as if it had never been saved."""
        self.points, self.radii, self.covers, self.prototype = (
            np.array(arrays[key]) for key in ("points", "radii", "covers", "prototype")
        )
        self.resolution, self.images, self.spread = plain["resolution"], plain["images"], plain["spread"]
        for key, kept in (("hashes", self.hashes), ("novelties", self.novelties)):
            kept.clear()
            kept.extend(arrays[key].tolist())
        self._index = self._build_index(plain["divided_at"])

    def _absorb(self, patches: Array, covers: Array) -> float:
        squares, found = self._index.search(patches, 1)
        index = found[:, 0]
        # The index may miss the nearest point, which costs at most a vector too many in the pool.
        distances = np.where(index < 0, np.float32(np.inf), np.sqrt(np.maximum(squares[:, 0], 0)))
        novelty = self._largest(patches, distances)
        if self.resolution > 0:
            known = distances <= self.resolution
            # The index subtracts large squares; what is charged is taken directly.
            exact = np.linalg.norm(patches[known] - self.points[index[known]], axis=1)
            np.maximum.at(self.covers, index[known], exact + covers[known])
            patches, covers, distances = patches[~known], covers[~known], distances[~known]
            picks, _ = farthest_first(patches, len(patches), distances, stop=self.resolution)
            rest = np.setdiff1d(np.arange(len(patches)), picks)
            new, new_covers = patches[picks], covers[picks]
            _charge(new, new_covers, patches[rest], covers[rest])  # within the resolution of a pick
            patches, covers = new, new_covers
        if len(patches):
            self._index.add(patches)
        self.points = np.concatenate([self.points, patches])
        self.radii = np.concatenate([self.radii, np.zeros(len(patches), np.float32)])
        self.covers = np.concatenate([self.covers, covers])
        if len(self.points) > self.capacity:
            self.select(self.capacity // 4)
            self._index = self._build_index()
        elif not self._divided_at and len(self.points) >= DIVIDED_INDEX:
            self._index = self._build_index()
        return novelty

    def _largest(self, patches: Array, distances: Array) -> float:
        """Largest distance of a patch to its nearest point, of which `distances` are upper bounds."""
        largest = 0.0
        if not len(self.points):
            return np.inf
        for i in np.argsort(-distances):
            if distances[i] <= largest:
                break
            largest = max(largest, float(nearest(patches[i : i + 1], self.points)[0][0]))
        return largest

    def describe(self, prototype: Array, spread: float, images: int) -> None:
        """Count images of this mean embedding and spread."""
        before = self.images + (self.known.images if self.known else 0)
        weight = images / max(before + images, 1)
        self.prototype = (self.prototype + weight * (prototype - self.prototype)).astype(np.float32)
        self.spread += weight * (spread - self.spread)
        self.images += images

    @single_threaded()
    def select(self, size: int, stop: float = -1.0) -> None:
        """Reduce the pool to points in order of insertion radius, seniors keeping their seat.

        Args:
            size: Largest number of points that are kept.
            stop: Keep no point, but for seniors, whose radius is this or less.
        """
        points, covers = self.points, self.covers
        seated = (self.radii >= SENIORITY * self.resolution) & (self.resolution > 0)
        rest = np.flatnonzero(~seated)
        distances = nearest(points[rest], points[seated])[0] if seated.any() and len(rest) else None
        picks, radii = farthest_first(points[rest], size + 1, distances, stop)
        chosen = np.concatenate([np.flatnonzero(seated), rest[picks]])
        radii = np.concatenate([self.radii[seated], radii])
        by_radius = np.argsort(-radii, kind="stable")
        chosen, radii = chosen[by_radius], radii[by_radius]
        others = np.setdiff1d(np.arange(len(points)), chosen)
        first = _is_first(points[chosen], radii)
        repeated, chosen, radii = chosen[~first], chosen[first], radii[first]
        order = np.concatenate([chosen, others])
        kept_covers = covers[chosen]
        _charge(points[chosen], kept_covers, points[repeated], covers[repeated])
        points, covers = points[order], np.concatenate([kept_covers, covers[others]])
        keep = min(size, len(chosen))
        if len(points) > keep:
            # The rest lies within the radius of the first point too many, or within `stop`, or repeats a point.
            # As float32, in which distances are compared with it.
            self.resolution = max(self.resolution, float(radii[keep] if keep < len(radii) else np.float32(stop)))
            covers = _covers_after_cut(points, covers, radii, keep, self.resolution)
            points, radii = points[:keep].copy(), radii[:keep].copy()
        self.points, self.radii, self.covers = points, radii, covers

    def scale(self) -> float:
        """Scale of the variant as it is so far."""
        if self.known is not None:
            return self.known.scale
        return _scale(farthest_first(self.points, SCALE_PICKS + 1)[1], None)

    def result(self, size: int, threshold: float) -> Variant:
        """The variant with at most `size` vectors, or as many as its scale takes, without calibration.

        The stream is used up.

        Args:
            size: Budget of the bank.
            threshold: Radius / scale down to which the bank cuts all variants at least.
        """
        scale = self.scale()
        self.select(max(size, SCALE_PICKS + 1), threshold * scale if threshold > 0 else -1.0)
        return Variant(
            vectors=self.points.astype(self.dtype, copy=False),
            radii=self.radii,
            covers=self.covers,
            scale=scale if self.known is None else _scale(self.radii, self.known),
            resolution=self.resolution,
            images=self.images + (self.known.images if self.known else 0),
            prototype=self.prototype,
            spread=self.spread,
            novelties=np.array(self.novelties, np.float32),
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


def rounded(vectors: Array, dtype: np.dtype) -> tuple[Array, Array]:
    """Vectors as `dtype` holds them, and the distance by which each was moved."""
    rounded = vectors.astype(dtype)
    return rounded, np.linalg.norm(rounded.astype(np.float32) - vectors, axis=1)


def _charge(points: Array, covers: Array, dropped: Array, dropped_covers: Array) -> None:
    """Raise `covers` until `points` stand for all that `dropped`, each charged to its nearest point, stood for."""
    if len(dropped):
        distances, index = nearest(dropped, points)
        np.maximum.at(covers, index, distances + dropped_covers)


def _covers_after_cut(points: Array, covers: Array, radii: Array, keep: int, resolution: float) -> Array:
    """Covers of the first `keep` points, ordered by radius, once the rest is charged to the seniors among them."""
    seniors = max(1, int((radii[:keep] >= SENIORITY * resolution).sum()))
    kept = covers[:keep].copy()
    _charge(points[:seniors], kept[:seniors], points[keep:], covers[keep:])
    return kept


def cut(variant: Variant, keep: int) -> Variant:
    """Keep the first `keep` vectors."""
    if keep >= len(variant.radii):
        return variant
    resolution = max(variant.resolution, float(variant.radii[keep]))
    vectors = variant.vectors.astype(np.float32, copy=False)
    # Copies, so that the memory of what was cut is given back.
    return replace(
        variant,
        vectors=variant.vectors[:keep].copy(),
        radii=variant.radii[:keep].copy(),
        covers=_covers_after_cut(vectors, variant.covers, variant.radii, keep, resolution),
        resolution=resolution,
    )


def description(patches: Array) -> tuple[Array, float]:
    """Mean of patches of shape `(n, d)`, and their mean distance to it."""
    mean = patches.mean(axis=0, dtype=np.float64).astype(np.float32)
    return mean, float(np.linalg.norm(patches - mean, axis=1).mean())


def _scale(radii: Array, known: Variant | None) -> float:
    """Scale of a variant with vectors of these falling radii, of which the first is infinite."""
    picks = radii[1 : SCALE_PICKS + 1]
    if known is not None and known.resolution > 0 and len(picks) < SCALE_PICKS:
        return known.scale  # measured before it was cut too short to measure
    return max(float(picks.mean()), 1e-6) if len(picks) else 1.0


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

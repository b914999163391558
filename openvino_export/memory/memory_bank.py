# SPDX-License-Identifier: Apache-2.0
"""Memory bank that learns by incremental k-center selection within a fixed budget.

NumPy and faiss only, so that a training PC and an edge PC without torch run the same code. How a variant is selected
says `variant.py`. The budget is divided by equal scaled radius: one threshold on radius / scale of the variant cuts all
variants. The rule is ours.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from openvino_export.memory.k_center import nearest

from .variant import LISTS, REMEMBERED_IMAGES, Calibration, Variant, VariantStream, cut, description, rounded

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from numpy.typing import NDArray

    Array = NDArray[np.float32]

SCHEMA_VERSION = 2
# An image belongs to a variant if its mean embedding lies within this share of the variant's spread of the prototype.
# Between what own images and what those of other products reach on real data, see docs/benchmarks.md.
MEMBERSHIP = 0.5
# The pool that vectors are chosen from holds twice the budget, and for small budgets at least this many patches.
SMALLEST_POOL = 12_288
# Several variants may be learned in turn, image by image. Together their streams hold at most so many pools of points.
OPEN_POOLS = 4
# Calibration keeps the patches of an image that score highest, now and once only a share of the vectors is left.
CALIBRATION_SHARES = (0.5, 0.25, 0.125)
PATCHES_BY_SHARE = 4
CALIBRATION_PATCHES = PATCHES_BY_SHARE * (1 + len(CALIBRATION_SHARES))
CALIBRATION_IMAGES = 32  # of each label
# Squares of larger values, summed over a patch, would leave the range of float32.
LARGEST_VALUE = 1e15


@dataclass
class Report:
    """What one update did.

    Attributes:
        variants: Images learned by variant.
        known_images: Images left out because they had been learned before.
        added: Vectors that a variant has more than before.
        removed: Vectors that a variant has less than before.
        radius_bound: Every patch ever learned lies within this distance of some vector.
        num_vectors: Vectors in the bank.
        nbytes: Bytes of the bank and its calibration.
        seconds: Time spent on selection.
    """

    variants: Counter[str] = field(default_factory=Counter)
    known_images: int = 0
    added: Counter[str] = field(default_factory=Counter)
    removed: Counter[str] = field(default_factory=Counter)
    radius_bound: float = 0.0
    num_vectors: int = 0
    nbytes: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        """One line for a log."""
        learned = ", ".join(f"{name}: {images} images" for name, images in self.variants.items()) or "nothing new"
        added, removed = (
            ", ".join(f"{count} of {name}" for name, count in counts.items()) or "none"
            for counts in (self.added, self.removed)
        )
        return (
            f"learned {learned} ({self.known_images} known already); vectors added {added}, removed {removed}, now "
            f"{self.num_vectors}; radius bound {self.radius_bound:.2f}; {self.nbytes / 2**20:.1f} MiB; selection "
            f"{self.seconds:.1f} s"
        )


def _spread(indices: NDArray[np.int64]) -> NDArray[np.int64]:
    """At most CALIBRATION_IMAGES of the indices, evenly spread over them."""
    if len(indices) <= CALIBRATION_IMAGES:
        return indices
    return indices[np.linspace(0, len(indices) - 1, CALIBRATION_IMAGES).astype(int)]


def _highest(scores: Array, count: int) -> NDArray[np.int64]:
    """Indices of the highest scores; of fewer than `count`, the lowest is repeated, which changes no maximum."""
    order = np.argsort(-scores, kind="stable")[:count]
    return np.pad(order, (0, count - len(order)), mode="edge")


def equal_scaled_radius(variants: Mapping[str, Variant], size: int) -> dict[str, int]:
    """Divide `size` vectors among at most as many variants: one threshold on radius / scale."""
    scaled = {name: variant.radii / variant.scale for name, variant in variants.items()}
    together = np.concatenate([*scaled.values(), np.zeros(0, np.float32)])
    if len(together) <= size:
        return {name: len(radii) for name, radii in scaled.items()}
    threshold = np.partition(together, -size - 1)[-size - 1]
    return {name: int((radii > threshold).sum()) for name, radii in scaled.items()}


class MemoryBank:  # noqa: PLR0904  # small steps of learning, saving and judging
    """Patch embeddings of all variants, at most `size` of them.

    Learned patches first go to the stream of their variant (:meth:`learn`) and reach the bank at :meth:`commit`. To be
    able to go back, learn with a copy (`copy.deepcopy`).

    Args:
        size: Largest number of vectors.
        dtype: Precision in which vectors are kept.

    Attributes:
        variants: The bank's content by variant name, in order of arrival.

    Raises:
        ValueError: If `size` is not positive, or `dtype` neither float32 nor float16.
    """

    def __init__(self, size: int, dtype: str = "float32") -> None:
        if size < 1:
            msg = f"memory_size must be at least 1, got {size}."
            raise ValueError(msg)
        if dtype not in {"float32", "float16"}:
            msg = f"precision must be 'float32' or 'float16', got {dtype!r}."
            raise ValueError(msg)
        self.size = size
        self.dtype = np.dtype(dtype)
        self.variants: dict[str, Variant] = {}
        self.image_hashes: NDArray[np.int64] = np.empty(0, np.int64)
        self._streams: dict[str, VariantStream] = {}
        self._report = Report()
        self._before: dict[str, int] = {}  # vectors by variant at the last commit
        self._resumed: dict[int, str] = {}  # variants of the images that came with streams that were loaded

    def __len__(self) -> int:
        """Number of vectors."""
        return sum(len(variant.radii) for variant in self.variants.values())

    @property
    def radius_bound(self) -> float:
        """Upper bound of the coverage radius: every patch ever learned lies within it of some vector."""
        covers = [variant.covers.max() for variant in self.variants.values()]
        return float(max(covers, default=0.0)) * (1 + 1e-5)  # rounding of float32 distances

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.nbytes for array in self.to_arrays()[0].values())

    @property
    def vectors(self) -> Array:
        """All vectors, shape `(n, d)`, variant after variant."""
        if not self.variants:
            return np.empty((0, 0), np.float32)
        return np.concatenate([variant.vectors for variant in self.variants.values()]).astype(np.float32, copy=False)

    @property
    def owners(self) -> NDArray[np.int64]:
        """Position of each vector's variant in `variants`, shape `(n,)`."""
        counts = [len(variant.radii) for variant in self.variants.values()]
        return np.repeat(np.arange(len(counts)), counts)

    @property
    def is_learning(self) -> bool:
        """Whether there are images that :meth:`commit` or :meth:`flush` has yet to bring into the bank."""
        return bool(self._streams)

    def images(self, variant: str) -> int:
        """Number of images that were learned of a variant, those not yet in the bank included."""
        known = self.variants[variant].images if variant in self.variants else 0
        return known + (self._streams[variant].images if variant in self._streams else 0)

    def knows(self, image_hash: int) -> bool:
        """Whether the image with this hash was learned, in the bank or in an open stream."""
        return bool((self.image_hashes == image_hash).any()) or any(
            image_hash in stream.hashes for stream in self._streams.values()
        )

    def resumed(self, image_hash: int) -> str | None:
        """Variant of an image that the open streams brought with them when loaded; None when asked again."""
        return self._resumed.pop(image_hash, None)

    def count_known(self, images: int) -> None:
        """Report `images` that were not learned because they are known."""
        self._report.known_images += images

    def learn(
        self,
        patches: Array,
        variant: str | None = None,
        image_hash: int | None = None,
        views: Array | None = None,
    ) -> str | None:
        """Take in the patches of one image.

        Args:
            patches: Patch embeddings, shape `(n, d)`.
            variant: Name of the variant; found by :meth:`identify` if not given.
            image_hash: Identifies the image, which is then learned once only.
            views: Patch embeddings of augmented views of the image, shape `(m, d)`.

        Returns:
            Name of the variant, None if the image was known.

        Raises:
            ValueError: If `patches` are not of shape `(n, d)`, of another dimension than the bank's, not finite or too
                large, if the name is empty, or if the bank has no room for another variant. Nothing was learned then.
        """
        self._validate(patches)
        if views is not None:
            self._validate(views)
        if image_hash is not None and self.knows(image_hash):
            self.count_known(1)
            return None
        start = time.perf_counter()
        if variant is not None and not variant:
            msg = "The name of a variant must not be empty; without one, the variant of each image is found."
            raise ValueError(msg)
        if variant is None:
            variant = self.identify(patches) or self._new_name()
        self._check_room([variant])
        stream = self._stream_of(variant, patches.shape[1])
        novelty = stream.absorb(patches.astype(np.float32, copy=False))
        if np.isfinite(novelty):
            stream.novelties.append(novelty)
        if views is not None:
            stream.absorb(views.astype(np.float32, copy=False))
        stream.describe(*description(patches), images=1)
        if image_hash is not None:
            stream.hashes.append(image_hash)
        stream.seconds += time.perf_counter() - start
        while sum(len(other.points) for other in self._streams.values()) > OPEN_POOLS * stream.capacity:
            self._close(max(self._streams.values(), key=lambda other: len(other.points)))
        return variant

    def _stream_of(self, variant: str, dimension: int) -> VariantStream:
        """The open stream of a variant."""
        if variant not in self._streams:
            pool = max(2 * self.size, SMALLEST_POOL)
            self._streams[variant] = VariantStream(variant, self.variants.get(variant), dimension, pool, self.dtype)
        return self._streams[variant]

    def commit(self) -> Report:
        """Bring what was learned since the last commit into the bank.

        Returns:
            What changed.
        """
        self.flush()
        report, self._report, self._resumed = self._report, Report(), {}
        before, self._before = self._before, {name: len(variant.radii) for name, variant in self.variants.items()}
        for name, vectors in self._before.items():
            more = vectors - before.get(name, 0)
            if more:
                (report.added if more > 0 else report.removed)[name] = abs(more)
        report.radius_bound, report.num_vectors, report.nbytes = self.radius_bound, len(self), self.nbytes
        return report

    def flush(self) -> None:
        """Bring what was learned into the bank and go on; :meth:`commit` reports it later."""
        for stream in list(self._streams.values()):
            self._close(stream)

    def _close(self, stream: VariantStream) -> None:
        """Bring what was learned of one variant into the bank."""
        start = time.perf_counter()
        threshold = 0.0
        if len(self.variants) < len(self) == self.size:
            # More vectors can only raise the threshold of a full bank, which is just below the least of its radii.
            threshold = 0.99 * min(float(variant.radii[-1]) / variant.scale for variant in self.variants.values())
        variant = stream.result(self.size, threshold)
        if stream.name in self.variants:
            variant = replace(variant, calibration=self.variants[stream.name].calibration)
        self._store({stream.name: variant}, np.array(stream.hashes, np.int64))
        del self._streams[stream.name]
        self._report.variants[stream.name] += stream.images
        self._report.seconds += stream.seconds + time.perf_counter() - start

    def _store(self, variants: Mapping[str, Variant], image_hashes: NDArray[np.int64]) -> None:
        """Take in new or changed variants, dividing the budget anew, and remember the images."""
        variants = {**self.variants, **variants}
        shares = equal_scaled_radius(variants, self.size)
        self.variants = {name: cut(variant, shares[name]) for name, variant in variants.items()}
        self.image_hashes = np.concatenate([self.image_hashes, image_hashes])[-REMEMBERED_IMAGES:]

    def identify(self, patches: Array) -> str | None:
        """Variant to which an image belongs, or None if it is of no variant that was learned.

        It belongs to the variant with the nearest prototype, if its mean embedding is near enough to it.

        Args:
            patches: Patch embeddings of one image, shape `(n, d)`.
        """
        known = {name: (variant.prototype, variant.spread) for name, variant in self.variants.items()}
        known |= {name: (stream.prototype, stream.spread) for name, stream in self._streams.items()}
        if not known:
            return None
        mean, own_spread = description(patches)
        name = min(known, key=lambda key: float(np.linalg.norm(known[key][0] - mean)))
        prototype, spread = known[name]
        return name if np.linalg.norm(prototype - mean) <= MEMBERSHIP * max(spread, own_spread) else None

    def merge(self, other: MemoryBank) -> Report:
        """Learn all that another bank of the same backbone knows.

        Args:
            other: Bank to learn from, with no open stream; it stays as it is.

        Returns:
            What changed since the last commit.

        Raises:
            ValueError: If the banks are of different dimensions, there is no room for all variants, or the other bank
                has not committed what it learned. Nothing was changed then.
        """
        if other.is_learning:
            msg = f"The other bank still learns {', '.join(other._streams)}; commit that, then merge."  # its own class
            raise ValueError(msg)
        if other.variants:
            self._validate(other.vectors)
        self._check_room(other.variants)
        self.flush()
        unknown: dict[str, Variant] = {}
        for name, variant in other.variants.items():
            if name not in self.variants:
                vectors, moved = rounded(variant.vectors, self.dtype)
                unknown[name] = replace(variant, vectors=vectors, covers=variant.covers + moved)
        hashes = other.image_hashes[~np.isin(other.image_hashes, self.image_hashes)]
        for name, variant in other.variants.items():
            if name in self.variants:
                stream = self._stream_of(name, variant.vectors.shape[1])
                stream.absorb(variant.vectors.astype(np.float32), variant.covers)
                stream.describe(variant.prototype, variant.spread, variant.images)
                stream.novelties.extend(variant.novelties.tolist())
                self.flush()
                known = self.variants[name]
                if known.calibration is None:
                    self.variants[name] = replace(known, calibration=variant.calibration)
        self._store(unknown, hashes)
        for name, variant in unknown.items():
            self._report.variants[name] += variant.images
        return self.commit()

    def calibration_patches(self, variant: str, patches: Array, scores: Array) -> Array:
        """Patches by which the score of an image can be renewed when vectors are cut.

        The last vectors of a variant are cut first, so it is known which ones will be left. Kept are the patches that
        score highest by all vectors, by the first half of the variant's, by a quarter and by an eighth (ours).

        Args:
            variant: Name of the variant.
            patches: Patch embeddings of one image, shape `(n, d)`.
            scores: Distance of each to the nearest vector of the bank, shape `(n,)`.

        Returns:
            Shape `(CALIBRATION_PATCHES, d)`.
        """
        vectors = self.variants[variant].vectors
        chosen = [_highest(scores, PATCHES_BY_SHARE)]
        distances, first = np.full(len(patches), np.inf, np.float32), 0
        for share in reversed(CALIBRATION_SHARES):
            last = math.ceil(share * len(vectors))
            if last > first:
                distances = np.minimum(distances, nearest(patches, vectors[first:last])[0])
            chosen.append(_highest(distances, PATCHES_BY_SHARE))
            first = last
        return patches[np.concatenate(chosen)]

    def calibrate(
        self,
        variant: str,
        patches: Array,
        labels: NDArray[np.bool_],
        pixel: tuple[float, float, float] = (np.nan, np.nan, np.nan),
        reach: float = 0.0,
    ) -> None:
        """Keep what renews a variant's thresholds when the bank changes, in place of what was kept before.

        Args:
            variant: Name of a variant in the bank.
            patches: What :meth:`calibration_patches` gave for each image, shape `(n, CALIBRATION_PATCHES, d)`.
            labels: Whether each image is anomalous, shape `(n,)`.
            pixel: Pixel threshold, minimum and maximum of the anomaly maps of these images.
            reach: Score that normal images are known to have; thresholds are raised to it.

        Raises:
            ValueError: If `patches` are not finite or not of the shape above.
        """
        shape = (len(labels), CALIBRATION_PATCHES, self.variants[variant].vectors.shape[1])
        if patches.shape != shape or not np.isfinite(patches).all():
            msg = f"Calibration patches must be finite and of shape {shape}, got {patches.shape}."
            raise ValueError(msg)
        chosen = np.sort(np.concatenate([_spread(np.flatnonzero(labels == label)) for label in (False, True)]))
        patches = patches[chosen].astype(np.float32)
        if np.abs(patches).max(initial=0) <= np.finfo(np.float16).max:
            patches = patches.astype(np.float16)  # precise enough for scores
        scores = self._scores(patches)
        margin = max(1.0, reach / max(float(scores.max(initial=0)), 1e-12)) if reach else 1.0
        calibration = Calibration(patches, labels[chosen].astype(bool), scores, pixel, margin)
        self.variants = {**self.variants, variant: replace(self.variants[variant], calibration=calibration)}

    def _scores(self, patches: Array) -> Array:
        if not len(patches):
            return np.empty(0, np.float32)
        flat = patches.reshape(-1, patches.shape[-1]).astype(np.float32)
        return nearest(flat, self.vectors)[0].reshape(patches.shape[:2]).max(axis=1).astype(np.float32)

    def thresholds(self, variant: str) -> dict[str, tuple[float, float, float]]:
        """Threshold, minimum and maximum of the raw scores of a variant, for the bank as it is now.

        The image values come from the calibration images scored again. The anomaly maps are gone; their values move
        by the same factor as the calibration scores. Without calibration, images are judged by the reach of the
        variant, as after an update that was interrupted.

        Args:
            variant: Name of a variant in the bank.

        Returns:
            Under `"image"` and `"pixel"` each threshold, minimum and maximum; NaN where nothing is known.
        """
        calibration = self.variants[variant].calibration
        if calibration is None or not len(calibration.labels):
            reach = self.variants[variant].reach or np.nan
            return dict.fromkeys(("image", "pixel"), (reach, 0.0 * reach, reach))
        scores = self._scores(calibration.patches)
        factor = float(scores.mean() / max(float(calibration.scores.mean()), 1e-12))
        threshold, lowest, highest = calibration.pixel
        margin = calibration.margin
        return {
            "image": (
                margin * f1_threshold(scores, calibration.labels),
                float(scores.min()),
                margin * float(scores.max()),
            ),
            "pixel": (margin * threshold * factor, lowest * factor, margin * highest * factor),
        }

    def to_arrays(self) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        """State as arrays and as plain data, fit for safetensors and JSON; with the open streams."""
        variants = self.variants.values()
        dimension = next(iter(variants)).vectors.shape[1] if self.variants else 0
        empty = Calibration(
            np.empty((0, CALIBRATION_PATCHES, dimension), np.float16),
            np.empty(0, bool),
            np.empty(0, np.float32),
        )
        calibrations = [variant.calibration or empty for variant in variants]
        nothing = np.empty(0, np.float32)
        arrays = {
            "vectors": np.concatenate([np.empty((0, dimension), self.dtype), *(v.vectors for v in variants)]),
            "radii": np.concatenate([nothing, *(v.radii for v in variants)]),
            "covers": np.concatenate([nothing, *(v.covers for v in variants)]),
            "calibration_patches": np.concatenate([empty.patches, *(c.patches for c in calibrations)]),
            "calibration_labels": np.concatenate([empty.labels, *(c.labels for c in calibrations)]),
            "calibration_scores": np.concatenate([empty.scores, *(c.scores for c in calibrations)]),
            "calibration_pixels": np.array([c.pixel for c in calibrations], np.float64).reshape(-1, 3),
            "calibration_margins": np.array([c.margin for c in calibrations], np.float64),
            "novelties": np.concatenate([nothing, *(v.novelties for v in variants)]),
            "prototypes": np.array([v.prototype for v in variants], np.float32).reshape(len(variants), dimension),
            "image_hashes": self.image_hashes,
        }
        plain: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "size": self.size,
            "dtype": self.dtype.name,
            "variants": [
                {
                    "name": name,
                    "vectors": len(variant.radii),
                    "scale": variant.scale,
                    "resolution": variant.resolution,
                    "images": variant.images,
                    "spread": variant.spread,
                    "calibration_images": len(variant.calibration.labels) if variant.calibration else 0,
                    "novelties": len(variant.novelties),
                }
                for name, variant in self.variants.items()
            ],
            "streams": [],
        }
        for position, stream in enumerate(self._streams.values()):
            own, described = stream.to_arrays()
            arrays |= {f"stream_{position}_{key}": value for key, value in own.items()}
            plain["streams"].append(described)
        return arrays, plain

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]], plain: Mapping[str, Any]) -> MemoryBank:
        """Inverse of :meth:`to_arrays`. What was in the bank by then is not part of the next report.

        Raises:
            ValueError: If the state is of another schema, or damaged.
        """
        version = plain.get("schema_version")
        if version != SCHEMA_VERSION:
            msg = (
                f"The memory bank has schema version {version}, this version of anomalib-ext reads {SCHEMA_VERSION}; "
                "use the version that wrote it, or a newer one."
            )
            raise ValueError(msg)
        try:
            bank = cls(plain["size"], plain["dtype"])
            problems = _contradictions(arrays, plain)
        except KeyError as error:
            problems = [f"{error} is missing"]
        if problems:
            msg = f"The memory bank is damaged: {'; '.join(problems)}. Use an undamaged copy of the file."
            raise ValueError(msg)
        bank.image_hashes = np.array(arrays["image_hashes"])
        first = image = novelty = 0
        for position, entry in enumerate(plain["variants"]):
            part = slice(first, first + entry["vectors"])
            images = slice(image, image + entry["calibration_images"])
            novelties = slice(novelty, novelty + entry["novelties"])
            first, image, novelty = part.stop, images.stop, novelties.stop
            calibration = None
            if entry["calibration_images"]:
                threshold, lowest, highest = (float(value) for value in arrays["calibration_pixels"][position])
                calibration = Calibration(
                    np.array(arrays["calibration_patches"][images]),
                    np.array(arrays["calibration_labels"][images]),
                    np.array(arrays["calibration_scores"][images]),
                    (threshold, lowest, highest),
                    float(arrays["calibration_margins"][position]),
                )
            bank.variants[entry["name"]] = Variant(
                np.array(arrays["vectors"][part]),
                np.array(arrays["radii"][part]),
                np.array(arrays["covers"][part]),
                entry["scale"],
                entry["resolution"],
                entry["images"],
                np.array(arrays["prototypes"][position]),
                entry["spread"],
                calibration,
                np.array(arrays["novelties"][novelties]),
            )
        bank._before = {name: len(variant.radii) for name, variant in bank.variants.items()}
        for position, described in enumerate(plain["streams"]):
            prefix = f"stream_{position}_"
            own = {key.removeprefix(prefix): value for key, value in arrays.items() if key.startswith(prefix)}
            stream = bank._stream_of(described["name"], own["points"].shape[1])
            stream.restore(own, described)
            bank._resumed |= dict.fromkeys(stream.hashes, stream.name)
        return bank

    @property
    def _dimension(self) -> int | None:
        """Dimension of all that was learned, None before anything was."""
        for stream in self._streams.values():
            return stream.points.shape[1]
        return next((variant.vectors.shape[1] for variant in self.variants.values()), None)

    def _validate(self, patches: Array) -> None:
        if patches.ndim != 2 or not patches.size:
            msg = f"Patch embeddings must have the shape (patches, dimension), got {patches.shape}."
            raise ValueError(msg)
        if self._dimension not in {None, patches.shape[1]}:
            msg = (
                f"Patch embeddings have dimension {patches.shape[1]}, the memory bank has {self._dimension}: "
                "it was learned with another backbone or other layers."
            )
            raise ValueError(msg)
        if not np.isfinite(patches).all():
            msg = (
                "Patch embeddings hold NaN or infinite values, so this image was not learned. "
                "Look for NaN in the image, or for damaged backbone weights."
            )
            raise ValueError(msg)
        limit = min(LARGEST_VALUE, float(np.finfo(self.dtype).max))
        if np.abs(patches).max() > limit:
            msg = (
                f"Patch embeddings reach {np.abs(patches).max():.3g}, a memory bank of precision {self.dtype.name} "
                f"holds values up to {limit:.3g}. Use precision float32, or other layers of the backbone."
            )
            raise ValueError(msg)

    def _check_room(self, names: Iterable[str]) -> None:
        """Refuse variants for which not even one vector each is left."""
        variants = {*self.variants, *names, *self._streams}
        if len(variants) > self.size:
            msg = f"A memory of {self.size} vectors cannot hold {len(variants)} variants; use a larger memory_size."
            raise ValueError(msg)

    def _new_name(self) -> str:
        taken = {*self.variants, *self._streams}
        return next(name for i in range(1, 2**31) if (name := f"variant_{i}") not in taken)


def _contradictions(arrays: Mapping[str, NDArray[Any]], plain: Mapping[str, Any]) -> list[str]:
    """What is wrong with a state that was loaded.

    Raises:
        KeyError: If something is missing.
    """
    entries = plain["variants"]
    counts = [entry["vectors"] for entry in entries]
    images = sum(entry["calibration_images"] for entry in entries)
    dimension = arrays["vectors"].shape[-1]
    shapes = {
        "vectors": (sum(counts), dimension),
        "radii": (sum(counts),),
        "covers": (sum(counts),),
        "calibration_patches": (images, CALIBRATION_PATCHES, dimension),
        "calibration_labels": (images,),
        "calibration_scores": (images,),
        "calibration_pixels": (len(entries), 3),
        "calibration_margins": (len(entries),),
        "novelties": (sum(entry["novelties"] for entry in entries),),
        "prototypes": (len(entries), dimension),
        "image_hashes": (arrays["image_hashes"].size,),
    }
    finite = [
        "vectors",
        "covers",
        "prototypes",
        "calibration_patches",
        "calibration_scores",
        "calibration_margins",
        "novelties",
    ]
    for position in range(len(plain["streams"])):
        prefix = f"stream_{position}_"
        count = len(arrays[f"{prefix}points"])
        dimension = dimension or arrays[f"{prefix}points"].shape[-1]  # 0 while the bank is empty
        shapes |= {
            f"{prefix}points": (count, dimension),
            f"{prefix}radii": (count,),
            f"{prefix}covers": (count,),
            f"{prefix}prototype": (dimension,),
            f"{prefix}hashes": (arrays[f"{prefix}hashes"].size,),
            f"{prefix}novelties": (arrays[f"{prefix}novelties"].size,),
        }
        finite += [f"{prefix}{key}" for key in ("points", "covers", "prototype", "novelties")]
    problems = [
        f"{key} has the shape {arrays[key].shape} in place of {shape}"
        for key, shape in shapes.items()
        if arrays[key].shape != shape
    ]
    if problems:
        return problems
    if sum(counts) > plain["size"]:
        problems.append(f"there are {sum(counts)} vectors, but at most {plain['size']} are allowed")
    if arrays["vectors"].dtype != plain["dtype"]:
        problems.append(f"vectors are of {arrays['vectors'].dtype} in place of {plain['dtype']}")
    problems += [f"{key} holds values that are not finite" for key in finite if not np.isfinite(arrays[key]).all()]
    if len({entry["name"] for entry in entries}) < len(entries):
        problems.append("a variant is there twice")
    if len({stream["name"] for stream in plain["streams"]}) < len(plain["streams"]):
        problems.append("a stream is there twice")
    for position, stream in enumerate(plain["streams"]):
        points, radii = (arrays[f"stream_{position}_{key}"] for key in ("points", "radii"))
        if np.isnan(radii).any() or (radii < 0).any():
            problems.append(f"stream_{position}_radii holds negative values or NaN")
        if points.dtype != np.float32:
            problems.append(f"stream_{position}_points are of {points.dtype} in place of float32")
        if not stream["name"] or stream["divided_at"] not in {0, *range(LISTS, len(points) + 1)}:
            problems.append(f"name or divided_at of stream {position} are out of range")
        if not all(stream[key] >= 0 for key in ("resolution", "spread", "images")):
            problems.append(f"resolution, spread or images of stream {position} are out of range")
    first = 0
    for entry, count in zip(entries, counts, strict=True):
        radii = arrays["radii"][first : first + count]
        first += count
        if count < 1 or radii[0] != np.inf or not (np.diff(radii) <= 0).all():
            problems.append(f"radii of {entry['name']} do not fall from infinity")
        if not (entry["scale"] > 0 and all(entry[key] >= 0 for key in ("resolution", "spread", "images"))):
            problems.append(f"scale, resolution, spread or images of {entry['name']} are out of range")
    return problems


def f1_threshold(scores: Array, labels: NDArray[np.bool_]) -> float:
    """Score above which an image is called anomalous, best by F1; the highest score if no image is anomalous.

    Args:
        scores: Shape `(n,)`.
        labels: Shape `(n,)`, True where anomalous.
    """
    if not labels.any():
        return float(scores.max())
    order = np.argsort(-scores, kind="stable")
    ranked, hits = scores[order], np.cumsum(labels[order])
    f1 = 2 * hits / (np.arange(1, len(scores) + 1) + labels.sum())
    f1[:-1][ranked[:-1] == ranked[1:]] = 0  # equal scores are decided together
    best = int(f1.argmax())
    lowest = float(ranked[best])
    below = float(ranked[best + 1]) if best + 1 < len(ranked) else lowest - 1e-6 * max(abs(lowest), 1e-6)
    middle = float(np.float32((lowest + below) / 2))
    return middle if middle < lowest else below  # neighbors in float32 have no middle

# SPDX-License-Identifier: Apache-2.0
"""Memory bank of a fixed size that holds what was learned of all product variants.

NumPy and faiss only, so that a training PC and an edge PC without torch run the same code. How a variant is selected
says `variant.py`, how images are learned `update.py`. The budget is divided by need: one threshold on what a vector is
worth to good images cuts all variants (`leave_one_out.py`). The rule is ours.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from .defects import within_bounds
from .leave_one_out import scored
from .patch_pool import REMEMBERED_IMAGES
from .search import NearestNeighbors
from .thresholds import FALSE_ALARM_RATE, check_rate
from .variant import MEMBERSHIP, Variant, cut, describe

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from numpy.typing import NDArray

    Array = NDArray[np.float32]

MEMORY_SIZE = 10_000  # vectors, where nothing else is said
# Squares of larger values, summed over a patch, would leave the range of float32.
LARGEST_VALUE = 1e15


class MemoryBank:
    """Patch embeddings of all variants, at most `size` of them. It never changes: an `Update` makes a new one.

    Args:
        size: Largest number of vectors.
        dtype: Precision in which vectors are kept, `float32` or `float16`.
        variants: The bank's content by variant name, in order of arrival; cut to the shares of the budget.
        image_hashes: Hashes of the images that were learned, shape `(n,)`; the last ones are kept.
        image_owners: Position of each image's variant in `variants`, shape `(n,)`; -1 where unknown, as by default.
        false_alarm_rate: Share of good images that may be called anomalous, where a variant has no rate of its own.

    Attributes:
        variants: The bank's content.
        image_hashes: Hashes of the images.
        image_owners: Position of each image's variant.

    Raises:
        ValueError: If `size` is not positive, `dtype` neither float32 nor float16, or the rate out of range.
    """

    def __init__(
        self,
        size: int,
        dtype: str = "float32",
        variants: Mapping[str, Variant] | None = None,
        image_hashes: NDArray[np.int64] | None = None,
        false_alarm_rate: float = FALSE_ALARM_RATE,
        image_owners: NDArray[np.int32] | None = None,
    ) -> None:
        if not isinstance(size, (int, np.integer)) or not 1 <= size < 2**31:
            msg = f"memory_size must be a whole number of at least 1 and below 2**31, got {size!r}."
            raise ValueError(msg)
        if dtype not in {"float32", "float16"}:
            msg = f"precision must be 'float32' or 'float16', got {dtype!r:.50}."
            raise ValueError(msg)
        self.size = int(size)
        self.dtype = np.dtype(dtype)
        self.false_alarm_rate = check_rate(false_alarm_rate)
        shares = shares_by_need(variants or {}, size)
        self.variants = within_bounds({name: _cut(each, shares[name]) for name, each in (variants or {}).items()})
        hashes = np.empty(0, np.int64) if image_hashes is None else image_hashes
        owners = np.full(len(hashes), -1, np.int32) if image_owners is None else image_owners
        self.image_hashes, self.image_owners = hashes[-REMEMBERED_IMAGES:], owners[-REMEMBERED_IMAGES:]

    def __len__(self) -> int:
        """Number of vectors."""
        return sum(len(variant.radii) for variant in self.variants.values())

    def with_variants(
        self, variants: Mapping[str, Variant], image_hashes: Mapping[str, NDArray[np.int64]] | None = None
    ) -> MemoryBank:
        """A bank with new or changed variants, the budget divided anew, that remembers further images.

        Args:
            variants: New or changed variants by name.
            image_hashes: Hashes of further images by the name of their variant, "" where it is unknown.
        """
        together = {**self.variants, **variants}
        position = {"": -1, **{name: number for number, name in enumerate(together)}}
        hashes, owners = [self.image_hashes], [self.image_owners]
        for name, more in (image_hashes or {}).items():
            hashes.append(more)
            owners.append(np.full(len(more), position[name], np.int32))
        return self._of(together, np.concatenate(hashes), np.concatenate(owners))

    def of_variants(self, names: Collection[str]) -> MemoryBank:
        """A bank of some of the variants and their images; images of unknown variants are remembered, too."""
        kept = {name: each for name, each in self.variants.items() if name in names}
        moved = np.array([*({name: i for i, name in enumerate(kept)}.get(name, -2) for name in self.variants), -1])
        owners = moved[self.image_owners].astype(np.int32)  # -1 is the last
        return self._of(kept, self.image_hashes[owners != -2], owners[owners != -2])

    def check_known(self, variant: str) -> None:
        """Refuse a name that no variant has.

        Raises:
            ValueError: If none has it.
        """
        if variant not in self.variants:
            msg = f"There is no variant {variant!r}; known are {', '.join(self.variants) or 'none'}."
            raise ValueError(msg)

    def renamed(self, old: str, new: str) -> MemoryBank:
        """A bank in which a variant has another name."""
        bank = copy.copy(self)
        bank.variants = {new if name == old else name: each for name, each in self.variants.items()}
        return bank

    def hashes_by_variant(self) -> dict[str, NDArray[np.int64]]:
        """Hashes of the images of each variant, under "" those whose variant is unknown."""
        return {name: self.image_hashes[self.image_owners == i] for i, name in ((-1, ""), *enumerate(self.variants))}

    def variant_of_image(self, image_hash: int) -> str | None:
        """Name of the variant that an image was learned as, "" where it is unknown, None if it was not learned."""
        found = np.flatnonzero(self.image_hashes == image_hash)
        if not len(found):
            return None
        owner = self.image_owners[found[0]]
        return "" if owner < 0 else list(self.variants)[owner]

    def _of(self, variants: Mapping[str, Variant], hashes: NDArray[np.int64], owners: NDArray[np.int32]) -> MemoryBank:
        """A bank of the same size that holds something else."""
        return MemoryBank(self.size, self.dtype.name, variants, hashes, self.false_alarm_rate, owners)

    def with_size(self, size: int) -> MemoryBank:
        """A bank of another size: a smaller one is cut at once, a larger one is filled by what is learned from now on.

        Args:
            size: Largest number of vectors.

        Raises:
            ValueError: If it is less than one vector for each variant.
        """
        if isinstance(size, (int, np.integer)) and size < len(self.variants):
            msg = f"memory_size must be at least {len(self.variants)}, one vector for each variant, got {size}."
            raise ValueError(msg)
        rest = (self.dtype.name, self.variants, self.image_hashes, self.false_alarm_rate, self.image_owners)
        return MemoryBank(size, *rest)

    def with_changes(self, variant: str, **changes: Any) -> MemoryBank:  # noqa: ANN401
        """A bank that decides otherwise on a variant; its vectors, and their index, are the same.

        Args:
            variant: Name of the variant.
            changes: Attributes of :class:`Variant` other than its vectors.
        """
        bank = copy.copy(self)
        bank.variants = {**self.variants, variant: replace(self.variants[variant], **changes)}
        return bank

    def with_decision(
        self,
        variant: str | None = None,
        *,
        false_alarm_rate: float | None = None,
        threshold: float | None = None,
    ) -> MemoryBank:
        """A bank that decides by another false-alarm rate, or by thresholds that are set by hand.

        Args:
            variant: Name of the variant that this is for; all by default.
            false_alarm_rate: Share of good images that may be called anomalous. Thresholds by hand end.
            threshold: Raw image score above which an image is anomalous.

        Returns:
            The bank; without rate and threshold, one that decides by the rate of the bank again.

        Raises:
            ValueError: If there is no such variant, or a value is out of range.
        """
        if variant is not None:
            self.check_known(variant)
        if threshold is not None and not 0 < threshold < np.inf:
            msg = f"A threshold must be above 0 and finite, got {threshold}."
            raise ValueError(msg)
        rate = None if false_alarm_rate is None else check_rate(false_alarm_rate)
        keeps_rate = threshold is not None and rate is None
        bank = copy.copy(self)
        if variant is None and rate is not None:
            bank.false_alarm_rate, rate = rate, None
        by_hand = None if threshold is None else (threshold, np.nan)
        chosen = self.variants if variant is None else {variant: self.variants[variant]}
        changes: dict[str, Any] = {"by_hand": by_hand}
        if not keeps_rate:
            changes |= {"false_alarm_rate": rate, "former": None}
        changed = {name: replace(each, **changes) for name, each in chosen.items()}
        bank.variants = {**self.variants, **changed}
        return bank

    def dimension(self) -> int | None:
        """Length of a vector, None in an empty bank."""
        return next((variant.vectors.shape[1] for variant in self.variants.values()), None)

    def nbytes(self) -> int:
        """Bytes of all arrays, as they are saved."""
        arrays: list[NDArray[Any]] = [self.image_hashes, self.image_owners]
        for variant in self.variants.values():
            arrays += [variant.vectors, variant.radii, variant.cover_radii, variant.prototype]
            arrays += [variant.origins, variant.stand_ins, variant.gains]
            if variant.calibration:
                arrays += vars(variant.calibration).values()
            if variant.defects:
                arrays += [variant.defects.vectors, variant.defects.reaches]
        return sum(array.nbytes for array in arrays)

    def radius_bound(self) -> float:
        """Upper bound of the coverage radius: every patch ever learned lies within it of some vector."""
        largest = [variant.cover_radii.max() for variant in self.variants.values()]
        return float(max(largest, default=0.0)) * (1 + 1e-5)  # rounding of float32 distances

    def vectors(self) -> Array:
        """Copy of all vectors as float32, shape `(n, d)`, variant after variant."""
        if not self.variants:
            return np.empty((0, 0), np.float32)
        return np.concatenate([variant.vectors for variant in self.variants.values()]).astype(np.float32, copy=False)

    def owners(self) -> NDArray[np.int64]:
        """Position of each vector's variant in `variants`, shape `(n,)`."""
        counts = [len(variant.radii) for variant in self.variants.values()]
        return np.repeat(np.arange(len(counts)), counts)

    @cached_property
    def index(self) -> NearestNeighbors:
        """The vectors as they are searched, made when first asked for."""
        return NearestNeighbors(self.vectors())

    def search(self, patches: Array) -> tuple[Array, NDArray[np.int64]]:
        """Find the nearest vector of each patch; safe to be called by several threads at once.

        Args:
            patches: Shape `(m, d)`, finite.

        Returns:
            Distance of each patch to its nearest vector, and the index of that vector, each of shape `(m,)`.
        """
        return self.index.search(patches)

    def identify(self, patches: Array) -> str | None:
        """Variant to which an image with patches of shape `(n, d)` belongs, None if it is of none that was learned."""
        return identify(patches, {name: (each.prototype, each.spread) for name, each in self.variants.items()})


def identify(patches: Array, known: Mapping[str, tuple[Array, float]]) -> str | None:
    """Variant to which an image belongs, or None if it is of no variant that is known.

    It belongs to the variant with the nearest prototype, if its mean embedding is near enough to it.

    Args:
        patches: Patch embeddings of one image, shape `(n, d)`.
        known: Prototype, shape `(d,)`, and spread of each variant.
    """
    if not known:
        return None
    mean, own_spread = describe(patches)
    name = min(known, key=lambda key: float(np.linalg.norm(known[key][0] - mean)))
    prototype, spread = known[name]
    return name if np.linalg.norm(prototype - mean) <= MEMBERSHIP * max(spread, own_spread) else None


def check_patches(patches: Array, dimension: int | None, dtype: np.dtype) -> None:
    """Refuse patch embeddings that cannot be learned.

    Args:
        patches: Patch embeddings.
        dimension: Length that they must have, None for any.
        dtype: Precision in which they are to be kept.

    Raises:
        ValueError: If they are not of shape `(n, d)`, of another dimension, not finite or too large.
    """
    if patches.ndim != 2 or not patches.size:
        msg = f"Patch embeddings must have the shape (patches, dimension), got {patches.shape}."
        raise ValueError(msg)
    if dimension not in {None, patches.shape[1]}:
        msg = (
            f"Patch embeddings have dimension {patches.shape[1]}, the memory bank has {dimension}: "
            "it was learned with another backbone or other layers."
        )
        raise ValueError(msg)
    if not np.isfinite(patches).all():
        msg = (
            "Patch embeddings hold NaN or infinite values, so this image was not learned. "
            "Look for NaN in the image, or for damaged backbone weights."
        )
        raise ValueError(msg)
    limit = min(LARGEST_VALUE, float(np.finfo(dtype).max))
    if np.abs(patches).max() > limit:
        msg = (
            f"Patch embeddings reach {np.abs(patches).max():.3g}, a memory bank of precision {dtype.name} "
            f"holds values up to {limit:.3g}. Use precision float32, or other layers of the backbone."
        )
        raise ValueError(msg)


def shares_by_need(variants: Mapping[str, Variant], size: int) -> dict[str, int]:
    """Divide `size` vectors among at most as many variants: one threshold on what a vector is worth."""
    together = np.concatenate([*(variant.gains for variant in variants.values()), np.zeros(0, np.float32)])
    if len(together) <= size:
        return {name: len(variant.gains) for name, variant in variants.items()}
    threshold = np.partition(together, -size - 1)[-size - 1]
    shares = {name: int((variant.gains > threshold).sum()) for name, variant in variants.items()}
    # Of vectors that are worth the same each variant has as many, or one more, in order of names.
    equal = {name: int((variant.gains == threshold).sum()) for name, variant in sorted(variants.items())}
    left = size - sum(shares.values())
    while left > 0:
        waiting = [name for name, count in equal.items() if count][:left]
        step = max(1, min(left // len(waiting), *(equal[name] for name in waiting)))
        for name in waiting:
            shares[name] += step
            equal[name] -= step
        left -= step * len(waiting)
    return shares


def _cut(variant: Variant, keep: int) -> Variant:
    """Keep the first `keep` vectors, and score the images again by which the variant judges itself."""
    shorter = cut(variant, keep)
    if shorter is variant or variant.calibration is None:
        return shorter
    return replace(shorter, calibration=scored(shorter, variant.calibration))

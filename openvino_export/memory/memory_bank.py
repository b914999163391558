# SPDX-License-Identifier: Apache-2.0
"""Memory bank of a fixed size that holds what was learned of all product variants.

NumPy and faiss only, so that a training PC and an edge PC without torch run the same code. How a variant is selected
says `variant.py`, how images are learned `update.py`. The budget is divided by equal scaled radius: one threshold on
radius / scale of the variant cuts all variants. The rule is ours.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from .patch_pool import REMEMBERED_IMAGES
from .search import NearestNeighbors
from .variant import MEMBERSHIP, Calibration, Variant, cut, describe

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    Array = NDArray[np.float32]

# Squares of larger values, summed over a patch, would leave the range of float32.
LARGEST_VALUE = 1e15


class MemoryBank:
    """Patch embeddings of all variants, at most `size` of them. It never changes: an `Update` makes a new one.

    Args:
        size: Largest number of vectors.
        dtype: Precision in which vectors are kept, `float32` or `float16`.
        variants: The bank's content by variant name, in order of arrival; cut to the shares of the budget.
        image_hashes: Hashes of the images that were learned, shape `(n,)`; the last ones are kept.

    Attributes:
        variants: The bank's content.
        image_hashes: Hashes of the images.

    Raises:
        ValueError: If `size` is not positive, or `dtype` neither float32 nor float16.
    """

    def __init__(
        self,
        size: int,
        dtype: str = "float32",
        variants: Mapping[str, Variant] | None = None,
        image_hashes: NDArray[np.int64] | None = None,
    ) -> None:
        if size < 1:
            msg = f"memory_size must be at least 1, got {size}."
            raise ValueError(msg)
        if dtype not in {"float32", "float16"}:
            msg = f"precision must be 'float32' or 'float16', got {dtype!r}."
            raise ValueError(msg)
        self.size = size
        self.dtype = np.dtype(dtype)
        shares = equal_scaled_radius(variants or {}, size)
        self.variants = {name: cut(variant, shares[name]) for name, variant in (variants or {}).items()}
        hashes = np.empty(0, np.int64) if image_hashes is None else image_hashes
        self.image_hashes = hashes[-REMEMBERED_IMAGES:]

    def __len__(self) -> int:
        """Number of vectors."""
        return sum(len(variant.radii) for variant in self.variants.values())

    def with_variants(
        self, variants: Mapping[str, Variant], image_hashes: NDArray[np.int64] | None = None
    ) -> MemoryBank:
        """A bank with new or changed variants, the budget divided anew, that remembers further images."""
        hashes = self.image_hashes if image_hashes is None else np.concatenate([self.image_hashes, image_hashes])
        return MemoryBank(self.size, self.dtype.name, {**self.variants, **variants}, hashes)

    def with_calibration(self, variant: str, calibration: Calibration) -> MemoryBank:
        """A bank with other images that set the thresholds of a variant; its vectors, and their index, are the same."""
        bank = copy.copy(self)
        bank.variants = {**self.variants, variant: replace(self.variants[variant], calibration=calibration)}
        return bank

    def dimension(self) -> int | None:
        """Length of a vector, None in an empty bank."""
        return next((variant.vectors.shape[1] for variant in self.variants.values()), None)

    def nbytes(self) -> int:
        """Bytes of all arrays, as they are saved."""
        arrays: list[NDArray[Any]] = [self.image_hashes]
        for variant in self.variants.values():
            arrays += [variant.vectors, variant.radii, variant.cover_radii, variant.prototype]
            arrays.append(variant.prequential_scores)
            if calibration := variant.calibration:
                arrays += [calibration.patches, calibration.labels, calibration.scores]
        numbers = 4 * 8 * len(self.variants)  # pixel threshold, minimum, maximum and margin of each
        return sum(array.nbytes for array in arrays) + numbers

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


def equal_scaled_radius(variants: Mapping[str, Variant], size: int) -> dict[str, int]:
    """Divide `size` vectors among at most as many variants: one threshold on radius / scale."""
    scaled = {name: variant.radii / variant.scale for name, variant in variants.items()}
    together = np.concatenate([*scaled.values(), np.zeros(0, np.float32)])
    if len(together) <= size:
        return {name: len(radii) for name, radii in scaled.items()}
    threshold = np.partition(together, -size - 1)[-size - 1]
    return {name: int((radii > threshold).sum()) for name, radii in scaled.items()}

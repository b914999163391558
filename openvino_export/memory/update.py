# SPDX-License-Identifier: Apache-2.0
"""The one way to learn: an update of a memory bank, which is committed as a whole or dropped.

Example:
    >>> update = Update(bank)
    >>> update.add(patches, "lid")
    'lid'
    >>> print(update.commit())
    >>> bank = update.bank
"""

from __future__ import annotations

import copy
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from openvino_export.images import image_hash

from .augment import NUM_VIEWS, augmented_views
from .memory_bank import check_patches, identify
from .patch_pool import PatchPool
from .report import Report
from .thresholds import RECENT_IMAGES, calibrated, calibrated_from_views
from .variant import Variant, describe, rounded

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from numpy.typing import NDArray

    from .memory_bank import MemoryBank

    Array = NDArray[np.float32]
    # By the name that was given: images `(3, H, W)` with their hashes, and with patches `(n, d)` unless they are known.
    Waiting = dict[str | None, list[tuple[Array, int, Array | None]]]

# The pool that vectors are chosen from holds twice the budget, and for small budgets at least this many patches.
SMALLEST_POOL = 12_288
# Several variants may be learned in turn, image by image. Together their pools hold at most so many pools of points.
OPEN_POOLS = 4
# Up to this many images of a variant, each is learned with augmented views; with 16, they hardly changed the mean
# (docs/benchmarks.md).
FEW_IMAGES = 4


class Update:
    """Learns images on top of a bank. Dropping it forgets them.

    Args:
        bank: What is known; it stays as it is.
        embed: Gives patch embeddings `(B, h, w, d)`, float32, for normalised images `(B, 3, H, W)`. Not needed if
            only patches are added.
        few_shot_views: Whether a variant of at most FEW_IMAGES images is learned with augmented views of them. Images
            without a name are counted by update.

    Attributes:
        bank: What is known with the images that are no longer in a pool; with all of them after :meth:`flush` and
            :meth:`commit`.
        pools: The patches of each variant that are on their way into the bank.
        waiting: By the name that was given, images that wait until it is clear whether they are few.
        learned: Variant of each image that was learned since the last commit, by its hash.
        report: What was done since the last commit; complete when :meth:`commit` returns it.
    """

    def __init__(
        self,
        bank: MemoryBank,
        embed: Callable[[Array], Array] | None = None,
        few_shot_views: bool = False,
    ) -> None:
        self.bank = bank
        self.embed = embed
        self.few_shot_views = few_shot_views
        self.pools: dict[str, PatchPool] = {}
        self.waiting: Waiting = {}
        self.learned: dict[int, str] = {}
        self.report = Report()
        self._committed = _counts(bank)
        self._many: set[str | None] = set()  # names of which there are more than few
        self._recent: dict[str, list[Array]] = {}  # last learned images by variant
        self._calibrated: set[str] = set()  # variants
        # Images of an update that is resumed, which may be given again: their variants, None for those that waited.
        self._resumed: dict[int, str | None] = {}

    def resume(self, pools: Iterable[PatchPool], waiting: Waiting, learned: Mapping[int, str]) -> None:
        """Go on where an update was that was not committed; its images may be given again.

        Args:
            pools: Its pools, which are used up.
            waiting: Its images that wait.
            learned: Its images that were learned.
        """
        self.pools |= {pool.name: pool for pool in pools}
        self.learned |= learned
        self._resumed |= learned
        for name, images in waiting.items():
            self.waiting[name] = [each for each in images if each[2] is not None]  # known ones are counted when given
            self._resumed |= dict.fromkeys(value for _, value, _ in self.waiting[name])
        if not self.few_shot_views:
            self._many |= waiting.keys()

    def continued(self, embed: Callable[[Array], Array] | None = None, few_shot_views: bool = False) -> Update:
        """Another update that goes on where this one is, which stays as it is; arguments are those of the class."""
        other = Update(self.bank, embed, few_shot_views)
        other.resume(copy.deepcopy(list(self.pools.values())), self.waiting, self.learned)
        return other

    def is_open(self) -> bool:
        """Whether anything was added that is not committed."""
        return bool(self.pools or self.waiting or self.learned)

    def images(self, variant: str) -> int:
        """Number of images that were learned of a variant, those still in a pool included."""
        known = self.bank.variants[variant].images if variant in self.bank.variants else 0
        return known + (self.pools[variant].images if variant in self.pools else 0)

    def knows(self, value: int) -> bool:
        """Whether the image with this hash was learned."""
        return bool((self.bank.image_hashes == value).any()) or any(
            value in pool.hashes for pool in self.pools.values()
        )

    def identify(self, patches: Array) -> str | None:
        """Variant to which an image with patches of shape `(n, d)` belongs, None if it is of none that was learned."""
        parts: dict[str, Variant | PatchPool] = {**self.bank.variants, **self.pools}
        return identify(patches, {name: (part.prototype, part.spread) for name, part in parts.items()})

    # Adding

    def add(
        self,
        item: Array,
        variant: str | None = None,
        *,
        image_hash: int | None = None,
        patches: Array | None = None,
    ) -> str | None:
        """Take in an image, several, or the patches of one.

        Args:
            item: Patch embeddings of one image, shape `(n, d)`, or normalised images, shape `(B, 3, H, W)`.
            variant: Name of their variant; found for each image by :meth:`identify` if not given.
            image_hash: Identifies the image that patches are of, which is then learned once only.
            patches: Patch embeddings `(B, n, d)` of the images, if they are known already.

        Returns:
            For patches the name of the variant, None if the image was known. Images may wait until it is clear whether
            they are few, so for them it is always None.

        Raises:
            ValueError: If patches are not of shape `(n, d)`, of another dimension than the bank's, not finite or too
                large, if the name is empty, or if the bank has no room for another variant. Nothing was learned then;
                of images without a name those before the one that has no room.
        """
        if item.ndim != 4:
            return self._add_patches(item, variant, image_hash)
        given = self._embedded(item, patches)
        if variant is not None and any(own is not None for *_, own in given):
            self._check_name(variant)
        waiting = self.waiting.setdefault(variant, [])
        waiting += given
        count = len(waiting)
        if variant is not None:  # those that are given again count among the learned
            count = self.images(variant) + sum(value not in self._resumed for _, value, _ in waiting)
        if not self.few_shot_views or count > FEW_IMAGES:
            self._many.add(variant)
        if variant in self._many:
            self._add_waiting(variant)
        return None

    def _embedded(self, images: Array, patches: Array | None) -> list[tuple[Array, int, Array | None]]:
        """Images with their hashes, and with their patches, which are fit to be learned, unless they are known."""
        hashes = [image_hash(image) for image in images]
        # Those that waited when the update was saved are here already.
        waited = [self._resumed.get(value, "") is None for value in hashes]
        new = [i for i, value in enumerate(hashes) if not (waited[i] or self.knows(value))]
        own: dict[int, Array] = {}
        if patches is not None:
            own = {i: patches[i] for i in new}
        elif new:
            assert self.embed is not None, "images need `embed`"
            embedded = self.embed(images[new])
            own = dict(zip(new, embedded.reshape(len(new), -1, embedded.shape[-1]), strict=True))
        for one in own.values():
            check_patches(one, self._dimension(), self.bank.dtype)
        return [(images[i], value, own.get(i)) for i, value in enumerate(hashes) if not waited[i]]

    def _add_waiting(self, variant: str | None) -> None:
        for image, value, patches in self.waiting.pop(variant, ()):
            if patches is None:
                self.report.known_images += 1
                name = self._resumed.pop(value, None)
            else:
                views = None
                if variant not in self._many:
                    assert self.embed is not None, "views need `embed`"
                    embedding = self.embed(augmented_views(image, NUM_VIEWS, seed=value))
                    views = embedding.reshape(-1, embedding.shape[-1])
                name = self._add_patches(patches, variant, value, views)
            if name is not None:
                self._recent[name] = [*self._recent.get(name, []), image][-RECENT_IMAGES:]

    def _add_patches(
        self, patches: Array, variant: str | None, value: int | None, views: Array | None = None
    ) -> str | None:
        """Take in the patches of an image, and of views of it, shape `(m, d)`."""
        for given in (patches, views):
            if given is not None:
                check_patches(given, self._dimension(), self.bank.dtype)
        if value is not None and self.knows(value):
            self.report.known_images += 1
            return None
        start = time.perf_counter()
        if variant is None:
            variant = self.identify(patches) or _new_name({*self.bank.variants, *self.pools})
        self._check_name(variant)
        pool = self._pool_of(variant, patches.shape[1])
        score = pool.absorb(patches.astype(np.float32, copy=False))
        if np.isfinite(score):
            pool.prequential_scores.append(score)
        if views is not None:
            pool.absorb(views.astype(np.float32, copy=False))
        pool.count_images(*describe(patches), images=1)
        if value is not None:
            pool.hashes.append(value)
            self.learned[value] = variant
        pool.seconds += time.perf_counter() - start
        while sum(len(other.points) for other in self.pools.values()) > OPEN_POOLS * pool.capacity:
            self._close(max(self.pools.values(), key=lambda other: len(other.points)))
        return variant

    def merge(self, other: MemoryBank) -> None:
        """Take in all that another bank of the same backbone knows.

        Args:
            other: Bank to learn from; it stays as it is.

        Raises:
            ValueError: If the banks are of different dimensions, or there is no room for all variants. Nothing was
                learned then.
        """
        if other.variants:
            check_patches(other.vectors(), self._dimension(), self.bank.dtype)
        self._check_room(other.variants)
        self.flush()
        self._check_room(other.variants)  # images that had waited without a name may be of new variants
        unknown: dict[str, Variant] = {}
        for name, variant in other.variants.items():
            if name not in self.bank.variants:
                vectors, moved = rounded(variant.vectors, self.bank.dtype)
                unknown[name] = replace(variant, vectors=vectors, cover_radii=variant.cover_radii + moved)
        hashes = other.image_hashes[~np.isin(other.image_hashes, self.bank.image_hashes)]
        for name, variant in other.variants.items():
            if name in self.bank.variants:
                pool = self._pool_of(name, variant.vectors.shape[1])
                pool.absorb(variant.vectors.astype(np.float32), variant.cover_radii)
                pool.count_images(variant.prototype, variant.spread, variant.images)
                pool.prequential_scores.extend(variant.prequential_scores.tolist())
                self.flush()
                if self.bank.variants[name].calibration is None and variant.calibration is not None:
                    self.bank = self.bank.with_calibration(name, variant.calibration)
        self.bank = self.bank.with_variants(unknown, hashes)
        for name, variant in unknown.items():
            self.report.variants[name] += variant.images

    def calibrate(
        self,
        variant: str,
        patches: Array,
        labels: NDArray[np.bool_],
        pixel: tuple[float, float, float] = (np.nan, np.nan, np.nan),
    ) -> None:
        """Let validation images set the thresholds of a variant; see :func:`thresholds.calibrated`."""
        self.bank = calibrated(self.bank, variant, patches, labels, pixel)
        self._calibrated.add(variant)

    # Bringing into the bank

    def flush(self) -> None:
        """Bring what was added into :attr:`bank` and go on; :meth:`commit` reports it later."""
        for name in [*self.waiting]:
            self._add_waiting(name)
        for pool in list(self.pools.values()):
            self._close(pool)

    def commit(self) -> Report:
        """Bring what was added into :attr:`bank`, with thresholds.

        Returns:
            What changed since the last commit.
        """
        self.flush()
        for variant, images in self._recent.items():
            if variant not in self._calibrated:
                assert self.embed is not None
                few = self.few_shot_views and self.images(variant) <= FEW_IMAGES
                self.bank = calibrated_from_views(self.bank, variant, images, self.embed, few)
        report, self.report = self.report, Report()
        report.complete(self._committed, self.bank)
        self._committed = _counts(self.bank)
        self.learned, self._many, self._recent, self._calibrated, self._resumed = {}, set(), {}, set(), {}
        return report

    def _close(self, pool: PatchPool) -> None:
        """Bring what was learned of one variant into the bank."""
        start = time.perf_counter()
        bank, threshold = self.bank, 0.0
        if len(bank.variants) < len(bank) == bank.size:
            # More vectors can only raise the threshold of a full bank, which is just below the least of its radii.
            threshold = 0.99 * min(float(variant.radii[-1]) / variant.scale for variant in bank.variants.values())
        variant = pool.result(bank.size, threshold)
        if pool.name in bank.variants:
            variant = replace(variant, calibration=bank.variants[pool.name].calibration)
        self.bank = bank.with_variants({pool.name: variant}, np.array(pool.hashes, np.int64))
        del self.pools[pool.name]
        self.report.variants[pool.name] += pool.images
        self.report.seconds += pool.seconds + time.perf_counter() - start

    def _pool_of(self, variant: str, dimension: int) -> PatchPool:
        """The open pool of a variant."""
        if variant not in self.pools:
            known = self.bank.variants.get(variant)
            self.pools[variant] = PatchPool(variant, known, dimension, pool_capacity(self.bank), self.bank.dtype)
        return self.pools[variant]

    def _dimension(self) -> int | None:
        """Dimension of all that was learned, None before anything was."""
        return next((pool.points.shape[1] for pool in self.pools.values()), self.bank.dimension())

    def _check_name(self, variant: str) -> None:
        """Refuse the name of a variant that cannot be learned."""
        if not variant:
            msg = "The name of a variant must not be empty; without one, the variant of each image is found."
            raise ValueError(msg)
        self._check_room([variant])

    def _check_room(self, names: Iterable[str]) -> None:
        """Refuse variants for which not even one vector each is left."""
        waiting = {name for name, images in self.waiting.items() if any(own is not None for *_, own in images)}
        variants = {*self.bank.variants, *names, *self.pools, *waiting} - {None}
        if len(variants) > self.bank.size:
            msg = (
                f"A memory of {self.bank.size} vectors cannot hold {len(variants)} variants; use a larger memory_size."
            )
            raise ValueError(msg)


def pool_capacity(bank: MemoryBank) -> int:
    """Number of points from which a pool is thinned."""
    return max(2 * bank.size, SMALLEST_POOL)


def _new_name(taken: set[str]) -> str:
    """A name for a variant that is found."""
    return next(name for i in range(1, 2**31) if (name := f"variant_{i}") not in taken)


def _counts(bank: MemoryBank) -> dict[str, int]:
    """Number of vectors of each variant."""
    return {name: len(variant.radii) for name, variant in bank.variants.items()}

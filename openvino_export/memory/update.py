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

from .defects import DEFECT_VECTORS, good_patches, limited, scored_by, together, with_defect
from .leave_one_out import calibration_of, joined, no_images, scored, worth
from .memory_bank import check_patches, identify
from .names import checked_name
from .patch_pool import PatchPool
from .report import Report
from .thresholds import thresholds
from .variant import Calibration, Variant, describe, rounded

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from numpy.typing import NDArray

    from .memory_bank import MemoryBank

    Array = NDArray[np.float32]

# The pool that vectors are chosen from holds twice the budget, and for small budgets at least this many patches.
SMALLEST_POOL = 12_288
# Several variants may be learned in turn, image by image. Together their pools hold at most so many pools of points.
OPEN_POOLS = 4


class Update:
    """Learns images on top of a bank. Dropping it forgets them.

    Args:
        bank: What is known; it stays as it is.
        pools: Those of an update that was not committed, with which this one goes on; they are used up.

    Attributes:
        bank: What is known with the images that are no longer in a pool; with all of them after :meth:`flush` and
            :meth:`commit`.
        pools: The patches of each variant that are on their way into the bank.
        report: What was done since the last commit; complete when :meth:`commit` returns it.
    """

    def __init__(self, bank: MemoryBank, pools: Iterable[PatchPool] = ()) -> None:
        self.bank = bank
        self.pools = {pool.name: pool for pool in pools}
        self.report = Report()
        self._shown: list[
            tuple[str, str, Array]
        ] = []  # name, variant and patches of images shown since the last commit
        self._committed = _counts(bank)

    def continued(self) -> Update:
        """Another update that goes on where this one is, which stays as it is."""
        return Update(self.bank, copy.deepcopy(list(self.pools.values())))

    def knows(self, image_hash: int, variant: str | None = None) -> bool:
        """Whether the image with this hash was learned; if so, the report counts it.

        Args:
            image_hash: Identifies the image.
            variant: As which it is to be learned. The report tells if it is known as another.
        """
        known_as = next((pool.name for pool in self.pools.values() if image_hash in pool.hashes), None)
        if known_as is None:
            known_as = self.bank.variant_of_image(image_hash)
        if known_as is None:
            return False
        self.report.known_images += 1
        if known_as and variant not in {None, known_as}:
            self.report.known_as[known_as, str(variant)] += 1
        return True

    def identify(self, patches: Array) -> str | None:
        """Variant to which an image with patches of shape `(n, d)` belongs, None if it is of none that was learned."""
        parts: dict[str, Variant | PatchPool] = {**self.bank.variants, **self.pools}
        return identify(patches, {name: (part.prototype, part.spread) for name, part in parts.items()})

    # Adding

    def add(
        self,
        embedding: Array,
        variant: str | None = None,
        *,
        image_hash: int | None = None,
        map_size: tuple[int, int] = (0, 0),
    ) -> str | None:
        """Take in an image.

        Args:
            embedding: Its patch embeddings, shape `(h, w, d)`, or `(n, d)` where their places are unknown.
            variant: Name of its variant; found by :meth:`identify` if not given.
            image_hash: Identifies the image, which is then learned once only.
            map_size: Height and width of its anomaly map. Without, and without places, masks are decided as if the
                largest value of a map were the score of the image, which is a little more.

        Returns:
            The name of the variant, None if the image was known.

        Raises:
            ValueError: If the embedding has another shape or another dimension than the bank's, is not finite or too
                large, if the name is blank, or if the bank has no room for another variant. Nothing was learned then.
        """
        patches = embedding
        if embedding.ndim == 3:
            patches = embedding.reshape(embedding.shape[0] * embedding.shape[1], embedding.shape[2])
        check_patches(patches, self._dimension(), self.bank.dtype)
        variant = None if variant is None else checked_name(variant)
        if image_hash is not None and self.knows(image_hash, variant):
            return None
        start = time.perf_counter()
        if variant is None:
            variant = self.identify(patches) or _new_name({*self.bank.variants, *self.pools})
        self._check_room([variant])
        pool = self._pool_of(variant, patches.shape[1])
        places = embedding.ndim == 3 and all(map_size)
        grid = (embedding.shape[0], embedding.shape[1]) if places else (0, 0)
        patches = patches.astype(np.float32, copy=False)
        pool.absorb(patches, grid, map_size if places else (0, 0))
        pool.count_images(*describe(patches), images=1)
        if image_hash is not None:
            pool.hashes.append(image_hash)
        self._limit_defects(variant, patches)
        pool.seconds += time.perf_counter() - start
        while sum(len(other.points) for other in self.pools.values()) > OPEN_POOLS * pool.capacity:
            self._close(max(self.pools.values(), key=lambda other: len(other.points)))
        return variant

    def show_defect(
        self,
        embedding: Array,
        variant: str | None = None,
        *,
        region: Array | None = None,
        map_size: tuple[int, int] = (0, 0),
        name: str = "the image",
    ) -> str:
        """Take in a defective image: what looks like its defect is found more easily from then on.

        Args:
            embedding: Its patch embeddings, shape `(h, w, d)`.
            variant: Name of its variant; that which it is judged by if not given.
            region: Which share of each patch is defective, shape `(h, w)`; looked for if not given.
            map_size: Height and width of its anomaly map.
            name: What the report calls the image.

        Returns:
            The name of the variant.

        Raises:
            ValueError: If the embedding is not finite, or of another dimension than the bank's, or the variant was not
                learned. Nothing was learned then.
        """
        patches = embedding.reshape(-1, embedding.shape[-1])
        check_patches(patches, self._dimension(), self.bank.dtype)
        if variant in self.pools or variant is None:
            self.flush()
        if variant is None and len(self.bank):
            variant = scored_by(self.bank, patches)[0]
        if variant not in self.bank.variants:
            msg = (
                f"{name} cannot be shown as defective: no variant {variant or ''!r} is known. "
                f"Learn good images of it first; known are {', '.join(self.bank.variants) or 'none'}."
            )
            raise ValueError(msg)
        self._check_defects([variant])
        known = self.bank.variants[variant]
        shown = with_defect(known, embedding, region, map_size)
        if shown is known:
            self.report.known_images += 1
        else:
            self.bank = self.bank.with_variants({variant: shown})
            self.report.shown[variant] += 1
        self._shown.append((name, variant, patches))
        return variant

    def resize(self, size: int) -> None:
        """Give the bank another size; see :meth:`MemoryBank.with_size`, also for errors.

        Args:
            size: Largest number of vectors.
        """
        variants = len({*self.bank.variants, *self.pools})
        if size < variants:
            msg = f"memory_size must be at least {variants}, one vector for each variant, got {size}."
            raise ValueError(msg)
        self.bank = self.bank.with_size(size)
        for pool in self.pools.values():
            pool.capacity = pool_capacity(self.bank)

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
        self._check_defects(name for name, variant in other.variants.items() if variant.defects is not None)
        self.flush()
        unknown: dict[str, Variant] = {}
        for name, variant in other.variants.items():
            if name not in self.bank.variants:
                vectors, moved = rounded(variant.vectors, self.bank.dtype)
                unknown[name] = replace(variant, vectors=vectors, cover_radii=variant.cover_radii + moved)
        hashes = {
            name: values[~np.isin(values, self.bank.image_hashes)] for name, values in other.hashes_by_variant().items()
        }
        for name, variant in other.variants.items():
            if name in self.bank.variants:
                pool = self._pool_of(name, variant.vectors.shape[1])
                numbers = _numbers(self.bank.variants[name], variant)
                origins = numbers(variant.origins)
                pool.absorb_points(variant.vectors.astype(np.float32), variant.cover_radii, origins, variant.stand_ins)
                pool.count_images(variant.prototype, variant.spread, variant.images)
                more = None
                if variant.calibration is not None:
                    more = replace(variant.calibration, origins=numbers(variant.calibration.origins))
                self._close(pool, more)
                merged = self.bank.variants[name]
                defects = limited(together(merged.defects, variant.defects), good_patches(merged))
                self.bank = self.bank.with_variants({name: replace(merged, defects=defects)})
        self.bank = self.bank.with_variants(unknown, hashes)
        for name, variant in unknown.items():
            self.report.variants[name] += variant.images

    def validate(self, variant: str, images: Calibration) -> None:
        """Let images that are not learned set the thresholds of a variant, too, in place of those that did before.

        Args:
            variant: Name of a variant in :attr:`bank`.
            images: What was kept of them; `scores` are taken anew.
        """
        self.bank = validated(self.bank, variant, images)

    # Bringing into the bank

    def flush(self) -> None:
        """Bring what was added into :attr:`bank` and go on; :meth:`commit` reports it later."""
        for pool in list(self.pools.values()):
            self._close(pool)

    def commit(self) -> Report:
        """Bring what was added into :attr:`bank`.

        Returns:
            What changed since the last commit.
        """
        self.flush()
        for name, variant, patches in self._shown:
            judged_as, score = scored_by(self.bank, patches)
            if not score > thresholds(self.bank, judged_as).image.value:
                other = "" if judged_as == variant else f" (judged as {judged_as}, not {variant})"
                self.report.still_good.append(f"{name}{other}")
        self._shown = []
        report, self.report = self.report, Report()
        report.complete(self._committed, self.bank)
        self._committed = _counts(self.bank)
        return report

    def _close(self, pool: PatchPool, more: Calibration | None = None) -> None:
        """Bring what was learned of one variant into the bank, and what is kept of images that it was merged with."""
        start = time.perf_counter()
        bank, known = self.bank, self.bank.variants.get(pool.name)
        variant = pool.result(bank.size)
        calibrations = [known.calibration if known else None, more]
        parts = [calibration for calibration in calibrations if calibration is not None]
        calibration = calibration_of(variant, joined(parts) if parts else None, pool.samples)
        variant = replace(
            variant,
            calibration=calibration,
            defects=known.defects if known else None,
            false_alarm_rate=known.false_alarm_rate if known else None,
            by_hand=known.by_hand if known else None,
            former=known.former if known else None,
        )
        if known is not None:
            variant = replace(variant, wanted=known.wanted, floor=known.floor)
        variant = replace(variant, **worth(variant)._asdict())
        self.bank = bank.with_variants({pool.name: variant}, {pool.name: np.array(pool.hashes, np.int64)})
        del self.pools[pool.name]
        self.report.variants[pool.name] += pool.images
        self.report.seconds += pool.seconds + time.perf_counter() - start

    def _limit_defects(self, variant: str, patches: Array) -> None:
        """What good images look like is not like a defect, whatever was shown before."""
        known = self.bank.variants.get(variant)
        if known is not None and known.defects is not None:
            self.bank = self.bank.with_changes(variant, defects=limited(known.defects, patches))

    def _pool_of(self, variant: str, dimension: int) -> PatchPool:
        """The open pool of a variant."""
        if variant not in self.pools:
            known = self.bank.variants.get(variant)
            self.pools[variant] = PatchPool(variant, known, dimension, pool_capacity(self.bank), self.bank.dtype)
        return self.pools[variant]

    def _check_defects(self, names: Iterable[str]) -> None:
        """Refuse variants of which defects cannot be kept any more."""
        holders = {*names, *(name for name, variant in self.bank.variants.items() if variant.defects is not None)}
        if len(holders) > DEFECT_VECTORS:
            msg = f"Defects of at most {DEFECT_VECTORS} variants can be kept, these would be {len(holders)}."
            raise ValueError(msg)

    def _dimension(self) -> int | None:
        """Dimension of all that was learned, None before anything was."""
        return next((pool.points.shape[1] for pool in self.pools.values()), self.bank.dimension())

    def _check_room(self, names: Iterable[str]) -> None:
        """Refuse variants for which not even one vector each is left."""
        variants = {*self.bank.variants, *names, *self.pools}
        if len(variants) > self.bank.size:
            msg = (
                f"A memory of {self.bank.size} vectors cannot hold {len(variants)} variants; use a larger memory_size."
            )
            raise ValueError(msg)


def validated(bank: MemoryBank, variant: str, images: Calibration) -> MemoryBank:
    """A bank in which images that are not learned set the thresholds of a variant; see :meth:`Update.validate`."""
    known = bank.variants[variant]
    kept = known.calibration or no_images(known.vectors.shape[1])
    lasting = kept.origins != -1
    kept = Calibration(**{key: value[lasting] for key, value in vars(kept).items()})
    good = images.patches[~images.labels]
    defects = limited(known.defects, good.reshape(-1, good.shape[-1]))
    calibration = scored(known, joined([kept, images]))
    return bank.with_changes(variant, calibration=calibration, defects=defects, former=None)


def merged(bank: MemoryBank, variant: str, into: str) -> MemoryBank:
    """A bank in which a variant has become a part of another, whose rate and threshold are kept."""
    update = Update(bank.of_variants([name for name in bank.variants if name != variant]))
    update.merge(bank.of_variants([variant]).renamed(variant, into))
    return update.bank


def _numbers(known: Variant, other: Variant) -> Callable[[NDArray[np.int32]], NDArray[np.int32]]:
    """How the images of another bank's variant are numbered in this one: those that both have learned as here."""
    owners = {vector.tobytes(): origin for vector, origin in zip(known.vectors, known.origins.tolist(), strict=True)}
    highest = int(other.origins.max(initial=0))
    if other.calibration is not None:
        highest = max(highest, int(other.calibration.origins.max(initial=-1)))
    numbers = np.arange(highest + 1) + known.images
    vectors = other.vectors.astype(known.vectors.dtype)
    for origin in np.unique(other.origins[other.origins >= 0]).tolist():
        found = [owners.get(vector.tobytes(), -1) for vector in vectors[other.origins == origin]]
        same, times = np.unique(found, return_counts=True)
        if same[times.argmax()] >= 0 and 2 * times.max() > len(found):
            numbers[origin] = same[times.argmax()]
    return lambda origins: np.where(origins < 0, origins, numbers[np.maximum(origins, 0)]).astype(np.int32)


def pool_capacity(bank: MemoryBank) -> int:
    """Number of points from which a pool is thinned."""
    return max(2 * bank.size, SMALLEST_POOL)


def _new_name(taken: set[str]) -> str:
    """A name for a variant that is found."""
    return next(name for i in range(1, 2**31) if (name := f"variant_{i}") not in taken)


def _counts(bank: MemoryBank) -> dict[str, int]:
    """Number of vectors of each variant."""
    return {name: len(variant.radii) for name, variant in bank.variants.items()}

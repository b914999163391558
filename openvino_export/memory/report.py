# SPDX-License-Identifier: Apache-2.0
"""What an update tells of itself."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .thresholds import SURE_IMAGES, thresholds

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from .memory_bank import MemoryBank

# A variant that wants so many times the vectors that it has is named.
STARVED = 2


@dataclass
class Report:
    """What one update did.

    Attributes:
        variants: Images learned by variant.
        known_images: Images left out because they had been learned before.
        known_as: Those of them that had been learned as another variant than they were now to be, by both names: as
            which they are known, and as which they were given.
        shown: Defective images shown by variant.
        still_good: Images that were shown as defective, and are still called good: their defect looks as good parts do.
        held_back: Images left out because they look anomalous, and the factor by which each exceeds the threshold.
        added: Vectors that a variant has more than before.
        removed: Vectors that a variant has less than before.
        radius_bound: Every patch ever learned lies within this distance of some vector.
        num_vectors: Vectors in the bank.
        nbytes: Bytes of the bank and its calibration.
        seconds: Time spent on selection.
        advice: What the bank would need to judge well, a sentence each.
    """

    variants: Counter[str] = field(default_factory=Counter)
    known_images: int = 0
    known_as: Counter[tuple[str, str]] = field(default_factory=Counter)
    shown: Counter[str] = field(default_factory=Counter)
    still_good: list[str] = field(default_factory=list)
    held_back: dict[str, float] = field(default_factory=dict)
    added: Counter[str] = field(default_factory=Counter)
    removed: Counter[str] = field(default_factory=Counter)
    radius_bound: float = 0.0
    num_vectors: int = 0
    nbytes: int = 0
    seconds: float = 0.0
    advice: list[str] = field(default_factory=list)

    def complete(self, before: Mapping[str, int], bank: MemoryBank) -> None:
        """Say what the update led to.

        Args:
            before: Number of vectors of each variant before it.
            bank: What is known after it.
        """
        for name, variant in bank.variants.items():
            more = len(variant.radii) - before.get(name, 0)
            if more:
                (self.added if more > 0 else self.removed)[name] = abs(more)
        self.radius_bound, self.num_vectors, self.nbytes = bank.radius_bound(), len(bank), bank.nbytes()
        self.advice = [
            f"{count} images are known as {known!r}, so they were not learned as {given!r}. If that name is wrong, "
            "rename the variant, or merge it with the right one (anomalib-edge variants, or rename_variant)."
            for (known, given), count in self.known_as.items()
        ]
        self.advice += advice(bank, self.variants)
        self.advice += [
            f"{name} was shown as defective and is still called good: what is seen of its defect looks as good parts "
            "do. It may help to show where it is, with a mask or a box; or take larger images."
            for name in self.still_good
        ]

    def __str__(self) -> str:
        """One line for a log."""
        learned = ", ".join(f"{name}: {images} images" for name, images in self.variants.items()) or "nothing new"
        added, removed = (
            ", ".join(f"{count} of {name}" for name, count in counts.items()) or "none"
            for counts in (self.added, self.removed)
        )
        known = "".join(f", {count} of them as {name}" for (name, _), count in self.known_as.items())
        held_back = f", {len(self.held_back)} held back" if self.held_back else ""
        shown = "".join(f"; {count} defective images of {name} shown" for name, count in self.shown.items())
        return (
            f"learned {learned} ({self.known_images} known already{known}{held_back}){shown}; vectors added {added}, "
            f"removed {removed}, now {self.num_vectors}; radius bound {self.radius_bound:.2f}; "
            f"{self.nbytes / 2**20:.1f} MiB; selection {self.seconds:.1f} s"
        )


def advice(bank: MemoryBank, learned: Collection[str]) -> list[str]:
    """What a bank would need to judge well, a sentence each.

    Args:
        bank: What is known.
        learned: Names of variants that were just learned. Of these it is said how sure their thresholds are.
    """
    sentences = []
    for name in learned:
        # The first image is scored once there is another.
        decided = thresholds(bank, name)
        images = max(decided.images, min(1, bank.variants[name].images))
        if not decided.is_sure():
            sentences.append(
                f"The threshold of {name} rests on {images} good images and is a guess; "
                f"{SURE_IMAGES - images} more make it sure."
            )
    short = {name: each for name, each in bank.variants.items() if STARVED * len(each.radii) < each.wanted}
    if short:
        lacking = ", ".join(f"{name} has {len(each.radii)} of {each.wanted}" for name, each in short.items())
        enough = sum(max(len(each.radii), each.wanted) for each in bank.variants.values())
        sentences.append(
            f"The memory is too small for what it holds: {lacking} vectors that it needs. "
            f"A memory_size of {enough} would do for what is learned from now on."
        )
    return sentences

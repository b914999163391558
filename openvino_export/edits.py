# SPDX-License-Identifier: Apache-2.0
"""What a user changes of a memory bank besides learning, alike on a training PC and on an edge PC."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .memory.names import checked_name
from .memory.update import merged

if TYPE_CHECKING:
    from collections.abc import Callable

    from .memory.memory_bank import MemoryBank


class BankEdits:
    """Methods of a model with a memory bank. On an edge PC, ``save`` makes what they change last."""

    def edit_bank(self, change: Callable[[MemoryBank], MemoryBank]) -> None:
        """Judge from now on by what a function makes of the bank; if it fails, nothing is changed."""
        raise NotImplementedError

    def set_decision(
        self,
        variant: str | None = None,
        *,
        false_alarm_rate: float | None = None,
        threshold: float | None = None,
    ) -> None:
        """Decide by another false-alarm rate, or by a threshold that is set by hand.

        Args:
            variant: Name of the variant that this is for; all by default.
            false_alarm_rate: Share of good images that may be called anomalous. Thresholds by hand end.
            threshold: Raw image score above which an image is anomalous, as `info` shows it. Without rate and
                threshold, thresholds follow from good images again, at the rate of the bank.

        Raises:
            ValueError: If there is no such variant, a value is out of range, or there is no memory bank.
        """
        values = {"false_alarm_rate": false_alarm_rate, "threshold": threshold}
        self.edit_bank(lambda bank: bank.with_decision(variant, **values))

    def set_memory_size(self, size: int) -> None:
        """Give the bank room for more vectors, or less.

        Args:
            size: Largest number of vectors. More are filled by what is learned from now on.

        Raises:
            ValueError: If there are more variants or neighbors, or there is no memory bank.
        """
        self.edit_bank(lambda bank: bank.with_size(size))

    def rename_variant(self, variant: str, new: str, *, force: bool = False) -> None:
        """Give a variant another name.

        Args:
            variant: Its name.
            new: Its new name.
            force: Whether the new name may differ from that of another variant by case or blanks alone.

        Raises:
            ValueError: If there is no such variant, the new name is blank or another variant's, or there is no memory
                bank.
        """

        def change(bank: MemoryBank) -> MemoryBank:
            others = [name for name in bank.variants if name != variant]
            name = checked_name(new, others, force=force)
            bank.check_known(variant)
            if name in others:
                msg = f"There is a variant {name!r} already. If both are the same product, merge {variant!r} into it."
                raise ValueError(msg)
            return bank.renamed(variant, name)

        self.edit_bank(change)

    def merge_variants(self, variant: str, into: str) -> None:
        """Let a variant become a part of another, as if all its images had been learned as that one.

        Args:
            variant: Name of the variant that ends.
            into: Name of the one that knows the images of both, and keeps its rate, or its threshold set by hand.

        Raises:
            ValueError: If there is no such variant, or both are the same, or there is no memory bank.
        """

        def change(bank: MemoryBank) -> MemoryBank:
            bank.check_known(variant)
            bank.check_known(into)
            if variant == into:
                msg = f"{variant!r} cannot be merged into itself; give the names of two variants."
                raise ValueError(msg)
            return merged(bank, variant, into)

        self.edit_bank(change)

    def delete_variant(self, variant: str) -> None:
        """Forget a variant. Its images can be learned again; other variants do not get back what was cut of them.

        Args:
            variant: Its name.

        Raises:
            ValueError: If there is no such variant, or no other one, or there is no memory bank.
        """

        def change(bank: MemoryBank) -> MemoryBank:
            bank.check_known(variant)
            others = [name for name in bank.variants if name != variant]
            if not others:
                msg = f"{variant!r} is the only variant, so nothing could be judged without it. Learn another first."
                raise ValueError(msg)
            return bank.of_variants(others)

        self.edit_bank(change)

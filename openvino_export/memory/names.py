# SPDX-License-Identifier: Apache-2.0
"""Names of variants."""

from __future__ import annotations

import unicodedata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


def checked_name(name: str, known: Iterable[str] = (), *, force: bool = False) -> str:
    """The name of a variant, without blanks around it.

    Args:
        name: As it was given.
        known: Names of the variants that are known.
        force: Whether the name may differ from one of them by case or blanks alone.

    Raises:
        ValueError: If it is blank, holds what cannot be printed, or is so alike a known one that it may be a mistake.
    """
    stripped = name.strip()
    if not stripped:
        msg = "The name of a variant must not be blank; without one, the variant of each image is found."
        raise ValueError(msg)
    if not stripped.isprintable():
        msg = f"The name of a variant must be printable, without line breaks, got {stripped!r}."
        raise ValueError(msg)
    known = list(known)
    alike = [other for other in known if _key(other) == _key(stripped)]
    if alike and stripped not in known and not force:
        msg = (
            f"{stripped!r} differs from the variant {alike[0]!r} by case or blanks alone, so nothing was changed. Give "
            "that name if both are the same product, else one that differs by more, or force it (--force true)."
        )
        raise ValueError(msg)
    return stripped


def _key(name: str) -> str:
    """What alike names have in common."""
    return "".join(unicodedata.normalize("NFKC", name).casefold().split())

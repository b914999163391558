# SPDX-License-Identifier: Apache-2.0
"""What values may be that were read from JSON, which someone may have changed."""

from __future__ import annotations

import reprlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    # How each entry is told, and in which words.
    Kinds = Mapping[str, tuple[Callable[[Any], bool], str]]


def is_text(value: object) -> bool:
    """Whether it is a string."""
    return isinstance(value, str)


def is_flag(value: object) -> bool:
    """Whether it is true or false."""
    return isinstance(value, bool)


def is_count(value: object) -> bool:
    """Whether it is a whole number that an array's length could be, 0 included."""
    return isinstance(value, int) and not is_flag(value) and 0 <= value < 2**31


def is_number(value: object) -> bool:
    """Whether it is a number that float32 can hold, a whole one also int64; NaN is none."""
    largest = 3.4e38 if isinstance(value, float) else 2**53
    return isinstance(value, (int, float)) and not is_flag(value) and abs(value) < largest


def is_list(value: object, of: Callable[[Any], bool], length: int | None = None) -> bool:
    """Whether it is a list, of a length if that is given, of what `of` says."""
    return isinstance(value, list) and length in {None, len(value)} and all(map(of, value))


def wrong_kinds(entries: Mapping[str, Any], kinds: Kinds) -> Iterator[str]:
    """What is wrong with those entries of a JSON object that are there."""
    for key, (is_right, words) in kinds.items():
        if key in entries and not is_right(entries[key]):
            yield f"{key} is {reprlib.repr(entries[key])}, not {words}"

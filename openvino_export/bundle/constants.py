# SPDX-License-Identifier: Apache-2.0
"""What learning changes in a model, as arrays of static shape: alike in torch and in an OpenVINO file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from openvino_export.memory.defects import DEFECT_VECTORS
from openvino_export.memory.thresholds import thresholds

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from openvino_export.memory.memory_bank import MemoryBank

# Names of the constants of model.xml that learning changes.
SEARCH_CONSTANTS = ("bank.vectors", "bank.squares")
VOTE_CONSTANTS = ("bank.owners", "bank.positions")
DEFECT_CONSTANTS = ("bank.defects", "bank.defect_squares", "bank.defect_scales", "bank.defect_owners")
VALUE_CONSTANTS = ("bank.image_values", "bank.pixel_values")
CONSTANTS = SEARCH_CONSTANTS + VOTE_CONSTANTS + DEFECT_CONSTANTS + VALUE_CONSTANTS
# Room for the thresholds of so many variants, doubled until all fit.
SMALLEST_CAPACITY = 64


def constants_in(metadata: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the constants of a bundle's model.xml, by its metadata."""
    by_variant = metadata.get("variant_thresholds", True) and (
        metadata.get("normalization") or metadata.get("thresholding")
    )
    votes = VOTE_CONSTANTS if takes_defects(metadata) or by_variant else ()
    defects = DEFECT_CONSTANTS if takes_defects(metadata) else ()
    return SEARCH_CONSTANTS + votes + defects + (VALUE_CONSTANTS if by_variant else ())


def takes_defects(metadata: Mapping[str, Any]) -> bool:
    """Whether defects can be shown to a bundle."""
    return bool(metadata.get("shown_defects"))


def variant_capacity(variants: int) -> int:
    """Number of variants for which the tables have room."""
    capacity = SMALLEST_CAPACITY
    while capacity < variants:
        capacity *= 2
    return capacity


def bank_tables(bank: MemoryBank, dimension: int, capacity: int) -> dict[str, NDArray[Any]]:
    """The bank as it is searched; unused rows are zero, with an infinite square.

    Args:
        bank: What is known.
        dimension: Length `d` of a vector.
        capacity: Number of variants that there is room for.

    Returns:
        `vectors`, shape `(size, d)`, in the bank's precision; `squares`, their squared lengths in float32, shape
        `(size,)`; `owners`, the position of each vector's variant in int64, shape `(size,)`, for equal vectors that of
        the first; `positions`, those of all variants, shape `(capacity,)`.
    """
    vectors = np.zeros((bank.size, dimension), bank.dtype)
    squares = np.full(bank.size, np.inf, np.float32)
    owners = np.zeros(bank.size, np.int64)
    if count := len(bank):
        learned = bank.vectors()
        vectors[:count] = learned
        squares[:count] = np.einsum("ij,ij->i", learned, learned)
        # A graph finds any of equal vectors. So it votes as the search of the bank does, which finds the first.
        first: dict[bytes, int] = {}
        pairs = zip(learned, bank.owners().tolist(), strict=True)
        owners[:count] = [first.setdefault(vector.tobytes(), owner) for vector, owner in pairs]
    return {"vectors": vectors, "squares": squares, "owners": owners, "positions": np.arange(capacity)}


def defect_tables(bank: MemoryBank, dimension: int) -> dict[str, NDArray[Any]]:
    """The defects that were shown; unused rows are zero, with an infinite square.

    Args:
        bank: What is known.
        dimension: Length `d` of a vector.

    Returns:
        `defects`, shape `(DEFECT_VECTORS, d)`; `defect_squares`, their squared lengths; `defect_scales`, 1 by the
        squares of their reaches; and `defect_owners`, the position of each one's variant in int64; these of shape
        `(DEFECT_VECTORS,)`.
    """
    vectors = np.zeros((DEFECT_VECTORS, dimension), np.float32)
    squares, scales = np.full(DEFECT_VECTORS, np.inf, np.float32), np.ones(DEFECT_VECTORS, np.float32)
    owners = np.zeros(DEFECT_VECTORS, np.int64)
    first = 0
    for position, variant in enumerate(bank.variants.values()):
        if variant.defects is not None:
            part = slice(first, first := first + len(variant.defects.reaches))
            vectors[part], owners[part] = variant.defects.vectors, position
            scales[part] = variant.defects.reaches**-2.0
            squares[part] = np.einsum("ij,ij->i", vectors[part], vectors[part])
    return {"defects": vectors, "defect_squares": squares, "defect_scales": scales, "defect_owners": owners}


def threshold_tables(bank: MemoryBank, capacity: int, by_range: bool = False) -> dict[str, NDArray[np.float32]]:
    """Thresholds of all variants; what is unknown is NaN, and so are unused rows.

    Args:
        bank: What is known.
        capacity: Number of rows.
        by_range: Whether they are for a bundle of a version that normalised by a minimum and a maximum.

    Returns:
        `image_values` and `pixel_values`: threshold and steepness of each variant, shape `(capacity, 2)`; for such a
        bundle threshold, minimum and maximum, shape `(capacity, 3)`.

    Raises:
        ValueError: If there are more variants than rows.
    """
    if len(bank.variants) > capacity:
        msg = f"There is room for the thresholds of {capacity} variants, but {len(bank.variants)} were learned."
        raise ValueError(msg)
    tables = {kind: np.full((capacity, 3 if by_range else 2), np.nan, np.float32) for kind in ("image", "pixel")}
    for position, variant in enumerate(bank.variants):
        decided = thresholds(bank, variant)
        for kind, threshold in (("image", decided.image), ("pixel", decided.pixel)):
            value = threshold.value
            if not by_range:
                tables[kind][position] = (value, threshold.steepness)
            elif np.isfinite(value):
                tables[kind][position] = (value, 0, 2 * value)
    return {f"{kind}_values": table for kind, table in tables.items()}


def graph_tables(bank: MemoryBank, dimension: int, capacity: int, by_range: bool = False) -> dict[str, NDArray[Any]]:
    """All tables, by the names of the constants that hold them in an OpenVINO file; see the functions above."""
    tables = {
        **bank_tables(bank, dimension, capacity),
        **defect_tables(bank, dimension),
        **threshold_tables(bank, capacity, by_range),
    }
    return {f"bank.{name}": table for name, table in tables.items()}

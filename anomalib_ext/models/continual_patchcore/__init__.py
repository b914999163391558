# SPDX-License-Identifier: Apache-2.0
"""PatchCore that learns product after product. The memory bank alone can be imported without torch."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .lightning_model import ContinualPatchCore

__all__ = ["ContinualPatchCore"]


def __getattr__(name: str) -> object:
    """Import the model, with torch and anomalib, when it is asked for."""
    if name == "ContinualPatchCore":
        from .lightning_model import ContinualPatchCore

        return ContinualPatchCore
    msg = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(msg)

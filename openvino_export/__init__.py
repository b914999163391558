# SPDX-License-Identifier: Apache-2.0
"""What runs on an edge PC; imports neither torch nor anomalib."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .detector import EdgeDetector

__all__ = ["EdgeDetector"]


def __getattr__(name: str) -> object:
    """Import the detector when it is asked for."""
    if name == "EdgeDetector":
        from .detector import EdgeDetector

        return EdgeDetector
    msg = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(msg)

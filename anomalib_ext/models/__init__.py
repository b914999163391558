# SPDX-License-Identifier: Apache-2.0
"""The models, each imported on first use."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .continual_patchcore import ContinualPatchCore
    from .crr import Crr
    from .het_net import HetNet
    from .rd_akf import RdAkf
    from .sa_cfa_patchcore import SaCfaPatchCore

_FOLDERS = {
    "ContinualPatchCore": "continual_patchcore",
    "Crr": "crr",
    "HetNet": "het_net",
    "RdAkf": "rd_akf",
    "SaCfaPatchCore": "sa_cfa_patchcore",
}

__all__ = ["ContinualPatchCore", "Crr", "HetNet", "RdAkf", "SaCfaPatchCore"]


def __getattr__(name: str) -> object:
    """Import the model class ``name`` from its folder."""
    if name not in _FOLDERS:
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    return getattr(import_module(f".{_FOLDERS[name]}", __name__), name)

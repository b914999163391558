# SPDX-License-Identifier: Apache-2.0
"""PatchCore that learns product after product."""

from .lightning_model import ContinualPatchCore

__all__ = ["ContinualPatchCore"]

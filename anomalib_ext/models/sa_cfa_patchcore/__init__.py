# SPDX-License-Identifier: Apache-2.0
"""PatchCore with self-attention and channel aggregation."""

from .lightning_model import SaCfaPatchCore

__all__ = ["SaCfaPatchCore"]

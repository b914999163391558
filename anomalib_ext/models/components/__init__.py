# SPDX-License-Identifier: Apache-2.0
"""Parts that several models share."""

from .backbone import backbone_normalization, load_backbone

__all__ = ["backbone_normalization", "load_backbone"]

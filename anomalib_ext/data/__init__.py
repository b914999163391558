# SPDX-License-Identifier: Apache-2.0
"""Data that need no download."""

from .photo_variants import PhotoVariants

__all__ = ["PhotoVariants"]

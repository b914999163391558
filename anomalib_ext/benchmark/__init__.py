# SPDX-License-Identifier: Apache-2.0
"""Continual benchmark: learners side by side on streams of products, see :func:`benchmark`."""

from .pipeline import benchmark

__all__ = ["benchmark"]

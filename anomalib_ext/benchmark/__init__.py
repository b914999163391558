# SPDX-License-Identifier: Apache-2.0
"""Learners side by side on streams of products, and measured accuracy beside published figures."""

from .pipeline import benchmark
from .published import compare

__all__ = ["benchmark", "compare"]

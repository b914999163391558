# SPDX-License-Identifier: Apache-2.0
"""Data that need no download, data of many categories, and synthetic anomalies."""

from .anomaly_synthesis import AnomalySynthesis
from .multi_category import MultiCategory
from .photo_variants import PhotoVariants

__all__ = ["AnomalySynthesis", "MultiCategory", "PhotoVariants"]

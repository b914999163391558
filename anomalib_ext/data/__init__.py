# SPDX-License-Identifier: Apache-2.0
"""Data that need no download, and synthetic anomalies."""

from .anomaly_synthesis import AnomalySynthesis
from .photo_variants import PhotoVariants

__all__ = ["AnomalySynthesis", "PhotoVariants"]

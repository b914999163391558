# SPDX-License-Identifier: Apache-2.0
"""CRR: one model for many classes, which repairs synthetic anomalies and segments them."""

from .lightning_model import Crr

__all__ = ["Crr"]

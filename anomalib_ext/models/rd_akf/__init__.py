# SPDX-License-Identifier: Apache-2.0
"""Reverse distillation with asymptotic knowledge fusion."""

from .lightning_model import RdAkf

__all__ = ["RdAkf"]

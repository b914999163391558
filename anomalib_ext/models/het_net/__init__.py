# SPDX-License-Identifier: Apache-2.0
"""Reverse distillation from a CNN with the context of a transformer."""

from .lightning_model import HetNet

__all__ = ["HetNet"]

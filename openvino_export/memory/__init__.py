# SPDX-License-Identifier: Apache-2.0
"""The memory bank: what a line has learned, with NumPy and faiss alone."""

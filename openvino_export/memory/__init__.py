# SPDX-License-Identifier: Apache-2.0
"""The memory bank: what a line has learned, with NumPy and faiss alone."""

import logging

# It tells of each instruction set for which it has no library.
logging.getLogger("faiss.loader").setLevel(logging.WARNING)

# SPDX-License-Identifier: Apache-2.0
"""Models that a stock Anomalib lacks, registered under its own names.

Importing this package registers every model of the entry-point group ``anomalib.models`` and imports
neither torch nor anomalib; with the package installed, ``import torch`` does the same by itself.
"""

from .plugin import install

__version__ = "0.1.0"

install()

# SPDX-License-Identifier: Apache-2.0
"""What runs on an edge PC; imports neither torch nor anomalib."""

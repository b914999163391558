# SPDX-License-Identifier: Apache-2.0
"""The folder that an export writes and an edge PC runs: its files, and the constants that learning changes."""

# SPDX-License-Identifier: Apache-2.0
"""Parts that several models share, imported one by one: `k_center` runs where torch is not installed."""

# SPDX-License-Identifier: Apache-2.0
"""Inspection as a service: a station at the line that judges parts, keeps the last ones, and is taught by people."""

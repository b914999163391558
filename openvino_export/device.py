# SPDX-License-Identifier: Apache-2.0
"""OpenVINO's core, one for the process."""

from __future__ import annotations

import threading
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import openvino as ov


def core() -> ov.Core:
    """OpenVINO's core, one for the process.

    Where drivers of a GPU or NPU are missing or old, a second core that looks for devices may crash the process.
    """
    with _FIRST:  # the cache alone would let several threads in
        return _core()


_FIRST = threading.Lock()


@cache
def _core() -> ov.Core:
    import openvino as ov

    # Threads whose first inferences meet in this conversion wait for each other for ever; once done, it is safe.
    ov.Type.f32.to_dtype()
    return ov.Core()

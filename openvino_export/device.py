# SPDX-License-Identifier: Apache-2.0
"""OpenVINO's core, one for the process, and the devices that it finds."""

from __future__ import annotations

import sys
import threading
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Generator

    import openvino as ov

# What OpenVINO raises for files and devices that it cannot use; the second if a text in the file is none.
FAILURES = (RuntimeError, UnicodeDecodeError)


def core() -> ov.Core:
    """OpenVINO's core, one for the process.

    Where drivers of a GPU or NPU are missing or old, a second core that looks for devices may crash the process.
    """
    with _FIRST:  # the cache alone would let several threads in
        return _core()


_FIRST = threading.Lock()


@contextmanager
def telemetry_hidden() -> Generator[None]:
    """Have OpenVINO or NNCF, if imported within, do so without what looks up a host of analytics and writes to home."""
    known = sys.modules.get("openvino_telemetry")
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # as if it were not installed
    try:
        yield
    finally:
        if known is None:
            del sys.modules["openvino_telemetry"]
        else:
            sys.modules["openvino_telemetry"] = known


def import_openvino() -> None:
    """Import OpenVINO without its telemetry."""
    if "openvino" in sys.modules or "openvino_telemetry" in sys.modules:  # it is too late, or its user wants it
        return
    with telemetry_hidden():
        import openvino  # noqa: F401


@cache
def _core() -> ov.Core:
    import_openvino()
    import openvino as ov

    # Threads whose first inferences meet in this conversion wait for each other for ever; once done, it is safe.
    ov.Type.f32.to_dtype()
    return ov.Core()


def check_device(device: str) -> None:
    """Refuse a device that this PC does not have.

    Raises:
        ValueError: If it is one.
    """
    plain = device.partition(":")[0].partition(".")[0]
    # The CPU is always there; looking for others loads their drivers.
    if plain in {"CPU", "AUTO", "BATCH", "HETERO", "MULTI"}:
        return
    found = core().available_devices
    if not any(device == known or plain == known.partition(".")[0] for known in found):
        msg = f"OpenVINO finds no device {device} on this PC. It finds {', '.join(found)}."
        raise ValueError(msg)

# SPDX-License-Identifier: Apache-2.0
"""The command in this process, and a clock that it does not wait for."""

import json
from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest

from openvino_export.cli import main


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, list[dict[str, Any]], str]]:
    """Return a function that runs the command and returns its exit code, its lines, and what it says beside."""

    def call(*args: object) -> tuple[int, list[dict[str, Any]], str]:
        code = main([str(arg) for arg in args])
        captured = capsys.readouterr()
        return code, [json.loads(line) for line in captured.out.splitlines() if line.startswith("{")], captured.err

    return call


class Clock:
    """Time that passes only while `watch` sleeps; after each of its looks at the folder, the next event happens."""

    def __init__(self, *events: Callable[[], object] | None) -> None:
        self.now = 0.0
        self.events = list(events)

    def monotonic(self) -> float:
        """Return seconds."""
        return self.now

    def sleep(self, seconds: float) -> None:
        """Let time pass."""
        self.now += seconds
        event = self.events.pop(0) if self.events else None
        if event is not None:
            event()


@pytest.fixture
def set_clock(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Clock]:
    """Return a function that gives `watch` a clock with these events."""

    def set_it(*events: Callable[[], object] | None) -> Clock:
        clock = Clock(*events)
        monkeypatch.setattr(import_module("openvino_export.cli.watch"), "time", clock)
        return clock

    return set_it

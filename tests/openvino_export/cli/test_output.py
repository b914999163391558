# SPDX-License-Identifier: Apache-2.0
"""What all commands print."""

import io
import sys

import pytest

from openvino_export.cli.output import print_line, progress


class Terminal(io.StringIO):
    """What says that it is a terminal."""

    def isatty(self) -> bool:  # noqa: PLR6301
        """Say so."""
        return True


@pytest.mark.parametrize(
    ("total", "shown"), [(4, f"[{'#' * 15:30}] judged 2 of 4 ("), (None, "\rjudged 2 ("), (1, None)]
)
def test_progress_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], total: int | None, shown: str | None
) -> None:
    """A bar if the number of images is known, a count if not, nothing for one image; lines take its place."""
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with progress("judged", total) as show:
        show(2)
        assert shown in terminal.getvalue() if shown else not terminal.getvalue()
        print_line({"source": "a.png"})
    assert terminal.getvalue().count("\x1b[K") == 1
    assert capsys.readouterr().out == '{"source": "a.png"}\n'


def test_no_progress_in_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing but the lines is written there."""
    with progress("judged", 4) as show:
        show(2)
        print_line({"source": "a.png"})
    assert capsys.readouterr() == ('{"source": "a.png"}\n', "")

# SPDX-License-Identifier: Apache-2.0
"""What all commands give: an exit code, JSON lines, and a progress bar on a terminal."""

from __future__ import annotations

import json
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    import numpy as np
    from numpy.typing import NDArray

    from openvino_export.detector import Prediction

# Exit codes; 2 is that of wrong arguments. `learn` gives ANOMALOUS for images held back, `parity` for a difference. Of
# several images the highest counts: one that could not be judged above an anomalous one.
GOOD, ERROR, ANOMALOUS, UNDECIDED = 0, 1, 3, 4


def print_line(content: dict[str, Any]) -> None:
    """Print one line of JSON, in place of the progress bar."""
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)
    print(json.dumps(content), flush=True)


def say(text: str) -> None:
    """Say something beside the lines."""
    with suppress(OSError):  # the disk is full, and this goes to a file
        print(text, file=sys.stderr, flush=True)


def exit_code(result: Prediction) -> int:
    """What an image means for the exit code."""
    return UNDECIDED if result.pred_label is None else ANOMALOUS if result.pred_label else GOOD


def prediction_line(result: Prediction, name: str, output: str | None) -> dict[str, Any]:
    """Content of the line about an image.

    Args:
        result: What was said about the image.
        name: Path of the image relative to its source, or the name of a frame.
        output: Folder for heat maps, which :func:`write_heat_map` writes.
    """
    line = {
        "source": result.source or name,
        "pred_label": result.pred_label,
        "pred_score": round(result.pred_score, 6),
        "variant": result.variant,
    }
    if result.is_sure is not None:
        line["is_sure"] = result.is_sure
    if output is not None:
        from openvino_export.cli.overlay import heat_map_name

        line["overlay"] = str(Path(output) / heat_map_name(name))
    return line


def write_heat_map(line: dict[str, Any], result: Prediction, image: Path | NDArray[np.uint8]) -> None:
    """Write the heat map that a line names; if that fails, say so and go on.

    Args:
        line: What :func:`prediction_line` gave.
        result: What was said about the image.
        image: Path or RGB pixels of 8 bits.
    """
    if "overlay" not in line:
        return
    from openvino_export.cli.overlay import write_overlay

    try:
        write_overlay(result, image, Path(line["overlay"]))
    except (OSError, ValueError) as error:  # the image was taken away, or the disk is full
        say(f"The heat map {line['overlay']} was not written: {error}.")


@contextmanager
def progress(done: str, total: int | None) -> Generator[Callable[[int], None], None, None]:
    """Show on a terminal how many images are done.

    Args:
        done: What is done with images, such as "learned".
        total: Number of images, if it is known; of a single one, nothing is shown.

    Yields:
        A function that takes the number of images done so far.
    """
    stream: TextIO = sys.stderr
    is_shown = stream.isatty() and (total is None or total > 1)
    start = time.monotonic()

    def show(number: int) -> None:
        if not is_shown:
            return
        rate = number / max(time.monotonic() - start, 1e-6)
        bar = of = left = ""
        if total:
            bar = f"[{'#' * (30 * number // total):30}] "
            of = f" of {total}"
            left = f", {(total - number) / rate:.0f} s left"
        print(f"\r{bar}{done} {number}{of} ({rate:.1f} images/s{left}) ", end="", file=stream, flush=True)

    try:
        yield show
    finally:
        if is_shown:
            print(file=stream)

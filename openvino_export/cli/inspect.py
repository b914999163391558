# SPDX-License-Identifier: Apache-2.0
"""Commands that judge images: ``predict`` and ``watch``."""

from __future__ import annotations

import json
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openvino_export.cli.output import GOOD, UNDECIDED, exit_code, prediction_line, print_line, progress, write_heat_map

if TYPE_CHECKING:
    from collections.abc import Callable, Generator


def predict(
    bundle: str,
    source: str,
    output: str | None = None,
    device: str = "CPU",
    precision: str | None = None,
    frames: int | None = None,
) -> int:
    """Judge an image, a folder of images, a video file or a camera.

    Writes one JSON line for each image, of a folder for an unreadable one too. Exits with 0 if all are good, with 3 if
    one is anomalous, with 4 if one could not be judged, with 1 on errors.

    Args:
        bundle: Folder that the export to openvino has written.
        source: Image, folder, video file, or the number of a camera.
        output: Folder for heat maps over the images; none are written without it.
        device: Device of OpenVINO, such as CPU, GPU or NPU.
        precision: Precision to compute in, such as bf16; that of the bundle by default.
        frames: Number of frames of a video or camera after which to stop.
    """
    from openvino_export.cli.overlay import refuse_output_among_images
    from openvino_export.cli.sources import named_images
    from openvino_export.detector import EdgeDetector

    refuse_output_among_images(output, source)
    detector = EdgeDetector(bundle, device, precision)
    code = GOOD
    images, total = named_images(source, frames)
    is_folder = Path(source).is_dir()
    with progress("judged", total) as show:
        for number, (name, image) in enumerate(images, 1):
            try:
                result = detector.predict(image)
            except (OSError, ValueError) as error:
                if not is_folder:
                    raise
                print_line({"source": str(image), "error": str(error)})
                code = UNDECIDED
            else:
                code = max(code, exit_code(result))
                line = prediction_line(result, name, output)
                write_heat_map(line, result, image)
                print_line(line)
            show(number)
    return code


def watch(
    bundle: str,
    folder: str,
    output: str | None = None,
    device: str = "CPU",
    interval: float = 0.2,
    idle: float | None = None,
) -> int:
    """Judge each new image of a folder once, as a camera fills it; what others learn meanwhile is taken up.

    Writes one JSON line for each image, an unreadable one too, and goes on until it is interrupted. A line with
    "drift": true is the first that shows that good parts no longer look as learned. The lines are also
    added to predictions.jsonl in the output folder, or in the watched one without it; images that are named there are
    not judged again when it is started anew, unless they have changed.

    Args:
        bundle: Folder that the export to openvino has written.
        folder: Folder to watch.
        output: Folder for heat maps over the images; none are written without it.
        device: Device of OpenVINO.
        interval: Seconds between two looks at the folder.
        idle: Seconds without a new image after which to stop.
    """
    from openvino_export.cli.overlay import refuse_output_among_images
    from openvino_export.detector import EdgeDetector
    from openvino_export.images import files_in

    if not Path(folder).is_dir():
        msg = f"There is no folder {folder} to watch."
        raise FileNotFoundError(msg)
    refuse_output_among_images(output, folder)
    watched = Path(folder).resolve()
    detector = EdgeDetector(bundle, device)
    code, last_change = GOOD, time.monotonic()
    monitor = detector.drift_monitor()
    seen: dict[Path, list[int]] = {}  # size and time of change at the last look
    with _journal(Path(output or watched) / "predictions.jsonl") as (judged, add):
        while idle is None or time.monotonic() - last_change < idle:
            if detector.reload():
                monitor = detector.drift_monitor()
            for path in files_in(watched):
                try:
                    status = path.stat()
                except FileNotFoundError:  # taken away again
                    continue
                state = [status.st_size, status.st_mtime_ns]
                if judged.get(str(path)) == state:
                    continue
                last_change = time.monotonic()
                if seen.get(path) != state:  # it may be in the middle of being written
                    seen[path] = state
                    continue
                result = None
                try:
                    result = detector.predict(path)
                except (OSError, ValueError) as error:
                    line: dict[str, Any] = {"source": str(path), "error": str(error)}
                    code = UNDECIDED
                else:
                    code = max(code, exit_code(result))
                    line = prediction_line(result, str(path.relative_to(watched)), output)
                    if monitor is not None and monitor.add(result):
                        line["drift"] = True
                        _warn_of_drift(str(result.variant))
                add({**line, "state": state})  # before anything else can fail
                if result is not None:
                    write_heat_map(line, result, path)
                print_line(line)
            time.sleep(interval)
    return code


def _warn_of_drift(variant: str) -> None:
    text = f"Good parts of {variant} no longer look as learned. See whether light, lens or supplier changed"
    print(f"{text}; if they are right, learn some of them.", file=sys.stderr, flush=True)


@contextmanager
def _journal(path: Path) -> Generator[tuple[dict[str, list[int]], Callable[[dict[str, Any]], None]], None, None]:
    """Open the file of JSON lines that remembers what was judged.

    Args:
        path: The file; it is made if need be, and a line that a power failure has cut is passed over.

    Yields:
        The state in which each image was judged, by path, and a function that adds a line to it and to the file.
    """
    judged: dict[str, list[int]] = {}

    def remember(line: dict[str, Any]) -> None:
        judged[line["source"]] = line["state"]

    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8") as file:
        file.seek(0)
        text = file.read()
        for line in text.splitlines():
            with suppress(ValueError):  # a line that was being written when the power failed
                remember(json.loads(line))
        if text and not text.endswith("\n"):
            file.write("\n")

        def add(line: dict[str, Any]) -> None:
            file.write(json.dumps(line) + "\n")
            file.flush()
            remember(line)

        yield judged, add

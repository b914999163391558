# SPDX-License-Identifier: Apache-2.0
"""Commands that measure a bundle: ``benchmark`` and ``parity``."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openvino_export.cli.output import GOOD, print_line

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator


def benchmark(
    bundle: str,
    source: str | None = None,
    devices: list[str] | str | None = None,
    precisions: list[str] | str | None = None,
    seconds: float = 5.0,
) -> int:
    """Measure latency and throughput from pixels to decision, a JSON line for each device, precision and hint.

    The hint LATENCY judges one image after the other, THROUGHPUT several at a time.

    Args:
        bundle: Folder that the export to openvino has written.
        source: Image or folder to judge; noise, which takes longest, by default.
        devices: A device of OpenVINO, or a list such as "[CPU, GPU]"; all that it finds by default.
        precisions: A precision to compute in, or a list such as "[f32, bf16]"; that of the bundle by default.
        seconds: Time for each measurement.
    """
    import numpy as np

    from openvino_export.cli.sources import image_paths
    from openvino_export.detector import EdgeDetector
    from openvino_export.device import core
    from openvino_export.images import load

    devices, precisions = ([given] if isinstance(given, str) else given for given in (devices, precisions))
    for device in devices or core().available_devices:
        for precision in precisions or (None,):
            start = time.perf_counter()
            detector = EdgeDetector(bundle, device, precision)
            if source is None:
                images = [np.random.default_rng(0).random((*detector.input_size, 3), dtype=np.float32)]
            else:
                images = [load(path).transpose(1, 2, 0) for path in image_paths(Path(source))[:64]]
            detector.predict(images[0])
            first = time.perf_counter() - start
            for hint, predict in (("LATENCY", partial(map, detector.predict)), ("THROUGHPUT", detector.stream)):
                latencies, rate = _measured(predict, images, seconds)
                print_line({
                    "device": device,
                    "precision": detector.precision,
                    "hint": hint,
                    "first_verdict_s": round(first, 3),
                    **{f"latency_p{q}_ms": round(float(np.percentile(latencies, q)), 2) for q in (50, 90, 99)},
                    "images_per_s": round(rate, 1),
                })
    return GOOD


def _measured(
    predict: Callable[[Iterable[Any]], Iterable[Any]], images: list[Any], seconds: float
) -> tuple[list[float], float]:
    """Latencies in ms and images per second of judging images again and again, at least one."""
    next(iter(predict(images[:1])))  # compiles
    taken: list[float] = []  # when each image was taken
    latencies: list[float] = []
    start = time.perf_counter()

    def repeated() -> Iterator[Any]:
        while not taken or time.perf_counter() < start + seconds:
            taken.append(time.perf_counter())
            yield images[len(taken) % len(images)]

    for _ in predict(repeated()):
        latencies.append(1e3 * (time.perf_counter() - taken[len(latencies)]))
    return latencies, len(latencies) / (time.perf_counter() - start)


def parity(bundle: str, source: str, reference: str | None = None, tolerance: float = 1e-3, device: str = "CPU") -> int:
    """Compare this runtime with another form of the model on images; fail above a tolerance.

    Exits with 0 if scores and maps differ by no more than the tolerance and all labels agree, with 3 if not. To compare
    with a checkpoint, which needs torch, use `anomalib-ext parity`.

    Args:
        bundle: Folder that the export to openvino has written.
        source: Image or folder of images.
        reference: Another model.xml, or an .onnx file; model.xml of the bundle by default.
        tolerance: Largest allowed difference of scores and of pixels of maps.
        device: Device of OpenVINO for the bundle.
    """
    from openvino_export.cli.comparison import compare, exported_model
    from openvino_export.detector import EdgeDetector

    detector = EdgeDetector(bundle, device)
    return compare(detector, Path(source), exported_model(Path(reference or Path(bundle) / "model.xml")), tolerance)

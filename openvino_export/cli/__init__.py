# SPDX-License-Identifier: Apache-2.0
"""The command ``anomalib-edge``: inspection and learning on an edge PC without torch."""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import contextmanager, suppress
from functools import partial
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator

    import numpy as np
    from numpy.typing import NDArray

    from openvino_export.detector import Prediction

# Exit codes; 2 is that of wrong arguments.
GOOD, ERROR, ANOMALOUS = 0, 1, 3


def predict(
    bundle: str,
    source: str,
    output: str | None = None,
    device: str = "CPU",
    precision: str | None = None,
    frames: int | None = None,
) -> int:
    """Judge an image, a folder of images, a video file or a camera.

    Writes one JSON line for each image. Exits with 0 if all are good, with 3 if one is anomalous, with 1 on errors.

    Args:
        bundle: Folder that the export to openvino has written.
        source: Image, folder, video file, or the number of a camera.
        output: Folder for heat maps over the images; none are written without it.
        device: Device of OpenVINO, such as CPU, GPU or NPU.
        precision: Precision to compute in, such as bf16; that of the bundle by default.
        frames: Number of frames of a video or camera after which to stop.
    """
    from openvino_export.detector import EdgeDetector

    _check_output(output, source)
    detector = EdgeDetector(bundle, device, precision)
    anomalous = False
    images, total = _images(source, frames)
    with _progress("judged", total) as done:
        for number, (name, image) in enumerate(images, 1):
            result = detector.predict(image)
            anomalous |= bool(result.pred_label)
            _print(_line(result, name, image, output))
            done(number)
    return ANOMALOUS if anomalous else GOOD


def learn(
    bundle: str,
    source: str,
    variant: str | None = None,
    force: bool = False,
    device: str = "CPU",
) -> int:
    """Learn good images, and save what was learned in the bundle.

    A kill at any moment leaves the bundle as it was or as it is to be. Images that look anomalous are held back and
    named. Exits with 0 if all were learned, with 3 if some were held back, with 1 on errors, when nothing was learned.

    Args:
        bundle: Folder that the export to openvino has written.
        source: Good image, or folder of good images.
        variant: Name of the product variant that they show; found for each image if not given.
        force: Learn images that look anomalous as well.
        device: Device of OpenVINO.
    """
    from openvino_export.detector import EdgeDetector

    detector = EdgeDetector(bundle, device)
    paths = _paths(Path(source))
    with _progress("looked at", len(paths)) as done:
        learned = detector.learn(paths, variant, force=force, progress=done)
    detector.save()
    report = learned.report
    _print({
        "learned": dict(report.variants),
        "known_images": report.known_images,
        "held_back": learned.held_back,
        "vectors": report.num_vectors,
        "radius_bound": report.radius_bound,
    })
    for name, excess in learned.held_back.items():
        text = f"{name} was not learned: it scores {excess:.1f} times the threshold. If it is good, add --force true."
        print(text, file=sys.stderr)
    return ANOMALOUS if learned.held_back else GOOD


def info(bundle: str) -> int:
    """Show what a bundle is and knows, as JSON.

    Args:
        bundle: Folder that the export to openvino has written.
    """
    from openvino_export.detector import EdgeDetector

    print(json.dumps(EdgeDetector(bundle).info(), indent=2))
    return GOOD


def undo(bundle: str) -> int:
    """Bring back the bundle as it was before the last learning; a second time, bring the learning back.

    Args:
        bundle: Folder that the export to openvino has written.
    """
    from openvino_export.bundle.folder import read
    from openvino_export.bundle.folder import undo as bring_back

    bring_back(bundle)
    _print({"variants": read(bundle).metadata["variants"]})
    return GOOD


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
                images = [load(path).transpose(1, 2, 0) for path in _paths(Path(source))[:64]]
            detector.predict(images[0])
            first = time.perf_counter() - start
            for hint, judge in (("LATENCY", partial(map, detector.predict)), ("THROUGHPUT", detector.stream)):
                next(iter(judge(images[:1])))  # compiles
                begins: list[float] = []
                times: list[float] = []
                start = time.perf_counter()
                for _ in judge(_until(images, start + seconds, begins)):
                    times.append(1e3 * (time.perf_counter() - begins[len(times)]))
                _print({
                    "device": device,
                    "precision": detector.precision,
                    "hint": hint,
                    "first_verdict_s": round(first, 3),
                    **{f"latency_p{share}_ms": round(float(np.percentile(times, share)), 2) for share in (50, 90, 99)},
                    "images_per_s": round(len(times) / (time.perf_counter() - start), 1),
                })
    return GOOD


def parity(bundle: str, source: str, reference: str | None = None, tolerance: float = 1e-3, device: str = "CPU") -> int:
    """Compare this runtime with another form of the model on images; fail above a tolerance.

    Exits with 0 if scores and maps differ by no more than the tolerance and all labels agree, with 3 if not.

    Args:
        bundle: Folder that the export to openvino has written.
        source: Image or folder of images.
        reference: Another model.xml, an .onnx file, or a .ckpt file, which needs torch; model.xml of the bundle by
            default.
        tolerance: Largest allowed difference of scores and of pixels of maps.
        device: Device of OpenVINO for the bundle.
    """
    import numpy as np

    from openvino_export.detector import EdgeDetector
    from openvino_export.images import load, resize

    detector = EdgeDetector(bundle, device)
    judge = _reference(Path(reference or Path(bundle) / "model.xml"), detector.info()["model"])
    paths = _paths(Path(source))
    worst, labels = {"pred_score": 0.0, "anomaly_map": 0.0}, 0
    with _progress("compared", len(paths)) as done:
        for number, path in enumerate(paths, 1):
            result = detector.predict(path)
            other = judge(resize(load(path), detector.input_size)[None])
            for name, value in worst.items():
                difference = np.abs(np.asarray(other[name]).squeeze() - np.asarray(getattr(result, name)))
                worst[name] = max(value, float(difference.max()))
            labels += "pred_label" in other and bool(np.asarray(other["pred_label"]).item()) != result.pred_label
            done(number)
    same = labels == 0 and all(value <= tolerance for value in worst.values())
    differences = {f"largest_difference_of_{name}": value for name, value in worst.items()}
    _print({"images": len(paths), **differences, "different_labels": labels, "tolerance": tolerance, "same": same})
    return GOOD if same else ANOMALOUS


def watch(
    bundle: str,
    folder: str,
    output: str | None = None,
    device: str = "CPU",
    interval: float = 0.2,
    idle: float | None = None,
) -> int:
    """Judge each new image of a folder once, as a camera fills it; what others learn meanwhile is taken up.

    Writes one JSON line for each image, an unreadable one too, and goes on until it is interrupted. The lines are also
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
    from openvino_export.detector import EdgeDetector

    if not Path(folder).is_dir():
        msg = f"There is no folder {folder} to watch."
        raise FileNotFoundError(msg)
    _check_output(output, folder)
    watched = Path(folder).resolve()
    detector = EdgeDetector(bundle, device)
    anomalous, last = False, time.monotonic()
    seen: dict[Path, list[int]] = {}  # size and time of change at the last look
    with _record(Path(output or watched) / "predictions.jsonl") as (judged, record):
        while idle is None or time.monotonic() - last < idle:
            detector.reload()
            for path in _files(watched):
                try:
                    status = path.stat()
                except FileNotFoundError:  # taken away again
                    continue
                state = [status.st_size, status.st_mtime_ns]
                if judged.get(str(path)) == state:
                    continue
                last = time.monotonic()
                if seen.get(path) != state:  # it may be in the middle of being written
                    seen[path] = state
                    continue
                try:
                    result = detector.predict(path)
                except (OSError, ValueError) as error:
                    line = {"source": str(path), "error": str(error)}
                else:
                    anomalous |= bool(result.pred_label)
                    line = _line(result, str(path.relative_to(watched)), path, output)
                _print(line)
                record({**line, "state": state})
            time.sleep(interval)
    return ANOMALOUS if anomalous else GOOD


@contextmanager
def _record(path: Path) -> Generator[tuple[dict[str, list[int]], Callable[[dict[str, Any]], None]], None, None]:
    """States of the images that a file of JSON lines names, and what adds a line to both."""
    judged: dict[str, list[int]] = {}

    def note(line: dict[str, Any]) -> None:
        judged[line["source"]] = line["state"]

    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8") as file:
        file.seek(0)
        text = file.read()
        for line in text.splitlines():
            with suppress(ValueError):  # a line that was being written when the power failed
                note(json.loads(line))
        if text and not text.endswith("\n"):
            file.write("\n")

        def add(line: dict[str, Any]) -> None:
            file.write(json.dumps(line) + "\n")
            file.flush()
            note(line)

        yield judged, add


def _reference(path: Path, name: str) -> Callable[[NDArray[np.float32]], dict[str, Any]]:
    """What judges an image `(1, 3, H, W)` in [0, 1] with another form of the model of this name."""
    if path.suffix == ".ckpt":
        try:
            import torch
            from anomalib import models
        except ImportError as error:
            msg = f"To compare with {path}, torch is needed: pip install 'anomalib-ext[train]' ({error})."
            raise ValueError(msg) from error
        kind = getattr(models, name)
        # The checkpoint has the weights, so that they need not be found once more.
        known = {"pre_trained": False} if "pre_trained" in signature(kind).parameters else {}
        model = kind.load_from_checkpoint(path, map_location="cpu", **known).eval()

        def in_torch(image: NDArray[np.float32]) -> dict[str, Any]:
            with torch.no_grad():
                found = model(torch.from_numpy(image))
            return {key: value for key, value in found._asdict().items() if value is not None}

        return in_torch
    if path.suffix not in {".onnx", ".xml"} or not path.is_file():
        msg = f"There is no model {path} to compare with; give a file that ends in .xml, .onnx or .ckpt."
        raise ValueError(msg)
    from openvino_export.device import core

    compiled = core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda image: {next(iter(key.names)): value for key, value in compiled(image).items()}


# Images and results


def _files(folder: Path) -> list[Path]:
    from openvino_export.images import files_in

    return files_in(folder)


def _paths(source: Path) -> list[Path]:
    """Image files of a folder, or the file itself."""
    if not source.is_dir():
        return [source]
    paths = _files(source)
    if not paths:
        msg = f"The folder {source} holds no images."
        raise ValueError(msg)
    return paths


def _images(source: str, frames: int | None) -> tuple[Iterable[tuple[str, Any]], int | None]:
    """Names and images of a source, and how many there are, if that is known."""
    from openvino_export.images import SUFFIXES

    path = Path(source)
    if path.is_dir() or path.suffix.lower() in SUFFIXES:
        paths = _paths(path)
        names = [str(one.relative_to(path)) if path.is_dir() else one.name for one in paths]
        return zip(names, paths, strict=True), len(paths)
    if not source.isdigit() and not path.exists():
        msg = f"There is no image, folder or video {source}."
        raise FileNotFoundError(msg)
    return _frames(source, frames), frames


def _frames(source: str, frames: int | None) -> Iterator[tuple[str, NDArray[np.uint8]]]:
    """Frames of a video file or a camera, RGB."""
    import numpy as np

    if frames is not None and frames < 1:
        msg = f"frames must be at least 1, got {frames}."
        raise ValueError(msg)
    os.environ.setdefault("OPENCV_LOG_LEVEL", "ERROR")  # the message below says it

    try:
        import cv2
    except ImportError as error:
        msg = "Videos and cameras are read with OpenCV: pip install opencv-python-headless"
        raise ValueError(msg) from error
    capture = cv2.VideoCapture(int(source) if source.isdigit() else source)
    number = 0
    try:
        while frames is None or number < frames:
            found, frame = capture.read()
            if not found:
                break
            yield f"{Path(source).stem}_{number:06}", np.asarray(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB), np.uint8)
            number += 1
    finally:
        capture.release()
    if not number:
        if source.isdigit():
            msg = f"There is no camera {source}, or it gives no picture; see whether another program uses it."
        else:
            msg = f"No frame can be read from {source}: it is no video, or of a kind that OpenCV cannot decode."
        raise ValueError(msg)


def _until(images: list[Any], end: float, begins: list[float]) -> Iterator[Any]:
    """Images again and again, at least one; the times at which they are taken are added to `begins`."""
    while not begins or time.perf_counter() < end:
        begins.append(time.perf_counter())
        yield images[len(begins) % len(images)]


def _check_output(output: str | None, source: str) -> None:
    """Refuse to write heat maps among the images, which they would replace or be taken for."""
    if output is None:
        return
    folder, images = Path(output).resolve(), Path(source).resolve()
    if folder.is_relative_to(images) or folder / images.name == images:
        msg = f"Heat maps in {output} would mix with the images of {source}; choose an output folder outside of it."
        raise ValueError(msg)


def _line(result: Prediction, name: str, image: Path | NDArray[np.uint8], output: str | None) -> dict[str, Any]:
    """What is said about an image, after its heat map was written."""
    line = {
        "source": result.source or name,
        "pred_label": result.pred_label,
        "pred_score": round(result.pred_score, 6),
        "variant": result.variant,
    }
    if output is not None:
        target = Path(output) / (name if name.endswith(".png") else f"{name}.png")
        overlay(result, image, target)
        line["overlay"] = str(target)
    return line


def overlay(result: Prediction, image: Path | NDArray[Any], target: Path) -> None:
    """Write an image with its anomaly map laid over it, and the borders of the mask in white.

    Args:
        result: What was said about the image.
        image: Path or RGB pixels of 8 bits.
        target: File to write.
    """
    import numpy as np
    from PIL import Image, ImageFilter

    picture = Image.open(image) if isinstance(image, Path) else Image.fromarray(image)
    picture = picture.convert("RGB")
    values = result.anomaly_map
    if result.pred_mask is None:  # without thresholds, in the range of the image
        values = (values - values.min()) / max(float(np.ptp(values)), 1e-12)
    heat = Image.fromarray(np.clip(values, 0, 1).astype(np.float32)).resize(picture.size, Image.Resampling.BILINEAR)
    strength = np.asarray(heat)[..., None]
    # From blue over yellow to red, and the more opaque the more anomalous.
    colors = np.concatenate([2 * strength, 1.6 - 2 * np.abs(strength - 0.5) - 0.6, 1 - 2 * strength], axis=2)
    share = 0.65 * np.clip(2 * strength - 0.5, 0, 1)
    pixels = np.asarray(picture) * (1 - share) + 255 * np.clip(colors, 0, 1) * share
    mixed = Image.fromarray(pixels.astype(np.uint8))
    if result.pred_mask is not None:
        mask = Image.fromarray(result.pred_mask.astype(np.uint8) * 255).resize(picture.size, Image.Resampling.NEAREST)
        width = max(3, min(picture.size) // 150 * 2 + 1)
        border = np.asarray(mask.filter(ImageFilter.MaxFilter(width))) != np.asarray(mask)
        mixed.paste((255, 255, 255), (0, 0), Image.fromarray(border.astype(np.uint8) * 255))
    target.parent.mkdir(parents=True, exist_ok=True)
    mixed.save(target)


def _print(line: dict[str, Any]) -> None:
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)  # in place of the progress bar
    print(json.dumps(line), flush=True)


@contextmanager
def _progress(what: str, total: int | None) -> Generator[Callable[[int], None], None, None]:
    """Show how far it is, on a terminal."""
    stream: TextIO = sys.stderr
    start = time.monotonic()

    def show(number: int) -> None:
        if stream.isatty() and (total is None or total > 1):
            of = f" of {total}" if total else ""
            rate = number / max(time.monotonic() - start, 1e-6)
            left = f", {(total - number) / rate:.0f} s left" if total else ""
            bar = f"[{'#' * (30 * number // total):30}] " if total else ""
            print(f"\r{bar}{what} {number}{of} ({rate:.1f} images/s{left}) ", end="", file=stream, flush=True)

    try:
        yield show
    finally:
        if stream.isatty() and (total is None or total > 1):
            print(file=stream)


def main(args: list[str] | None = None) -> int:
    """Run a subcommand and return its exit code: 0 good, 3 anomalous, 1 error, 2 wrong arguments."""
    # Before NumPy is imported: its threads would keep OpenVINO's from the processor.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from jsonargparse import auto_cli

    commands: list[Any] = [predict, learn, info, benchmark, parity, watch, undo]
    description = (
        "Inspect with a bundle that the export to openvino has written, and go on learning. "
        "Exit codes: 0 good; 3 anomalous, held back or different; 1 error; 2 wrong arguments."
    )
    try:
        return int(auto_cli(commands, args=args, as_positional=True, description=description))
    except (OSError, ValueError) as error:  # what the messages of this package are made for
        print(f"anomalib-edge: {error}", file=sys.stderr)
        return ERROR
    except KeyboardInterrupt:
        return 130

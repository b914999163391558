# SPDX-License-Identifier: Apache-2.0
"""The command ``predict``."""

from __future__ import annotations

from pathlib import Path

from openvino_export.cli.output import GOOD, UNDECIDED, exit_code, prediction_line, print_line, progress, write_heat_map


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

# SPDX-License-Identifier: Apache-2.0
"""The edge runtime against another form of the same model; any function from images to outputs can be the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from openvino_export.cli.output import ANOMALOUS, GOOD, print_line, progress
from openvino_export.cli.sources import image_paths
from openvino_export.device import FAILURES, core
from openvino_export.images import load_resized

if TYPE_CHECKING:
    from pathlib import Path

    from openvino_export.detector import EdgeDetector

# From an image `(1, 3, H, W)` in [0, 1] to `pred_score` and `anomaly_map`, and `pred_label` if there is one.
Reference = Callable[[NDArray[np.float32]], dict[str, Any]]


def exported_model(path: Path) -> Reference:
    """The model of a file, run on the CPU in float32.

    Args:
        path: An .xml or .onnx file.

    Raises:
        ValueError: If there is no such file, or it is of another kind or damaged, also when it is run.
    """
    if path.suffix == ".ckpt":
        msg = f"{path} is a checkpoint, which only torch can run: use anomalib-ext parity with the same arguments."
        raise ValueError(msg)
    if path.suffix not in {".onnx", ".xml"} or not path.is_file():
        msg = f"There is no model {path} to compare with; give a file that ends in .xml or .onnx."
        raise ValueError(msg)
    try:
        compiled = core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    except FAILURES as error:
        raise _refused(path, error) from error
    names = [next(iter(output.names), "") for output in compiled.outputs]

    def run(image: NDArray[np.float32]) -> dict[str, Any]:
        try:
            return dict(zip(names, compiled(image).values(), strict=True))
        except FAILURES as error:
            raise _refused(path, error) from error

    return run


def _refused(path: Path, error: Exception) -> ValueError:
    reason = str(error).strip().splitlines()[-1]
    return ValueError(f"{path} cannot be compared with: {reason}. Give an undamaged model for the same images.")


def compare(detector: EdgeDetector, source: Path, reference: Reference, tolerance: float) -> int:
    """Print the largest differences between a detector and a reference on images, one line of JSON.

    Args:
        detector: The edge runtime.
        source: Image or folder of images.
        reference: The other form of the model.
        tolerance: Largest allowed difference of scores and of pixels of maps.

    Returns:
        Exit code: good if no difference exceeds the tolerance and all labels agree.

    Raises:
        ValueError: If the reference is of another kind, or damaged.
    """
    paths = image_paths(source)
    worst, labels = {"pred_score": 0.0, "anomaly_map": 0.0}, 0
    with progress("compared", len(paths)) as show:
        for number, path in enumerate(paths, 1):
            result = detector.predict(path)
            other = reference(load_resized(path, detector.input_size)[0][None])
            for name, value in worst.items():
                own, given = np.asarray(getattr(result, name)), np.asarray(other.get(name, np.nan)).squeeze()
                if own.shape != given.shape or not np.isfinite(given).all():
                    msg = (
                        f"The model that {path} is to be compared by gives no finite {name} of the shape {own.shape}. "
                        "Give an undamaged model for the same images."
                    )
                    raise ValueError(msg)
                worst[name] = max(value, float(np.abs(given - own).max()))
            labels += "pred_label" in other and bool(np.asarray(other["pred_label"]).item()) != result.pred_label
            show(number)
    same = labels == 0 and all(value <= tolerance for value in worst.values())
    differences = {f"largest_difference_of_{name}": value for name, value in worst.items()}
    print_line({"images": len(paths), **differences, "different_labels": labels, "tolerance": tolerance, "same": same})
    return GOOD if same else ANOMALOUS

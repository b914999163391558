# SPDX-License-Identifier: Apache-2.0
"""The command ``anomalib-ext parity``: whether an edge bundle judges as the checkpoint that it was exported from."""

from __future__ import annotations

from inspect import signature
from typing import TYPE_CHECKING, Any

import torch
from anomalib import models

from openvino_export import EdgeDetector
from openvino_export.cli.comparison import compare

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from openvino_export.cli.comparison import Reference


def parity(bundle: Path, source: Path, *, reference: Path, tolerance: float = 1e-3, device: str = "CPU") -> int:
    """Compare the edge runtime with a checkpoint on images; fail above a tolerance.

    Prints the largest differences, one line of JSON. Exits with 0 if scores and maps differ by no more than the
    tolerance and all labels agree, with 3 if not, with 1 on errors.

    Args:
        bundle: Folder that the export to openvino has written.
        source: Image or folder of images.
        reference: Checkpoint of the model that was exported.
        tolerance: Largest allowed difference of scores and of pixels of maps.
        device: Device of OpenVINO for the bundle.
    """
    try:
        detector = EdgeDetector(bundle, device)
        return compare(detector, source, checkpoint_model(reference, detector.info()["model"]), tolerance)
    except (OSError, ValueError) as error:
        msg = f"anomalib-ext parity: {error}"
        raise SystemExit(msg) from error


def checkpoint_model(path: Path, name: str) -> Reference:
    """The model of a checkpoint, run by torch on the CPU.

    Args:
        path: The checkpoint.
        name: Class of the model.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If there is no such model, or it cannot be made of the file.
    """
    if name not in models.__all__:
        msg = f"The bundle is of the model {name:.50}, which anomalib.models does not have; install what it is of."
        raise ValueError(msg)
    kind = getattr(models, name)
    # The checkpoint has the weights, so that they need not be found once more.
    known = {"pre_trained": False} if "pre_trained" in signature(kind).parameters else {}
    try:
        model = kind.load_from_checkpoint(path, map_location="cpu", **known).eval()
    except OSError:
        raise
    except Exception as error:  # whatever torch makes of a damaged or foreign file
        reason = str(error).rstrip(".")
        msg = f"{path} cannot be loaded as a checkpoint of {name}: {reason}. Give the one that was exported."
        raise ValueError(msg) from error

    def run(image: NDArray[np.float32]) -> dict[str, Any]:
        with torch.no_grad():
            outputs = model(torch.from_numpy(image))
        return {key: value for key, value in outputs._asdict().items() if value is not None}

    return run

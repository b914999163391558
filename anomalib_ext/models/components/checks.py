# SPDX-License-Identifier: Apache-2.0
"""What no model takes: image files, images and scores that are refused, each with one message."""

from collections.abc import Sequence
from pathlib import Path

import torch

from openvino_export.images import check_file, load_picture


def check_files(paths: Sequence[str | Path] | None) -> None:
    """Refuse image files that Anomalib would read as something else than what they show.

    Raises:
        ValueError: If an image is too small, too large, or of more than 8 bits.
    """
    for path in paths or ():
        check_file(path)


def fault_of(path: str | Path) -> str | None:
    """What is wrong with an image file, if something is."""
    try:
        load_picture(Path(path))
    except (OSError, ValueError) as error:
        return str(error)
    return None


def check_images(images: torch.Tensor) -> None:
    """Refuse normalised images that cannot be learned or scored.

    Raises:
        ValueError: If the shape is not ``(B, 3, H, W)``, or a value is not finite.
    """
    if images.ndim != 4 or images.shape[1] != 3:
        msg = f"Images must have the shape (B, 3, H, W), got {tuple(images.shape)}."
        raise ValueError(msg)
    if not torch.compiler.is_compiling() and not torch.isfinite(images).all():
        bad = (~torch.isfinite(images).flatten(1).all(dim=1)).nonzero().flatten().tolist()
        msg = f"Images {bad} of the batch hold NaN or infinite values. Nothing of the batch was used."
        raise ValueError(msg)


def check_scores(scores: torch.Tensor) -> None:
    """Refuse image scores of shape ``(B,)`` that are not finite.

    Raises:
        ValueError: If one is not.
    """
    if not torch.compiler.is_compiling() and not torch.isfinite(scores).all():
        bad = (~torch.isfinite(scores)).nonzero().flatten().tolist()
        msg = f"Images {bad} of the batch give scores that are not finite; look for NaN in the weights of the model."
        raise ValueError(msg)

# SPDX-License-Identifier: Apache-2.0
"""Learning without a trainer: which images can be learned, and how they come into an update."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import torch

from openvino_export.decision import check_finite
from openvino_export.images import check_values, image_hash, load
from openvino_export.memory.guard import hold_back
from openvino_export.memory.update import Update

from .torch_model import ContinualPatchCoreModel

Image: TypeAlias = torch.Tensor | str | Path


def named_images(images: torch.Tensor | str | Path | Sequence[str | Path]) -> list[tuple[str, Image]]:
    """Images with the names by which messages and reports call them. Files are not read yet.

    Args:
        images: RGB images of shape ``(B, 3, H, W)`` in [0, 1], or the path of an image, or several.

    Returns:
        For each its name, and a float32 image of shape ``(3, H, W)`` or a path.

    Raises:
        TypeError: If something else than that is given.
        ValueError: If there are no images, or a tensor holds what cannot be learned.
    """
    named: list[tuple[str, Image]] = []
    if isinstance(images, torch.Tensor):
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            msg = f"Images must be floats of shape (B, 3, H, W), got {images.dtype} of {tuple(images.shape)}."
            raise ValueError(msg)
        for number, image in enumerate(images.float(), 1):
            check_values(image.cpu().numpy(), f"image {number}")
            named.append((f"image {number}", image))
    else:
        paths = [images] if isinstance(images, str | Path) else list(images)
        wrong = [type(path).__name__ for path in paths if not isinstance(path, str | Path)]
        if wrong:
            msg = f"Images must be paths, or one tensor of shape (B, 3, H, W); got a list with {wrong[0]} in it."
            raise TypeError(msg)
        named += [(str(path), path) for path in paths]
    if not named:
        msg = "There are no images to learn."
        raise ValueError(msg)
    return named


def add_images(
    update: Update,
    model: ContinualPatchCoreModel,
    images: Iterable[tuple[str, Image]],
    prepare: Callable[[torch.Tensor], torch.Tensor],
    variant: str | None = None,
    limits: Mapping[str, float] | None = None,
) -> None:
    """Add images to an update.

    Args:
        update: The update.
        model: The model that it is of.
        images: What :func:`named_images` gave.
        prepare: Resizes and normalises images of shape ``(1, 3, H, W)``.
        variant: Name of their variant; found for each image if not given.
        limits: Image threshold of each variant. Images far above the threshold of their variant are held back, and
            the report of the update names them; without limits, all are learned.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If an image is unreadable, too small, of unsuitable depth or not finite.
    """
    device = next(model.parameters()).device
    for name, item in images:  # one by one, for they may be many and differ in size
        image = item if isinstance(item, torch.Tensor) else torch.from_numpy(load(item))
        prepared = prepare(image[None].to(device)).detach().float().cpu().numpy()
        value = image_hash(prepared[0])
        if update.knows(value):
            continue
        embedding = model.embed_arrays(prepared)[0]
        if limits is not None:
            patches = embedding.reshape(-1, embedding.shape[-1])
            check_finite(patches, name)
            if hold_back(update.report, name, patches, variant, model.bank, limits):
                continue
        update.add(embedding, variant, image_hash=value, map_size=prepared.shape[2:])

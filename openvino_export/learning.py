# SPDX-License-Identifier: Apache-2.0
"""How an image comes into an update, alike on a training PC and on an edge PC."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from .decision import check_finite
from .images import load_picture, resize_rows
from .memory.guard import hold_back

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from .memory.memory_bank import MemoryBank
    from .memory.update import Update

Array: TypeAlias = NDArray[np.float32]
# Path of a mask, or a mask of the image's shape, or left, top, right and bottom of a box in pixels of the image,
# in any sequence. A mask marks what is above half of its largest value.
Region: TypeAlias = str | Path | NDArray[Any] | Sequence[float]


def take_in(
    update: Update,
    name: str,
    image: Array,
    embed: Callable[[Array], Array],
    variant: str | None,
    image_hash: int,
    *,
    bank: MemoryBank,
    limits: Mapping[str, float] | None,
) -> None:
    """Learn a good image, unless it is known or held back.

    Args:
        update: The update.
        name: What messages and the report call the image.
        image: The image, shape `(3, H, W)`.
        embed: Gives its patch embeddings, shape `(h, w, d)`.
        variant: Name of its variant; found if not given.
        image_hash: That of the image once it is normalised.
        bank: What was known before the update.
        limits: Image threshold of each variant. An image far above is held back, and the report names it; without
            limits none is.

    Raises:
        ValueError: If it gives embeddings that are not finite.
    """
    if update.knows(image_hash, variant):
        return
    embedding = embed(image)
    patches = embedding.reshape(-1, embedding.shape[-1])
    check_finite(patches, name)
    if limits is None or not hold_back(update.report, name, patches, variant, bank, limits):
        update.add(embedding, variant, image_hash=image_hash, map_size=(image.shape[1], image.shape[2]))


def show_defect(
    update: Update,
    name: str,
    embedding: Array,
    variant: str | None,
    region: Region | None,
    *,
    image_size: tuple[int, int],
    map_size: tuple[int, int],
) -> None:
    """Show an image as defective.

    Args:
        update: The update.
        name: What messages and the report call the image.
        embedding: Its patch embeddings, shape `(h, w, d)`.
        variant: Name of its variant; found if not given.
        region: Where the defect is.
        image_size: Height and width of the image as it was read.
        map_size: Height and width of its anomaly map.

    Raises:
        FileNotFoundError: If there is no such mask.
        ValueError: If the embedding or the region cannot be used, or the variant is not known.
    """
    check_finite(embedding, name)
    shares = None if region is None else region_of_patches(region, image_size, embedding.shape[:2], name)
    update.show_defect(embedding, variant, region=shares, map_size=map_size, name=name)


def regions_of(regions: Region | Sequence[Region] | None, count: int, *, defective: bool) -> list[Region | None]:
    """One region for each of several images.

    Raises:
        ValueError: If there are more or fewer, or the images are not defective.
    """
    if regions is None:
        return [None] * count
    if not defective:
        msg = "Regions tell where defects are; give them with defective=True, or learn without them."
        raise ValueError(msg)
    is_one = isinstance(regions, (str, Path, np.ndarray)) or (len(regions) > 0 and _is_number(regions[0]))
    several: list[Any] = [regions] if is_one else [*regions]  # type: ignore[misc]
    if len(several) != count:
        msg = f"There are {count} images and {len(several)} regions; give one for each image."
        raise ValueError(msg)
    return several


def region_of_patches(region: Region, image: tuple[int, int], grid: tuple[int, int], name: str) -> Array:
    """Which share of each patch a region covers.

    Args:
        region: A mask or a box.
        image: Height and width of the image.
        grid: Rows and columns of patches.
        name: What messages call the image.

    Returns:
        Shape of the grid, in [0, 1].

    Raises:
        FileNotFoundError: If there is no such mask.
        ValueError: If the mask is of another shape than the image, or marks nothing.
    """
    from PIL import Image

    if isinstance(region, (str, Path)):
        values = np.asarray(load_picture(Path(region)))
        values = values.max(axis=2) if values.ndim == 3 else values
    elif np.ndim(region) == 1:
        values = _inside(region, image, name)
    else:
        values = np.asarray(region, np.float32)
        values = values[..., 0] if values.ndim == 3 and values.shape[2] == 1 else values
    mask = values > values.max(initial=0) / 2
    if mask.shape != image:
        msg = f"The mask of {name} is of shape {mask.shape}, the image of {image}; they must be alike."
        raise ValueError(msg)
    if not mask.any():
        msg = f"The mask or box of {name} marks nothing of it; it has {image[1]} x {image[0]} pixels."
        raise ValueError(msg)

    def rows(first: int, last: int) -> Array:
        return mask[None, first:last].astype(np.float32)

    return resize_rows(rows, (1, *image), grid, Image.Resampling.BOX)[0]


def _inside(box: Any, image: tuple[int, int], name: str) -> NDArray[np.bool_]:  # noqa: ANN401  # as it comes from users
    """Mask of a box."""
    if len(box) != 4 or not all(_is_number(side) and np.isfinite(side) for side in box):
        msg = f"The box of {name} is {box}, not left, top, right and bottom in pixels, such as (20, 30, 60, 50)."
        raise ValueError(msg)
    left, top, right, bottom = (max(0, round(float(side))) for side in box)
    mask = np.zeros(image, bool)
    mask[top:bottom, left:right] = True
    return mask


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float, np.integer, np.floating))

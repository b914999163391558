# SPDX-License-Identifier: Apache-2.0
"""Which images can be learned without a trainer, how they come into an update, and what variants a batch is of."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import numpy as np
import torch
from anomalib.data import Batch
from numpy.typing import NDArray

from anomalib_ext.data import MultiCategory
from openvino_export.images import check_values, image_hash, load
from openvino_export.learning import Region, regions_of, show_defect, take_in
from openvino_export.memory.names import checked_name
from openvino_export.memory.update import Update

from .torch_model import ContinualPatchCoreModel

if TYPE_CHECKING:
    from .lightning_model import ContinualPatchCore

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
    images: Sequence[tuple[str, Image]],
    prepare: Callable[[torch.Tensor], torch.Tensor],
    variant: str | None = None,
    limits: Mapping[str, float] | None = None,
    *,
    defective: bool = False,
    regions: Region | Sequence[Region] | None = None,
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
        defective: Whether they are shown as defective.
        regions: Where the defect is in each.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If an image is unreadable, too small, of unsuitable depth or not finite.
    """
    device = next(model.parameters()).device

    def embed(image: NDArray[np.float32]) -> NDArray[np.float32]:
        return model.embed_arrays(image[None])[0]

    places = regions_of(regions, len(images), defective=defective)
    # one by one, for they may be many and differ in size
    for (name, item), region in zip(images, places, strict=True):
        image = item if isinstance(item, torch.Tensor) else torch.from_numpy(load(item))
        prepared = prepare(image[None].to(device)).detach().float().cpu().numpy()
        map_size = (prepared.shape[2], prepared.shape[3])
        if defective:
            size = (image.shape[1], image.shape[2])
            show_defect(update, name, embed(prepared[0]), variant, region, image_size=size, map_size=map_size)
        else:
            value = image_hash(prepared[0])
            take_in(update, name, prepared[0], embed, variant, value, bank=model.bank, limits=limits)


def add_batch(update: Update, model: "ContinualPatchCore", batch: Batch) -> None:
    """Add a trainer's batch of normal images to an update, and those that its other processes have at the time."""
    images = cast("torch.Tensor", batch.image).detach().float().cpu().numpy()
    variants, values = variants_of(model, batch), list(map(image_hash, images))
    given = model.gathered(list(zip(values, variants, strict=True)))
    new = {value for value, variant in given if not update.knows(value, variant)}
    own = [i for i, value in enumerate(values) if value in new]
    embeddings = model.model.embed_arrays(images[own]) if own else ()
    learned = [(embedding, variants[i], values[i]) for i, embedding in zip(own, embeddings, strict=True)]
    for embedding, variant, value in model.gathered(learned):
        update.add(embedding, variant, image_hash=value, map_size=images.shape[2:])


def variants_of(model: "ContinualPatchCore", batch: Batch) -> list[str | None]:
    """Name of the variant of each image of a batch of a trainer; None where it is to be found.

    Raises:
        ValueError: If a name is blank, or differs from that of a known variant by case or blanks alone.
    """
    datamodule = getattr(model.trainer, "datamodule", None)
    if model.variant is None and isinstance(datamodule, MultiCategory):
        labels: list[Any] = list(datamodule.categories_of(cast("Any", batch).image_path))
    else:
        label = model.variant or getattr(datamodule, "category", None) or getattr(datamodule, "name", None)
        labels = [label] * len(cast("torch.Tensor", batch.image))
    return [label and checked_name(label, model.model.searched.variants) for label in labels]

# SPDX-License-Identifier: Apache-2.0
"""What is learned and judged: products embedded once, streams of them, and products that drift."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from anomalib import TaskType
from anomalib.data.utils import ValSplitMode
from torch import nn
from torchvision.transforms.v2 import InterpolationMode, functional

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from anomalib.data import AnomalibDataModule, AnomalibDataset
    from numpy.typing import NDArray

    from anomalib_ext.models import ContinualPatchCore

    Array = NDArray[np.float32]
    Change = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]

DRIFT_STEPS = 10
# How far each image of a stream without boundaries may be from its place, as a part of its product's images.
OVERLAP = 0.5


@dataclass(frozen=True)
class Images:
    """Embedded images to judge.

    Attributes:
        patches: Patch embeddings, shape ``(B, h, w, d)``.
        labels: Whether each image is anomalous, shape ``(B,)``.
        masks: Where, shape ``(B, H, W)``; None if the product has no masks.
        size: Height and width of the images.
    """

    patches: torch.Tensor
    labels: torch.Tensor
    masks: torch.Tensor | None
    size: torch.Size


@dataclass(frozen=True)
class Task:
    """A product, or a product as it is at one step of a drift.

    Attributes:
        name: Its name.
        variant: Name of the product.
        train: Patch embeddings of the normal images to learn, shape ``(N, n, d)``.
        test: Images to judge.
        validation: Images that set thresholds.
        is_split: Whether these were split off from the test images.
    """

    name: str
    variant: str
    train: Array
    test: Images
    validation: Images
    is_split: bool


@dataclass(frozen=True)
class Step:
    """What arrives at once.

    Attributes:
        name: Its name.
        images: Patch embeddings of each image, shape ``(n, d)``.
        task: What they are images of; None if they may be mixed.
        known: Number of tasks of which an image has been seen by its end.
    """

    name: str
    images: Sequence[Array]
    task: Task | None
    known: int


@dataclass(frozen=True)
class Stream:
    """Tasks, in the order in which they come, and the steps in which they are learned."""

    name: str
    order: int
    tasks: Sequence[Task]
    steps: Sequence[Step]


def embed(
    model: ContinualPatchCore, data: AnomalibDataModule, variant: str, name: str = "", change: Change | None = None
) -> Task:
    """Embed a product, each image once.

    Args:
        model: Brings pre-processor and backbone.
        data: The product, set up.
        variant: Name of the product.
        name: Name of the task; the product's by default.
        change: Changes each image of shape ``(3, H, W)`` in [0, 1] and its mask of shape ``(1, H, W)``.

    Raises:
        ValueError: If there are no normal or no anomalous images to test.
    """
    train = _embed_all(model, data.train_data, change)
    test = _embed_all(model, data.test_data, change)
    if test.labels.all() or not test.labels.any():
        counts = [int((~test.labels).sum()), int(test.labels.sum())]
        msg = f"{variant} has {counts[0]} normal and {counts[1]} anomalous test images; the benchmark needs both."
        raise ValueError(msg)
    split = data.val_split_mode
    own = split not in {ValSplitMode.SAME_AS_TEST, ValSplitMode.NONE}
    validation = _embed_all(model, data.val_data, change) if own else test
    patches = train.patches.flatten(1, 2).numpy()
    return Task(name or variant, variant, patches, test, validation, is_split=split == ValSplitMode.FROM_TEST)


@torch.inference_mode()
def _embed_all(model: ContinualPatchCore, dataset: AnomalibDataset, change: Change | None) -> Images:
    prepare = getattr(model.pre_processor, "transform", None) or nn.Identity()
    patches, masks, labels = [], [], []
    size = torch.Size()
    for item in dataset:
        image = item.image
        mask = torch.zeros(1, *image.shape[1:]) if item.gt_mask is None else item.gt_mask.reshape(1, *image.shape[1:])
        if change is not None:
            image, mask = change(image, mask)
        prepared = prepare(image[None])
        size = prepared.shape[-2:]
        patches.append(model.model.embed(prepared))
        masks.append(functional.resize(mask, list(size), InterpolationMode.NEAREST) > 0.5)
        labels.append(bool(item.gt_label))
    has_masks = dataset.task == TaskType.SEGMENTATION
    return Images(torch.cat(patches), torch.tensor(labels), torch.cat(masks) if has_masks else None, size)


def product_streams(tasks: Sequence[Task], orders: int, seed: int) -> list[Stream]:
    """Product after product: as they are given, in reverse, and shuffled."""
    rng = np.random.default_rng(seed)
    sequences = [list(tasks), list(tasks)[::-1]]
    sequences += [[tasks[i] for i in rng.permutation(len(tasks))] for _ in range(orders - 2)]
    return [
        Stream(
            "products",
            order,
            sequence,
            [
                Step(task.name, shuffled(task, seed + order), task, known)
                for known, task in enumerate(sequence, start=1)
            ],
        )
        for order, sequence in enumerate(sequences[:orders], start=1)
    ]


def shuffled(task: Task, seed: int) -> list[Array]:
    """Images to learn in a random order."""
    return list(task.train[np.random.default_rng(seed).permutation(len(task.train))])


def mixed_stream(tasks: Sequence[Task], seed: int) -> Stream:
    """A stream without boundaries: each product fades into the next, and no image has a label.

    Each image is moved from its place by up to half of its product. After as many steps as there are products all are
    judged of which an image was seen. A step ends where its product would without the moves, so that every product has
    begun by the end of its step, however few images it has.
    """
    rng = np.random.default_rng(seed)
    parts: list[list[tuple[float, int, Any]]] = [[]]
    while not all(parts):  # the two or three images of a product may all move out of its step
        places = [
            (position + (index + 0.5) / len(task.train) + rng.uniform(-OVERLAP, OVERLAP), position, image)
            for position, task in enumerate(tasks)
            for index, image in enumerate(shuffled(task, seed))
        ]
        places.sort(key=lambda place: place[0])
        # What was moved beyond an end of the stream belongs to its first or last step.
        numbers = [min(max(int(place), 0), len(tasks) - 1) for place, *_ in places]
        parts = [
            [place for place, own in zip(places, numbers, strict=True) if own == number] for number in range(len(tasks))
        ]
    steps: list[Step] = []
    known = 0
    for number, part in enumerate(parts):
        known = max(known, *(position + 1 for _, position, _ in part))
        steps.append(Step(f"part {number + 1}", [image for _, _, image in part], None, known))
    return Stream("mixed", 1, tasks, steps)


def drift_name(variant: str, kind: str) -> str:
    """Name of the stream in which a product drifts."""
    return f"{variant}, {kind}"


def drift_stream(model: ContinualPatchCore, data: AnomalibDataModule, variant: str, kind: str, seed: int) -> Stream:
    """A product that drifts in ten steps, each of which changes all its images, more and more.

    The steps are those of "Rethinking continual anomaly detection on the edge" (arXiv 2605.24251).

    Args:
        model: Brings pre-processor and backbone.
        data: The product, set up.
        variant: Its name.
        kind: ``color``, ``blur`` or ``geometry``.
        seed: Seed of the changes.

    Raises:
        ValueError: If the kind is unknown.
    """
    if kind not in DRIFTS:
        msg = f"Unknown drift {kind!r}. There are {', '.join(DRIFTS)}."
        raise ValueError(msg)
    rng = np.random.default_rng(seed)
    tasks = [
        embed(model, data, variant, f"{kind} {level}", partial(DRIFTS[kind], level, rng))
        for level in range(1, DRIFT_STEPS + 1)
    ]
    steps = [Step(task.name, shuffled(task, seed), task, known) for known, task in enumerate(tasks, start=1)]
    return Stream(drift_name(variant, kind), 1, tasks, steps)


def _color(
    level: int, rng: np.random.Generator, image: torch.Tensor, mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Brightness, contrast and saturation, each up or down by 0 to 0.05 at first and by 0.45 to 0.5 at last."""
    changes = (functional.adjust_brightness, functional.adjust_contrast, functional.adjust_saturation)
    for change in changes:
        image = change(image, 1 + rng.choice([-1, 1]) * rng.uniform(0.05 * (level - 1), 0.05 * level))
    return image, mask


def _blur(
    level: int, rng: np.random.Generator, image: torch.Tensor, mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gaussian blur with a kernel of 1 pixel and a sigma of 0.5 at first, and 19 pixels and 5 at last."""
    del rng
    return functional.gaussian_blur(image, [2 * level - 1] * 2, [0.5 * level] * 2), mask


def _geometry(
    level: int, rng: np.random.Generator, image: torch.Tensor, mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotation, shift, scale and shear by up to 2 degrees, 1 pixel, 1% and 1 degree at first, ten times that at last.

    The pixels are those of an image of 256 pixels.
    """
    pixels = level * max(image.shape[-2:]) / 256
    angle, x, y, scale, shear = rng.uniform(-1, 1, 5) * [2 * level, pixels, pixels, 0.01 * level, level]
    margin = min(image.shape[-2:]) // 3  # mirrored, so that nothing is empty
    moved = []
    for picture, mode in ((image, InterpolationMode.BILINEAR), (mask.float(), InterpolationMode.NEAREST)):
        padded = nn.functional.pad(picture[None], [margin] * 4, mode="reflect")[0]
        changed = functional.affine(padded, angle, [x, y], 1 + scale, [shear, 0.0], interpolation=mode)
        moved.append(changed[:, margin:-margin, margin:-margin])
    return moved[0], moved[1]


DRIFTS: dict[str, Callable[..., tuple[torch.Tensor, torch.Tensor]]] = {
    "color": _color,
    "blur": _blur,
    "geometry": _geometry,
}

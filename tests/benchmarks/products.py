# SPDX-License-Identifier: Apache-2.0
"""Patch embeddings of real products, each image embedded once, for the benchmarks of memory and thresholds."""

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from anomalib.models import ContinualPatchCore
from numpy.typing import NDArray
from PIL import Image

from openvino_export.images import load
from openvino_export.memory.search import NearestNeighbors

Array = NDArray[np.float32]


class Product:
    """Embeddings of a product in MVTec AD's layout.

    Args:
        root: Folder of the products.
        name: Name of its folder.
        model: Embeds the images.
        cache: Folder in which embeddings are kept, as float16.

    Attributes:
        train: Embeddings of the training images, shape ``(n, h, w, d)``, float16; `test` likewise.
        kinds: Kind of each test image, ``good`` or the name of a folder of defects.
        masks: Share of each patch that is defective, shape ``(n, h, w)``; None where a product has no masks.
    """

    def __init__(self, root: Path, name: str, model: ContinualPatchCore, cache: Path) -> None:
        self.name = name
        train = sorted((root / name / "train" / "good").iterdir())
        test = sorted((root / name / "test").glob("*/*"))
        self.kinds = np.array([path.parent.name for path in test])
        file = cache / f"{name}.npz"
        if not file.exists():
            cache.mkdir(parents=True, exist_ok=True)
            np.savez(file, train=_embedded(model, train), test=_embedded(model, test))
        with np.load(file) as arrays:
            self.train, self.test = arrays["train"], arrays["test"]
        if (len(self.train), len(self.test)) != (len(train), len(test)):
            msg = f"{file} is of other images; delete it."
            raise ValueError(msg)
        folder = root / name / "ground_truth"
        size = self.train.shape[1:3]
        self.masks = np.stack([_mask(folder, path, size) for path in test]) if folder.exists() else None

    def is_good(self) -> NDArray[np.bool_]:
        """Whether each test image is good."""
        return self.kinds == "good"


def flat(images: NDArray[np.floating]) -> Array:
    """Patches of shape ``(n, d)`` of one image or several."""
    return images.reshape(-1, images.shape[-1]).astype(np.float32)


def scores(images: NDArray[np.floating], vectors: Array) -> Array:
    """Image score of each, shape ``(n,)``, by vectors of shape ``(m, d)``."""
    index = NearestNeighbors(vectors)
    return np.array([index.search(flat(image))[0].max() for image in images], np.float32)


def write(results: Path, columns: Sequence[str], lines: Iterable[dict[str, Any]]) -> None:
    """Write lines of results as they come; what a line lacks is empty."""
    results.parent.mkdir(parents=True, exist_ok=True)
    with results.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        for line in lines:
            writer.writerow({
                key: round(value, 5) if isinstance(value, float) else value for key, value in line.items()
            })
            file.flush()


@torch.inference_mode()
def _embedded(model: ContinualPatchCore, paths: list[Path]) -> NDArray[np.float16]:
    prepare = model.pre_processor.transform
    return np.stack([
        model.model.embed(prepare(torch.from_numpy(load(path))[None]))[0].numpy().astype(np.float16) for path in paths
    ])


def _mask(folder: Path, path: Path, size: tuple[int, int]) -> Array:
    if path.parent.name == "good":
        return np.zeros(size, np.float32)
    with Image.open(folder / path.parent.name / f"{path.stem}_mask.png") as image:
        return np.asarray(image.convert("L").resize(size[::-1], Image.Resampling.BOX), np.float32) / 255

# SPDX-License-Identifier: Apache-2.0
"""What a validation keeps of its images, to set the thresholds of each variant."""

from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from openvino_export.images import image_hash
from openvino_export.memory.leave_one_out import Sample, kept_patches
from openvino_export.memory.memory_bank import MemoryBank
from openvino_export.memory.variant import Calibration

Array = NDArray[np.float32]


class ValidatedImages:
    """What sets thresholds of images.

    Attributes:
        kept: Patches that give the score of an image, their factors, and whether it is anomalous; by variant and hash.
    """

    def __init__(self) -> None:
        self.kept: dict[tuple[str, int], tuple[Array, Array, bool]] = {}

    def add(
        self,
        bank: MemoryBank,
        variants: Sequence[str],
        labels: Sequence[bool],
        embeddings: Array,
        images: Array,
    ) -> None:
        """Keep what sets thresholds of images; those that were learned, or of a variant that is unknown, set none.

        Args:
            bank: Bank that scored them.
            variants: Variant of each image.
            labels: Whether each image is anomalous.
            embeddings: Patch embeddings, shape ``(B, h, w, d)``.
            images: What they are embeddings of, normalised, shape ``(B, 3, H, W)``.
        """
        learned = set(bank.image_hashes.tolist())
        map_size = (images.shape[2], images.shape[3])
        for name, label, embedding, image in zip(variants, labels, embeddings, images, strict=True):
            value = image_hash(image)
            if name in bank.variants and value not in learned:
                rows, columns, dimension = embedding.shape
                sample = Sample(-1, embedding.reshape(-1, dimension), (rows, columns), map_size)
                self.kept[name, value] = (*kept_patches(bank.variants[name], sample), bool(label))

    def __iter__(self) -> Iterator[tuple[str, Calibration]]:
        """Each variant with what was kept, as :meth:`Update.validate` takes it."""
        by_variant = defaultdict(list)
        for (name, _), image in self.kept.items():
            by_variant[name].append(image)
        for name, kept in by_variant.items():
            yield (
                name,
                Calibration(
                    patches=np.stack([patches for patches, *_ in kept]),
                    origins=np.full(len(kept), -1, np.int32),
                    labels=np.array([label for *_, label in kept]),
                    factors=np.stack([factors for _, factors, _ in kept]),
                    scores=np.zeros(len(kept), np.float32),
                ),
            )

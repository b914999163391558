# SPDX-License-Identifier: Apache-2.0
"""What a validation keeps of its images, to set the thresholds of each variant."""

from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from openvino_export.memory.leave_one_out import Sample, kept_patches
from openvino_export.memory.memory_bank import MemoryBank
from openvino_export.memory.variant import Calibration

Array = NDArray[np.float32]


class ValidatedImages:
    """Patches of each image that give its score, and whether it is anomalous, by variant."""

    def __init__(self) -> None:
        self._kept: dict[str, list[tuple[Array, Array, bool]]] = defaultdict(list)

    def add(
        self,
        bank: MemoryBank,
        variants: Sequence[str],
        labels: Sequence[bool],
        embeddings: Array,
        map_size: tuple[int, int],
    ) -> None:
        """Keep what sets thresholds of images; those of a variant that is not in the bank set none.

        Args:
            bank: Bank that scored them.
            variants: Variant of each image.
            labels: Whether each image is anomalous.
            embeddings: Patch embeddings, shape ``(B, h, w, d)``.
            map_size: Height and width of the anomaly maps.
        """
        for name, label, embedding in zip(variants, labels, embeddings, strict=True):
            if name in bank.variants:
                rows, columns, dimension = embedding.shape
                sample = Sample(-1, embedding.reshape(-1, dimension), (rows, columns), map_size)
                self._kept[name].append((*kept_patches(bank.variants[name], sample), bool(label)))

    def __iter__(self) -> Iterator[tuple[str, Calibration]]:
        """Each variant with what was kept, as :meth:`Update.validate` takes it."""
        for name, kept in self._kept.items():
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

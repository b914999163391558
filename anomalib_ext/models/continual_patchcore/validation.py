# SPDX-License-Identifier: Apache-2.0
"""What a validation keeps of its images, to set the thresholds of each variant."""

from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from openvino_export.memory.memory_bank import MemoryBank
from openvino_export.memory.thresholds import calibration_patches

Array = NDArray[np.float32]


class ValidatedImages:
    """Patches of each image that give its score, and whether it is anomalous, by variant."""

    def __init__(self) -> None:
        self._patches: dict[str, list[Array]] = defaultdict(list)
        self._labels: dict[str, list[bool]] = defaultdict(list)

    def add(
        self, bank: MemoryBank, variants: Sequence[str], labels: Sequence[bool], patches: Array, scores: Array
    ) -> None:
        """Keep what sets thresholds of images; those of a variant that is not in the bank set none.

        Args:
            bank: Bank that scored them.
            variants: Variant of each image.
            labels: Whether each image is anomalous.
            patches: Patch embeddings, shape ``(B, n, d)``.
            scores: Distance of each patch to the nearest vector, shape ``(B, n)``.
        """
        for name, label, *image in zip(variants, labels, patches, scores, strict=True):
            if name in bank.variants:
                self._patches[name].append(calibration_patches(bank, name, *image))
                self._labels[name].append(bool(label))

    def __iter__(self) -> Iterator[tuple[str, Array, NDArray[np.bool_]]]:
        """Each variant with patches and labels, as :meth:`Update.calibrate` takes them."""
        for name, patches in self._patches.items():
            yield name, np.stack(patches), np.array(self._labels[name])

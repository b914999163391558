# SPDX-License-Identifier: Apache-2.0
"""From patch embeddings to a decision, with arrays.

The same rules are a graph for torch and OpenVINO: `image_score` and `anomaly_maps` in
`anomalib_ext/models/components/patchcore.py`, the vote in `ContinualPatchCoreModel`, ranges and normalisation in
`VariantPostProcessor`. `tests/openvino_export/test_decision.py` proves them equal.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .anomaly_map import anomaly_maps
from .bundle.constants import threshold_tables
from .memory.defects import raised
from .memory.thresholds import normalized, thresholds

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from .memory.memory_bank import MemoryBank

    Array = NDArray[np.float32]


@dataclass(frozen=True)
class Prediction:
    """What is said about an image.

    Attributes:
        pred_score: Anomaly score. If the model normalises, it is in [0, 1] with 0.5 at the threshold, and tells how
            rare such a score is among good images, see :func:`normalized`.
        pred_label: Whether the image is anomalous; None if the model has no thresholds.
        anomaly_map: Score of each pixel of the model's input, shape `(H, W)`.
        pred_mask: Which pixels are anomalous, shape `(H, W)`; None if the model has no thresholds.
        variant: Name of the variant that the image is judged by.
        is_sure: Whether the threshold rests on enough good images; None without a memory bank.
        source: Path of the image, if it came from a file.
    """

    pred_score: float
    pred_label: bool | None
    anomaly_map: Array
    pred_mask: NDArray[np.bool_] | None
    variant: str | None
    is_sure: bool | None = None
    source: str | None = None


class Decider:
    """Decides by a memory bank; it never changes.

    Args:
        bank: What is known, at least one vector.
        metadata: The bundle's, for whether scores are normalised and decided, and how, sensitivities, and the
            thresholds of a model that has none by variant.

    Attributes:
        ranges: For `"image"` and `"pixel"`, what raw scores of each variant are decided by, see
            :func:`threshold_tables`; NaN where nothing is known.
    """

    def __init__(self, bank: MemoryBank, metadata: Mapping[str, Any]) -> None:
        self.bank = bank
        self.names = list(bank.variants)
        self.metadata = metadata
        self.num_neighbors = min(int(metadata.get("num_neighbors", 1)), len(bank))
        self._search = bank.index.search  # made now, not at the first image
        self._owners = bank.owners()
        # Only neighbors that weigh need the vectors themselves.
        self._vectors = bank.vectors() if self.num_neighbors > 1 else None
        self.ranges: dict[str, Array] = {}
        self.are_sure = [thresholds(bank, name).is_sure() for name in self.names]
        self._by_rate = metadata.get("score") == "rate"
        tables = threshold_tables(bank, len(self.names), by_range=not self._by_rate)
        for kind in ("image", "pixel"):
            self.ranges[kind] = tables[f"{kind}_values"]
            if not metadata.get("variant_thresholds", True):
                stored = metadata.get("last_values", {}).get(kind, [None] * 3)
                self.ranges[kind][:] = [np.nan if value is None else value for value in stored]

    def decide(self, embedding: Array, size: tuple[int, int], source: str | None = None) -> Prediction:
        """Search the bank and decide.

        Args:
            embedding: Patch embeddings of an image, shape `(h, w, d)`.
            size: Height and width of the anomaly map.
            source: Path of the image, if it came from a file.

        Raises:
            ValueError: If the embedding is not finite.
        """
        patches = embedding.reshape(-1, embedding.shape[-1])
        check_finite(patches, source)
        distances, index = self._search(patches)
        position = vote(self._owners, index)
        distances = raised(patches, distances, self.bank.variants[self.names[position]].defects)
        score = image_score(patches, distances, index, self._vectors, self.num_neighbors)
        pixels = anomaly_maps(distances.reshape(embedding.shape[:2]), *size)
        pred_score, pred_label = self._apply("image", np.array([score], np.float32), position)
        anomaly_map, pred_mask = self._apply("pixel", pixels, position)
        return Prediction(
            pred_score=float(pred_score[0]),
            pred_label=None if pred_label is None else bool(pred_label[0]),
            anomaly_map=anomaly_map,
            pred_mask=pred_mask,
            variant=self.names[position],
            is_sure=self.are_sure[position],
            source=source,
        )

    def _apply(self, kind: str, raw: Array, position: int) -> tuple[Array, NDArray[np.bool_] | None]:
        """Normalise and decide raw scores by the range of a variant."""
        threshold, *others = self.ranges[kind][position]
        normalization = self.metadata.get("normalization")
        if normalization:
            raw = normalized(raw, threshold, *others) if self._by_rate else normalize(raw, threshold, *others)
        # Anomalib's own post-processor compares raw scores with the sensitivity, too.
        if normalization or not self.metadata.get("variant_thresholds", True):
            threshold = np.float32(1 - self.metadata.get(f"{kind}_sensitivity", 0.5))
        return raw, raw > threshold if self.metadata.get("thresholding") else None


def check_finite(patches: Array, name: str | None) -> None:
    """Refuse embeddings that are not finite.

    Raises:
        ValueError: If one is not.
    """
    if not np.isfinite(patches).all():
        msg = f"{name or 'The image'} gives embeddings that are not finite; look for damaged weights."
        raise ValueError(msg)


def vote(owners: NDArray[np.int64], index: NDArray[np.int64]) -> int:
    """Position of the variant to which most of the nearest vectors belong; of several, the first.

    Args:
        owners: Position of each vector's variant, shape `(m,)`.
        index: Nearest vector of each patch, shape `(n,)`.
    """
    return int(np.bincount(owners[index], minlength=1).argmax())


def image_score(
    patches: Array, distances: Array, index: NDArray[np.int64], vectors: Array | None, num_neighbors: int
) -> float:
    """PatchCore's image score (arXiv 2106.08265, eq. 7): the largest patch distance, weighed by its neighborhood.

    Args:
        patches: Patch embeddings, shape `(n, d)`.
        distances: Distance of each patch to its nearest vector, shape `(n,)`.
        index: Index of that vector, shape `(n,)`.
        vectors: The bank, shape `(m, d)`; not needed for one neighbor.
        num_neighbors: Neighbors that weigh, at most `m`; 1 takes the distance as it is.
    """
    position = int(distances.argmax())
    if num_neighbors == 1 or vectors is None:
        return float(distances[position])
    order = np.argsort(np.linalg.norm(vectors - vectors[index[position]], axis=1), kind="stable")
    support = np.linalg.norm(patches[position] - vectors[order[:num_neighbors]], axis=1)
    shares = np.exp(support - support.max())
    return float(distances[position] * (1 - shares[0] / shares.sum()))


def normalize(raw: Array, threshold: np.float32, lowest: np.float32, highest: np.float32) -> Array:
    """Anomalib's normalisation: 0.5 at the threshold, in units of the range, within [0, 1]."""
    if np.isnan(lowest) or np.isnan(highest):
        return raw
    if np.isnan(threshold):
        threshold = (highest + lowest) / 2
    if highest == lowest:
        return np.where(raw > threshold, 1.0, np.where(raw < threshold, 0.0, 0.5)).astype(np.float32)
    return np.clip((raw - threshold) / (highest - lowest) + np.float32(0.5), 0, 1)

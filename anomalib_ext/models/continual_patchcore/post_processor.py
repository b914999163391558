# SPDX-License-Identifier: Apache-2.0
"""Post-processing with thresholds of the variant that an image belongs to (ours)."""

from typing import Any

import torch
from anomalib.data import Batch, InferenceBatch
from anomalib.post_processing import PostProcessor

from anomalib_ext.models.components.patchcore import ExactBuffers
from openvino_export.bundle.constants import threshold_tables
from openvino_export.memory.memory_bank import MemoryBank

from .torch_model import ContinualInferenceBatch


class VariantPostProcessor(ExactBuffers, PostProcessor):
    """Anomalib's post-processor, with the threshold of each image's variant, and scores that mean the same for all.

    The thresholds follow from good images at a false-alarm rate, see ``openvino_export/memory/thresholds.py``; those
    that Anomalib's validation finds are not used.
    """

    image_values: torch.Tensor
    pixel_values: torch.Tensor

    def __init__(self, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(**kwargs)
        # Derived from the memory bank, so not part of the state; rows: threshold and steepness.
        self.register_buffer("image_values", torch.empty(0, 2), persistent=False)
        self.register_buffer("pixel_values", torch.empty(0, 2), persistent=False)

    def refresh(self, bank: MemoryBank) -> None:
        """Take the thresholds of all variants from the bank."""
        for name, table in threshold_tables(bank, len(bank.variants)).items():
            setattr(self, name, torch.from_numpy(table).to(self.image_min.device))

    def forward(self, predictions: ContinualInferenceBatch) -> InferenceBatch:  # type: ignore[override]
        """Normalise scores and maps and decide; shapes as in :class:`ContinualInferenceBatch`."""
        assert predictions.variant is not None
        score, label = self._process("image", predictions.pred_score, predictions.variant)
        anomaly_map, mask = self._process("pixel", predictions.anomaly_map, predictions.variant)
        return InferenceBatch(pred_score=score, pred_label=label, anomaly_map=anomaly_map, pred_mask=mask)

    def post_process_batch(self, batch: Batch) -> None:
        """Normalise and decide in place; ``batch.variant`` holds the variants, shape ``(B,)``."""
        predictions = ContinualInferenceBatch(
            pred_score=batch.pred_score,
            anomaly_map=batch.anomaly_map,
            variant=getattr(batch, "variant"),  # noqa: B009  # no field of Anomalib's batch
        )
        batch.update(**self(predictions)._asdict())

    def _process(
        self,
        kind: str,
        values: torch.Tensor,
        variant: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        shape = (-1,) + (1,) * (values.ndim - 1)
        rows = getattr(self, f"{kind}_values")[variant]
        threshold, steepness = (value.reshape(shape) for value in rows.unbind(dim=-1))
        decided: torch.Tensor | None = None
        if self.enable_normalization:
            steps = (values / threshold).log()  # as `normalized` in openvino_export/memory/thresholds.py
            side = 0.5 * (-steepness * steps.abs()).exp()
            values = torch.where(steps > 0, 1 - side, side)
            threshold = getattr(self, f"normalized_{kind}_threshold")
        if self.enable_thresholding:
            # Without a threshold nothing is anomalous; to OpenVINO, any value is larger than NaN.
            decided = values > torch.as_tensor(threshold).nan_to_num(torch.inf)
        return values, decided

# SPDX-License-Identifier: Apache-2.0
"""Drift in a trainer: loggers are told how strongly accepted images speak for it, as `watch` does on the edge."""

import logging
from typing import TYPE_CHECKING, Any

import numpy as np
from anomalib.data import ImageBatch
from lightning.pytorch import Callback, LightningModule, Trainer

from anomalib_ext.files import safe_name
from openvino_export.decision import Prediction
from openvino_export.drift import PARTS_UNTIL_FALSE_WARNING, DriftMonitor
from openvino_export.memory.thresholds import thresholds

if TYPE_CHECKING:
    from openvino_export.memory.memory_bank import MemoryBank

logger = logging.getLogger(__name__)


class DriftCallback(Callback):
    """Watches what a trainer tests or predicts, in its order, and tells the loggers at the end.

    They get ``drift/<variant>``, from 0 on; from 1 on, good images no longer look as learned, which is also warned of.
    """

    def __init__(self) -> None:
        self._bank: MemoryBank | None = None
        self._monitor: DriftMonitor | None = None
        self._are_sure: dict[str, bool] = {}

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to watch what is judged by the bank as it is now."""
        del trainer
        self._bank = getattr(pl_module.model, "searched", None)
        # Other post-processors know nothing of rates.
        is_by_rate = hasattr(getattr(pl_module, "post_processor", None), "image_values")
        self._monitor = None
        if self._bank is not None and is_by_rate:
            self._monitor = DriftMonitor(self._bank)
            self._are_sure = {name: thresholds(self._bank, name).is_sure() for name in self._bank.variants}

    on_predict_start = on_test_start

    def on_test_batch_end(  # Lightning's hook
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,  # noqa: ANN401
        batch: Any,  # noqa: ANN401
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Watch a batch."""
        del trainer, pl_module, batch, batch_idx, dataloader_idx
        if self._monitor is None or self._bank is None or not isinstance(outputs, ImageBatch):
            return
        if outputs.pred_score is None or outputs.pred_label is None:
            return
        names = list(self._bank.variants)
        columns = (outputs.pred_score, outputs.pred_label, getattr(outputs, "variant"))  # noqa: B009  # no field
        for score, label, position in zip(*(column.tolist() for column in columns), strict=True):
            name = names[position]
            nothing = np.empty(0, np.float32)
            if self._monitor.add(Prediction(score, bool(label), nothing, None, name, self._are_sure[name])):
                logger.warning(
                    "Good images of %s no longer look as learned. If they are right, learn some of them.", name
                )

    on_predict_batch_end = on_test_batch_end

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell the loggers."""
        del pl_module
        if self._monitor is None or self._bank is None:
            return
        evidence = {
            f"drift/{safe_name(name)}": self._monitor.evidence(name) / PARTS_UNTIL_FALSE_WARNING
            for name in self._bank.variants
        }
        for each in trainer.loggers:
            each.log_metrics(evidence, step=trainer.global_step)
        self._monitor = None

    on_predict_end = on_test_end

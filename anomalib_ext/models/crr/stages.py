# SPDX-License-Identifier: Apache-2.0
"""The two stages of a fit: which one it is time for, its schedule, one progress bar for both, and an end."""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from anomalib.models.image.dinomaly.components import WarmCosineScheduler
from lightning.pytorch import Callback, LightningModule, Trainer
from tqdm.auto import tqdm

from .torch_model import CrrModel

STAGES = ("repair", "segment")


def current_stage(steps: Sequence[int], lengths: Sequence[int]) -> str | None:
    """Name of the stage that is to be learned next, if any is left.

    Args:
        steps: Number of steps that each stage has learned for.
        lengths: Number of steps that each is to learn for; 0 for a stage that is left out.
    """
    return next((name for name, done, length in zip(STAGES, steps, lengths, strict=True) if done < length), None)


class RepairSchedule(WarmCosineScheduler):
    """Dinomaly's schedule without NumPy, which checkpoints that run no code do not hold."""

    def get_lr(self) -> list[float]:
        """Learning rate of each group."""
        return [float(rate) for rate in super().get_lr()]

    def state_dict(self) -> dict[str, Any]:
        """How far it is; how long it is, the model says."""
        return {key: value for key, value in super().state_dict().items() if key not in {"schedule", "total_iters"}}


class StagesProgress(Callback):
    """Shows both stages of a fit in one bar, in place of one for each epoch, and ends the fit after them.

    Args:
        model: Counts the steps of the stages.
        lengths: Number of steps that each stage is to learn for.
    """

    def __init__(self, model: CrrModel, lengths: Sequence[int]) -> None:
        self.model = model
        self.lengths = lengths
        self._bar: tqdm | None = None
        self._undo = ExitStack()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Replace the bar."""
        del pl_module
        shown = trainer.progress_bar_callback
        if shown is not None:
            shown.disable()
            self._undo.callback(shown.enable)
            self._bar = self._undo.enter_context(tqdm(disable=not trainer.is_global_zero, dynamic_ncols=True))

    def on_train_batch_end(self, trainer: Trainer, *args) -> None:
        """Show how far the fit is, and end it."""
        del args
        steps = self.model.steps
        stage = current_stage(steps, self.lengths)
        if self._bar is not None:
            self._bar.total = sum(self.lengths)
            if stage is not None:
                self._bar.set_description(stage, refresh=False)
            done = sum(step for step, length in zip(steps, self.lengths, strict=True) if length)
            self._bar.update(done - self._bar.n)
        if stage is None:
            trainer.should_stop = True
            if trainer.check_val_every_n_epoch is not None:
                # The end is validated, and with that saved, whichever epoch it comes in.
                self._undo.callback(setattr, trainer, "check_val_every_n_epoch", trainer.check_val_every_n_epoch)
                trainer.check_val_every_n_epoch = 1

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the trainer as it was."""
        del trainer, pl_module, stage
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Likewise, for after a failure there is no teardown."""
        del trainer, pl_module, exception
        self._close()

    def _close(self) -> None:
        self._undo.close()
        self._bar = None

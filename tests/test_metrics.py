# SPDX-License-Identifier: Apache-2.0
"""The metrics of continual learning."""

import math
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader
from torchmetrics import MetricCollection

from anomalib_ext.metrics import (
    AverageValue,
    BackwardTransfer,
    ForgettingMeasure,
    IncrementalAverage,
    RelativeGap,
    TaskMatrix,
    task_matrix,
)

VALUES = st.integers(2, 6).flatmap(
    lambda tasks: arrays.arrays(np.float32, (tasks, tasks), elements=st.floats(0, 1, width=32)),
)


def _filled(metric: TaskMatrix, values: np.ndarray) -> torch.Tensor:
    for step, row in enumerate(values):
        for task in range(step + 1):
            metric.update(step, task, float(row[task]))
    return metric.compute()


def test_example_by_hand() -> None:
    """Three tasks, of which the first is forgotten and the second improves."""
    values = np.array([[0.9, 0, 0], [0.95, 0.6, 0], [0.7, 0.8, 1.0]])
    assert float(_filled(AverageValue(), values)) == pytest.approx((0.7 + 0.8 + 1.0) / 3)
    assert float(_filled(IncrementalAverage(), values)) == pytest.approx((0.9 + 0.775 + 2.5 / 3) / 3)
    assert float(_filled(ForgettingMeasure(), values)) == pytest.approx(((0.95 - 0.7) + (0.6 - 0.8)) / 2)
    assert float(_filled(BackwardTransfer(), values)) == pytest.approx(((0.7 - 0.9) + (0.8 - 0.6)) / 2)
    assert float(_filled(RelativeGap(joint=0.9), values)) == pytest.approx((0.9 - 2.5 / 3) / 0.9)


@given(VALUES)
def test_matrix_gives_back_what_it_was_given(values: np.ndarray) -> None:
    """Below the diagonal the values, above it NaN."""
    matrix = _filled(TaskMatrix(), values).numpy()
    known = np.tri(len(values), dtype=bool)
    np.testing.assert_array_equal(matrix[known], values[known])
    assert np.isnan(matrix[~known]).all()


def test_matrix_has_room_for_what_is_still_to_come() -> None:
    """The last value of a place counts, and an entry beyond the room makes more."""
    nan = math.nan
    entries = [(0, 1, 0.5), (0, 1, 0.7)]
    np.testing.assert_array_equal(task_matrix(entries, 3, 2), [[nan, 0.7], [nan, nan], [nan, nan]])
    np.testing.assert_array_equal(task_matrix(entries), [[nan, 0.7]])
    np.testing.assert_array_equal(task_matrix([(1, 0, 0.5)], 1, 1), [[nan], [0.5]])
    assert task_matrix([]).shape == TaskMatrix().compute().shape == (0, 0)


def test_matrix_of_several_processes() -> None:
    """Their entries, which come as one tensor, are joined."""

    def gather(own: torch.Tensor, group: object) -> list[torch.Tensor]:
        del group
        return [own, torch.tensor([[1, 1, 0.7]])]

    matrix = TaskMatrix(dist_sync_fn=gather, distributed_available_fn=lambda: True)
    matrix.update(1, 0, 0.5)
    np.testing.assert_array_equal(matrix.compute(), np.float32([[math.nan] * 2, [0.5, 0.7]]))


@given(VALUES)
def test_forgetting_is_at_least_the_loss_since_learning(values: np.ndarray) -> None:
    """The best value is at least the first, so that forgetting is never below the negative backward transfer."""
    assert _filled(ForgettingMeasure(), values) >= -_filled(BackwardTransfer(), values) - 1e-6


@given(VALUES)
def test_nothing_is_forgotten_while_values_rise(values: np.ndarray) -> None:
    """With rising values forgetting is not positive and backward transfer not negative."""
    rising = np.sort(values, axis=0)
    assert _filled(ForgettingMeasure(), rising) <= 0
    assert _filled(BackwardTransfer(), rising) >= 0


@given(VALUES, st.randoms(use_true_random=False))
def test_order_of_updates_does_not_matter(values: np.ndarray, random: Random) -> None:
    """The metrics depend on the matrix alone."""
    entries = [(step, task) for step in range(len(values)) for task in range(step + 1)]
    for kind in (AverageValue, IncrementalAverage, ForgettingMeasure, BackwardTransfer):
        metric = kind()
        random.shuffle(entries)
        for step, task in entries:
            metric.update(step, task, float(values[step, task]))
        assert float(metric.compute()) == pytest.approx(float(_filled(kind(), values)), abs=1e-6)


@given(VALUES)
def test_gap_is_zero_to_oneself(values: np.ndarray) -> None:
    """A learner as good as joint learning has no gap."""
    values = values + np.float32(0.5)
    joint = float(_filled(AverageValue(), values))
    assert float(_filled(RelativeGap(joint), values)) == pytest.approx(0, abs=1e-6)


def test_a_missing_value_is_seen() -> None:
    """Nothing is made up for a task that was not measured at the end."""
    for kind in (AverageValue, ForgettingMeasure, BackwardTransfer):
        metric = kind()
        metric.update(0, 0, 0.9)
        metric.update(1, 1, 0.8)
        assert math.isnan(metric.compute())


def test_one_task_cannot_be_forgotten() -> None:
    """There is no earlier task, and without any value there is no average."""
    for kind in (ForgettingMeasure, BackwardTransfer):
        assert math.isnan(_filled(kind(), np.ones((1, 1))))
    assert math.isnan(AverageValue().compute())


def test_refuses_nonsense() -> None:
    """Errors say what was wrong."""
    with pytest.raises(ValueError, match="counted from 0, got step -1"):
        TaskMatrix().update(-1, 0, 1.0)
    with pytest.raises(ValueError, match=r"must be positive, got 0\.0"):
        RelativeGap(joint=0.0)


def test_in_a_lightning_module() -> None:
    """Updated in the steps of a trainer, logged at its end, all on one state."""

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.metrics = MetricCollection([AverageValue(), ForgettingMeasure(), BackwardTransfer()])

        def test_step(self, batch: torch.Tensor) -> None:
            for step, task, value in batch:
                self.metrics.update(int(step), int(task), value)

        def on_test_epoch_end(self) -> None:
            self.log_dict(self.metrics.compute())

    module = Module()
    trainer = Trainer(logger=False, enable_progress_bar=False, accelerator="cpu", enable_model_summary=False)
    entries = torch.tensor([[0, 0, 0.9], [1, 0, 0.5], [1, 1, 0.7]])
    values = trainer.test(module, DataLoader(entries, batch_size=2), verbose=False)[0]
    assert values == pytest.approx({"AverageValue": 0.6, "ForgettingMeasure": 0.4, "BackwardTransfer": -0.4})

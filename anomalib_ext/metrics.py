# SPDX-License-Identifier: Apache-2.0
"""Metrics of continual learning, for any value that is measured on each task after each learning step.

All of them see the matrix R, whose entry ``R[i, j]`` is the value on task ``j`` after step ``i``; step ``j`` is the one
that learns task ``j``. They are updated alike, so a ``torchmetrics.MetricCollection`` of them keeps one state.
"""

from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torchmetrics import Metric

__all__ = [
    "AverageValue",
    "BackwardTransfer",
    "ForgettingMeasure",
    "IncrementalAverage",
    "RelativeGap",
    "TaskMatrix",
    "task_matrix",
]


def task_matrix(entries: Iterable[tuple[int, int, float]], steps: int = 0, tasks: int = 0) -> NDArray[np.float64]:
    """Build the matrix R from its entries.

    Args:
        entries: Step and task, both counted from 0, and value. Of several for one place, the last counts.
        steps: Least number of rows, for steps that are still to come.
        tasks: Least number of columns.

    Returns:
        Values of shape ``(steps, tasks)``, or larger if an entry needs it; NaN where nothing was measured.
    """
    entries = list(entries)
    shape = (max([steps, *(step + 1 for step, _, _ in entries)]), max([tasks, *(task + 1 for _, task, _ in entries)]))
    matrix = np.full(shape, np.nan)
    for step, task, value in entries:
        matrix[step, task] = value
    return matrix


class TaskMatrix(Metric):
    """The matrix R itself, of shape ``(steps, tasks)``; NaN where nothing was measured.

    The matrix grows with what is given. A value that is given twice counts as it was given last.

    Example:
        >>> matrix = TaskMatrix()
        >>> matrix.update(step=0, task=0, value=0.9)
        >>> matrix.update(step=1, task=0, value=0.8)
        >>> matrix.update(step=1, task=1, value=1.0)
        >>> matrix.compute()
        tensor([[0.9000,    nan],
                [0.8000, 1.0000]])
    """

    full_state_update = False
    higher_is_better: bool | None = True
    entries: list[torch.Tensor]

    def __init__(self, **kwargs) -> None:
        super().__init__(**kwargs)
        self.add_state("entries", default=[], dist_reduce_fx="cat")

    def update(self, step: int, task: int, value: float | torch.Tensor) -> None:
        """Take in the value on a task after a step.

        Args:
            step: Index of the step, from 0.
            task: Index of the task, from 0, in the order in which they are learned.
            value: The value, the higher the better.

        Raises:
            ValueError: If an index is negative.
        """
        if step < 0 or task < 0:
            msg = f"Steps and tasks are counted from 0, got step {step} and task {task}."
            raise ValueError(msg)
        self.entries.append(torch.tensor([[float(step), float(task), float(value)]], device=self.device))

    def compute(self) -> torch.Tensor:
        """Return the matrix."""
        # One tensor once processes have been joined.
        rows = [row for part in self.entries for row in part.reshape(-1, 3).tolist()]
        matrix = task_matrix((int(step), int(task), value) for step, task, value in rows)
        return torch.tensor(matrix, dtype=torch.float32, device=self.device)


class AverageValue(TaskMatrix):
    """Mean over all tasks after the last step T: ``mean_j R[T, j]``.

    With accuracies, it is the average accuracy, ACC, of Lopez-Paz and Ranzato (2017), "Gradient Episodic Memory for
    Continual Learning", section 2.
    """

    def compute(self) -> torch.Tensor:
        """Return the mean, NaN if a task was not measured after the last step."""
        return super().compute()[-1:].mean()


class IncrementalAverage(TaskMatrix):
    """Mean over the steps of the mean over the tasks learned by then: ``mean_i mean_{j<=i} R[i, j]``.

    With accuracies, it is the average incremental accuracy of Rebuffi et al. (2017), "iCaRL", section 4.1.
    """

    def compute(self) -> torch.Tensor:
        """Return the mean, NaN if a task was not measured after a step that follows it."""
        matrix = super().compute()
        steps = [matrix[step, : step + 1].mean() for step in range(len(matrix))]
        return torch.stack(steps).mean() if steps else matrix.mean()  # NaN


class ForgettingMeasure(TaskMatrix):
    """How far each earlier task has fallen below its best: ``mean_{j<T} (max_{j<=i<T} R[i, j] - R[T, j])``.

    Chaudhry et al. (2018), "Riemannian Walk for Incremental Learning", section 3. They take the best over all earlier
    steps; those before the task was learned are left out here, for what is not known cannot be forgotten. Negative if
    later steps have helped.
    """

    higher_is_better = False

    def compute(self) -> torch.Tensor:
        """Return the mean; NaN with a single task, or if a value is missing."""
        matrix = super().compute()
        last = len(matrix) - 1
        falls = [
            matrix[task:last, task].max() - matrix[last, task] for task in range(min(matrix.shape[1], max(last, 0)))
        ]
        return torch.stack(falls).mean() if falls else torch.full_like(matrix.sum(), torch.nan)


class BackwardTransfer(TaskMatrix):
    """What later steps have changed of each earlier task: ``mean_{j<T} (R[T, j] - R[j, j])``.

    BWT of Lopez-Paz and Ranzato (2017), "Gradient Episodic Memory for Continual Learning", section 2. Negative if
    tasks were forgotten.
    """

    def compute(self) -> torch.Tensor:
        """Return the mean; NaN with a single task, or if a value is missing."""
        matrix = super().compute()
        last = len(matrix) - 1
        changes = [matrix[last, task] - matrix[task, task] for task in range(min(matrix.shape[1], max(last, 0)))]
        return torch.stack(changes).mean() if changes else torch.full_like(matrix.sum(), torch.nan)


class RelativeGap(TaskMatrix):
    """What is missing to a learner that sees all tasks at once: ``(joint - mean_j R[T, j]) / joint``.

    The definition is ours.

    Args:
        joint: Mean value over all tasks of the learner that sees them at once.
        **kwargs: Arguments of ``torchmetrics.Metric``.

    Raises:
        ValueError: If ``joint`` is not positive.
    """

    higher_is_better = False

    def __init__(self, joint: float, **kwargs) -> None:
        super().__init__(**kwargs)
        if not joint > 0:
            msg = f"The value of joint learning must be positive, got {joint}."
            raise ValueError(msg)
        self.joint = float(joint)

    def compute(self) -> torch.Tensor:
        """Return the gap, NaN if a task was not measured after the last step."""
        return (self.joint - super().compute()[-1:].mean()) / self.joint

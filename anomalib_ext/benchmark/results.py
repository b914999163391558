# SPDX-License-Identifier: Apache-2.0
"""What a benchmark has measured, on disk, so that an interrupted one goes on where it was."""

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast

import safetensors.numpy

from anomalib_ext.files import atomic_write, write_table

from .learners import Learner


@dataclass(frozen=True)
class Row:
    """How a learner judges a task after a step of a stream.

    Attributes:
        stream: Name of the stream.
        order: Number of the order of its tasks.
        learner: Name of the learner, and size of its memory bank.
        step: Number of the step; of the stream ``few-shot``, number of images learned.
        learned: What was learned in the step.
        task: What is judged.
        image_AUROC: Of images.
        image_F1Score: Of images, by thresholds.
        pixel_AUROC: Of pixels, NaN without masks.
        pixel_AUPRO: Of regions, NaN without masks.
        false_alarms: Share of good images that are called anomalous.
        misses: Share of anomalous images that are called good.
        ms_per_image: Time to judge one, features apart.
        update_seconds: Time to learn the step, features apart; of the stream ``few-shot``, to select alone.
        peak_mib: Memory that the update needs, with the patches that it must hold at once; NaN where it is not known.
        bank_mib: Memory that judging needs, the backbone apart.
    """

    stream: str
    order: int
    learner: str
    step: int
    learned: str
    task: str
    image_AUROC: float  # noqa: N815  # Anomalib's name
    image_F1Score: float  # noqa: N815  # Anomalib's name
    pixel_AUROC: float  # noqa: N815  # Anomalib's name
    pixel_AUPRO: float  # noqa: N815  # Anomalib's name
    false_alarms: float
    misses: float
    ms_per_image: float
    update_seconds: float
    peak_mib: float
    bank_mib: float

    @classmethod
    def read(cls, cells: dict[str, str]) -> "Row":
        """Row of a CSV file."""
        return cls(**{field.name: cast("type", field.type)(cells[field.name]) for field in fields(cls)})


class Results:
    """Rows on disk, replaced at once after every step, and the state of the learner that is under way.

    Args:
        folder: Where they are.
        settings: What they must agree in.

    Raises:
        ValueError: If there are results of other settings.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder = folder
        self.settings = settings
        self.rows: list[Row] = []
        if (folder / "settings.json").exists():
            before = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
            # As text, in which the order of the products counts.
            other = [key for key in settings if json.dumps(settings[key]) != json.dumps(before.get(key))]
            if other:
                msg = (
                    f"{folder} holds results of another {', '.join(other)}: {[before.get(key) for key in other]} in "
                    f"place of {[settings[key] for key in other]}. Give another results_dir, or remove that folder."
                )
                raise ValueError(msg)
        with atomic_write(folder / "settings.json") as file:
            file.write(json.dumps(settings, indent=2).encode())
        if (folder / "results.csv").exists():
            with (folder / "results.csv").open(encoding="utf-8", newline="") as file:
                self.rows = [Row.read(cells) for cells in csv.DictReader(file)]

    def of(self, stream: str, order: int, learner: str) -> list[Row]:
        """Rows of a learner on a stream."""
        return [row for row in self.rows if (row.stream, row.order, row.learner) == (stream, order, learner)]

    def steps(self, stream: str, order: int, learner: str) -> int:
        """Number of steps of a stream that a learner has done."""
        return max((row.step for row in self.of(stream, order, learner)), default=0)

    def add(self, rows: Sequence[Row]) -> None:
        """Write further rows."""
        self.rows = [*self.rows, *rows]
        write_table([vars(row) for row in self.rows], self.folder / "results.csv")

    def _states(self, run: str) -> list[Path]:
        return sorted((self.folder / "state").glob(f"{run}-step*.safetensors"))

    def save(self, run: str, step: int, learner: Learner, rows: Sequence[Row]) -> None:
        """Keep what the next step of a learner depends on, then the rows; a kill in between leaves the step before."""
        arrays, plain = learner.state()
        before = self._states(run)
        path = self.folder / "state" / f"{run}-step{step}.safetensors"
        with atomic_write(path) as file:
            file.write(safetensors.numpy.save(arrays, {"plain": json.dumps(plain)}))
        self.add(rows)
        for other in before:
            if other != path:
                other.unlink()

    def load(self, run: str, step: int, learner: Learner) -> None:
        """Have a learner go on after a step."""
        with safetensors.safe_open(self.folder / "state" / f"{run}-step{step}.safetensors", "numpy") as file:
            plain = json.loads(file.metadata()["plain"])
            learner.load(({name: file.get_tensor(name) for name in file.keys()}, plain))  # noqa: SIM118  # no mapping

    def drop(self, run: str) -> None:
        """Remove the state of a learner that has come to its end."""
        for path in self._states(run):
            path.unlink()

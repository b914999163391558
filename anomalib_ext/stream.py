# SPDX-License-Identifier: Apache-2.0
"""Learn a stream of product variants, one after another, and evaluate all known ones after each."""

import csv
import io
from pathlib import Path

from anomalib.engine import Engine
from anomalib.models import AnomalibModule
from anomalib.visualization import ImageVisualizer
from lightning.pytorch import seed_everything
from rich.console import Console
from rich.table import Table

from anomalib_ext.data import MultiCategory
from anomalib_ext.models.components.training import replacing

METRICS = ("image_AUROC", "image_F1Score", "pixel_AUROC", "pixel_F1Score")


def learn_stream(
    model: AnomalibModule,
    data: MultiCategory,
    results_dir: Path | str = "results/stream",
    seed: int = 0,
) -> list[dict[str, str | int | float]]:
    """Fit one model on one variant after another; after each, test it on all variants learned so far.

    Pictures of the last step, with anomaly maps, go to ``results_dir/images/<variant>``, checkpoints to
    ``results_dir/<model>``, and the measured values to ``results_dir/results.csv``, written anew after every step.

    Args:
        model: Model whose ``fit`` adds to what it knows, such as ``ContinualPatchCore``. Its visualizer is replaced
            by one for the pictures of the last step.
        data: The variants, each a category, in the order in which they arrive.
        results_dir: Folder for the results.
        seed: Seed of all random numbers.

    Returns:
        A row for each step and variant known by then.
    """
    names = list(data.datamodules)
    results_dir = Path(results_dir)
    results_dir.mkdir(parents=True, exist_ok=True)
    seed_everything(seed, verbose=False)
    model.visualizer = None
    console = Console()
    rows: list[dict[str, str | int | float]] = []
    for step, name in enumerate(names, start=1):
        engine = Engine(default_root_dir=results_dir, enable_model_summary=False, enable_progress_bar=False)
        engine.fit(model, datamodule=data.datamodules[name])
        console.print(f"[bold]{step}/{len(names)} {name}[/bold]: {getattr(model, 'last_report', 'learned')}")
        for known in names[:step]:
            if step == len(names):  # pictures of the last step are enough
                model.visualizer = ImageVisualizer(output_dir=results_dir / "images" / known)
            tester = Engine(default_root_dir=results_dir, enable_model_summary=False, enable_progress_bar=False)
            values = tester.test(model, datamodule=data.datamodules[known], verbose=False)[0]
            rows.append({
                "step": step,
                "learned": name,
                "variant": known,
                **{key: values.get(key, float("nan")) for key in METRICS},
            })
        _write(rows, results_dir / "results.csv")
    for metric in ("image_AUROC", "image_F1Score"):
        console.print(_table(rows, names, metric))
    console.print(f"Pictures, checkpoints and results.csv are in {results_dir}")
    return rows


def _write(rows: list[dict[str, str | int | float]], path: Path) -> None:
    """Write all at once: an interrupted stream leaves the table of the step before."""
    with replacing(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8", newline="")
        writer = csv.DictWriter(text, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
        text.detach()


def _table(rows: list[dict[str, str | int | float]], names: list[str], metric: str) -> Table:
    """Values of one metric: a row for each step, a column for each variant, and their mean."""
    table = Table(title=f"{metric} of each variant after each step")
    for heading in ("after learning", *names, "mean"):
        table.add_column(heading)
    for name in names:
        values = {row["variant"]: float(row[metric]) for row in rows if row["learned"] == name}
        cells = [f"{values[known]:.3f}" if known in values else "" for known in names]
        table.add_row(name, *cells, f"{sum(values.values()) / len(values):.3f}")
    return table

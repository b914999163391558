# SPDX-License-Identifier: Apache-2.0
"""Learn a stream of product variants, one after another, and evaluate all known ones after each."""

import json
import math
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from anomalib.data import AnomalibDataModule, ImageBatch, ImageItem
from anomalib.engine import Engine
from anomalib.loggers.base import ImageLoggerBase
from anomalib.models import AnomalibModule
from anomalib.visualization import ImageVisualizer
from anomalib.visualization.image.functional import add_text_to_image, create_image_grid
from anomalib.visualization.image.item_visualizer import visualize_image_item
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.loggers import Logger, MLFlowLogger
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.table import Table

from anomalib_ext.data import MultiCategory
from anomalib_ext.data.multi_category import MEAN
from anomalib_ext.files import atomic_write, safe_name, write_table
from anomalib_ext.metrics import task_matrix
from anomalib_ext.plots import heat_maps, to_array

# Of each variant, after each step.
VARIANT_METRICS = ("image_AUROC", "image_F1Score", "pixel_AUROC", "pixel_F1Score")
WORST = 3  # pictures of each kind of mistake, variant and step

Row = dict[str, Any]


def learn_stream(
    model: AnomalibModule,
    data: MultiCategory,
    results_dir: Path | str = "results/stream",
    seed: int = 0,
    logger: Logger | list[Logger] | None = None,
) -> list[Row]:
    """Fit one model on one variant after another; after each, test it on all variants learned so far.

    ``results_dir`` gets, written anew after every step:

    - ``results.csv``: the metrics of each variant known by then,
    - ``scores.csv``: score and decision of each test image, and the picture if it is among the worst mistakes,
    - ``metrics.csv``: all values that loggers get, by step and name.

    Pictures of the worst mistakes go to ``worst/<step>/<variant>``, those of all images of the last step to
    ``images/<variant>``, checkpoints to ``<model>``, and the arguments of the model to ``hparams.json``.

    Args:
        model: Model whose ``fit`` adds to what it knows, such as ``ContinualPatchCore``. Its visualizer is replaced.
        data: The variants, each a category, in the order in which they arrive.
        results_dir: Folder for the results.
        seed: Seed of all random numbers.
        logger: Loggers of Lightning or Anomalib. Their global step is the step of the stream. They get the metrics of
            each variant as ``<variant>/<metric>``, and their mean; what the model logs in ``fit``, such as
            ``memory/share/<variant>``; and ``update_seconds``, the time of ``fit``. MLflow and the loggers of Anomalib
            also get pictures: the worst mistakes, and R, the AUROC of each variant after each step.

    Returns:
        The rows of ``results.csv``, one for each step and variant known by then.
    """
    names = list(data.datamodules)
    results_dir = Path(results_dir)
    hparams = {"model": type(model).__name__, **model.hparams, "variants": names, "seed": seed}
    seed_everything(seed, verbose=False)
    model.visualizer = None
    console = Console()
    results: list[Row] = []
    scores: list[Row] = []
    metrics: list[Row] = []
    with _finalized([logger] if isinstance(logger, Logger) else logger or []) as loggers:
        for each in loggers:
            each.log_hyperparams(hparams)
        for step, name in enumerate(names, start=1):
            start = time.perf_counter()
            learner = _engine(results_dir)
            learner.fit(model, datamodule=data.datamodules[name])
            values = {key: float(value) for key, value in learner.trainer.callback_metrics.items()}
            values["update_seconds"] = time.perf_counter() - start
            console.print(f"[bold]{step}/{len(names)} {name}[/bold]: {getattr(model, 'last_report', 'learned')}")
            pictures = {}
            for known in names[:step]:
                safe = safe_name(known)
                # Of the mistakes there are pictures after each step; of all images, those of the last are enough.
                judged = JudgedImages(results_dir / "images" / safe if step == len(names) else None)
                tested = _test(model, data.datamodules[known], judged, results_dir)
                row = {"step": step, "learned": name, "variant": known}
                results.append({**row, **{key: tested.get(key, math.nan) for key in VARIANT_METRICS}})
                judged.save_worst(results_dir, f"worst/{step}/{safe}")
                scores += [{**row, **image} for image in judged.rows]
                pictures.update({f"{kind}/{safe}": sheet for kind, sheet in judged.sheets().items()})
                values = {key: value for key, value in values.items() if key not in tested}  # of the validation set
                values.update({f"{safe}/{key}": value for key, value in tested.items()})
            for key in VARIANT_METRICS:
                # A variant may lack a metric, as that of pixels without masks.
                measured = [row[key] for row in results if row["step"] == step and not math.isnan(row[key])]
                values[f"{MEAN}/{key}"] = float(np.mean(measured)) if measured else math.nan
            values = {key: value for key, value in values.items() if not math.isnan(value)}
            metrics += [{"step": step, "name": key, "value": value} for key, value in values.items()]
            with atomic_write(results_dir / "hparams.json") as file:
                file.write(json.dumps(hparams, default=str, indent=2).encode())
            write_table(metrics, results_dir / "metrics.csv")
            write_table(scores, results_dir / "scores.csv")
            write_table(results, results_dir / "results.csv")  # at the end, so that the others hold each step in it
            matrix = {"image_AUROC": _matrix(results, names, "image_AUROC")}
            pictures["R/image_AUROC"] = to_array(heat_maps(matrix, names, names, "each variant after each step"))
            for each in loggers:
                each.log_metrics(values, step=step)
                for key, picture in pictures.items():
                    _log_picture(each, key, picture, step)
                each.save()
    for metric in ("image_AUROC", "image_F1Score"):
        console.print(_table(results, names, metric))
    console.print(f"Pictures, checkpoints and results.csv are in {results_dir}")
    return results


class JudgedImages(ImageVisualizer):
    """Scores and decisions of a test, and pictures of its worst mistakes.

    Args:
        output_dir: Folder for pictures of all images; ``None`` for none.

    Attributes:
        rows: For each image ``image_path``, ``gt_label``, ``pred_score``, ``pred_label``, ``threshold`` above which a
            score is called anomalous, and ``picture``, which is empty until :meth:`save_worst`. Without a
            post-processor there are neither labels nor threshold.
    """

    def __init__(self, output_dir: Path | None = None) -> None:
        super().__init__(output_dir=output_dir)
        self.rows: list[Row] = []
        self._worst: dict[str, list[tuple[Row, Image.Image]]] = {"false_positives": [], "false_negatives": []}

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: AnomalibModule,
        outputs: ImageBatch,  # type: ignore[override]  # as in Anomalib's class
        batch: ImageBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep what the model said; post-processor and evaluator have had the batch before."""
        if self.output_dir is not None:
            super().on_test_batch_end(trainer, pl_module, outputs, batch, batch_idx, dataloader_idx)
        threshold = getattr(pl_module.post_processor, "normalized_image_threshold", None)
        item: Any
        for item in batch:
            row: Row = {
                "image_path": item.image_path,
                "gt_label": int(item.gt_label),
                "pred_score": float(item.pred_score),
                "pred_label": None if item.pred_label is None else int(item.pred_label),
                "threshold": None if threshold is None else float(threshold),
                "picture": None,
            }
            self.rows.append(row)
            if row["pred_label"] not in {None, row["gt_label"]}:
                self._keep_mistake(row, item)

    def _keep_mistake(self, row: Row, item: ImageItem) -> None:
        kind, sign = ("false_positives", -1) if row["pred_label"] else ("false_negatives", 1)
        worst = self._worst[kind]
        if len(worst) < WORST or sign * row["pred_score"] < sign * worst[-1][0]["pred_score"]:
            worst.append((row, _draw(item)))  # at once, for an item keeps its whole batch in memory
            worst.sort(key=lambda entry: sign * entry[0]["pred_score"])
            del worst[WORST:]

    def save_worst(self, root: Path, folder: str) -> None:
        """Write the pictures of the worst mistakes into a folder below the root, and their paths into the rows."""
        for kind, worst in self._worst.items():
            for rank, (row, picture) in enumerate(worst, start=1):
                row["picture"] = f"{folder}/{kind}_{rank}.png"
                (root / folder).mkdir(parents=True, exist_ok=True)
                picture.save(root / row["picture"])

    def sheets(self) -> dict[str, NDArray[np.uint8]]:
        """The worst mistakes of each kind below each other, with scores and file names: shape ``(H, W, 3)``."""
        sheets = {}
        for kind, worst in self._worst.items():
            titled = [
                add_text_to_image(
                    picture.copy(),
                    f"{row['pred_score']:.2f} {'/'.join(Path(row['image_path']).parts[-2:])}",
                    size=16,
                )
                for row, picture in worst
            ]
            if titled:
                sheets[kind] = np.asarray(create_image_grid(titled, nrow=1))
        return sheets


def _draw(item: ImageItem) -> Image.Image:
    """The image with the outline of its defect, if it has one, and beside it the anomaly map."""
    picture = visualize_image_item(
        item,
        overlay_fields=[("image", ["gt_mask"]), ("image", ["anomaly_map"])],
        overlay_fields_config={"gt_mask": {"color": (255, 0, 255), "alpha": 1.0, "mode": "contour"}},
        text_config={"enable": False},
    )
    assert picture is not None  # an image it has
    return picture


def _engine(results_dir: Path) -> Engine:
    return Engine(default_root_dir=results_dir, enable_model_summary=False, enable_progress_bar=False)


def _test(model: AnomalibModule, data: AnomalibDataModule, judged: JudgedImages, results_dir: Path) -> dict[str, float]:
    """Values of all metrics of the model's evaluator."""
    model.visualizer = judged
    try:
        return dict(_engine(results_dir).test(model, datamodule=data, verbose=False)[0])
    finally:
        model.visualizer = None


@contextmanager
def _finalized(loggers: Sequence[Logger]) -> Generator[Sequence[Logger]]:
    """Tell loggers at the end how it went."""
    try:
        yield loggers
    except BaseException:
        for logger in loggers:
            logger.finalize("failed")
        raise
    for logger in loggers:
        logger.finalize("success")


def _matrix(rows: list[Row], names: list[str], metric: str) -> NDArray[np.float64]:
    """R of a metric, with all steps that are planned."""
    entries = ((row["step"] - 1, names.index(row["variant"]), row[metric]) for row in rows)
    return task_matrix(entries, len(names), len(names))


def _log_picture(logger: Logger, name: str, picture: NDArray[np.uint8], step: int) -> None:
    if isinstance(logger, MLFlowLogger):
        # Anomalib's own method would replace the picture of the step before.
        logger.experiment.log_image(logger.run_id, picture, key=name, step=step)
    elif isinstance(logger, ImageLoggerBase):
        logger.add_image(picture, name, global_step=step)


def _table(rows: list[Row], names: list[str], metric: str) -> Table:
    """Values of one metric: a row for each step, a column for each variant, and their mean."""
    table = Table(title=f"{metric} of each variant after each step")
    for heading in ("after learning", *names, "mean"):
        table.add_column(heading)
    for name, values in zip(names, _matrix(rows, names, metric), strict=True):
        measured = values[~np.isnan(values)]
        mean = measured.mean() if len(measured) else math.nan
        table.add_row(name, *("" if math.isnan(value) else f"{value:.3f}" for value in (*values, mean)))
    return table

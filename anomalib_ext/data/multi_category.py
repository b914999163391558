# SPDX-License-Identifier: Apache-2.0
"""Several categories as one data set: trained on together, evaluated apart and on average."""

import copy
import logging
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from anomalib import TaskType
from anomalib.data import AnomalibDataModule, AnomalibDataset, DatasetItem, ImageBatch, MVTecAD
from anomalib.data.errors import MisMatchError
from anomalib.data.utils import ValSplitMode
from anomalib.metrics import Evaluator
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.types import STEP_OUTPUT
from rich.console import Console
from rich.table import Table

from anomalib_ext.files import safe_name

if TYPE_CHECKING:
    from torchmetrics import Metric

logger = logging.getLogger(__name__)

MEAN = "mean"  # stands where a category's name stands


class MultiCategory(AnomalibDataModule):
    """Several categories as one data set, for models of many classes.

    It takes any datamodules of Anomalib, or the folders of a tree in the layout of MVTec AD. Splits and augmentations
    are each category's own. When a model is validated or tested on it, every metric of the model's evaluator is logged
    for all images, as ever, for each category, as ``bottle/image_AUROC``, and as their mean, ``mean/image_AUROC``; a
    test ends with a table. A category with good or with defective images only has no such metrics: they are NaN,
    left out of the mean, and a warning says so.

    Args:
        datamodules: A datamodule of each category. Joined, their own batch sizes and workers do not matter.
        root: Folder of the categories instead, each with ``train/good``, ``test`` and ``ground_truth``.
        categories: Names of the folders in ``root``; by default all that have ``train/good``.
        train_batch_size: Images in a batch of training.
        eval_batch_size: Images in a batch of validation and testing.
        num_workers: Loading processes.
        val_split_mode: How the categories in ``root`` get their validation sets.
        val_split_ratio: Part of the images that goes into them, where they are split off.
        seed: Seed of these splits.

    Raises:
        ValueError: If there is no category, or two have the same name, or one is unknown, or both ``datamodules`` and
            ``root`` are given; later, if a category has no images.

    Example:
        >>> from anomalib.engine import Engine
        >>> from anomalib.models import Padim
        >>> from anomalib_ext.data import MultiCategory
        >>> data = MultiCategory(root="datasets/MVTecAD", categories=["bottle", "pill"])
        >>> Engine().train(Padim(), datamodule=data)
    """

    def __init__(
        self,
        datamodules: Sequence[AnomalibDataModule] | None = None,
        root: str | Path | None = None,
        categories: Sequence[str] | None = None,
        train_batch_size: int = 32,
        eval_batch_size: int = 32,
        num_workers: int = 8,
        val_split_mode: ValSplitMode | str = ValSplitMode.SAME_AS_TEST,
        val_split_ratio: float = 0.5,
        seed: int | None = None,
    ) -> None:
        super().__init__(train_batch_size=train_batch_size, eval_batch_size=eval_batch_size, num_workers=num_workers)
        if (datamodules is None) == (root is None) or (root is None and categories is not None):
            msg = "MultiCategory needs either datamodules, or root and perhaps categories in it."
            raise ValueError(msg)
        if root is not None:
            root = Path(root).absolute()
            datamodules = [
                MVTecAD(
                    root,
                    name,
                    train_batch_size=train_batch_size,
                    eval_batch_size=eval_batch_size,
                    num_workers=num_workers,
                    val_split_mode=val_split_mode,
                    val_split_ratio=val_split_ratio,
                    seed=seed,
                )
                for name in _categories_in(root, categories)
            ]
        assert datamodules is not None
        names = [datamodule.category or datamodule.name for datamodule in datamodules]
        if not names or len({*names, MEAN}) <= len(names):
            msg = f"MultiCategory needs categories of different names, none of them {MEAN!r}, got {names}."
            raise ValueError(msg)
        self.datamodules = dict(zip(names, datamodules, strict=True))
        self._category_of: dict[str, str] = {}

    @cached_property
    def name(self) -> str:  # type: ignore[override]  # a property in Anomalib, too
        """Name of the folder that holds all categories, below which Anomalib repeats their folders for pictures."""
        roots = [getattr(datamodule, "root", None) for datamodule in self.datamodules.values()]
        if not all(roots):
            return super().name
        levels = zip(*(Path(root).absolute().parts for root in roots if root), strict=False)
        return Path(*(level[0] for level in takewhile(lambda level: len(set(level)) == 1, levels))).name or super().name

    def prepare_data(self) -> None:
        """Download what is missing."""
        for datamodule in self.datamodules.values():
            datamodule.prepare_data()

    def _setup(self, _stage: str | None = None) -> None:
        """Nothing to do: every datamodule sets itself up."""

    def setup(self, stage: str | None = None) -> None:
        """Set up the categories and join their subsets.

        Raises:
            ValueError: If a category cannot be read, or has no images to train on or in a subset that others have.
        """
        for name, datamodule in self.datamodules.items():
            datamodule.trainer = self.trainer  # which knows the size of the model's images
            try:
                datamodule.setup(stage)
            except (RuntimeError, ValueError, FileNotFoundError, MisMatchError) as error:
                msg = f"The category {name!r} cannot be read: {error}"
                raise ValueError(msg) from error
        self._category_of = {}
        for subset in ("train_data", "val_data", "test_data"):
            parts: dict[str, Any] = {
                name: getattr(datamodule, subset, ()) for name, datamodule in self.datamodules.items()
            }
            empty = [name for name, part in parts.items() if not len(part)]
            if empty and (subset == "train_data" or len(empty) < len(parts)):
                msg = f"These categories have no images for {subset}: {', '.join(empty)}. Add some, or leave them out."
                raise ValueError(msg)
            if not empty:
                joined = MultiCategoryDataset(parts)
                setattr(self, subset, joined)
                self._category_of.update(zip(joined.samples.image_path, joined.samples.category, strict=True))
        trainer: Any = self.trainer
        if trainer is not None:
            others = [callback for callback in trainer.callbacks if not isinstance(callback, CategoryMetrics)]
            # At the end, after the model's own, which judge a batch first and are attached anew in every run.
            trainer.callbacks = [*others, CategoryMetrics(self)]

    def categories_of(self, image_paths: Sequence[str]) -> list[str]:
        """Return the category of each image of a batch.

        Raises:
            KeyError: If an image is in none.
        """
        return [self._category_of[path] for path in image_paths]


class MultiCategoryDataset(AnomalibDataset):
    """Data sets of several categories as one. Where some categories have no masks, none are used.

    Args:
        parts: Data set of each category.

    Raises:
        ValueError: If an image is in two categories.
    """

    def __init__(self, parts: dict[str, AnomalibDataset]) -> None:
        super().__init__()
        self.parts = parts
        self.samples = pd.concat(
            [part.samples.assign(category=name, part_index=range(len(part))) for name, part in parts.items()],
            ignore_index=True,
        )
        pairs = self.samples[["image_path", "category"]].drop_duplicates()
        for path, owners in pairs[pairs.image_path.duplicated(keep=False)].groupby("image_path").category:
            msg = f"{path} is in several categories: {', '.join(owners)}."
            raise ValueError(msg)
        unmasked = [name for name, part in parts.items() if part.task == TaskType.CLASSIFICATION]
        if 0 < len(unmasked) < len(parts):
            logger.warning("No pixels are evaluated, because these categories have no masks: %s", ", ".join(unmasked))
        self.samples.attrs["task"] = TaskType.CLASSIFICATION if unmasked else TaskType.SEGMENTATION

    def __getitem__(self, index: int) -> DatasetItem:
        """Return the item as its category's data set gives it."""
        sample = self.samples.iloc[index]
        item = self.parts[sample.category][int(sample.part_index)]
        if self.task == TaskType.CLASSIFICATION:
            item.gt_mask = None
        return item

    @property
    def collate_fn(self) -> Callable:
        """The one of the categories."""
        return next(iter(self.parts.values())).collate_fn


class CategoryMetrics(Callback):
    """Logs the metrics of a model's evaluator for each category of the data, and their mean."""

    def __init__(self, data: MultiCategory) -> None:
        self._data = data
        self._metrics: dict[str, list[Metric]] = {}
        self._labels = torch.empty(0)  # number of normal and of anomalous images of each category
        self._warned: set[str] = set()

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin with empty metrics."""
        self._begin(trainer, pl_module, "val_metrics")

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin with empty metrics."""
        self._begin(trainer, pl_module, "test_metrics")

    def _begin(self, trainer: Trainer, pl_module: LightningModule, kind: str) -> None:
        self._metrics = {}
        evaluator = getattr(pl_module, "evaluator", None)
        if getattr(trainer, "datamodule", None) is not self._data or not isinstance(evaluator, Evaluator):
            return
        for name in self._data.datamodules:
            self._metrics[name] = [copy.deepcopy(metric) for metric in getattr(evaluator, kind)]
            for metric in self._metrics[name]:
                metric.reset()
        self._labels = torch.zeros(len(self._metrics), 2, device=pl_module.device)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: STEP_OUTPUT | None,
        batch: Any,  # noqa: ANN401  # as in Lightning
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Update the metrics of the categories in the batch."""
        del trainer, pl_module, outputs, batch_idx, dataloader_idx
        self._update(batch)

    on_test_batch_end = on_validation_batch_end

    def _update(self, batch: ImageBatch) -> None:
        if not self._metrics:
            return
        assert batch.image_path is not None
        categories = self._data.categories_of(batch.image_path)
        for position, (name, metrics) in enumerate(self._metrics.items()):
            chosen = [index for index, category in enumerate(categories) if category == name]
            if not chosen:
                continue
            part = batch if len(chosen) == len(categories) else _select(batch, chosen)
            if part.gt_label is not None:
                self._labels[position] += torch.bincount(part.gt_label.long(), minlength=2).to(self._labels)
            for metric in metrics:
                metric.update(part)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the metrics."""
        self._log(trainer, pl_module)

    on_test_epoch_end = on_validation_epoch_end

    def _log(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._metrics or trainer.sanity_checking:
            return
        labels = trainer.strategy.reduce(self._labels, reduce_op="sum")
        values: dict[str, dict[str, torch.Tensor]] = {}  # by metric and category
        for (name, metrics), counts in zip(self._metrics.items(), labels, strict=True):
            if not (counts > 0).all():
                self._warn(name, *counts.int().tolist())
                continue
            for metric in metrics:
                value = metric.compute()
                if value is not None:  # as for pixels without masks
                    values.setdefault(metric.name, {})[name] = value.float()
        for metric_name, by_category in values.items():
            mean = torch.stack(list(by_category.values())).mean()
            for name in (*self._metrics, MEAN):
                value = mean if name == MEAN else by_category.get(name, torch.tensor(torch.nan))
                pl_module.log(f"{safe_name(name)}/{metric_name}", value.to(pl_module.device), sync_dist=True)

    def _warn(self, name: str, normal: int, anomalous: int) -> None:
        if name not in self._warned:
            self._warned.add(name)
            logger.warning(
                "%s has %d normal and %d anomalous images to evaluate. Without both its metrics are NaN and left out "
                "of the mean.",
                *(name, normal, anomalous),
            )

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print a table, unless the test is to be quiet."""
        del pl_module
        if not self._metrics or not trainer.is_global_zero or not trainer.test_loop.verbose:
            return
        names = [metric.name for metric in next(iter(self._metrics.values()))]
        table = Table("category", *names)
        for category, prefix in [
            *((name, f"{safe_name(name)}/") for name in (*self._metrics, MEAN)),
            ("all images", ""),
        ]:
            values = [trainer.callback_metrics.get(prefix + name) for name in names]
            table.add_row(category, *("" if value is None else f"{float(value):.3f}" for value in values))
        Console().print(table)


def _select(batch: ImageBatch, chosen: list[int]) -> ImageBatch:
    """The images of a batch at these positions."""
    values: dict[str, Any] = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return replace(
        batch,
        **{
            name: value[chosen] if isinstance(value, torch.Tensor) else [value[index] for index in chosen]
            for name, value in values.items()
            if value is not None
        },
    )


def _categories_in(root: Path, categories: Sequence[str] | None) -> list[str]:
    """The categories asked for, or all that there are.

    Raises:
        ValueError: If there are none, or one of them is unknown.
    """
    found = sorted(folder.parent.parent.name for folder in root.glob("*/train/good"))
    if not found:
        msg = f"There is no category in {root}: no folder with train/good in it."
        raise ValueError(msg)
    unknown = [name for name in categories or () if name not in found]
    if unknown:
        msg = f"Unknown categories {', '.join(unknown)}. Those in {root} are {', '.join(found)}."
        raise ValueError(msg)
    return found if categories is None else list(categories)

# SPDX-License-Identifier: Apache-2.0
"""Run the benchmark, step by step, so that an interrupted one goes on where it was."""

import ctypes
import re
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from anomalib.data import ImageBatch
from anomalib.metrics import AUPRO, AUROC, F1Score
from lightning.pytorch import seed_everything
from rich.console import Console

from anomalib_ext.data import MultiCategory
from anomalib_ext.models import ContinualPatchCore

from .cadic import Cadic
from .learners import ContinualPatchCoreLearner, Joint, LastProduct, Learner, PerProduct, Reservoir
from .mh_patchcore import MHPatchcoreLearner
from .report import write_report
from .results import Results, Row
from .tasks import (
    DRIFT_STEPS,
    DRIFTS,
    Images,
    Step,
    Stream,
    Task,
    drift_name,
    drift_stream,
    embed,
    mixed_stream,
    product_streams,
)

LEARNERS: dict[str, type[Learner]] = {
    "continual_patchcore": ContinualPatchCoreLearner,
    "joint": Joint,
    "per_product": PerProduct,
    "last_product": LastProduct,
    "reservoir": Reservoir,
    "cadic": Cadic,
    "mh_patchcore": MHPatchcoreLearner,
}
# Of their memory banks, where none are given.
SIZES = {
    "continual_patchcore": [10_000, 2_000],
    "joint": [10_000, 2_000],
    "per_product": [10_000],
    "last_product": [10_000],
    "reservoir": [10_000, 2_000],
    "cadic": [10_000, 2_000],
    "mh_patchcore": [1_000],
}


def benchmark(
    model: ContinualPatchCore,
    data: MultiCategory,
    learners: dict[str, list[int]] | None = None,
    orders: int = 2,
    mixed: bool = True,
    shots: list[int] | None = None,
    drifts: dict[str, list[str]] | None = None,
    pixel_stride: int = 1,
    results_dir: Path | str = "results/benchmark",
    seed: int = 0,
) -> list[Row]:
    """Compare learners on streams of products. Started again, it goes on where it was interrupted.

    Every image is embedded once, and all learners see the same embeddings. After each step they judge all products seen
    so far: AUROC of images and of pixels and AUPRO on the test images, joined by validation images that were split off
    from them; F1 and errors on the test images alone, by thresholds that the validation images have set.

    ``results_dir`` receives ``results.csv`` with a row for each stream, order, learner, step and product, the tables
    ``report.md``, and plots.

    Args:
        model: Brings the pre-processor, the backbone, and the size of the memory bank that learns from few images. Its
            own memory bank is lost.
        data: The products, in the first order.
        learners: Sizes of the memory bank for each learner; by default all learners.
        orders: Number of orders in which the products are learned: as given, in reverse, and shuffled.
        mixed: Whether there is also a stream without labels and boundaries.
        shots: Numbers of images to learn a product alone from, such as 1, 2, 4, 8 and 16; none by default.
        drifts: Kinds of drift, of ``color``, ``blur`` and ``geometry``, for some products; none by default.
        pixel_stride: Metrics of pixels are taken on every such row and column. They take half of the benchmark's time;
            with 2 it is a sixth of that.
        results_dir: Folder for the results.
        seed: Seed of all random numbers.

    Returns:
        The rows of ``results.csv``.

    Raises:
        ValueError: If a learner, a drift or a product is unknown, or the folder holds results of other settings.
    """
    learners = SIZES if learners is None else learners
    drifts = drifts or {}
    unknown = [
        *(name for name in learners if name not in LEARNERS),
        *(name for name in drifts if name not in data.datamodules),
        *(kind for kinds in drifts.values() for kind in kinds if kind not in DRIFTS),
    ]
    if unknown:
        msg = (
            f"Unknown: {', '.join(unknown)}. Learners are {', '.join(LEARNERS)}; drifts {', '.join(DRIFTS)}; products "
            f"{', '.join(data.datamodules)}."
        )
        raise ValueError(msg)
    seed_everything(seed, verbose=False)
    model.eval()
    memory_size = model.model.bank.size  # the learners' banks will take the place of the model's
    data.prepare_data()
    data.setup()
    console = Console()
    start = time.perf_counter()
    tasks = [embed(model, datamodule, name) for name, datamodule in data.datamodules.items()]
    images = sum(len(task.train) + len(task.test.labels) for task in tasks)
    console.print(f"{images} images of {len(tasks)} products embedded in {time.perf_counter() - start:.0f} s")

    results = Results(Path(results_dir), _settings(model, tasks, seed, pixel_stride))
    titles = [_title(LEARNERS[name], size) for name, sizes in learners.items() for size in sizes]
    drifting = (
        drift_stream(model, data.datamodules[product], product, kind, seed)
        for product, kinds in drifts.items()
        for kind in kinds
        # Embedding it takes minutes, which one that has come to its end does not need.
        if any(results.steps(drift_name(product, kind), 1, title) < DRIFT_STEPS for title in titles)
    )
    for stream in chain(product_streams(tasks, orders, seed), [mixed_stream(tasks, seed)] if mixed else [], drifting):
        for name, sizes in learners.items():
            own = {"model": model.model} if name == "continual_patchcore" else {}
            for size in sizes:
                learner = LEARNERS[name](size, seed, **own)
                if stream.name == "mixed" and learner.needs_tasks:
                    continue
                for line in _run(stream, learner, f"{name}-{size}", results):
                    console.print(line, soft_wrap=True)
    for task in tasks:
        for line in _few_shot(model, memory_size, task, shots or [], results):
            console.print(line, soft_wrap=True)
    write_report(results.rows, Path(results_dir))
    console.print(f"results.csv, report.md and plots are in {results_dir}")
    return results.rows


def _settings(model: ContinualPatchCore, tasks: Sequence[Task], seed: int, pixel_stride: int) -> dict[str, Any]:
    """What results must agree in to be put side by side."""
    return {
        "backbone": model.model.backbone,
        "layers": model.model.layers,
        "seed": seed,
        "pixel_stride": pixel_stride,
        "products": {
            task.name: {
                "size": list(task.test.size),
                "train": len(task.train),
                "test": len(task.test.labels),
                "validation": len(task.validation.labels),
                "mean": f"{task.train.mean():.4f}",
            }
            for task in tasks
        },
    }


def _title(kind: type[Learner], size: int) -> str:
    return f"{kind.title}, {size}"


def _run(stream: Stream, learner: Learner, key: str, results: Results) -> Generator[str]:
    """Learn a stream from where it was left; yield a line for each step."""
    name = _title(type(learner), learner.size)
    rows = results.of(stream.name, stream.order, name)
    done = results.steps(stream.name, stream.order, name)
    run = re.sub(r"[^\w-]+", "_", f"{stream.name}-{stream.order}-{key}")
    if 0 < done < len(stream.steps):
        results.load(run, done, learner)
    seen = [image for step in stream.steps[:done] for image in step.images]
    for number, step in enumerate(stream.steps[done:], start=done + 1):
        seen.extend(step.images)
        costs = _learn(learner, step, seen)
        known = {row.task: row for row in rows if row.step == number - 1 and not learner.is_shared}
        rows = [
            replace(known[task.name], step=number, learned=step.name, **costs)
            if task.name in known
            else Row(
                stream.name,
                stream.order,
                name,
                number,
                step.name,
                task.name,
                **evaluate(learner, task, results.settings["pixel_stride"]),
                **costs,
            )
            for task in stream.tasks[: step.known]
        ]
        results.save(run, number, learner, rows)
        mean = float(np.mean([row.image_AUROC for row in rows]))
        yield f"{stream.name} {stream.order}, {name}, {number}/{len(stream.steps)} {step.name}: image AUROC {mean:.3f}"
    results.drop(run)


def _learn(learner: Learner, step: Step, seen: Sequence[Any]) -> dict[str, Any]:
    """Have a learner take in a step; say what that costs."""
    held = seen if learner.keeps_images else step.images[:1] if learner.learns_images else step.images
    start = time.perf_counter()
    with _memory() as memory:
        learner.learn(step.images, seen, step.task)
    seconds = time.perf_counter() - start
    return {
        "update_seconds": seconds,
        "peak_mib": memory[0] + sum(image.nbytes for image in held) / 2**20,
        "bank_mib": learner.nbytes() / 2**20,
    }


@contextmanager
def _memory() -> Generator[list[float]]:
    """Give a list that afterwards holds by how many MiB resident memory was larger at its peak than before.

    Linux only; NaN elsewhere.
    """
    peak = [float("nan")]
    reset, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    if not reset.exists():
        yield peak
        return
    # Memory that was freed but not given back would hide what is taken again; only glibc keeps such.
    getattr(ctypes.CDLL(None), "malloc_trim", lambda _: None)(0)
    reset.write_text("5", encoding="utf-8")  # the peak is now what is resident
    before = _resident(status)
    yield peak  # noqa: RUF075  # nothing to undo
    peak[0] = (_resident(status) - before) / 2**10


def _resident(status: Path) -> int:
    """Peak of resident memory, KiB."""
    line = next(line for line in status.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1])


def evaluate(learner: Learner, task: Task, pixel_stride: int) -> dict[str, float]:
    """Have a learner judge the images of a task."""
    start = time.perf_counter()
    test = learner.predict(task.test, task)
    milliseconds = (time.perf_counter() - start) * 1000 / len(task.test.labels)
    validation = test if task.validation is task.test else learner.predict(task.validation, task)
    decided, labels = learner.decide(test, validation, task), task.test.labels
    f1 = F1Score(fields=["pred_label", "gt_label"])
    f1.update(_batch(pred_label=decided, gt_label=labels))
    judged = [(test, task.test), *([(validation, task.validation)] if task.is_split else [])]
    return {
        **_ranking(judged, pixel_stride),
        "image_F1Score": float(f1.compute()),
        "false_alarms": float(decided[~labels].float().mean()),
        "misses": float((~decided[labels]).float().mean()),
        "ms_per_image": milliseconds,
    }


def _ranking(judged: Sequence[tuple[Any, Images]], stride: int) -> dict[str, float]:
    """Metrics that need no threshold."""
    scores = _unit([prediction.pred_score for prediction, _ in judged])
    image = AUROC(fields=["pred_score", "gt_label"])
    image.update(_batch(pred_score=scores, gt_label=torch.cat([images.labels for _, images in judged])))
    values = {"image_AUROC": float(image.compute()), "pixel_AUROC": float("nan"), "pixel_AUPRO": float("nan")}
    masks = [images.masks[:, ::stride, ::stride] for _, images in judged if images.masks is not None]
    if masks:
        maps = _unit([prediction.anomaly_map[:, 0, ::stride, ::stride] for prediction, _ in judged])
        for metric in (AUROC, AUPRO):
            pixel = metric(fields=["anomaly_map", "gt_mask"])
            pixel.update(_batch(anomaly_map=maps, gt_mask=torch.cat(masks)))
            values[f"pixel_{metric.__name__}"] = float(pixel.compute())
    return values


def _unit(parts: Sequence[Any]) -> torch.Tensor:
    """Values moved to between 0 and 1, as the metrics want them."""
    values = torch.cat(list(parts)).float()
    low, high = values.aminmax()
    return (values - low) / (high - low).clamp_min(torch.finfo(values.dtype).tiny)


def _batch(**values: torch.Tensor) -> ImageBatch:
    count = len(next(iter(values.values())))
    return ImageBatch(image=torch.zeros(1).expand(count, 3, 1, 1), **values)


def _few_shot(
    model: ContinualPatchCore, size: int, task: Task, shots: Sequence[int], results: Results
) -> Generator[str]:
    """Learn a product alone from its first images, without validation images; yield a line for each."""
    for kind in (ContinualPatchCoreLearner, Joint):
        name = _title(kind, size)
        done = [row.step for row in results.of("few-shot", 1, name) if row.task == task.name]
        for count in sorted(set(shots) - set(done)):
            if count > len(task.train):
                continue
            own = {"model": model.model} if kind is ContinualPatchCoreLearner else {}
            learner: Learner = kind(size, 0, **own)
            images = list(task.train[:count])
            costs = _learn(learner, Step("", images, task, 1), images)
            row = Row(
                "few-shot",
                1,
                name,
                count,
                task.name,
                task.name,
                **evaluate(learner, task, results.settings["pixel_stride"]),
                **costs,
            )
            results.add([row])
            yield f"few-shot, {name}, {count} images of {task.name}: image AUROC {row.image_AUROC:.3f}"

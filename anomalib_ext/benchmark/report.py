# SPDX-License-Identifier: Apache-2.0
"""Tables and plots of the benchmark."""

import io
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import cast

import numpy as np
from matplotlib.figure import Figure

from anomalib_ext.files import atomic_write
from anomalib_ext.metrics import (
    AverageValue,
    BackwardTransfer,
    ForgettingMeasure,
    IncrementalAverage,
    RelativeGap,
    TaskMatrix,
)
from anomalib_ext.plots import heat_maps

from .learners import ContinualPatchCoreLearner, Joint

METRICS = {
    "image_AUROC": "image AUROC",
    "image_F1Score": "F1",
    "pixel_AUROC": "pixel AUROC",
    "pixel_AUPRO": "AUPRO",
}


FEW_SHOT = (
    "Each product alone, from its first images. ContinualPatchCore sets its thresholds without a validation set, "
    "PatchCore by validation images."
)


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


def write_report(rows: Sequence[Row], folder: Path) -> None:
    """Write ``report.md`` and the plots."""
    text = ["# Continual benchmark\n"]
    plots: dict[str, Figure] = {}
    for stream in dict.fromkeys(row.stream for row in rows):
        own = [row for row in rows if row.stream == stream]
        if stream == "few-shot":
            text += [f"## Few images\n\n{FEW_SHOT}\n", *_few_shot_tables(own)]
            plots["few_shot"] = _few_shot_plot(own)
            continue
        text.append(f"## {stream}\n")
        slug = stream.replace(", ", "_").replace(" ", "_")
        plots[f"{slug}_curves"] = _curves(own)
        first = [row for row in own if row.order == 1]
        for metric, title in METRICS.items():
            if not all(np.isnan(getattr(row, metric)) for row in own):
                text += [f"### {title}\n", _summary(own, metric)]
                plots[f"{slug}_{metric}"] = _heat_maps(first, metric, title)
        text += ["### Costs\n", _costs(own)]
    text.append("## Plots\n")
    for name, figure in plots.items():
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=120)
        with atomic_write(folder / f"{name}.png") as file:
            file.write(buffer.getvalue())
        text.append(f"![{name}]({name}.png)\n")
    with atomic_write(folder / "report.md") as file:
        file.write("\n".join(text).encode())


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def _groups(rows: Sequence[Row], *keys: str) -> dict[tuple, list[Row]]:
    groups = defaultdict(list)
    for row in rows:
        groups[tuple(getattr(row, key) for key in keys)].append(row)
    return groups


def _fill(metric: TaskMatrix, rows: Sequence[Row], field: str) -> TaskMatrix:
    """Give the rows of one learner and order to a metric."""
    last = max(row.step for row in rows)
    order = [row.task for row in rows if row.step == last]
    for row in rows:
        metric.update(row.step - 1, order.index(row.task), getattr(row, field))
    return metric


def _summary(rows: Sequence[Row], field: str) -> str:
    """A row for each learner; figures are means over the orders, with the standard deviation."""
    groups = _groups(rows, "learner", "order")
    joint: dict[int, dict[str, float]] = defaultdict(dict)  # by order and number of vectors
    for (learner, order), own in groups.items():
        if learner.startswith(Joint.title):
            joint[order][_size(learner)] = float(_fill(AverageValue(), own, field).compute())
    figures = defaultdict(list)
    for (learner, order), own in groups.items():
        metrics: list[TaskMatrix] = [AverageValue(), IncrementalAverage(), ForgettingMeasure(), BackwardTransfer()]
        values = [float(_fill(metric, own, field).compute()) for metric in metrics]
        largest = max(joint[order], key=int, default="")
        reference = joint[order].get(_size(learner), joint[order].get(largest, 0.0))
        gap = float(_fill(RelativeGap(reference), own, field).compute()) if reference > 0 else np.nan
        figures[learner].append([*values, gap])
    lines = [[learner, *_spread(values)] for learner, values in figures.items()]
    header = ["learner, vectors", "average at the end", "average over steps", "forgetting", "backward transfer"]
    return table([*header, "relative gap to joint"], lines)


def _size(learner: str) -> str:
    return learner.rsplit(", ", 1)[1]


def _spread(figures: Sequence[Sequence[float]]) -> list[str]:
    """Means of the columns, with the standard deviation if there are several rows."""
    means = np.mean(figures, axis=0)
    if len(figures) == 1:
        return [_number(mean) for mean in means]
    return [
        f"{_number(mean)} ± {deviation:.4f}" if np.isfinite(mean) else ""
        for mean, deviation in zip(means, np.std(figures, axis=0, ddof=1), strict=True)
    ]


def _number(value: float) -> str:
    return f"{round(float(value), 4) + 0.0:.4f}" if np.isfinite(value) else ""  # no negative zero


def _costs(rows: Sequence[Row]) -> str:
    lines = []
    for (learner,), own in _groups(rows, "learner").items():
        steps = {(row.order, row.step): row for row in own}.values()
        last = [row for row in steps if row.step == max(row.step for row in steps)]
        lines.append([
            learner,
            f"{np.mean([row.update_seconds for row in steps]):.1f}",
            f"{np.mean([row.update_seconds for row in last]):.1f}",
            f"{max(row.peak_mib for row in steps):.0f}",
            f"{np.mean([row.bank_mib for row in last]):.1f}",
            f"{np.median([row.ms_per_image for row in own]):.1f}",
        ])
    header = ["learner, vectors", "update, s, mean", "last update, s", "peak memory of an update, MiB", "bank, MiB"]
    return table([*header, "search and map, ms an image"], lines)


def _few_shot_tables(rows: Sequence[Row]) -> list[str]:
    """A table for each metric, with the errors."""
    products = list(dict.fromkeys(row.task for row in rows))
    titles = {**METRICS, "false_alarms": "good images called anomalous", "misses": "anomalous images called good"}
    tables = []
    for metric, title in titles.items():
        lines = []
        for (learner, count), own in _groups(sorted(rows, key=lambda row: row.step), "learner", "step").items():
            values = {row.task: getattr(row, metric) for row in own}
            cells = [f"{values[name]:.3f}" if name in values else "" for name in products]
            mean = f"{np.mean(list(values.values())):.3f}" if len(values) == len(products) else ""
            lines.append([str(count), learner, *cells, mean])
        tables += [f"### {title}\n", table(["images", "learner, vectors", *products, "mean"], lines)]
    return tables


def _figure(rows: int, columns: int, width: float, height: float) -> tuple[Figure, list]:
    """Figure with a grid of axes of this size in inches, without a window."""
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    return figure, list(np.ravel(figure.subplots(rows, columns, squeeze=False)))


def _heat_maps(rows: Sequence[Row], metric: str, title: str) -> Figure:
    """The matrix R of each learner."""
    steps = list(dict.fromkeys(row.learned for row in rows))
    last = max(row.step for row in rows)
    tasks = list(dict.fromkeys(row.task for row in rows if row.step == last))
    matrices = {}
    for (learner,), own in _groups(rows, "learner").items():
        matrices[learner] = np.full((len(steps), len(tasks)), np.nan)
        for row in own:
            matrices[learner][row.step - 1, tasks.index(row.task)] = getattr(row, metric)
    return heat_maps(matrices, steps, tasks, f"{rows[0].stream}, first order: {title} of each column after each row")


def _curves(rows: Sequence[Row]) -> Figure:
    """Mean over the tasks known by then, after each step; mean of the orders."""
    shown = {
        metric: title for metric, title in METRICS.items() if not all(np.isnan(getattr(row, metric)) for row in rows)
    }
    learners = list(dict.fromkeys(row.learner for row in rows))
    figure, axes = _figure(-(-len(shown) // 2), min(2, len(shown)), 4.6, 3.2)
    for axis, (metric, title) in zip(axes, shown.items(), strict=False):
        for (learner,), own in _groups(rows, "learner").items():
            steps = _groups(own, "step")
            means = [np.mean([getattr(row, metric) for row in part]) for part in steps.values()]
            axis.plot([step for (step,) in steps], means, label=learner, **_style(learner, learners))
        axis.set_xlabel("step")
        axis.set_ylabel(f"{title}, mean so far")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
    for axis in axes[len(shown) :]:
        axis.set_visible(False)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    orders = len({row.order for row in rows})
    figure.suptitle(f"{rows[0].stream}" + (f", mean of {orders} orders" if orders > 1 else ""))
    return figure


def _style(learner: str, learners: Sequence[str]) -> dict[str, str | float]:
    """A color for each kind of learner, a line for each of its sizes."""
    kinds = list(dict.fromkeys(name.rsplit(", ", 1)[0] for name in learners))
    kind = learner.rsplit(", ", 1)[0]
    sizes = sorted((int(_size(name)) for name in learners if name.startswith(f"{kind}, ")), reverse=True)
    return {
        "color": f"C{kinds.index(kind) % 10}",
        "linestyle": ("-", "--", ":")[min(sizes.index(int(_size(learner))), 2)],
        "linewidth": 2.2 if kind == ContinualPatchCoreLearner.title else 1.2,
        "marker": "o",
        "markersize": 3,
    }


def _few_shot_plot(rows: Sequence[Row]) -> Figure:
    """Mean of the products over the number of images."""
    shown = {"image_AUROC": METRICS["image_AUROC"], "pixel_AUPRO": METRICS["pixel_AUPRO"]}
    figure, axes = _figure(1, 2, 4.6, 3.6)
    for axis, (metric, title) in zip(axes, shown.items(), strict=True):
        for (learner,), own in _groups(rows, "learner").items():
            counts = _groups(sorted(own, key=lambda row: row.step), "step")
            means = [np.mean([getattr(row, metric) for row in part]) for part in counts.values()]
            axis.plot([count for (count,) in counts], means, marker="o", markersize=3, label=learner)
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:.0f}")
        axis.set_xlabel("images learned")
        axis.set_ylabel(f"{title}, mean of products")
        axis.grid(alpha=0.3)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    figure.suptitle("each product alone, from few images")
    return figure

# SPDX-License-Identifier: Apache-2.0
"""Tables and plots of the benchmark."""

import io
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

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
    task_matrix,
)
from anomalib_ext.plots import heat_maps

from .learners import ContinualPatchCoreLearner, Joint
from .results import Row

METRIC_TITLES = {
    "image_AUROC": "image AUROC",
    "image_F1Score": "F1",
    "pixel_AUROC": "pixel AUROC",
    "pixel_AUPRO": "AUPRO",
}
FEW_SHOT = (
    "Each product alone, from its first images. ContinualPatchCore sets its thresholds without a validation set, "
    "PatchCore by validation images."
)


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
        for metric, title in METRIC_TITLES.items():
            if not all(np.isnan(getattr(row, metric)) for row in own):
                text += [f"### {title}\n", _summary(own, metric)]
                plots[f"{slug}_{metric}"] = _heat_maps(first, metric)
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


def _tasks(rows: Sequence[Row]) -> list[str]:
    """The tasks, of which all are judged after the last step, in the order in which they are learned."""
    last = max(row.step for row in rows)
    return list(dict.fromkeys(row.task for row in rows if row.step == last))


def _entries(rows: Sequence[Row], field: str, tasks: Sequence[str]) -> Iterator[tuple[int, int, float]]:
    """Entries of R of one learner and order."""
    return ((row.step - 1, tasks.index(row.task), getattr(row, field)) for row in rows)


def _compute(metric: TaskMatrix, rows: Sequence[Row], field: str) -> float:
    """Value of a metric for the rows of one learner and order."""
    for entry in _entries(rows, field, _tasks(rows)):
        metric.update(*entry)
    return float(metric.compute())


def _summary(rows: Sequence[Row], field: str) -> str:
    """A row for each learner; figures are means over the orders, with the standard deviation."""
    groups = _groups(rows, "learner", "order")
    joint: dict[int, dict[str, float]] = defaultdict(dict)  # by order and number of vectors
    for (learner, order), own in groups.items():
        if learner.startswith(Joint.title):
            joint[order][_size(learner)] = _compute(AverageValue(), own, field)
    figures = defaultdict(list)
    for (learner, order), own in groups.items():
        metrics: list[TaskMatrix] = [AverageValue(), IncrementalAverage(), ForgettingMeasure(), BackwardTransfer()]
        values = [_compute(metric, own, field) for metric in metrics]
        largest = max(joint[order], key=int, default="")
        reference = joint[order].get(_size(learner), joint[order].get(largest, 0.0))
        gap = _compute(RelativeGap(reference), own, field) if reference > 0 else np.nan
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
    titles = {**METRIC_TITLES, "false_alarms": "good images called anomalous", "misses": "anomalous images called good"}
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


def _figure(rows: int, columns: int, height: float) -> tuple[Figure, list]:
    """Figure with a grid of axes of this height in inches, without a window."""
    figure = Figure(figsize=(4.6 * columns, height * rows), layout="constrained")
    return figure, list(np.ravel(figure.subplots(rows, columns, squeeze=False)))


def _heat_maps(rows: Sequence[Row], metric: str) -> Figure:
    """The matrix R of each learner."""
    steps, tasks = list(dict.fromkeys(row.learned for row in rows)), _tasks(rows)
    matrices = {
        learner: task_matrix(_entries(own, metric, tasks), len(steps), len(tasks))
        for (learner,), own in _groups(rows, "learner").items()
    }
    title = f"{rows[0].stream}, first order: {METRIC_TITLES[metric]} of each column after each row"
    return heat_maps(matrices, steps, tasks, title)


def _curves(rows: Sequence[Row]) -> Figure:
    """Mean over the tasks known by then, after each step; mean of the orders."""
    shown = {
        metric: title
        for metric, title in METRIC_TITLES.items()
        if not all(np.isnan(getattr(row, metric)) for row in rows)
    }
    learners = list(dict.fromkeys(row.learner for row in rows))
    figure, axes = _figure(-(-len(shown) // 2), min(2, len(shown)), 3.2)
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
    shown = {"image_AUROC": METRIC_TITLES["image_AUROC"], "pixel_AUPRO": METRIC_TITLES["pixel_AUPRO"]}
    figure, axes = _figure(1, 2, 3.6)
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

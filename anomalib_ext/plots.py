# SPDX-License-Identifier: Apache-2.0
"""Plots of what a stream of variants measured, for loggers and for the report."""

import base64
import io
from collections.abc import Mapping, Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import PowerNorm, to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

GOOD, ANOMALOUS = "#2f6fab", "#d1495b"
# For a phone, on which a plot is about as wide: inches, and characters of a name.
_SIZE = (4.2, 2.5)
_LONGEST_LABEL = 14
# From chance to perfect; most values are near perfect, so there the shades differ most.
_NORM = PowerNorm(3, 0.5, 1, clip=True)
_STYLE = mpl.rc_context({
    "svg.fonttype": "none",  # text stays text
    "text.parse_math": False,  # a dollar sign in a name is one
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#e3e6ea",
    "figure.constrained_layout.use": True,
})


def colors(names: Sequence[str]) -> dict[str, str]:
    """A color for each name."""
    palette = list(mpl.color_sequences["tab10"])
    if len(names) > len(palette):
        palette = list(mpl.colormaps["turbo"](np.linspace(0.05, 0.95, len(names))))
    return {name: to_hex(color) for name, color in zip(names, palette, strict=False)}


def shade(value: float) -> tuple[str, str]:
    """Colors of a cell that shows a metric, and of the text on it."""
    depth = float(_NORM(value))
    return to_hex(mpl.colormaps["Blues"](0.85 * depth)), "#ffffff" if depth > 0.6 else "#000000"


@_STYLE
def heat_maps(
    matrices: Mapping[str, NDArray[np.floating]], steps: Sequence[str], tasks: Sequence[str], title: str
) -> Figure:
    """Draw matrices R beside each other: a metric of each task (columns) after each step (rows).

    Args:
        matrices: By heading, values of shape ``(steps, tasks)``, from 0.5 (chance) to 1; NaN stays empty.
        steps: What was learned in each step.
        tasks: What was judged.
        title: What it shows.
    """
    columns = min(4, len(matrices))
    rows = -(-len(matrices) // columns)
    width, height = max(3.0, 0.7 + 0.5 * len(tasks)), 1.2 + 0.4 * len(steps)
    figure = Figure(figsize=(1.0 + width * columns, 0.6 + height * rows))
    figure.suptitle(title)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for axes in grid.flat[len(matrices) :]:
        axes.set_visible(False)
    for axes, (heading, matrix) in zip(grid.flat, matrices.items(), strict=False):
        axes.set_title(heading, fontsize=10)
        axes.grid(visible=False)
        axes.tick_params(length=0, labelbottom=True)
        axes.set_xticks(range(len(tasks)), list(map(_short, tasks)), rotation=40, ha="right", fontsize=9)
        axes.set_yticks(range(len(steps)), list(map(_short, steps)), fontsize=9)
        axes.set(xlim=(-0.5, len(tasks) - 0.5), ylim=(len(steps) - 0.5, -0.5))
        for (row, column), value in np.ndenumerate(matrix):
            if np.isnan(value):
                continue
            background, text = shade(float(value))
            axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, facecolor=background))
            digits = f"{value:.3f}".removeprefix("0")  # for which there is no room
            axes.text(column, row, digits, color=text, ha="center", va="center", fontsize=8)
    figure.supylabel("after learning", fontsize=10)
    return figure


@_STYLE
def lines(
    series: Mapping[str, Mapping[int, float]],
    steps: Sequence[str],
    label: str,
    color: Mapping[str, str],
) -> Figure:
    """Draw values over the steps of a stream, a line for each name.

    Args:
        series: By name, the value by step, which counts from 1.
        steps: What was learned in each step.
        label: What the values are.
        color: Color of each name.
    """
    figure = Figure(figsize=_SIZE)
    axes = figure.add_subplot(ylabel=label)
    for name, values in series.items():
        axes.plot(list(values), list(values.values()), color=color[name], marker="o", markersize=4)
    _step_axis(axes, steps)
    return figure


@_STYLE
def stacked(
    series: Mapping[str, Mapping[int, float]],
    steps: Sequence[str],
    label: str,
    color: Mapping[str, str],
) -> Figure:
    """Draw shares over the steps of a stream as stacked bars; arguments as for :func:`lines`."""
    figure = Figure(figsize=_SIZE)
    axes = figure.add_subplot(ylabel=label)
    bottom = np.zeros(len(steps))
    for name, values in series.items():
        heights = np.array([values.get(step, 0.0) for step in range(1, len(steps) + 1)])
        axes.bar(np.arange(1, len(steps) + 1), heights, 0.7, bottom, color=color[name], edgecolor="white")
        bottom += heights
    axes.set_ylim(0, 1)
    _step_axis(axes, steps)
    return figure


@_STYLE
def histogram(good: Sequence[float], anomalous: Sequence[float], threshold: float | None) -> Figure:
    """Draw how the scores of good and of anomalous images lie about the threshold."""
    figure = Figure(figsize=_SIZE)
    axes = figure.add_subplot(xlabel="score", ylabel="images")
    values = [0.0, 1.0, *good, *anomalous]
    bins = np.linspace(min(values), max(values), 31).tolist()
    axes.hist(good, bins, color=GOOD, alpha=0.65)
    axes.hist(anomalous, bins, color=ANOMALOUS, alpha=0.65)
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    if threshold is not None:
        axes.axvline(threshold, color="black", linestyle="--", linewidth=1.2)
    return figure


@_STYLE
def to_array(figure: Figure) -> NDArray[np.uint8]:
    """Pixels of a figure, shape ``(H, W, 3)``."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


@_STYLE
def to_data_uri(figure: Figure) -> str:
    """A figure as an SVG image for the ``src`` of an HTML page."""
    file = io.BytesIO()
    figure.savefig(file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")), transparent=True)
    return "data:image/svg+xml;base64," + base64.b64encode(file.getvalue()).decode()


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST_LABEL else name[: _LONGEST_LABEL - 1] + "…"


def _step_axis(axes: mpl.axes.Axes, steps: Sequence[str]) -> None:
    axes.set_xlim(0.5, len(steps) + 0.5)
    axes.set_axisbelow(True)
    if len(steps) > 12:  # names would overlap
        axes.set_xlabel("step")
    else:
        axes.set_xticks(range(1, len(steps) + 1), list(map(_short, steps)), rotation=30, ha="right")

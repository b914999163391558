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
    if np.isnan(value):
        return "#ffffff", "#000000"
    depth = float(_NORM(value))
    return to_hex(mpl.colormaps["Blues"](0.85 * depth)), "#ffffff" if depth > 0.6 else "#000000"


@_STYLE
def heat_map(values: Mapping[tuple[str, str], float], names: Sequence[str], metric: str) -> Figure:
    """Draw the matrix R of a stream: a metric of each variant (columns) after each step (rows).

    Args:
        values: Metric by the variant that was learned last and the variant that was tested; what is missing
            or NaN stays empty.
        names: Variants in the order in which they are learned.
        metric: Name of the metric, whose values go from 0.5 (chance) to 1.
    """
    side = max(4.0, 2 + 0.6 * len(names))
    figure = Figure(figsize=(side, side))
    axes = figure.add_subplot(title=f"{metric} after each step", ylabel="after learning", xlabel="variant")
    axes.grid(visible=False)
    ticks = range(len(names))
    axes.set_xticks(ticks, list(map(_short, names)), rotation=40, ha="right")
    axes.set_yticks(ticks, list(map(_short, names)))
    axes.set(xlim=(-0.5, len(names) - 0.5), ylim=(len(names) - 0.5, -0.5), aspect="equal")
    for (learned, variant), value in values.items():
        if np.isnan(value):
            continue
        column, row = names.index(variant), names.index(learned)
        background, text = shade(value)
        axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, facecolor=background))
        axes.text(column, row, f"{value:.3f}".lstrip("0"), color=text, ha="center", va="center", fontsize=9)
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

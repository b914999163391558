# SPDX-License-Identifier: Apache-2.0
"""One HTML page that shows the life of a stream of product variants."""

import base64
import csv
import io
import json
import math
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from anomalib_ext import __version__, plots
from anomalib_ext.data.multi_category import MEAN
from anomalib_ext.files import atomic_write, safe_name
from anomalib_ext.metrics import task_matrix
from anomalib_ext.stream import VARIANT_METRICS
from openvino_export.memory.thresholds import SURE_IMAGES

Logged = dict[str, dict[int, float]]  # value by name and step


def report(run: Path) -> None:
    """Write ``report.html`` into the folder of a stream: one page that needs no other file and no network.

    It shows the metrics of each variant after each step, how the variants share the memory bank, thresholds and scores,
    and the worst mistakes after the last step. Of a stream that was interrupted, it shows the steps that are complete.

    Args:
        run: The ``results_dir`` of ``anomalib-ext stream``.

    Raises:
        FileNotFoundError: If the folder does not hold the results of a stream.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = lambda value, digits=3: "" if math.isnan(value) else f"{value:,.{digits}f}"
    page = environment.get_template("report.html.jinja").render(_content(run), shade=plots.shade, version=__version__)
    with atomic_write(run / "report.html") as file:
        file.write(page.encode())
    print(f"The report is {run / 'report.html'}")


def _content(run: Path) -> dict[str, Any]:
    """What the template shows."""
    results = _read(run, "results.csv")
    scores = _read(run, "scores.csv")
    names = list(dict.fromkeys(row["learned"] for row in results))
    logged: Logged = {}
    for row in _read(run, "metrics.csv"):
        if int(row["step"]) <= len(names):  # in a step that is complete
            logged.setdefault(row["name"], {})[int(row["step"])] = float(row["value"])
    if not (run / "hparams.json").is_file():
        raise _not_a_run(run, "hparams.json")
    hparams = json.loads((run / "hparams.json").read_text(encoding="utf-8"))
    at_the_end = [row for row in scores if int(row["step"]) == len(names)]
    return {
        "title": run.resolve().name,
        "names": names,
        "planned": hparams.pop("variants"),
        "hparams": hparams,
        "colors": plots.colors(names),
        "good": plots.GOOD,
        "anomalous": plots.ANOMALOUS,
        "matrices": _matrices(logged, names),
        "plots": _plots(logged, names),
        "updates": _updates(logged, names),
        "variants": [
            _variant(run, name, [row for row in at_the_end if row["variant"] == name], logged) for name in names
        ],
    }


def _read(run: Path, name: str) -> list[dict[str, str]]:
    """The rows of a table.

    Raises:
        FileNotFoundError: If there is none.
    """
    if not (run / name).is_file():
        raise _not_a_run(run, name)
    with (run / name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _not_a_run(run: Path, name: str) -> FileNotFoundError:
    msg = f"There is no {name} in {run}. Give the results_dir of an `anomalib-ext stream` that has finished a step."
    return FileNotFoundError(msg)


def _matrices(logged: Logged, names: list[str]) -> dict[str, list[list[float]]]:
    """R of each metric that was measured: a row for each step, a column for each variant and one for their mean."""
    columns = [*names, MEAN]
    matrices = {}
    for metric in VARIANT_METRICS:
        entries = [
            (step - 1, column, value)
            for column, name in enumerate(columns)
            for step, value in logged.get(f"{safe_name(name)}/{metric}", {}).items()
        ]
        if entries:
            matrices[metric] = task_matrix(entries, len(names), len(columns)).tolist()
    return matrices


def _series(logged: Logged, names: list[str], pattern: str) -> Logged:
    """The values of each variant that has some."""
    found = {name: logged.get(pattern.format(safe_name(name)), {}) for name in names}
    return {name: values for name, values in found.items() if values}


def _plots(logged: Logged, names: list[str]) -> dict[str, str]:
    """Data URIs of the plots over the steps, as far as there are values."""
    color = plots.colors(names)
    drawn = {}
    for metric in ("image_AUROC", "pixel_AUROC"):
        if series := _series(logged, names, f"{{}}/{metric}"):
            drawn[metric] = plots.lines(series, names, metric, color)
    if series := _series(logged, names, "memory/share/{}"):
        drawn["share"] = plots.stacked(series, names, "share of the bank", color)
    if series := _series(logged, names, "memory/image_threshold/{}"):
        drawn["threshold"] = plots.lines(series, names, "image threshold (distance)", color)
    if bound := logged.get("memory/radius_bound"):
        drawn["radius_bound"] = plots.lines({"": bound}, names, "radius bound (distance)", {"": "#333333"})
    return {key: plots.to_data_uri(figure) for key, figure in drawn.items()}


def _updates(logged: Logged, names: list[str]) -> dict[str, list[float]]:
    """Columns of the table of updates, as far as there are values."""
    columns = {
        "seconds": ("update_seconds", 1),
        "of which selection": ("memory/seconds", 1),
        "vectors in the bank": ("memory/vectors", 1),
        "MiB": ("memory/bytes", 2**-20),
        "radius bound": ("memory/radius_bound", 1),
    }
    steps = range(1, len(names) + 1)
    return {
        heading: [factor * logged[key].get(step, math.nan) for step in steps]
        for heading, (key, factor) in columns.items()
        if key in logged
    }


def _variant(run: Path, name: str, rows: list[dict[str, str]], logged: Logged) -> dict[str, Any]:
    """What the last step showed of a variant."""
    good, anomalous = ([row for row in rows if row["gt_label"] == label] for label in "01")
    good_scores, anomalous_scores = ([float(row["pred_score"]) for row in part] for part in (good, anomalous))
    threshold = next((float(row["threshold"]) for row in rows if row["threshold"]), None)
    return {
        "name": name,
        "good": len(good),
        "anomalous": len(anomalous),
        "false_positives": sum(row["pred_label"] == "1" for row in good),
        "false_negatives": sum(row["pred_label"] == "0" for row in anomalous),
        "decided": threshold is not None,
        "distance": list(logged.get(f"memory/image_threshold/{safe_name(name)}", {0: math.nan}).values())[-1],
        "rests_on": list(logged.get(f"memory/good_images/{safe_name(name)}", {0: math.nan}).values())[-1],
        "sure_images": SURE_IMAGES,
        "histogram": plots.to_data_uri(plots.histogram(good_scores, anomalous_scores, threshold)),
        "ranges": [
            f"{min(part):.2f} to {max(part):.2f}" if part else "none" for part in (good_scores, anomalous_scores)
        ],
        "worst": [
            {
                "kind": "False positive" if row["gt_label"] == "0" else "False negative",
                "score": float(row["pred_score"]),
                "file": "/".join(Path(row["image_path"]).parts[-3:]),
                "picture": _picture(run / row["picture"]),
            }
            for row in sorted(rows, key=lambda row: row["picture"])
            if row["picture"] and (run / row["picture"]).is_file()  # else it was removed, to save room
        ],
    }


def _picture(path: Path) -> str:
    """An image file as a JPEG for the ``src`` of the page."""
    file = io.BytesIO()
    with Image.open(path) as image:
        image.convert("RGB").save(file, format="JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()

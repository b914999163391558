# SPDX-License-Identifier: Apache-2.0
"""What Anomalib's benchmark pipeline has measured, beside what papers report."""

from pathlib import Path

import pandas as pd

from .report import table

METRICS = ("image_AUROC", "pixel_AUROC", "pixel_AUPRO")


def compare(
    results: Path | str = "runs/benchmark",
    published: Path | str = "configs/benchmark/published.csv",
) -> str:
    """Print, in Markdown, the results of ``anomalib benchmark`` beside published figures.

    Measured values are means over the categories that were run, of which the table gives the number; published ones are
    means over all categories of a data set, in percent as there.

    Args:
        results: Folder into which the pipeline has written, with one or several runs in it.
        published: CSV file with the columns ``dataset``, ``model``, ``setting``, the metrics, and ``source``.

    Returns:
        The table.

    Raises:
        FileNotFoundError: If there is no result of the pipeline.
    """
    paths = sorted(Path(results).glob("**/results.csv"))
    if not paths:
        msg = f"There is no results.csv in {results}. Run `anomalib benchmark` first, or name the folder it wrote into."
        raise FileNotFoundError(msg)
    # Each run has a folder named by its time, so the last of several for the same job is the newest.
    measured = pd.concat([pd.read_csv(path) for path in paths], ignore_index=True)
    jobs = [column for column in measured if column.startswith(("data.", "model."))]
    measured = measured.drop_duplicates(jobs, keep="last", ignore_index=True)
    kinds = {column: measured[f"{column}.class_path"].str.rsplit(".", n=1).str[-1] for column in ("data", "model")}
    lines = []
    for (dataset, model), rows in measured.groupby([kinds["data"], kinds["model"]], sort=False):
        values = [f"{100 * rows[metric].mean():.1f}" if metric in rows else "" for metric in METRICS]
        lines.append([dataset, model, f"measured, categories: {len(rows)}", *values, ""])
    reference = pd.read_csv(published, dtype=str, keep_default_na=False)
    reference = reference[reference.dataset.isin(kinds["data"])]
    lines += reference[["dataset", "model", "setting", *METRICS, "source"]].to_numpy().tolist()
    lines.sort(key=lambda line: line[0])
    text = table(["data set", "model", "setting", "image AUROC", "pixel AUROC", "AUPRO", "source"], lines)
    print(text)
    return text

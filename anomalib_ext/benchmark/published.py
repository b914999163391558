# SPDX-License-Identifier: Apache-2.0
"""What Anomalib's benchmark pipeline has measured, beside what papers report."""

from pathlib import Path

import pandas as pd

from .report import table

PUBLISHED_METRICS = ("image_AUROC", "pixel_AUROC", "pixel_AUPRO")
# What tells one product from another, of MVTec AD and VisA, and of Folder. All else is a setting.
PRODUCTS = ("data.init_args.category", "data.init_args.name", "data.init_args.root")


def compare(
    results: Path | str = "runs/benchmark",
    published: Path | str = "configs/benchmark/published.csv",
) -> str:
    """Print, in Markdown, the results of ``anomalib benchmark`` beside published figures.

    Measured values are means over the products that were run with the same settings, of which the table gives the
    number. Published values are means over all products of a data set, in percent as there; those on private data sets
    are shown for the models that were measured.

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
    measured = pd.concat([pd.read_csv(path).convert_dtypes() for path in paths], ignore_index=True)
    for column in ("data.class_path", "model.class_path"):
        measured[column] = measured[column].str.rsplit(".", n=1).str[-1]
    jobs = [column for column in measured if column == "seed" or column.startswith(("data.", "model."))]
    measured = measured.drop_duplicates(jobs, keep="last", ignore_index=True)
    datasets = measured["data.class_path"].unique()
    settings = [column for column in jobs if column not in PRODUCTS]
    # The model's arguments are shown; of all else, only what is not the same everywhere.
    shown = [
        column
        for column in settings
        if column.startswith("model.init_args.")
        or (
            not column.endswith(".class_path")
            and len(measured[["data.class_path", column]].drop_duplicates()) > len(datasets)
        )
    ]
    lines = []
    for _, rows in measured.groupby(settings, sort=False, dropna=False):
        first = rows.iloc[0]
        values = {column.split("init_args.")[-1]: first[column] for column in shown if pd.notna(first[column])}
        setting = [f"measured, products: {len(rows)}", *(f"{name}: {value}" for name, value in values.items())]
        means = [f"{100 * rows[metric].mean():.1f}" if metric in rows else "" for metric in PUBLISHED_METRICS]
        lines.append([first["data.class_path"], first["model.class_path"], ", ".join(setting), *means, ""])
    reference = pd.read_csv(published, dtype=str, keep_default_na=False)
    private = reference.dataset.str.startswith("private") & reference.model.isin(measured["model.class_path"])
    reference = reference[reference.dataset.isin(datasets) | private]
    lines += reference[["dataset", "model", "setting", *PUBLISHED_METRICS, "source"]].to_numpy().tolist()
    lines.sort(key=lambda line: line[0])
    text = table(["data set", "model", "setting", "image AUROC", "pixel AUROC", "AUPRO", "source"], lines)
    print(text)
    return text

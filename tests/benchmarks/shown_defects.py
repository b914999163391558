# SPDX-License-Identifier: Apache-2.0
"""Shown defects: what is found, and what good images are called bad, once one to four missed defects were shown.

    python tests/benchmarks/shown_defects.py --root datasets --products '[bottle, pill]' --results shown_defects.csv

A bank learns all products, one after another, from four fifths of their good images. Of each kind of defect some of
those that are missed are shown, with their mask and without. Judged are the others of the kind, those of other kinds,
and good images that were not learned.
"""

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from anomalib.models import ContinualPatchCore
from decisions import MAP_SIZE, learned, patch_distances
from jsonargparse import auto_cli
from products import Array, Product, flat, write

from openvino_export.memory.defects import raised
from openvino_export.memory.memory_bank import MemoryBank
from openvino_export.memory.thresholds import thresholds
from openvino_export.memory.update import Update
from openvino_export.memory.variant import Defects

COUNTS = (1, 2, 4)
DRAWS = 3  # of the images that are shown
COLUMNS = (
    "size",
    "rate",
    "fold",
    "product",
    "kind",
    "shown",
    "draw",
    "mask",
    "good",
    "false_alarms_before",
    "false_alarms",
    "same",
    "same_before",
    "same_found",
    "other",
    "other_before",
    "other_found",
    "shown_found",
    "vectors",
)


class Judged:
    """Images of a product and their distances to the good vectors of a bank.

    Args:
        images: Their embeddings, shape ``(n, h, w, d)``.
        bank: The bank.
    """

    def __init__(self, images: Array, bank: MemoryBank) -> None:
        self.images = images
        self.distances = patch_distances(images, bank)

    def are_anomalous(self, threshold: float, defects: Defects | None) -> np.ndarray:
        """Whether the score of each is above a threshold."""
        pairs = zip(self.images, self.distances, strict=True)
        scores = [raised(flat(image), distances.ravel(), defects).max() for image, distances in pairs]
        return np.array(scores) > threshold


def rows(product: Product, bank: MemoryBank, left: np.ndarray) -> Iterator[dict[str, Any]]:
    """What is found of a product before and after."""
    good = Judged(np.concatenate([product.test[product.is_good()], product.train[left]]), bank)
    defective = Judged(product.test[~product.is_good()], bank)
    kinds = product.kinds[~product.is_good()]
    masks = None if product.masks is None else product.masks[~product.is_good()]
    before = thresholds(bank, product.name).image.value
    found, alarms = (each.are_anomalous(before, None) for each in (defective, good))
    for kind in np.unique(kinds):
        missed = np.flatnonzero((kinds == kind) & ~found)
        for count in COUNTS:
            for draw in range(DRAWS if len(missed) >= count + 2 else 0):
                shown = np.random.default_rng(draw).permutation(missed)[:count]
                same, other = np.setdiff1d(np.flatnonzero(kinds == kind), shown), kinds != kind
                for with_mask in (True, False):
                    if with_mask and masks is None:
                        continue
                    update = Update(bank)
                    for i in shown:
                        region = masks[i] if with_mask and masks is not None and masks[i].any() else None
                        image = defective.images[i].astype(np.float32)
                        update.show_defect(image, product.name, region=region, map_size=MAP_SIZE)
                    defects = update.bank.variants[product.name].defects
                    assert defects is not None
                    threshold = thresholds(update.bank, product.name).image.value
                    now, now_alarms = (each.are_anomalous(threshold, defects) for each in (defective, good))
                    yield {
                        "product": product.name,
                        "kind": kind,
                        "shown": count,
                        "draw": draw,
                        "mask": with_mask,
                        "good": len(alarms),
                        "false_alarms_before": int(alarms.sum()),
                        "false_alarms": int(now_alarms.sum()),
                        "same": len(same),
                        "same_before": int(found[same].sum()),
                        "same_found": int(now[same].sum()),
                        "other": int(other.sum()),
                        "other_before": int(found[other].sum()),
                        "other_found": int(now[other].sum()),
                        "shown_found": int(now[shown].sum()),
                        "vectors": len(defects.reaches),
                    }


def run(products: list[Product], size: int, fold: int, rate: float, judged: list[str]) -> Iterator[dict[str, Any]]:
    """Learn all products, and show defects of some of them."""
    bank, left = learned(products, 0, fold, size)
    bank = bank.with_decision(false_alarm_rate=rate)
    for product in products:
        if product.name in judged:
            for row in rows(product, bank, left[product.name]):
                yield {"size": size, "rate": rate, "fold": fold, **row}


def tables(results: Path) -> None:
    """Print tables of what was written: means over kinds, and over products."""
    table = pd.read_csv(results)
    pairs = {
        "false alarms before": ("false_alarms_before", "good"),
        "after": ("false_alarms", "good"),
        "same kind before": ("same_before", "same"),
        "same kind": ("same_found", "same"),
        "other kinds before": ("other_before", "other"),
        "other kinds": ("other_found", "other"),
        "shown": ("shown_found", "shown"),
    }
    shares = pd.DataFrame({
        name: table[part] / table[whole].where(table[whole] > 0) for name, (part, whole) in pairs.items()
    })
    keys = ["size", "mask", "product", "shown"]
    shares = shares.rename(columns={"shown": "found of shown"}).assign(**table[keys])
    by_product = shares.groupby(keys).mean()
    print(by_product.round(3).to_markdown())
    print(f"\n{by_product.groupby(['size', 'mask', 'shown']).mean().round(3).to_markdown()}")


def main(
    root: Path,
    products: list[str],
    results: Path = Path("results/shown_defects.csv"),
    cache: Path = Path("results/features"),
    judged: list[str] = [],  # noqa: B006
    sizes: list[int] = [10_000],  # noqa: B006
    folds: int = 3,
    rate: float = 0.02,
) -> None:
    """Run the benchmark.

    Args:
        root: Folder of the products, in MVTec AD's layout.
        products: Names of the products, in the order in which they are learned.
        results: File that is written.
        cache: Folder in which the embeddings of images are kept.
        judged: Names of the products of which defects are shown; all by default.
        sizes: Sizes of the memory bank.
        folds: Number of folds of the good images.
        rate: False-alarm rate that is asked for.
    """
    model = ContinualPatchCore(evaluator=False, visualizer=False).eval()
    loaded = [Product(root, name, model, cache) for name in products]
    runs = [(size, fold) for size in sizes for fold in range(folds)]
    write(
        results, COLUMNS, chain.from_iterable(run(loaded, size, fold, rate, judged or products) for size, fold in runs)
    )
    tables(results)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)

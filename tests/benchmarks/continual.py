# SPDX-License-Identifier: Apache-2.0
"""Streams of products: what ContinualPatchCore still knows at the end, beside selections that see all at once.

    python tests/benchmarks/continual.py --root datasets --products '[bottle, pill]' --results streams.csv

writes image AUROC of every product after every step, and prints tables of it. Joint farthest-first selects the same
number of vectors from all patches of all products at once; *own* is a bank of the same size for one product alone.
"""

from collections import Counter
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import numpy as np
import pandas as pd
from anomalib.models import ContinualPatchCore
from jsonargparse import auto_cli
from products import Product, flat, scores, write
from sklearn.metrics import roc_auc_score

from anomalib_ext.metrics import task_matrix
from openvino_export.memory.k_center import farthest_first
from openvino_export.memory.memory_bank import MemoryBank
from openvino_export.memory.update import Update

COLUMNS = (
    "learner",
    "size",
    "order",
    "step",
    "learned",
    "product",
    "auroc",
    "vectors",
    "wanted",
    "mib",
    "ms_per_image",
)


def auroc(product: Product, vectors: np.ndarray) -> float:
    """Image AUROC."""
    return float(roc_auc_score(~product.is_good(), scores(product.test, vectors)))


def learned(bank: MemoryBank, product: Product, seed: int) -> tuple[MemoryBank, float]:
    """A bank that has learned a product as well, in a shuffled order, and the milliseconds of selection an image."""
    update = Update(bank)
    for i in np.random.default_rng(seed).permutation(len(product.train)):
        update.add(product.train[i].astype(np.float32), product.name)
    report = update.commit()
    return update.bank, report.seconds / len(product.train) * 1000


def stream(products: list[Product], size: int, order: int) -> Iterator[dict]:
    """Learn product after product; judge all that were learned after each."""
    bank = MemoryBank(size)
    for step, product in enumerate(products):
        bank, milliseconds = learned(bank, product, order)
        vectors = bank.vectors()
        for known in products[: step + 1]:
            variant = bank.variants[known.name]
            yield {
                "learner": "ours",
                "size": size,
                "order": order,
                "step": step,
                "learned": product.name,
                "product": known.name,
                "auroc": auroc(known, vectors),
                "vectors": len(variant.radii),
                "wanted": variant.wanted,
                "mib": bank.nbytes() / 2**20,
                "ms_per_image": milliseconds,
            }


def joint(products: list[Product], sizes: list[int], order: int) -> Iterator[dict]:
    """Farthest-first over all patches of all products; another start in each order."""
    together = np.concatenate([flat(product.train) for product in products])
    start = np.random.default_rng(order).integers(len(together))
    together[[0, start]] = together[[start, 0]]
    picks, _ = farthest_first(together, max(sizes))
    for size in sizes:
        for product in products:
            row = {"learner": "joint", "size": size, "order": order, "product": product.name}
            yield {**row, "auroc": auroc(product, together[picks[:size]])}


def own(products: list[Product], sizes: list[int]) -> Iterator[dict]:
    """A bank for each product alone."""
    for product in products:
        for size in sizes:
            bank, _ = learned(MemoryBank(size), product, 0)
            row = {"learner": "own", "size": size, "order": 0, "product": product.name}
            yield {**row, "auroc": auroc(product, bank.vectors())}


def unlabelled(products: list[Product], size: int) -> None:
    """Print which variants are found when no image has a label."""
    bank = MemoryBank(size)
    found: dict[str, Counter[str]] = {product.name: Counter() for product in products}
    for product in products:
        update = Update(bank)
        for image in product.train:
            found[product.name][str(update.add(image.astype(np.float32)))] += 1
        update.commit()
        bank = update.bank
    for name, counts in found.items():
        shown = ", ".join(f"{key}: {count}" for key, count in counts.items())
        print(f"{name}: {shown}; image AUROC", end=" ")
        print(f"{auroc(next(product for product in products if product.name == name), bank.vectors()):.3f}")


def tables(results: Path) -> None:
    """Print tables of what was written."""
    rows = pd.read_csv(results)
    for size, part in rows.groupby("size"):
        ours = part[part.learner == "ours"]
        last = ours[ours.step == ours.step.max()]
        means = {"own": part[part.learner == "own"], "joint": part[part.learner == "joint"], "ours": last}
        table = pd.DataFrame({name: each.groupby("product").auroc.mean() for name, each in means.items()})
        table["loss"] = table.own - table.ours
        table["vectors"] = last.groupby("product").vectors.mean().astype(int)
        table["wanted"] = last.groupby("product").wanted.mean().astype(int)
        means_of_all = table.mean().round(3).to_dict()
        print(f"\n### {size} vectors\n\n{table.round(3).to_markdown()}\n\nmean: {means_of_all}\n")
        for order, each in ours.groupby("order"):
            names = list(dict.fromkeys(each.sort_values("step").learned))
            entries = zip(each.step.astype(int), each["product"].map(names.index), each.auroc, strict=True)
            matrix = task_matrix(entries)
            forgotten = np.nanmax(matrix[:-1, :-1], axis=0) - matrix[-1, :-1]
            references = part[(part.learner == "joint") & (part.order == order)].auroc.mean()
            print(
                f"order {order}: mean {np.mean(matrix[-1]):.4f}, joint {references:.4f}, forgetting measure "
                f"{forgotten.mean():.4f}, largest of {names[int(forgotten.argmax())]} {forgotten.max():.3f}"
            )


def main(
    root: Path,
    products: list[str],
    results: Path = Path("results/streams.csv"),
    cache: Path = Path("results/features"),
    sizes: list[int] = [2000, 10_000],  # noqa: B006
    orders: int = 3,
) -> None:
    """Run the benchmark.

    Args:
        root: Folder of the products, in MVTec AD's layout.
        products: Names of the products, in the order of the first stream; then reversed, then shuffled.
        results: File that is written.
        cache: Folder in which the embeddings of images are kept.
        sizes: Sizes of the memory bank.
        orders: Number of streams.
    """
    model = ContinualPatchCore(evaluator=False, visualizer=False).eval()
    loaded = [Product(root, name, model, cache) for name in products]
    shuffled = [[loaded[i] for i in np.random.default_rng(seed).permutation(len(loaded))] for seed in range(orders)]
    streams = [loaded, loaded[::-1], *shuffled][:orders]
    parts = [
        *(stream(sequence, size, order) for order, sequence in enumerate(streams) for size in sizes),
        own(loaded, sizes),
        *(joint(loaded, sizes, order) for order in range(orders)),
    ]
    write(results, COLUMNS, chain.from_iterable(parts))
    tables(results)
    print("\n### Without labels\n")
    unlabelled(loaded, sizes[-1])


if __name__ == "__main__":
    auto_cli(main, as_positional=False)

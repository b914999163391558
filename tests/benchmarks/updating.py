# SPDX-License-Identifier: Apache-2.0
"""What updating is worth: PatchCore that is not updated, PatchCore refitted on everything, and ContinualPatchCore.

    python tests/benchmarks/updating.py --root datasets --products '[bottle, pill]' --results updating.csv

Refitted, PatchCore keeps a tenth of all patches so far, as Anomalib's does by default, chosen by farthest-first
traversal; not updated, that of the first product. Seconds are those of the selection, without the backbone: refitted,
all images so far must go through it again, or their patches be kept.
"""

import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from anomalib.models import ContinualPatchCore
from jsonargparse import auto_cli
from products import Product, flat, write
from sklearn.metrics import roc_auc_score

from openvino_export.memory.k_center import farthest_first
from openvino_export.memory.memory_bank import MemoryBank
from openvino_export.memory.search import NearestNeighbors
from openvino_export.memory.update import Update

RATIO = 0.1  # coreset_sampling_ratio of Anomalib's Patchcore
COLUMNS = ("learner", "step", "learned", "product", "auroc", "vectors", "mib", "held_mib", "seconds", "search_ms")
MIB = 2**20


def judged(vectors: np.ndarray, products: list[Product]) -> Iterator[dict[str, Any]]:
    """Image AUROC of each product, and the median milliseconds in which the patches of an image are looked up."""
    index = NearestNeighbors(vectors)
    for product in products:
        scores, times = [], []
        for image in product.test:
            patches = flat(image)
            start = time.perf_counter()
            scores.append(index.search(patches)[0].max())
            times.append(time.perf_counter() - start)
        auroc = float(roc_auc_score(~product.is_good(), scores))
        yield {"product": product.name, "auroc": auroc, "search_ms": float(np.median(times)) * 1000}


def refitted(products: list[Product], steps: int) -> Iterator[dict[str, Any]]:
    """PatchCore of all images so far, after the first steps and the last; after the first also as one not updated."""
    for step in sorted({*range(steps), len(products) - 1}):
        together = np.concatenate([flat(product.train) for product in products[: step + 1]])
        start = time.perf_counter()
        picks, _ = farthest_first(together, int(RATIO * len(together)))
        seconds, vectors = time.perf_counter() - start, together[picks]
        row = {
            "step": step,
            "learned": products[step].name,
            "vectors": len(vectors),
            "mib": vectors.nbytes / MIB,
            "held_mib": together.nbytes / MIB,
            "seconds": seconds,
        }
        del together
        for each in judged(vectors, products if step == 0 else products[: step + 1]):
            if step == 0:
                yield {"learner": "not updated", **row, **each}
            if each["product"] in {product.name for product in products[: step + 1]}:
                yield {"learner": "refitted", **row, **each}


def updated(products: list[Product], size: int) -> Iterator[dict[str, Any]]:
    """ContinualPatchCore after each step; `held_mib` are the bank and the most that its pools held."""
    bank = MemoryBank(size)
    for step, product in enumerate(products):
        update, held = Update(bank), 0
        for image in product.train:
            update.add(image.astype(np.float32), product.name)
            pool = next(iter(update.pools.values()), None)
            if pool is not None:
                samples = sum(sample.patches.nbytes for sample in pool.samples)
                held = max(held, pool.points.nbytes + samples)
        report = update.commit()
        bank = update.bank
        row = {
            "learner": f"ours, {size:,}",
            "step": step,
            "learned": product.name,
            "vectors": len(bank),
            "mib": bank.nbytes() / MIB,
            "held_mib": (bank.nbytes() + held) / MIB,
            "seconds": report.seconds,
        }
        for each in judged(bank.vectors(), products[: step + 1]):
            yield {**row, **each}


def table(results: Path) -> None:
    """Print one line for each learner: the mean over all products at the end, and what the updates took."""
    rows = pd.read_csv(results)
    lines = []
    for learner, part in rows.groupby("learner", sort=False):
        last = part[part.step == part.step.max()]
        updates = part.drop_duplicates("step")
        steps = part[part.step < part.step.max()].groupby("step").auroc.mean()
        lines.append({
            "learner": learner,
            "image AUROC": f"{last.auroc.mean():.3f}",
            "worst product": f"{last.loc[last.auroc.idxmin(), 'product']} {last.auroc.min():.3f}",
            "after each step": " ".join(f"{value:.3f}" for value in steps),
            "vectors": int(last.vectors.iloc[0]),
            "MiB": round(last.mib.iloc[0], 1),
            "MiB held while learning": round(updates.held_mib.max(), 1),
            "seconds of the last update": round(updates.seconds.iloc[-1], 1),
            "seconds of all": round(updates.seconds.sum(), 1) if len(updates) > updates.step.max() else "-",
            "ms of a search": round(last.search_ms.median(), 1),
        })
    print(pd.DataFrame(lines).to_markdown(index=False))


def main(
    root: Path,
    products: list[str],
    results: Path = Path("results/updating.csv"),
    cache: Path = Path("results/features"),
    sizes: list[int] = [2000, 10_000, 20_000],  # noqa: B006
    refits: int | None = None,
) -> None:
    """Run the benchmark.

    Args:
        root: Folder of the products, in MVTec AD's layout.
        products: Names of the products, in the order of the stream.
        results: File that is written.
        cache: Folder in which the embeddings of images are kept.
        sizes: Sizes of the memory bank of ContinualPatchCore.
        refits: Number of first steps after which PatchCore is refitted, besides the last, which takes longest; all by
            default.
    """
    model = ContinualPatchCore(evaluator=False, visualizer=False).eval()
    loaded = [Product(root, name, model, cache) for name in products]
    parts = [*(updated(loaded, size) for size in sizes), refitted(loaded, refits or len(loaded))]
    write(results, COLUMNS, chain.from_iterable(parts))
    table(results)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)

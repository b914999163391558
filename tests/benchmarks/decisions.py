# SPDX-License-Identifier: Apache-2.0
"""Decisions without defects: the false-alarm rates that were asked for and those that came, and what is found at them.

    python tests/benchmarks/decisions.py --root datasets --products '[bottle, pill]' --results decisions.csv

Each bank learns all products, one after another, from 8, 16, 32 or all of their good images, drawn three times; "all"
is five folds of the training images. Judged are good images that were not learned, those of the test set and those of
the training set that were not drawn, and the defects of the test set.
"""

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from anomalib.models import ContinualPatchCore
from jsonargparse import auto_cli
from matplotlib import pyplot as plt
from products import Array, Product, flat, write
from scipy.stats import beta

from openvino_export.anomaly_map import anomaly_maps
from openvino_export.memory.memory_bank import MemoryBank
from openvino_export.memory.thresholds import thresholds
from openvino_export.memory.update import Update

RATES = (0.02, 0.05, 0.1)
MAP_SIZE = (256, 256)
STRIDE = 4  # every such row and column of a map counts
SUPERADD = 1.421  # arXiv 2605.14808: the 95th percentile of held-out pixels, times this
FOLDS = 5
COLUMNS = (
    "images",
    "draw",
    "size",
    "product",
    "vectors",
    "rate",
    "smallest_rate",
    "good",
    "false_alarms",
    "defective",
    "found",
    "found_by_ranking",
    "threshold",
    "pixel_f1",
    "pixel_f1_best",
    "pixel_f1_superadd",
    "good_masks_empty",
)
MOST_GOOD, MOST_DEFECTIVE = 100, 80


def drawn(product: Product, count: int, draw: int) -> tuple[np.ndarray, np.ndarray]:
    """Training images to learn from, and those that are left; `count` 0 is a fold of five."""
    order = np.random.default_rng(0 if count == 0 else draw).permutation(len(product.train))
    if count == 0:
        left = order[draw::FOLDS]
        return np.setdiff1d(order, left), left
    return order[:count], order[count:]


def judged(product: Product, left: np.ndarray, seed: int) -> tuple[Array, Array, Any]:
    """Unseen good images, defective ones, and the masks of these."""
    rng = np.random.default_rng(seed)
    good = np.concatenate([product.test[product.is_good()], product.train[left]])
    good = good[rng.permutation(len(good))[:MOST_GOOD]]
    defective = rng.permutation(np.flatnonzero(~product.is_good()))[:MOST_DEFECTIVE]
    return good, product.test[defective], None if product.masks is None else product.masks[defective]


def patch_distances(images: Array, bank: MemoryBank) -> Array:
    """Distances of the patches of images, shape ``(n, h, w)``."""
    return np.stack([bank.search(flat(image))[0].reshape(image.shape[:2]) for image in images])


def rows(product: Product, bank: MemoryBank, left: np.ndarray, seed: int, pixels: bool) -> Iterator[dict[str, Any]]:
    """What is decided on a product at each rate."""
    good, defective, masks = judged(product, left, seed)
    good_maps, bad_maps = patch_distances(good, bank), patch_distances(defective, bank)
    good_scores, bad_scores = (maps.max(axis=(1, 2)) for maps in (good_maps, bad_maps))
    for rate in RATES:
        decided = thresholds(bank.with_decision(false_alarm_rate=rate), product.name)
        alarms = int((good_scores > decided.image.value).sum())
        ranked = np.sort(good_scores)[::-1]
        row = {
            "product": product.name,
            "vectors": len(bank.variants[product.name].radii),
            "rate": rate,
            "smallest_rate": decided.smallest_rate(),
            "good": len(good_scores),
            "false_alarms": alarms,
            "defective": len(bad_scores),
            "found": int((bad_scores > decided.image.value).sum()),
            "found_by_ranking": int((bad_scores > (ranked[alarms] if alarms < len(ranked) else -1)).sum()),
            "threshold": decided.image.value,
        }
        if pixels and masks is not None:
            row |= pixel_f1(good_maps, bad_maps, masks, decided.pixel.value)
        yield row


def pixel_f1(good: Array, defective: Array, masks: Array, threshold: float) -> dict[str, float]:
    """F1 of the pixels of defective images by the threshold, by SuperADD's, and by the best there is."""
    maps = {
        name: np.stack([anomaly_maps(each, *MAP_SIZE)[::STRIDE, ::STRIDE] for each in images])
        for name, images in (("good", good), ("defective", defective))
    }
    rows, columns = MAP_SIZE[0] // STRIDE, MAP_SIZE[1] // STRIDE
    truth = np.repeat(np.repeat(masks, rows // masks.shape[1], 1), columns // masks.shape[2], 2) > 0.5
    values, hits = maps["defective"].ravel(), truth.ravel()
    order = np.argsort(-values)
    found = np.cumsum(hits[order])
    curve = 2 * found / (np.arange(1, len(order) + 1) + hits.sum())

    def f1(limit: float) -> float:
        decided = values > limit
        return float(2 * (decided & hits).sum() / max(decided.sum() + hits.sum(), 1))

    return {
        "pixel_f1": f1(threshold),
        "pixel_f1_best": float(curve.max()),
        "pixel_f1_superadd": f1(SUPERADD * float(np.quantile(maps["good"], 0.95))),
        "good_masks_empty": float((maps["good"].max(axis=(1, 2)) <= threshold).mean()),
    }


def learned(products: list[Product], count: int, draw: int, size: int) -> tuple[MemoryBank, dict[str, np.ndarray]]:
    """A bank that has learned all products that have so many images, and the training images of each that are left."""
    bank, left = MemoryBank(size), {}
    for product in products:
        chosen, others = drawn(product, count, draw)
        if len(chosen) < count:
            continue
        left[product.name] = others
        update = Update(bank)
        for i in chosen:
            update.add(product.train[i].astype(np.float32), product.name, map_size=MAP_SIZE)
        update.commit()
        bank = update.bank
    return bank, left


def run(products: list[Product], count: int, draw: int, size: int) -> Iterator[dict[str, Any]]:
    """Learn all products, and judge each at the end."""
    bank, left = learned(products, count, draw, size)
    for product in products:
        if product.name in left:
            for row in rows(product, bank, left[product.name], draw, pixels=draw == 0):
                yield {"images": count, "draw": draw, "size": size, **row}


def picture(products: list[Product], size: int, path: Path) -> None:
    """Draw how scores of good images, learned and not, and of defective ones lie about thresholds at three rates."""
    mpl.use("Agg")
    bank, left = learned(products, 0, 0, size)
    figure, panels = plt.subplots(1, len(products), figsize=(3.2 * len(products), 2.8), layout="constrained")
    for panel, product in zip(np.atleast_1d(panels), products, strict=True):
        good, defective, _ = judged(product, left[product.name], 0)
        calibration = bank.variants[product.name].calibration
        assert calibration is not None
        scores = {
            "good, learned: without itself": calibration.scores,
            "good, not learned": patch_distances(good, bank).max(axis=(1, 2)),
            "defective": patch_distances(defective, bank).max(axis=(1, 2)),
        }
        bins = np.geomspace(*np.percentile(np.concatenate(list(scores.values())), [0, 100]), 28)
        for (label, values), color in zip(scores.items(), ("0.7", "tab:blue", "tab:red"), strict=True):
            weights = np.full(len(values), 1 / len(values))
            kind = "stepfilled" if color == "0.7" else "step"
            panel.hist(values, bins, weights=weights, histtype=kind, color=color, label=label)
        for rate, style in zip(RATES, ("-", "--", ":"), strict=True):
            limit = thresholds(bank.with_decision(false_alarm_rate=rate), product.name).image.value
            panel.axvline(limit, color="black", linestyle=style, linewidth=1, label=f"threshold at {rate:.0%}")
        panel.set(title=product.name, xlabel="score (distance)", xscale="log", yticks=[])
        panel.xaxis.set_major_formatter("{x:.0f}")
        panel.xaxis.set_minor_formatter("{x:.0f}")
    handles, labels = panel.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, fontsize="small", frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def tables(results: Path) -> None:
    """Print tables of what was written."""
    table = pd.read_csv(results)
    table["images"] = table.images.replace(0, 1000)
    lines = []
    for (images, size, rate), part in table.groupby(["images", "size", "rate"]):
        alarms, good = part.false_alarms.sum(), part.good.sum()
        low, high = beta.ppf([0.025, 0.975], [alarms, alarms + 1], [good - alarms + 1, max(good - alarms, 1)])
        by = part.groupby("product")[["false_alarms", "good", "found", "found_by_ranking", "defective"]].sum()
        draws = part.draw.nunique()
        worst = (by.false_alarms / by.good).idxmax()
        over = by[(by.false_alarms > 3 * rate * by.good) & (by.false_alarms > 2 * draws)].index
        lines.append({
            "images": "all" if images == 1000 else images,
            "vectors": size,
            "asked": rate,
            "supported": f"{(part.smallest_rate <= rate).mean():.0%}",
            "got": f"{alarms / good:.3f}",
            "interval": f"{np.nan_to_num(low):.3f} to {high:.3f}",
            "worst": f"{worst} {(by.false_alarms / by.good).max():.2f}",
            "above three times": ", ".join(over) or "-",
            "recall": f"{(by.found / by.defective).mean():.3f}",
            "by ranking": f"{(by.found_by_ranking / by.defective).mean():.3f}",
        })
    print(pd.DataFrame(lines).to_markdown(index=False))
    if "pixel_f1" in table:
        pixels = table[table.pixel_f1.notna()]
        columns = ["pixel_f1", "pixel_f1_superadd", "pixel_f1_best", "good_masks_empty"]
        print(f"\n{pixels.groupby(['size', 'rate'])[columns].mean().round(3).to_markdown()}")
        print(
            f"\n{pixels[pixels.rate == RATES[0]].groupby(['size', 'product'])[columns].mean().round(3).to_markdown()}"
        )


def main(
    root: Path,
    products: list[str],
    results: Path = Path("results/decisions.csv"),
    cache: Path = Path("results/features"),
    sizes: list[int] = [2000, 10_000],  # noqa: B006
    images: list[int] = [8, 16, 32, 0],  # noqa: B006
    draws: int = 3,
    pictured: list[str] = [],  # noqa: B006
) -> None:
    """Run the benchmark.

    Args:
        root: Folder of the products, in MVTec AD's layout.
        products: Names of the products, in the order in which they are learned.
        results: File that is written.
        cache: Folder in which the embeddings of images are kept.
        sizes: Sizes of the memory bank.
        images: Numbers of images of each product; 0 for all, in five folds.
        draws: Number of draws.
        pictured: Products of which scores and thresholds are drawn, beside the results; only this is done then.
    """
    model = ContinualPatchCore(evaluator=False, visualizer=False).eval()
    loaded = [Product(root, name, model, cache) for name in products]
    if pictured:
        picture([product for product in loaded if product.name in pictured], sizes[-1], results.with_suffix(".png"))
        return
    runs = [(count, draw, size) for count in images for draw in range(draws if count else FOLDS) for size in sizes]
    write(results, COLUMNS, chain.from_iterable(run(loaded, *each) for each in runs))
    tables(results)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)

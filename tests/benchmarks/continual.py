# SPDX-License-Identifier: Apache-2.0
"""Accuracy of ContinualPatchCore on a stream of products, beside joint farthest-first over all patches at once.

Reads data sets in MVTec AD's layout and prints Markdown tables:

    python tests/benchmarks/continual.py --root datasets --products '[bottle, pill]'
"""

import resource
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import torch
from anomalib.data import MVTecAD
from anomalib.models import ContinualPatchCore
from jsonargparse import auto_cli
from numpy.typing import NDArray
from sklearn.metrics import f1_score, roc_auc_score
from torchvision.transforms.v2.functional import resize

from openvino_export.memory.k_center import farthest_first, nearest
from openvino_export.memory.memory_bank import MemoryBank
from openvino_export.memory.thresholds import calibration_patches, thresholds
from openvino_export.memory.update import FEW_IMAGES, Update

Patches = NDArray[np.float32]


class Product:
    """Embeddings of one product: training images, and test images with labels and a half for validation."""

    def __init__(self, model: ContinualPatchCore, root: Path, name: str) -> None:
        self.name = name
        data = MVTecAD(root, category=name, num_workers=0, val_split_mode="none")
        data.setup()
        self.images = [resize(item.image, [256, 256]) for item in data.train_data]
        self.train = self._embed(model, self.images)
        self.test = self._embed(model, [item.image for item in data.test_data])
        self.labels = np.array([bool(item.gt_label) for item in data.test_data])
        self.validation = np.zeros(len(self.labels), bool)
        for label in (False, True):
            members = np.flatnonzero(self.labels == label)
            self.validation[np.random.default_rng(0).permutation(members)[: len(members) // 2]] = True

    @staticmethod
    @torch.inference_mode()
    def _embed(model: ContinualPatchCore, images: list[torch.Tensor]) -> Patches:
        batches = [
            torch.stack([model.pre_processor(i[None])[0] for i in images[s : s + 16]])
            for s in range(0, len(images), 16)
        ]
        return torch.cat([model.model.embed(batch).flatten(1, 2) for batch in batches]).numpy()

    def distances(self, vectors: Patches) -> tuple[Patches, NDArray[np.int64]]:
        """Distance of every test patch to the nearest vector, shape ``(images, patches)``, and its index."""
        found = [nearest(patches, vectors) for patches in self.test]
        return np.stack([f[0] for f in found]), np.stack([f[1] for f in found])

    def auroc(self, vectors: Patches) -> float:
        """Image AUROC."""
        return float(roc_auc_score(self.labels, self.distances(vectors)[0].max(axis=1)))

    def errors(self, bank: MemoryBank) -> str:
        """Share of good images that are called anomalous, and of anomalous ones that are called good."""
        decided = self.distances(bank.vectors())[0].max(axis=1) > thresholds(bank, self.name)["image"][0]
        return f"{decided[~self.labels].mean():.2f} / {(~decided[self.labels]).mean():.2f}"

    def calibrate(self, update: Update) -> None:
        """Set the thresholds from the validation half, as a fit with validation images does."""
        update.flush()
        bank = update.bank
        distances, _ = self.distances(bank.vectors())
        kept = [
            calibration_patches(bank, self.name, patches, scores)
            for patches, scores in zip(self.test[self.validation], distances[self.validation], strict=True)
        ]
        update.calibrate(self.name, np.stack(kept), self.labels[self.validation])

    def f1(self, bank: MemoryBank, limits: dict[str, float]) -> float:
        """F1 on the half that set no threshold; every image is judged by the variant that it is routed to."""
        distances, index = self.distances(bank.vectors())
        names = list(bank.variants)
        routed = [names[int(np.bincount(bank.owners()[i]).argmax())] for i in index]
        decided = distances.max(axis=1) > [limits[name] for name in routed]
        return float(f1_score(self.labels[~self.validation], decided[~self.validation]))


def _thresholds(bank: MemoryBank) -> dict[str, float]:
    return {name: thresholds(bank, name)["image"][0] for name in bank.variants}


def _row(cells: list[str]) -> None:
    print("| " + " | ".join(cells) + " |", flush=True)


def _stream(products: dict[str, Product], order: list[str], size: int, seed: int) -> tuple[float, float]:
    """Print the table of one stream; return the mean AUROC at the end and the forgetting measure."""
    bank = MemoryBank(size)
    auroc: dict[str, list[float]] = defaultdict(list)
    f1_before, frozen = {}, {}
    _row(["after learning", *order, "radius bound", "MiB", "ms an image"])
    _row(["---"] * (len(order) + 4))
    for name in order:
        images = products[name].train[np.random.default_rng(seed).permutation(len(products[name].train))]
        update = Update(bank)
        for image in images:
            update.add(image, name)
        products[name].calibrate(update)
        report = update.commit()
        bank = update.bank
        for known in bank.variants:
            auroc[known].append(products[known].auroc(bank.vectors()))
        f1_before[name] = products[name].f1(bank, _thresholds(bank))
        frozen[name] = _thresholds(bank)[name]
        cells = [f"{auroc[known][-1]:.3f}" if known in bank.variants else "" for known in order]
        milliseconds = report.seconds / len(images) * 1000
        _row([name, *cells, f"{bank.radius_bound():.1f}", f"{bank.nbytes() / 2**20:.1f}", f"{milliseconds:.0f}"])
    renewed = _thresholds(bank)
    _row(["vectors", *(str(len(bank.variants[name].radii)) for name in order), "", "", ""])
    _row(["F1 when learned", *(f"{f1_before[name]:.3f}" for name in order), "", "", ""])
    _row(["F1 at the end", *(f"{products[name].f1(bank, renewed):.3f}" for name in order), "", "", ""])
    _row(["F1, thresholds not renewed", *(f"{products[name].f1(bank, frozen):.3f}" for name in order), "", "", ""])
    covered = [max(nearest(image, bank.vectors())[0].max() for image in products[name].train) for name in order]
    _row(["coverage radius", *(f"{radius:.1f}" for radius in covered), "", "", ""])
    mean = float(np.mean([values[-1] for values in auroc.values()]))
    forgetting = float(np.mean([max(auroc[name][:-1]) - auroc[name][-1] for name in order[:-1]]))
    print(f"\nmean image AUROC {mean:.4f}, forgetting measure {forgetting:.4f}\n", flush=True)
    return mean, forgetting


def _few_shot(model: ContinualPatchCore, products: dict[str, Product], size: int) -> None:
    """Print image AUROC from 1, 4 and 16 images, with augmented views and without, and errors without validation."""
    errors = []
    _row(["images, views", *products, "mean"])
    _row(["---"] * (len(products) + 2))
    for count in (1, 4, 16):
        for few_shot_views in (False, True) if count <= FEW_IMAGES else (False,):
            cells, decisions = [], []
            for product in products.values():
                model.model.bank = MemoryBank(size)
                model.few_shot_views = few_shot_views
                model.partial_fit(torch.stack(product.images[:count]), product.name)
                cells.append(product.auroc(model.model.bank.vectors()))
                decisions.append(product.errors(model.model.bank))
            views = "with" if few_shot_views else "without"
            _row([f"{count}, {views}", *(f"{cell:.3f}" for cell in cells), f"{np.mean(cells):.3f}"])
            errors.append([f"{count}, {views}", *decisions])
    print("\nGood images called anomalous / anomalous called good, thresholds without a validation set\n")
    _row(["images, views", *products])
    _row(["---"] * (len(products) + 1))
    for row in errors:
        _row(row)


def _unlabelled(products: dict[str, Product], size: int) -> None:
    """Print which variants are found when no image has a label, and what the rule for it goes by."""
    bank = MemoryBank(size)
    found: dict[str, Counter[str]] = {name: Counter() for name in products}
    for name, product in products.items():
        update = Update(bank)
        for image in product.train:
            variant = update.add(image)
            assert variant is not None
            found[name][variant] += 1
        update.commit()
        bank = update.bank
    _row([
        "product",
        "images by variant found",
        "own test images / spread, at most",
        "other products / spread, at least",
    ])
    _row(["---"] * 4)
    for name, product in products.items():
        means = product.train.mean(axis=1)
        prototype = means.mean(axis=0)
        spread = np.mean([np.linalg.norm(image - prototype, axis=1).mean() for image in product.train])
        own = np.linalg.norm(product.test[~product.labels].mean(axis=1) - prototype, axis=1).max() / spread
        others = np.concatenate([other.train.mean(axis=1) for key, other in products.items() if key != name])
        nearest_other = np.linalg.norm(others - prototype, axis=1).min() / spread
        counts = ", ".join(f"{key}: {count}" for key, count in found[name].items())
        _row([name, counts, f"{own:.2f}", f"{nearest_other:.2f}"])


def main(
    root: Path,
    products: list[str],
    sizes: list[int] = [2000, 10_000],  # noqa: B006
    orders: int = 3,
    few_shot: bool = True,
) -> None:
    """Run the benchmark.

    Args:
        root: Folder of the products.
        products: Names of the products, in the order of the first stream.
        sizes: Sizes of the memory bank.
        orders: Number of streams: the products as they are given, in reverse, and shuffled.
        few_shot: Whether to learn each product from 1, 4 and 16 images too.
    """
    model = ContinualPatchCore().eval()
    loaded = {name: Product(model, root, name) for name in products}
    counts = [sum(len(getattr(product, part)) for product in loaded.values()) for part in ("train", "test")]
    print(f"{counts[0]} training images, {counts[1]} test images")
    if few_shot:
        print(f"\n### Few images, {sizes[-1]} vectors\n")
        _few_shot(model, loaded, sizes[-1])
    print(f"\n### Without labels, {sizes[-1]} vectors\n")
    _unlabelled(loaded, sizes[-1])
    together = np.concatenate([product.train.reshape(-1, product.train.shape[-1]) for product in loaded.values()])
    shuffled = [[str(name) for name in np.random.default_rng(seed).permutation(products)] for seed in range(orders)]
    streams = [products, products[::-1], *shuffled][:orders]
    joint = []
    for seed in range(orders):  # the start of farthest-first is arbitrary, so several
        start = np.random.default_rng(seed).integers(len(together))
        together[[0, start]] = together[[start, 0]]
        picks, _ = farthest_first(together, max(sizes))
        joint.append({size: [p.auroc(together[picks[:size]]) for p in loaded.values()] for size in sizes})
    summary = []
    for size in sizes:
        figures = []
        for number, order in enumerate(streams):
            print(f"\n### {size} vectors, order {number + 1}: {', '.join(order)}\n")
            mean, forgetting = _stream(loaded, order, size, seed=number)
            reference = float(np.mean(joint[number][size]))
            figures.append([mean, reference, mean - reference, forgetting])
            summary.append([f"{size}", f"{number + 1}", *(f"{figure:.4f}" for figure in figures[-1])])
        summary.append([f"{size}", "mean", *(f"{figure:.4f}" for figure in np.mean(figures, axis=0))])
        if orders > 1:
            deviations = np.std(figures, axis=0, ddof=1)
            summary.append([f"{size}", "standard deviation", *(f"{figure:.4f}" for figure in deviations)])
    print("\n### Summary\n")
    _row(["vectors", "order", "mean image AUROC", "joint farthest-first", "difference", "forgetting"])
    _row(["---"] * 6)
    for row in summary:
        _row(row)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"\npeak resident memory, embeddings of all images included: {peak:.2f} GiB")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)

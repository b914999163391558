# SPDX-License-Identifier: Apache-2.0
"""Why the most blurred step of a product is hardly learned: a product that is blurred more and more, in ten steps.

    python tests/benchmarks/blurred.py --root datasets --product pill --results blurred.csv

Each step has a tenth of the training images. Judged are all test images, blurred as in the last step.
"""

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from anomalib.models import ContinualPatchCore
from jsonargparse import auto_cli
from products import flat, scores, write
from sklearn.metrics import roc_auc_score
from torchvision.transforms.v2 import functional

from openvino_export.images import load
from openvino_export.memory.k_center import farthest_first
from openvino_export.memory.memory_bank import MemoryBank
from openvino_export.memory.update import Update

STEPS = 10
COLUMNS = ("size", "learned", "auroc", "vectors", "vectors_of_the_last_step")
Steps = list[np.ndarray]


@torch.inference_mode()
def embedded(model: ContinualPatchCore, paths: list[Path], level: int) -> np.ndarray:
    """Embeddings of images that are blurred as `anomalib-ext benchmark` does in a step, shape ``(n, h, w, d)``."""
    images = (torch.from_numpy(load(path))[None] for path in paths)
    blurred = (functional.gaussian_blur(image, [2 * level - 1] * 2, [0.5 * level] * 2) for image in images)
    prepare = model.pre_processor.transform
    return np.stack([model.model.embed(prepare(image))[0].numpy() for image in blurred])


def learned(steps: Steps, size: int, *, as_variants: bool = False) -> MemoryBank:
    """A bank that learned steps, as one variant or as one each."""
    bank = MemoryBank(size)
    for number, images in enumerate(steps):
        update = Update(bank)
        for image in images:
            update.add(image, f"step {number if as_variants else 0}")
        update.commit()
        bank = update.bank
    return bank


def rows(steps: Steps, test: np.ndarray, labels: np.ndarray, size: int) -> Iterator[dict[str, Any]]:
    """Image AUROC in the last step by several banks."""

    def row(name: str, vectors: np.ndarray, of_the_last: int | None = None) -> dict[str, Any]:
        auroc = float(roc_auc_score(labels, scores(test, vectors)))
        counts = {"vectors": len(vectors), "vectors_of_the_last_step": of_the_last}
        return {"size": size, "learned": name, "auroc": auroc, **counts}

    together = learned(steps, size)
    before = sum(len(images) for images in steps[:-1])
    yield row(
        "all steps as one variant", together.vectors(), int((together.variants["step 0"].origins >= before).sum())
    )
    apart = learned(steps, size, as_variants=True)
    yield row("each step as a variant", apart.vectors(), len(apart.variants[f"step {len(steps) - 1}"].radii))
    last = learned(steps[-1:], size).vectors()
    yield row("the last step alone", last, len(last))
    both = np.concatenate([last, learned(steps[:-1], size).vectors()])
    yield row("two banks of the size: the last step, and those before", both, len(last))
    patches = np.concatenate([flat(images) for images in steps])
    picks, _ = farthest_first(patches, size)
    yield row("farthest-first over all", patches[picks], int((picks >= len(patches) - flat(steps[-1]).shape[0]).sum()))


def main(
    root: Path,
    product: str,
    results: Path = Path("results/blurred.csv"),
    sizes: list[int] = [2000, 10_000],  # noqa: B006
) -> None:
    """Run the benchmark.

    Args:
        root: Folder of the products, in MVTec AD's layout.
        product: Name of the product.
        results: File that is written.
        sizes: Sizes of the memory bank.
    """
    model = ContinualPatchCore(evaluator=False, visualizer=False).eval()
    train = sorted((root / product / "train" / "good").iterdir())
    test = sorted((root / product / "test").glob("*/*"))
    labels = np.array([path.parent.name != "good" for path in test])
    parts = np.array_split(np.random.default_rng(0).permutation(len(train)), STEPS)
    steps = [embedded(model, [train[i] for i in part], level) for level, part in enumerate(parts, start=1) if len(part)]
    judged = embedded(model, test, STEPS)
    write(results, COLUMNS, chain.from_iterable(rows(steps, judged, labels, size) for size in sizes))
    print(results.read_text(encoding="utf-8"))


if __name__ == "__main__":
    auto_cli(main, as_positional=False)

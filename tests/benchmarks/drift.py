# SPDX-License-Identifier: Apache-2.0
"""When the drift monitor speaks on parts that change slowly, and how often on parts that do not.

    python tests/benchmarks/drift.py --root datasets --products '[pill, bottle]' --results drift.csv

Each product is learned but for some good images. Of these and of the good test images, parts are drawn at random:
without a change, or in ten steps of color, blur or geometry, as in `anomalib-ext benchmark`.
"""

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from anomalib.models import ContinualPatchCore
from jsonargparse import auto_cli
from products import write

from anomalib_ext.benchmark.tasks import DRIFTS
from openvino_export.decision import Prediction
from openvino_export.drift import DriftMonitor
from openvino_export.images import load
from openvino_export.memory.thresholds import normalized, thresholds

LEVELS, PARTS, LEFT = 10, 20, 40
STEADY_PARTS = 1000
COLUMNS = ("product", "drift", "run", "parts", "spoke_at", "step", "false_alarms_before", "false_alarms_at_step")


def normalised_scores(model: ContinualPatchCore, images: list[torch.Tensor], name: str) -> np.ndarray:
    """Normalised scores of images, shape ``(n,)``."""
    image = thresholds(model.model.bank, name).image
    raw = [model.model.bank.search(_patches(model, each))[0].max() for each in images]
    return normalized(np.array(raw, np.float32), image.value, image.steepness)


def _patches(model: ContinualPatchCore, image: torch.Tensor) -> np.ndarray:
    embedding = model.model.embed_arrays(model.pre_processor.transform(image[None]).numpy())
    return embedding.reshape(-1, embedding.shape[-1])


def watched(model: ContinualPatchCore, name: str, scores: np.ndarray) -> int | None:
    """Number of the part at which the monitor speaks, counted from 1."""
    monitor = DriftMonitor(model.model.bank)
    for number, score in enumerate(scores.tolist(), 1):
        if monitor.add(Prediction(score, score > 0.5, np.empty(0), None, name, is_sure=True)):
            return number
    return None


def run(root: Path, name: str, runs: int) -> Iterator[dict[str, Any]]:
    """Watch a product without a change, and with each kind of drift."""
    train = sorted((root / name / "train" / "good").iterdir())
    order = np.random.default_rng(0).permutation(len(train))
    left = min(LEFT, len(train) // 2)
    model = ContinualPatchCore(evaluator=False, visualizer=False).eval()
    model.partial_fit([train[i] for i in order[left:]], name)
    paths = [train[i] for i in order[:left]] + sorted((root / name / "test" / "good").iterdir())
    images = [torch.from_numpy(load(path)) for path in paths]
    steady = normalised_scores(model, images, name)
    for number in range(runs):
        scores = np.random.default_rng(number).choice(steady, STEADY_PARTS)
        yield {
            "product": name,
            "drift": "none",
            "run": number,
            "parts": STEADY_PARTS,
            "spoke_at": watched(model, name, scores),
        }
    for kind, change in DRIFTS.items():
        rng = np.random.default_rng(1)
        steps = []
        for level in range(1, LEVELS + 1):
            drawn = rng.choice(len(images), PARTS)
            empty = torch.zeros(1, *images[0].shape[1:])
            steps.append(normalised_scores(model, [change(level, rng, images[i], empty)[0] for i in drawn], name))
        scores = np.concatenate([rng.choice(steady, PARTS), *steps])
        spoke_at = watched(model, name, scores)
        row = {"product": name, "drift": kind, "run": 0, "parts": len(scores), "spoke_at": spoke_at}
        if spoke_at is not None:
            step = (spoke_at - 1) // PARTS
            row |= {
                "step": step,
                "false_alarms_before": float((scores[:spoke_at] > 0.5).mean()),
                "false_alarms_at_step": float((scores[step * PARTS : (step + 1) * PARTS] > 0.5).mean()),
            }
        yield row


def main(root: Path, products: list[str], results: Path = Path("results/drift.csv"), runs: int = 20) -> None:
    """Run the benchmark.

    Args:
        root: Folder of the products, in MVTec AD's layout.
        products: Their names.
        results: File that is written.
        runs: Number of sequences of parts that do not change.
    """
    write(results, COLUMNS, chain.from_iterable(run(root, name, runs) for name in products))
    table = pd.read_csv(results)
    print(table[table.drift != "none"].drop(columns="run").to_markdown(index=False))
    steady = table[table.drift == "none"].groupby("product")
    print(steady.agg(sequences=("run", "count"), parts=("parts", "sum"), warnings=("spoke_at", "count")).to_markdown())


if __name__ == "__main__":
    auto_cli(main, as_positional=False)

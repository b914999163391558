# SPDX-License-Identifier: Apache-2.0
"""SA, CFA and both beside Anomalib's Patchcore: accuracy, bank, and processor time on one thread, in one run.

Reads data sets in MVTec AD's layout and prints Markdown:

    OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 python tests/benchmarks/sa_cfa.py --root datasets \
        --products '[bottle, pill, cookie, hazelnut]' --stock '[cookie, hazelnut]'

Anomalib's ``KCenterGreedy`` takes many minutes for a large product. For products that ``stock`` does not name, its
coreset is found by its own projection and random start, then by our exact traversal; the table of agreement, made for
those it does name, says whether the vectors are the same. Build seconds of the peer are given for ``stock`` alone.
"""

import logging
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import TypeVar

import numpy as np
import torch
from anomalib.data import ImageBatch, InferenceBatch, MVTecAD
from anomalib.data.dataclasses import ImageItem
from anomalib.metrics import AUPRO, AUROC, F1Max
from anomalib.models.components import KCenterGreedy
from anomalib.models.image.patchcore.torch_model import PatchcoreModel
from jsonargparse import auto_cli

from anomalib_ext.models.components import patchcore
from anomalib_ext.models.components.backbone import backbone_pre_processor
from anomalib_ext.models.sa_cfa_patchcore.torch_model import SaCfaPatchCoreModel
from openvino_export.memory.k_center import farthest_first

T = TypeVar("T")
Test = list[tuple[torch.Tensor, ImageItem]]  # images as the backbone wants them
BACKBONES = {"tf_efficientnet_lite0": ["blocks.2", "blocks.4"], "resnet18.tv_in1k": ["layer2", "layer3"]}
# attention_ratio, reduction_ratio and channel_seed
VARIANTS = {
    "both off": (0.0, 1.0, None),
    "SA": (0.5, 1.0, None),
    "CFA": (0.0, 0.1, None),
    "SA + CFA": (0.5, 0.1, None),
    "CFA, random groups": (0.0, 0.1, 0),
    "CFA, ratio 0.5": (0.0, 0.5, None),
}
RATIO = 0.01
ACCURACY = ("image AUROC", "F1max", "pixel AUROC", "AUPRO")
FIGURES = (*ACCURACY, "build, s", "search, ms", "image, ms", "bank, MB")


def _seconds(function: Callable[[], T]) -> tuple[float, T]:
    """Processor time: what the wall clock says on an idle PC."""
    start = time.process_time()
    result = function()
    return time.process_time() - start, result


def _milliseconds(function: Callable[[], object], rounds: int = 15) -> float:
    function()
    return median(_seconds(function)[0] for _ in range(rounds)) * 1000


def _evaluate(model: Callable[[torch.Tensor], InferenceBatch], test: Test) -> dict[str, float]:
    image, pixel = ["pred_score", "gt_label"], ["anomaly_map", "gt_mask"]
    metrics = dict(zip(ACCURACY, (AUROC(image), F1Max(image), AUROC(pixel), AUPRO(pixel)), strict=True))
    results = [model(tensor) for tensor, _ in test]
    # In [0, 1], or torchmetrics would press the values through a sigmoid, which makes large ones equal.
    highest_score, highest_pixel = (
        max(float(getattr(result, name).max()) for result in results) for name in ("pred_score", "anomaly_map")
    )
    for (tensor, item), result in zip(test, results, strict=True):
        batch = ImageBatch(
            image=tensor,
            gt_label=item.gt_label[None],
            gt_mask=item.gt_mask[None],
            pred_score=result.pred_score / highest_score,
            anomaly_map=result.anomaly_map / highest_pixel,
        )
        for metric in metrics.values():
            metric.update(batch)
    return {name: float(metric.compute()) for name, metric in metrics.items()}


def _peer_like(ours: SaCfaPatchCoreModel) -> PatchcoreModel:
    origin = ours.embedding.origin
    peer = PatchcoreModel(origin["layers"], origin["backbone"], pre_trained=False, num_neighbors=ours.num_neighbors)
    state = ours.embedding.feature_extractor.state_dict()
    assert not peer.feature_extractor.load_state_dict(state, strict=False).unexpected_keys
    return peer


def _greedy(points: torch.Tensor) -> torch.Tensor:
    """What ``KCenterGreedy`` selects from the same state of the random generators."""
    sampler = KCenterGreedy(points, RATIO)
    sampler.model.fit(points)
    features = sampler.model.transform(points).numpy()
    start = int(torch.randint(high=len(points), size=(1,)))
    distances = np.linalg.norm(features - features[start], axis=1)
    picks, _ = farthest_first(features, sampler.coreset_size - 1, distances)
    return points[[start, *picks]]


def _seed(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002  # Anomalib's projection


def _measure_peer(
    peer: PatchcoreModel,
    train: list[torch.Tensor],
    test: Test,
    seed: int,
    stock: bool,
    accuracy: bool,
) -> dict[str, float]:
    peer.train()
    for image in train:
        peer(image)
    peer.eval()
    points, figures = torch.vstack(peer.embedding_store), {}
    peer.embedding_store.clear()
    _seed(seed)
    found = _greedy(points)
    if stock:
        _seed(seed)
        figures["build, s"], selected = _seconds(KCenterGreedy(points, RATIO).sample_coreset)
        figures["agreement"] = float((found == selected).all(dim=1).float().mean())
        found = selected
    peer.memory_bank = found
    image = test[0][0]
    with torch.no_grad():
        pooled = {layer: peer.feature_pooler(value) for layer, value in peer.feature_extractor(image).items()}
        patches = peer.reshape_embedding(peer.generate_embedding(pooled))
    return {
        **figures,
        "search, ms": _milliseconds(lambda: peer.nearest_neighbors(patches, 1)),
        "image, ms": _milliseconds(lambda: peer(image)),
        "bank, MB": found.numel() * 4 / 1e6,
        **(_evaluate(peer, test) if accuracy else {}),
    }


def _measure(
    model: SaCfaPatchCoreModel,
    train: list[torch.Tensor],
    test: Test,
    accuracy: bool,
) -> dict[str, float]:
    for image in train:
        model.collect(image)
    build, _ = _seconds(partial(model.subsample_embedding, RATIO))
    model.embedding_store.clear()
    image = test[0][0]
    patches = model.embed(image).flatten(1, 2)
    return {
        "build, s": build,
        "search, ms": _milliseconds(lambda: patchcore.search(patches, model.memory_bank, model.squares)),
        "image, ms": _milliseconds(lambda: model(image)),
        "bank, MB": model.memory_bank.numel() * 4 / 1e6,
        **(_evaluate(model, test) if accuracy else {}),
    }


def _runs(
    root: Path,
    backbone: str,
    product: str,
    seeds: list[int],
    stock: list[str],
    weights: Path | None,
    accuracy: bool,
) -> Iterator[tuple[str, dict[str, float]]]:
    layers = BACKBONES[backbone]
    transform = backbone_pre_processor(backbone).transform
    data = MVTecAD(root, category=product, num_workers=0, val_split_mode="none")
    data.setup()
    train = [transform(item.image[None]) for item in data.train_data]
    test = []
    for item in data.test_data:
        image, mask = transform(item.image[None], item.gt_mask)
        item.gt_mask = mask
        test.append((image, item))
    for seed in seeds:
        order = np.random.default_rng(seed).permutation(len(train))
        shuffled = [train[i] for i in order]
        for name, (attention, reduction, channel_seed) in VARIANTS.items():
            for file in (None, weights) if weights else (None,):
                model = SaCfaPatchCoreModel(
                    backbone,
                    layers,
                    backbone_weights=file,
                    attention_ratio=attention,
                    reduction_ratio=reduction,
                    channel_seed=channel_seed,
                ).eval()
                if name == "both off" and file is None:
                    peer = _peer_like(model)
                    yield "Patchcore", _measure_peer(peer, shuffled, test, seed, product in stock, accuracy)
                yield name if file is None else f"{name}, TL", _measure(model, shuffled, test, accuracy)


def _table(heading: str, rows: dict[str, list[dict[str, float]]]) -> None:
    figures = [figure for figure in FIGURES if any(figure in run for runs in rows.values() for run in runs)]
    print(f"\n### {heading}\n\n| model | {' | '.join(figures)} |\n{'| --- ' * (len(figures) + 1)}|")
    for name, runs in rows.items():
        cells = []
        for figure in figures:
            values = [run[figure] for run in runs if figure in run]
            digits = 4 if figure in ACCURACY else 2
            cells.append(f"{fmean(values):.{digits}f}" if values else "not measured")
        print(f"| {name} | {' | '.join(cells)} |")
    agreement = [run["agreement"] for run in rows["Patchcore"] if "agreement" in run]
    if agreement:
        print(f"\nVectors of KCenterGreedy that our traversal picked at the same place: {min(agreement):.2%} at least.")
    print(flush=True)


@torch.no_grad()
def main(
    root: Path,
    products: list[str],
    backbones: list[str] | None = None,
    seeds: list[int] | None = None,
    stock: list[str] | None = None,
    weights: Path | None = None,
    accuracy: bool = True,
) -> None:
    """Run the benchmark.

    Args:
        root: Folder of the products.
        products: Names of the products.
        backbones: Names of the backbones, all by default.
        seeds: Seeds of the order of images and of the peer's selection.
        stock: Products for which Anomalib's own selection is run.
        weights: File with a fine-tuned backbone, to be measured beside the pretrained one.
        accuracy: Whether to judge the test images; without it, only what takes time is measured.
    """
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    for backbone in backbones or BACKBONES:
        every: dict[str, list[dict[str, float]]] = {}
        for product in products:
            rows: dict[str, list[dict[str, float]]] = {}
            for name, figures in _runs(root, backbone, product, seeds or [0, 1, 2], stock or [], weights, accuracy):
                rows.setdefault(name, []).append(figures)
                every.setdefault(name, []).append(figures)
                print(f"<!-- {backbone} {product} {name} {figures} -->", flush=True)
            _table(f"{product}, {backbone}", rows)
        means = {name: [{m: fmean(run[m] for run in runs) for m in ACCURACY}] for name, runs in every.items()}
        _table(f"mean of {', '.join(products)}, {backbone}", means)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)

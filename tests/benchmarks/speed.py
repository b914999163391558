# SPDX-License-Identifier: Apache-2.0
"""Speed of ContinualPatchCore beside its floor and beside Anomalib's coreset selection, in one process.

Reads data sets in MVTec AD's layout and prints Markdown:

    python tests/benchmarks/speed.py --root datasets --products '[pill, cable, bottle]'
"""

import logging
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from anomalib.data import MVTecAD
from anomalib.engine import Engine
from anomalib.models import ContinualPatchCore
from anomalib.models.components import KCenterGreedy
from jsonargparse import auto_cli

from openvino_export.memory.k_center import farthest_first, nearest
from openvino_export.memory.memory_bank import MemoryBank
from openvino_export.memory.update import Update

T = TypeVar("T")


def _timed(function: Callable[[], T]) -> tuple[float, T]:
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def _data(root: Path, name: str) -> MVTecAD:
    return MVTecAD(root, category=name, num_workers=0, val_split_mode="none")


@torch.inference_mode()
def _extract(model: ContinualPatchCore, batches: Iterable[torch.Tensor]) -> None:
    for batch in batches:
        model.model.feature_extractor(batch)


def _fit(root: Path, products: list[str], size: int) -> None:
    """The last product as the first, the second and the last of a stream, beside its feature extraction alone."""
    target = products[-1]
    model = ContinualPatchCore(memory_size=size, visualizer=False).eval()
    data = _data(root, target)
    data.setup()
    prepared = [model.pre_processor.transform(item.image[None]) for item in data.train_data]
    batches = [torch.cat(prepared[i : i + 32]) for i in range(0, len(prepared), 32)]
    print(f"\n### Learning {target}, {len(prepared)} images of 256 px, {size} vectors\n")
    print("Features alone: of batches of 32 as the trainer brings them, and of single images, the floor on a CPU.\n")
    print(
        "| known before | whole fit, s | selection, s | features of batches, s | fit / them | features of images, s ",
        end="",
    )
    print("| fit / them | ms an image |")
    print("| --- " * 8 + "|")
    _fit_once(model, root, products[0])  # warm up
    for known in ([], products[:1], products[:-1]):
        model.model.bank = MemoryBank(size)
        for name in known:
            _fit_once(model, root, name)
        seconds = _fit_once(model, root, target)
        in_batches, _ = _timed(partial(_extract, model.eval(), batches))
        one_by_one, _ = _timed(partial(_extract, model, prepared))
        assert model.last_report is not None
        print(
            f"| {', '.join(known) or 'nothing'} | {seconds:.2f} | {model.last_report.seconds:.2f} "
            f"| {in_batches:.2f} | {seconds / in_batches:.2f} | {one_by_one:.2f} | {seconds / one_by_one:.2f} "
            f"| {seconds / len(prepared) * 1000:.1f} |",
            flush=True,
        )


def _fit_once(model: ContinualPatchCore, root: Path, name: str) -> float:
    with tempfile.TemporaryDirectory() as folder:
        engine = Engine(
            default_root_dir=folder,
            accelerator="cpu",
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        data = _data(root, name)
        data.setup()
        return _timed(lambda: engine.fit(model, datamodule=data))[0]


def _selection(root: Path, name: str, picks: int) -> None:
    """The same number of vectors from the same embeddings, by Anomalib and by us."""
    model = ContinualPatchCore().eval()
    data = _data(root, name)
    data.setup()
    images = [model.pre_processor.transform(item.image[None]) for item in data.train_data]
    with torch.inference_mode():
        embedding = model.model.embed(torch.cat(images)).flatten(0, 2)
    points = embedding.numpy()
    print(f"\n### {picks} of {len(points)} patches of {name}, d = {points.shape[1]}\n")
    print("| selection | seconds | coverage radius |")
    print("| --- | --- | --- |")
    ours, (index, _) = _timed(lambda: farthest_first(points, picks))
    print(f"| farthest_first | {ours:.2f} | {nearest(points, points[index])[0].max():.2f} |", flush=True)

    def stream() -> MemoryBank:
        update = Update(MemoryBank(picks))
        for patches in points.reshape(len(images), -1, points.shape[1]):
            update.add(patches, name)
        update.commit()
        return update.bank

    streamed, bank = _timed(stream)
    print(
        f"| MemoryBank, image by image | {streamed:.2f} | {nearest(points, bank.vectors())[0].max():.2f} |", flush=True
    )
    theirs, coreset = _timed(lambda: KCenterGreedy(embedding, picks / len(points)).sample_coreset())
    radius = nearest(points, coreset.numpy())[0].max()
    print(f"| Anomalib KCenterGreedy | {theirs:.2f} | {radius:.2f} |")
    print(f"\nKCenterGreedy / farthest_first {theirs / ours:.0f}, / MemoryBank {theirs / streamed:.0f}", flush=True)


@torch.inference_mode()
def _search(sizes: list[int], repetitions: int = 20) -> None:
    """Search beside feature extraction, one image at a time."""
    print("\n### Scoring one image of 256 px, median\n")
    print("| vectors | features, ms | search, ms | search / features | bytes of the bank, MiB |")
    print("| --- | --- | --- | --- | --- |")
    image = torch.rand(1, 3, 256, 256)
    for size in sizes:
        model = ContinualPatchCore(memory_size=size).eval()
        generator = np.random.default_rng(0)
        dimension = model.model.memory_bank.shape[1]
        update = Update(model.model.bank)
        update.add(generator.normal(size=(size, dimension)).astype(np.float32), "random")
        update.commit()
        model.model.bank = update.bank
        model.model.refresh()
        patches = model.model.embed(image).flatten(1, 2)[0]
        features = np.median([_timed(lambda m=model: m.model.embed(image))[0] for _ in range(repetitions)])
        search = np.median(
            [_timed(lambda m=model, p=patches: m.model.nearest_neighbors(p))[0] for _ in range(repetitions)],
        )
        mebibytes = size * dimension * 4 / 2**20
        print(f"| {size} | {features * 1e3:.1f} | {search * 1e3:.1f} | {search / features:.2f} | {mebibytes:.1f} |")


def main(root: Path, products: list[str], picks: int = 10_000, size: int = 10_000) -> None:
    """Run the benchmark.

    Args:
        root: Folder of the products.
        products: Names of the products in the order in which they are learned; the last is the one that is measured.
        picks: Number of vectors that the selections keep.
        size: Size of the memory bank of the stream.
    """
    logging.disable(logging.WARNING)
    _search([2000, 10_000])
    _fit(root, products, size)
    _selection(root, products[-1], picks)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)

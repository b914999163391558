# SPDX-License-Identifier: Apache-2.0
"""What an exported ContinualPatchCore keeps, loses and costs: parity, accuracy by compression, latency, size.

Reads data sets in MVTec AD's layout and prints Markdown:

    python tests/benchmarks/export.py --root datasets --products '[bottle, pill]'
"""

import json
import logging
import tempfile
import time
from pathlib import Path

import numpy as np
import openvino as ov
import torch
from anomalib.data import MVTecAD
from anomalib.deploy import CompressionType
from anomalib.engine import Engine
from anomalib.models import ContinualPatchCore
from jsonargparse import auto_cli
from torchvision.transforms.v2.functional import resize

EXACT = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
COMPRESSIONS = {"FP32": None, "FP16": CompressionType.FP16, "INT8": CompressionType.INT8_PTQ}


def _fit(data: MVTecAD, size: int) -> ContinualPatchCore:
    model = ContinualPatchCore(memory_size=size, visualizer=False)
    with tempfile.TemporaryDirectory() as folder:
        options = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
        Engine(default_root_dir=folder, **options).fit(model, datamodule=data)
    return model.eval()


def _milliseconds(path: Path, image: np.ndarray, repetitions: int) -> float:
    """Median time of one image."""
    model = ov.Core().compile_model(path, "CPU", EXACT)
    times = []
    for _ in range(repetitions + 3):
        start = time.perf_counter()
        model(image)
        times.append(time.perf_counter() - start)
    return float(np.median(times[3:])) * 1e3


@torch.inference_mode()
def _parity(model: ContinualPatchCore, path: Path, images: list[np.ndarray]) -> str:
    """Largest differences between torch and the exported file."""
    compiled = ov.Core().compile_model(path, "CPU", EXACT)
    score = pixels = labels = 0.0
    for image in images:
        ours, theirs = model(torch.from_numpy(image)), compiled(image)
        score = max(score, abs(float(ours.pred_score) - theirs["pred_score"].item()))
        pixels = max(pixels, float(np.abs(ours.anomaly_map.numpy() - theirs["anomaly_map"]).max()))
        labels += bool(ours.pred_label) != theirs["pred_label"].item()
    return f"{score:.1e} | {pixels:.1e} | {labels:.0f} of {len(images)}"


def main(root: Path, products: list[str], size: int = 2000, repetitions: int = 50) -> None:
    """Run the benchmark.

    Args:
        root: Folder of the products.
        products: Names of the products; each is learned by a model of its own.
        size: Size of the memory bank.
        repetitions: Number of images that are timed, one at a time.
    """
    logging.disable(logging.WARNING)
    rows = []
    for name in products:
        data = MVTecAD(root, category=name, num_workers=0)
        data.setup()
        model = _fit(data, size)
        items = [data.test_data[i] for i in np.linspace(0, len(data.test_data) - 1, 16).astype(int)]
        images = [resize(item.image[None], [256, 256], antialias=True).numpy() for item in items]
        with tempfile.TemporaryDirectory() as folder:
            paths = {}
            for key, compression in COMPRESSIONS.items():
                paths[key] = path = model.to_openvino(
                    Path(folder) / key,
                    compression_type=compression,
                    datamodule=data if compression else None,
                    max_drop=1.0,  # what is lost is to be shown
                )
                accuracy = json.loads(path.with_name("metadata.json").read_text()).get("accuracy", {})
                figures = [f"{value[key]:.4f} ({value['FP32']:.4f})" for value in accuracy.values()] or ["", ""]
                rows.append(
                    f"| {name} | {key} | {_parity(model, path, images)} | {' | '.join(figures)} "
                    f"| {sum(file.stat().st_size for file in path.parent.iterdir()) / 2**20:.1f} |",
                )
            if name == products[0]:
                timed = {key: (paths[key], paths[key].with_name("features.xml")) for key in paths}
                print(f"\n### One image of 256 px of {name}, {size} vectors, median of {repetitions}\n")
                print("| export | model.xml, ms | features.xml, ms |\n| --- | --- | --- |")
                for key, (whole, features) in timed.items():
                    times = [_milliseconds(each, images[0], repetitions) for each in (whole, features)]
                    print(f"| {key} | {times[0]:.1f} | {times[1]:.1f} |", flush=True)
    print("\n### Beside torch in float32 (16 images) and, all test images, beside FP32 in brackets\n")
    print("| product | export | score differs | map differs | labels differ | image AUROC | image F1 | MiB |")
    print("| --- " * 8 + "|")
    print("\n".join(rows))


if __name__ == "__main__":
    auto_cli(main, as_positional=False)

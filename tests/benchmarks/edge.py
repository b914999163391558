# SPDX-License-Identifier: Apache-2.0
"""Latency, learning, cold start and memory of a bundle on this PC, beside the backbone alone and Anomalib's export.

python tests/benchmarks/edge.py --root datasets --products bottle pill
"""

import argparse
import csv
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

BARE = """
import sys, numpy, openvino
model = openvino.Core().compile_model(sys.argv[1], "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
model(numpy.zeros((1, 3, 256, 256), numpy.float32))
"""
EDGE = """
import sys, numpy
from openvino_export import EdgeDetector
EdgeDetector(sys.argv[1]).predict(numpy.zeros((256, 256, 3), numpy.uint8))
"""


def timed(functions: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each round of each function, called in turn, so that a busy PC slows all alike."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds + 3):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: values[3:] for name, values in times.items()}


def summed_up(times: dict[str, list[float]]) -> dict[str, tuple[float, float]]:
    """Median and shortest of each."""
    return {name: (float(np.median(values)), min(values)) for name, values in times.items()}


def export(root: Path, products: Sequence[str], folder: Path, images: int, memory: int) -> None:
    """Write a bundle of the first product, and Anomalib's own export of the same vectors and of its default share."""
    import openvino as ov
    import torch
    from anomalib.engine import Engine
    from anomalib.models import Patchcore

    from anomalib_ext.models import ContinualPatchCore

    model = ContinualPatchCore(memory_size=memory, visualizer=False)
    model.partial_fit(sorted((root / products[0] / "train" / "good").iterdir())[:images], products[0])
    Engine(logger=False).export(model.eval(), "openvino", folder / "ours")
    peer = Patchcore(backbone=model.model.backbone, layers=model.model.layers, pre_trained=False, visualizer=False)
    peer.model.feature_extractor.load_state_dict(model.model.feature_extractor.state_dict(), strict=False)
    peer.pre_processor = model.pre_processor
    # How many vectors there are decides its speed, not which: these are repeated, for its own selection is slow.
    patches = 1024 * len(list((root / products[0] / "train" / "good").iterdir()))
    count = int(peer.coreset_sampling_ratio * patches)
    vectors = model.model.bank.vectors()
    for name, content in (("same", vectors), ("default", np.resize(vectors, (count, vectors.shape[1])))):
        peer.model.memory_bank = torch.from_numpy(content)
        # Its own graph at a batch of one image: with this backbone, Anomalib's export fixes a batch of two in it.
        torch.onnx.export(peer.eval(), (torch.zeros(1, 3, 256, 256),), folder / f"{name}.onnx", dynamo=True)
        ov.save_model(ov.convert_model(folder / f"{name}.onnx"), folder / f"{name}.xml", compress_to_fp16=False)


def compare_latency(folder: Path, images: list[Path], rounds: int, results: Path) -> None:
    """Print the time of each form for an image of 256 pixels, and write that of each round to a file."""
    import openvino as ov
    from PIL import Image

    from openvino_export import EdgeDetector

    arrays = [np.asarray(Image.open(path).convert("RGB").resize((256, 256))) for path in images]
    tensors = [np.ascontiguousarray(array.transpose(2, 0, 1)[None], np.float32) / 255 for array in arrays]
    options = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}

    def compiled(path: Path, stable: bool | None = None) -> Callable[[], object]:
        """A graph as it is, or with a search that does or does not have to find the first of equally near vectors."""
        model = ov.Core().read_model(path)
        model.reshape([1, 3, 256, 256])
        for node in model.get_ops():
            if stable is not None and node.get_type_name() == "TopK" and node.get_input_element_type(0).is_real():
                node.set_attribute("stable", stable)
        request = ov.Core().compile_model(model, "CPU", options).create_infer_request()
        turn = iter(range(10**9))
        return lambda: request.infer([tensors[next(turn) % len(tensors)]], share_inputs=True)

    bundle = folder / "ours" / "weights" / "openvino"
    detector = EdgeDetector(bundle)
    turn = iter(range(10**9))
    functions: dict[str, Callable[[], Any]] = {
        "backbone alone (features.xml)": compiled(bundle / "features.xml"),
        "EdgeDetector.predict": lambda: detector.predict(arrays[next(turn) % len(arrays)]),
        "whole graph (model.xml)": compiled(bundle / "model.xml"),
        "whole graph, stable": compiled(bundle / "model.xml", stable=True),
        "Anomalib's export of Patchcore, the same vectors": compiled(folder / "same.xml"),
        "Anomalib's export of Patchcore, the same vectors, not stable": compiled(folder / "same.xml", stable=False),
        "Anomalib's export of Patchcore, its default share": compiled(folder / "default.xml"),
        "Anomalib's export of Patchcore, its default share, not stable": compiled(folder / "default.xml", stable=False),
    }
    times = timed(functions, rounds)
    results.parent.mkdir(parents=True, exist_ok=True)
    with results.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["form", "round", "milliseconds"])
        writer.writerows((name, i, f"{each:.3f}") for name, values in times.items() for i, each in enumerate(values))
    found = summed_up(times)
    base = found["backbone alone (features.xml)"]
    print(f"{detector.info()['vectors']} vectors, {len(images)} images")
    for name, files in (
        ("bundle", bundle.glob("*.*")),
        ("Anomalib's files, the same vectors", folder.glob("same.[xb]*")),
        ("Anomalib's files, its default share", folder.glob("default.[xb]*")),
    ):
        print(f"{name}: {sum(file.stat().st_size for file in files) / 1e6:.1f} MB")
    for name, (median, shortest) in found.items():
        print(f"{name}: median {median:.1f} ms ({median / base[0]:.2f}), shortest {shortest:.1f} ms", flush=True)
    patches = [
        detector._network(tensor[0])["embedding"].reshape(-1, detector._network.last_dimension) for tensor in tensors
    ]
    assert detector._decider is not None
    bank = detector._decider.bank
    parts = summed_up(timed({"search": lambda: bank.search(patches[next(turn) % len(patches)])}, rounds))
    print(f"of it, search: median {parts['search'][0]:.1f} ms, shortest {parts['search'][1]:.1f} ms")


def compare_learning(folder: Path, all_images: list[Path]) -> None:
    """Print the time of learning images of a new variant and of predicting them, and the peak memory."""
    from openvino_export import EdgeDetector

    for images in (all_images, all_images[:4], all_images[:1]):
        with TemporaryDirectory() as temporary:
            bundle = Path(shutil.copytree(folder / "ours" / "weights" / "openvino", Path(temporary) / "bundle"))
            detector = EdgeDetector(bundle)
            detector.predict(images)
            start = time.perf_counter()
            detector.predict(images)
            predicted = time.perf_counter() - start
            start = time.perf_counter()
            detector.learn(images, "new")
            learned = time.perf_counter() - start
            start = time.perf_counter()
            detector.save()
            saved = time.perf_counter() - start
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            print(
                f"{len(images)} images: predicted in {predicted:.2f} s, "
                f"learned in {learned:.2f} s ({learned / predicted:.1f}), saved in {saved:.2f} s; "
                f"peak memory {peak:.0f} MB",
                flush=True,
            )


def compare_start(folder: Path, rounds: int) -> None:
    """Print the time from the start of Python to the first result."""
    bundle = folder / "ours" / "weights" / "openvino"
    functions = {
        "a bare script with the same backbone": lambda: subprocess.run(
            [sys.executable, "-c", BARE, bundle / "features.xml"], check=True
        ),
        "a bare script with model.xml": lambda: subprocess.run(
            [sys.executable, "-c", BARE, bundle / "model.xml"], check=True
        ),
        "EdgeDetector": lambda: subprocess.run([sys.executable, "-c", EDGE, bundle], check=True),
    }
    for name, (median, shortest) in summed_up(timed(functions, rounds)).items():
        print(f"first verdict, {name}: median {median:.0f} ms, shortest {shortest:.0f} ms", flush=True)


def main() -> None:
    """Run all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="folder of products in the layout of MVTec AD")
    parser.add_argument("--products", nargs=2, default=["bottle", "pill"], help="one to know, one to learn")
    parser.add_argument("--images", type=int, default=60, help="training images of the first product")
    parser.add_argument("--memory", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--results", type=Path, default=Path("results/latency.csv"), help="times of an image, written")
    parser.add_argument("--folder", type=Path, help="where the exports are kept; made anew if it is not there")
    parser.add_argument("--part", choices=["export", "latency", "learning", "start"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    known = sorted((args.root / args.products[0] / "test").glob("*/*.png"))
    if args.part == "export":
        export(args.root, args.products, args.folder, args.images, args.memory)
    elif args.part == "latency":
        compare_latency(args.folder, known[:: max(1, len(known) // 20)], args.rounds, args.results)
    elif args.part == "learning":
        compare_learning(args.folder, sorted((args.root / args.products[1] / "train" / "good").iterdir())[:16])
    elif args.part == "start":
        compare_start(args.folder, 5)
    else:
        with TemporaryDirectory() as temporary:
            folder = args.folder or Path(temporary)
            # Each in a process of its own, so that torch is not in the memory of the edge.
            parts = ["latency", "learning", "start"] if folder.exists() and any(folder.iterdir()) else None
            for part in parts or ["export", "latency", "learning", "start"]:
                subprocess.run([sys.executable, *sys.argv, "--folder", folder, "--part", part], check=True)


if __name__ == "__main__":
    main()

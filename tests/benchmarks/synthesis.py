# SPDX-License-Identifier: Apache-2.0
"""Images that one worker puts anomalies on in a second of processor time, beside Anomalib's ``PerlinAnomalyGenerator``.

Reads images of any size from a folder, and prints Markdown:

    python tests/benchmarks/synthesis.py --images datasets/bottle/train/good --texture_dir dtd/images
"""

import time
from collections.abc import Callable
from pathlib import Path

import torch
from anomalib.data.utils import read_image
from anomalib.data.utils.generators import PerlinAnomalyGenerator
from jsonargparse import auto_cli
from torchvision.transforms.v2.functional import resize

from anomalib_ext.data import AnomalySynthesis


def _rate(transform: Callable[[torch.Tensor], object], images: list[torch.Tensor], count: int) -> float:
    for image in images[:3]:
        transform(image)
    start = time.process_time()
    for index in range(count):
        transform(images[index % len(images)])
    return count / (time.process_time() - start)


def main(images: Path, texture_dir: Path | None = None, sides: list[int] | None = None, count: int = 300) -> None:
    """Print the rates.

    Args:
        images: Folder of images.
        texture_dir: Folder of textures for both, which Anomalib then reads for every image; bundled ones without it.
        sides: Heights and widths in pixels.
        count: Number of images for each rate.
    """
    torch.set_num_threads(1)
    files = sorted(images.glob("*"))[:20]
    print("| pixels | AnomalySynthesis, images/s | PerlinAnomalyGenerator, images/s |\n| ---: | ---: | ---: |")
    for side in sides or [256, 448]:
        resized = [resize(read_image(file, as_tensor=True), [side, side]) for file in files]
        ours = _rate(AnomalySynthesis(texture_dir), resized, count)
        theirs = _rate(PerlinAnomalyGenerator(texture_dir, probability=1.0, blend_factor=(0.2, 0.8)), resized, count)
        print(f"| {side} | {ours:.0f} | {theirs:.0f} |")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)

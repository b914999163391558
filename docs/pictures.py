# SPDX-License-Identifier: Apache-2.0
"""Draws the pictures of continual_learning.md, from what ContinualPatchCore says while it learns four products."""

from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from anomalib.data.utils import read_image
from matplotlib import pyplot as plt

from anomalib_ext.data import PhotoVariants
from anomalib_ext.models import ContinualPatchCore

PRODUCTS = ("brick", "cell", "moon", "retina")
FOLDER = Path(__file__).parent / "images"


def main() -> None:
    """Learn one product after another; draw who holds the memory bank, and how the first one is judged each time."""
    mpl.use("Agg")
    torch.manual_seed(0)
    data = {name: PhotoVariants(category=name) for name in PRODUCTS}
    for each in data.values():
        each.prepare_data()
        each.setup()
    model = ContinualPatchCore(memory_size=2000, visualizer=False).eval()
    samples = data["brick"].test_data.samples
    defective = Path(samples[samples.image_path.str.contains("scratch")].image_path.iloc[0])
    image = read_image(defective, as_tensor=True)[None]
    shares, maps, scores = [], [], []
    for name in PRODUCTS:
        model.partial_fit(list(data[name].train_data.samples.image_path), variant=name)
        known = model.model.bank.variants
        shares.append([len(known[each].vectors) if each in known else 0 for each in PRODUCTS])
        with torch.no_grad():
            result = model(image)
        maps.append(result.anomaly_map.squeeze().numpy())
        scores.append(float(result.pred_score))

    figure, axes = plt.subplots(figsize=(6.4, 2.6), layout="constrained")
    left = np.zeros(len(PRODUCTS))
    for name, vectors in zip(PRODUCTS, np.transpose(shares), strict=True):
        bars = axes.barh(PRODUCTS, vectors, left=left, label=name)
        axes.bar_label(bars, [str(count) if count else "" for count in vectors], label_type="center", color="white")
        left += vectors
    axes.invert_yaxis()
    axes.set(xlabel="vectors in the memory bank", ylabel="after learning")
    figure.legend(loc="outside right upper")
    figure.savefig(FOLDER / "memory_shares.png", dpi=110)

    figure, panels = plt.subplots(1, 1 + len(PRODUCTS), figsize=(9, 2.2), layout="constrained")
    panels[0].imshow(image.squeeze().permute(1, 2, 0))
    panels[0].set_title("scratched brick")
    for panel, name, anomaly_map, score in zip(panels[1:], PRODUCTS, maps, scores, strict=True):
        panel.imshow(anomaly_map, cmap="turbo", vmin=0, vmax=1)
        panel.set_title(f"after {name}: {score:.2f}")
    for panel in panels:
        panel.axis("off")
    figure.savefig(FOLDER / "map_after_each_product.png", dpi=90)


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""What each part of Crr does, and what it costs.

Several products are learned as one set, by a small encoder without pretrained weights if no other is named: so the
figures tell what repair, mask and head change, and nothing about accuracy. Prints Markdown tables:

    python tests/benchmarks/crr.py learn --settings.root datasets
    python tests/benchmarks/crr.py supply --settings.root datasets --settings.batch 16 --settings.size 448
    python tests/benchmarks/crr.py cost
"""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from anomalib.callbacks import ModelCheckpoint
from anomalib.engine import Engine
from anomalib.models import Crr
from jsonargparse import auto_cli
from lightning.pytorch import Callback, seed_everything
from torch.nn import functional as F  # noqa: N812
from torch.utils.flop_counter import FlopCounterMode
from torchmetrics.functional.classification import binary_auroc, binary_average_precision

from anomalib_ext.data import AnomalySynthesis, MultiCategory
from anomalib_ext.models.crr.anomalous_batches import WithAnomalies
from anomalib_ext.models.crr.lightning_model import ENCODER
from anomalib_ext.models.crr.torch_model import MAP_SIDE, CrrModel

# On a CPU that others use too, processor time says more.
CLOCK = time.perf_counter if torch.cuda.is_available() else time.process_time

VARIANTS: dict[str, dict[str, Any]] = {
    "Crr": {},
    "Crr, no head": {"stage": "repair"},
    "Crr, no repair": {"stage": "repair", "repair": False},
    "Crr, no mask": {"stage": "repair", "mask_ratio": 0.0},
    "Dinomaly": {"stage": "repair", "repair": False, "mask_ratio": 0.0},
}


@dataclass(frozen=True)
class Settings:
    """What all trainings have in common.

    Attributes:
        root: Folder of the products, in MVTec AD's layout.
        products: Their names.
        encoder: Encoder.
        pre_trained: Whether it has pretrained weights.
        repair_steps: Steps of the first stage.
        segment_steps: Steps of the second stage.
        batch: Number of images in a batch.
        size: Height and width of the images.
        head_width: Width of the head.
        head_lr: Its learning rate, larger than the paper's 1e-4 for the few steps.
        images: Number of test images of each kind.
        workers: Number of workers that load images.
    """

    root: Path
    products: tuple[str, ...] = ("bottle", "hazelnut", "pill")
    encoder: str = "test_vit"
    pre_trained: bool = False
    repair_steps: int = 300
    segment_steps: int = 300
    batch: int = 8
    size: int = 128
    head_width: int = 8
    head_lr: float = 1e-3
    images: int = 52
    workers: int = 0


class _Losses(Callback):
    """Notes the loss of each step and how long it took, without the wait for images; and sets the head's rate."""

    def __init__(self, head_lr: float) -> None:
        self.head_lr = head_lr
        self.losses: dict[str, list[float]] = {"repair": [], "segment": []}
        self.seconds: dict[str, list[float]] = {"repair": [], "segment": []}

    def on_train_start(self, trainer: Any, pl_module: Crr) -> None:  # noqa: ANN401
        """Set the rate."""
        del pl_module
        for optimizer in trainer.optimizers[1:]:
            optimizer.param_groups[0]["lr"] = self.head_lr

    def on_train_batch_start(self, trainer: Any, pl_module: Crr, *args) -> None:  # noqa: ANN401
        """Start."""
        del trainer, args
        self.stage = pl_module.current_stage
        self.started = CLOCK()

    def on_train_batch_end(self, trainer: Any, pl_module: Crr, *args) -> None:  # noqa: ANN401
        """Stop."""
        del pl_module, args
        self.losses[self.stage].append(float(trainer.callback_metrics[f"{self.stage}_loss_step"]))
        self.seconds[self.stage].append(CLOCK() - self.started)


def _data(settings: Settings) -> MultiCategory:
    data = MultiCategory(
        root=settings.root,
        categories=settings.products,
        train_batch_size=settings.batch,
        num_workers=settings.workers,
    )
    data.setup()
    return data


def _fit(settings: Settings, data: MultiCategory, seed: int, **kwargs) -> tuple[Crr, _Losses]:
    seed_everything(seed)
    model = Crr(
        settings.encoder,
        settings.pre_trained,
        repair_steps=settings.repair_steps,
        segment_steps=settings.segment_steps,
        head_width=settings.head_width,
        pre_processor=Crr.configure_pre_processor((settings.size, settings.size), encoder=settings.encoder),
        post_processor=False,
        evaluator=False,
        visualizer=False,
        **kwargs,
    )
    losses = _Losses(settings.head_lr)
    with TemporaryDirectory() as folder:
        engine = Engine(
            default_root_dir=folder,
            callbacks=[losses, ModelCheckpoint(save_top_k=0)],
            limit_val_batches=0,
            logger=False,
            enable_model_summary=False,
        )
        engine.fit(model, datamodule=data)
    return model.cpu().eval(), losses


def _images(model: Crr, items: Sequence[Any], images: int) -> Iterator[tuple[torch.Tensor, torch.Tensor, str]]:
    """Images evenly from a set, resized to values in [0, 1], with masks ``(1, H, W)`` and paths."""
    resize = model.pre_processor.transform.transforms[0]
    for index in np.linspace(0, len(items) - 1, min(images, len(items))):
        item = items[int(index)]
        mask = torch.zeros(item.image.shape[-2:]) if item.gt_mask is None else item.gt_mask
        image = resize(item.image).as_subclass(torch.Tensor)
        yield image, F.interpolate(mask[None, None].float(), image.shape[-2:])[0], item.image_path


@torch.inference_mode()
def _distances(model: Crr, clean: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
    """Cosine distance of what is decoded from an image to the encoder's maps of a clean one, shape ``(h, w)``."""
    normalize = model.pre_processor.transform.transforms[-1]
    target, _ = model.model.reconstruct(normalize(clean)[None])
    _, decoded = model.model.reconstruct(normalize(given)[None])
    pairs = zip(target, decoded, strict=True)
    return torch.stack([1 - F.cosine_similarity(e, d)[0] for e, d in pairs]).mean(0)


def _inside(mask: torch.Tensor, size: torch.Size) -> torch.Tensor:
    """Patches of which at least a half lies in a mask."""
    return F.adaptive_avg_pool2d(mask, size)[0] >= 0.5


@torch.inference_mode()
def _precision(model: Crr, synthetic: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, float]:
    """Average precision over all pixels of synthetic defects, of each map."""
    normalize = model.pre_processor.transform.transforms[-1]
    maps: dict[str, list[torch.Tensor]] = {"head": [], "cosine": [], "fused": []}
    truth = []
    for image, mask in synthetic:
        encoded, decoded = model.model.reconstruct(normalize(image)[None])
        pairs = list(zip(encoded, decoded, strict=True))
        cosine = torch.stack([1 - F.cosine_similarity(e, d) for e, d in pairs]).mean(0)
        cosine = F.interpolate(cosine[None], (MAP_SIDE, MAP_SIDE), mode="bilinear", align_corners=True)[0, 0]
        head = model.model.head(encoded, decoded).softmax(1)[0, 1]
        fused = model.model.alpha * cosine + (1 - model.model.alpha) * head
        for name, each in (("head", head), ("cosine", cosine), ("fused", fused)):
            maps[name].append(each.flatten())
        truth.append(F.interpolate(mask[None], (MAP_SIDE, MAP_SIDE))[0, 0].flatten())
    target = torch.cat(truth).int()
    result = {name: float(binary_average_precision(torch.cat(each), target)) for name, each in maps.items()}
    return {**result, "chance": float(target.float().mean())}


def learn(settings: Settings, variants: list[str] = list(VARIANTS), seeds: list[int] = [0]) -> None:  # noqa: B006
    """Train variants with equal seeds and steps, and compare them.

    Args:
        settings: What all trainings have in common.
        variants: Names in `VARIANTS`.
        seeds: Seeds of the weights, the encoder's too, of the batches and of the anomalies.
    """
    data = _data(settings)
    labels = np.array(data.test_data.samples.label_index)
    good, bad = ([data.test_data[int(i)] for i in np.flatnonzero(labels == kind)] for kind in (0, 1))
    found: dict[str, list[list[float]]] = {name: [] for name in variants}
    for seed in seeds:
        for name in variants:
            model, losses = _fit(settings, data, seed, **VARIANTS[name])
            synthesis = AnomalySynthesis(seed=1)
            clean = list(_images(model, good, settings.images))
            defects = [(image, *synthesis(image, path)) for image, _, path in clean]
            if model.model.head is not None:
                _tell_losses(losses)
                _tell_precision(_precision(model, [(changed, mask) for _, changed, mask in defects]))
            found[name].append(_identity(model, defects, list(_images(model, bad, settings.images))))
            print(name, seed, *(f"{value:.4f}" for value in found[name][-1]), flush=True)
    print("\n| model | synthetic, to clean | to own | real | normal | real - normal | real / normal | patch AUROC |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for name, rows in found.items():
        means, spreads = np.mean(rows, axis=0), np.std(rows, axis=0, ddof=1) if len(rows) > 1 else None
        cells = [
            f"{mean:.3f}" if spreads is None else f"{mean:.3f} ± {spread:.3f}"
            for mean, spread in zip(means, means if spreads is None else spreads, strict=True)
        ]
        print(f"| {name} | " + " | ".join(cells) + " |")
    print(f"\n{vars(settings)}, seeds {seeds}, {torch.get_num_threads()} threads")


def _identity(
    model: Crr,
    defects: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
    bad: Sequence[tuple[torch.Tensor, torch.Tensor, str]],
) -> list[float]:
    """How far what is decoded is from the encoder's features, in the mean over patches.

    Args:
        model: Model.
        defects: Good images, the same with anomalies, and the masks of these.
        bad: Images with real defects, their masks, and their paths.

    Returns:
        Cosine distances within synthetic defects to the clean and to the image's own features, within real defects,
        and on good images; difference and ratio of the last two; and the AUROC with which they tell patches apart.
    """
    repaired, synthetic, normal, real = [], [], [], []
    for image, changed, mask in defects:
        distance = _distances(model, image, changed)
        inside = _inside(mask, distance.shape)
        repaired.append(distance[inside])
        synthetic.append(_distances(model, changed, changed)[inside])
        normal.append(_distances(model, image, image).flatten())
    for image, mask, _ in bad:
        distance = _distances(model, image, image)
        real.append(distance[_inside(mask, distance.shape)])
    values = [torch.cat(each) for each in (repaired, synthetic, real, normal)]
    means = [float(each.mean()) for each in values]
    labels = torch.cat([torch.full(each.shape, number) for each, number in zip(values[2:], (1, 0), strict=True)])
    auroc = float(binary_auroc(torch.cat(values[2:]), labels))
    return [*means, means[2] - means[3], means[2] / means[3], auroc]


def _tell_losses(losses: _Losses) -> None:
    print("\n| stage | loss of the first tenth of the steps | of the last | median seconds a step |")
    print("| --- | --- | --- | --- |")
    for stage, values in losses.losses.items():
        tenth = max(1, len(values) // 10)
        seconds = np.median(losses.seconds[stage])
        print(
            f"| {stage} | {np.mean(values[:tenth]):.4f} | {np.mean(values[-tenth:]):.4f} | {seconds:.2f} |", flush=True
        )


def _tell_precision(precision: dict[str, float]) -> None:
    print("\npixel average precision on synthetic defects: ", end="")
    print(", ".join(f"{name} {value:.3f}" for name, value in precision.items()), end="\n\n", flush=True)


def supply(settings: Settings, step_ms: list[int] = [100, 200, 500, 1000]) -> None:  # noqa: B006
    """Tell how many workers a training needs for never waiting for images.

    Args:
        settings: Size and number of the images, and what is trained.
        step_ms: Lengths of steps, of other encoders and machines, to tell it for as well.
    """
    data = _data(settings)
    model, losses = _fit(settings, data, seed=0)
    loader = data.train_dataloader()
    loader.collate_fn = WithAnomalies(
        loader.collate_fn, model.pre_processor.transform.transforms[0], AnomalySynthesis()
    )
    images, started = 0, time.process_time()
    assert not settings.workers, "time in other processes would not be counted"
    for batch in islice(loader, 10):
        images += len(batch.image) // 2
    rate = images / (time.process_time() - started)
    print(f"\none worker reads, resizes and puts anomalies on {rate:.0f} images a second of processor time")
    print(f"\n| a step of {settings.batch} images | images a second | workers |\n| --- | --- | --- |")
    measured = [(f"{stage}, {settings.encoder}", np.median(seconds)) for stage, seconds in losses.seconds.items()]
    for name, seconds in [*measured, *(("", milliseconds / 1e3) for milliseconds in step_ms)]:
        taken = settings.batch / seconds
        print(f"| {1e3 * seconds:.0f} ms {name} | {taken:.0f} | {math.ceil(taken / rate)} |")
    print(f"\n{vars(settings)}, {torch.get_num_threads()} threads")


def cost(encoder: str = ENCODER, size: int = 392, latency: bool = False, repetitions: int = 3) -> None:
    """Count parameters and multiplications for an image, without head and with either one.

    Args:
        encoder: Encoder, whose weights do not matter here.
        size: Height and width of the images.
        latency: Whether to time the exported models on one thread, too.
        repetitions: Number of timed inferences.
    """
    print("| head | parameters, million | GMAC |" + (" ms an image, OpenVINO, one thread |" if latency else ""))
    print("| --- | --- | --- |" + (" --- |" if latency else ""))
    for width in (None, 192, 64):
        with torch.device("meta"):
            model = CrrModel(encoder, pre_trained=False, head_width=width).eval()
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                encoded, decoded = model.reconstruct(torch.empty(1, 3, size, size))
                if model.head is not None:
                    model.head(encoded, decoded)
        millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
        cells = [str(width), f"{millions:.1f}", f"{counter.get_total_flops() / 2e9:.0f}"]
        if latency:
            cells.append(f"{_milliseconds(encoder, size, width, repetitions):.0f}")
        print("| " + " | ".join(cells) + " |", flush=True)


def _milliseconds(encoder: str, size: int, width: int | None, repetitions: int) -> float:
    """Median time of one image."""
    import openvino as ov

    model = Crr(
        encoder,
        pre_trained=False,
        stage="both" if width else "repair",
        head_width=width or 192,
        pre_processor=Crr.configure_pre_processor((size, size), encoder=encoder),
    )
    model.model.steps = [1, 1]
    with TemporaryDirectory() as folder:
        path = model.to_openvino(folder, input_size=(size, size), ov_kwargs={"input": [1, 3, size, size]})
        options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
        compiled = ov.Core().compile_model(path, "CPU", options)
        image = np.random.default_rng(0).random((1, 3, size, size), dtype=np.float32)
        seconds = []
        for _ in range(repetitions + 1):
            started = time.perf_counter()
            compiled(image)
            seconds.append(time.perf_counter() - started)
    return float(np.median(seconds[1:])) * 1e3


if __name__ == "__main__":
    auto_cli({"learn": learn, "supply": supply, "cost": cost}, as_positional=False)

# SPDX-License-Identifier: Apache-2.0
"""RdAkf and HetNet beside Anomalib's ReverseDistillation, with the same steps, batches, optimizer and teacher.

Reads data sets in MVTec AD's layout and prints Markdown tables. Each training has a process of its own, for its memory;
what is finished is kept in a file, so that a run that was stopped goes on with the rest:

    python tests/benchmarks/distillation.py --settings.root datasets --products '[bottle, pill]' --settings.steps 60
"""

import json
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pandas as pd
import torch
import yaml
from anomalib.callbacks import ModelCheckpoint
from anomalib.data import MVTecAD
from anomalib.engine import Engine
from anomalib.metrics import AUPRO, AUROC, Evaluator
from anomalib.models import HetNet, RdAkf, ReverseDistillation
from anomalib.models.components import AnomalibModule
from anomalib.pre_processing import PreProcessor
from jsonargparse import ArgumentParser, auto_cli
from lightning.pytorch import Callback, seed_everything
from torchvision.transforms.v2 import Transform

from anomalib_ext.models.het_net.loss import HetNetLoss

PERTURBATIONS = Path(__file__).parents[2] / "configs" / "perturbations"
WARM_UP = 5  # steps that are not timed
TEST_METRICS = ("image_AUROC", "pixel_AUROC", "pixel_AUPRO")


@dataclass(frozen=True)
class Settings:
    """What all trainings have in common.

    Attributes:
        root: Folder of the products.
        steps: Number of optimizer steps.
        batch: Number of images in a batch.
        lr: Learning rate of Adam.
        betas: Its other rates.
        size: Height and width of the images.
        backbone: Teacher of all models.
        transformer: Second teacher of HetNet.
        transformer_pre_trained: Whether it has pretrained weights.
    """

    root: Path
    steps: int = 300
    batch: int = 16
    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    size: int = 256
    backbone: str = "resnet18.tv_in1k"
    transformer: str = "vit_tiny_patch16_224"
    transformer_pre_trained: bool = False


def _reverse_distillation(settings: Settings, pre_processor: PreProcessor, **kwargs) -> ReverseDistillation:
    # Anomalib knows decoders by names without tags, and timm's default weights by them: so a decoder of that name, and
    # the same teacher as the others.
    name = settings.backbone.split(".", maxsplit=1)[0]
    model = ReverseDistillation(name, pre_trained=False, pre_processor=pre_processor, **kwargs)
    ours = RdAkf(settings.backbone, weighting="content", pre_processor=pre_processor, **kwargs)
    model.model.encoder = ours.model.teacher.extractor
    return model


def _rd_akf(settings: Settings, pre_processor: PreProcessor, weighting: str = "position", **kwargs) -> RdAkf:
    return RdAkf(settings.backbone, weighting=weighting, pre_processor=pre_processor, **kwargs)


def _het_net(settings: Settings, pre_processor: PreProcessor, stop_gradient: bool = True, **kwargs) -> HetNet:
    model = HetNet(
        settings.backbone,
        settings.transformer,
        transformer_pre_trained=settings.transformer_pre_trained,
        pre_processor=pre_processor,
        **kwargs,
    )
    model.loss = HetNetLoss(stop_gradient)
    return model


MODELS: dict[str, Callable[..., AnomalibModule]] = {
    "ReverseDistillation": _reverse_distillation,
    "RdAkf": _rd_akf,
    "RdAkf, content": partial(_rd_akf, weighting="content"),
    "HetNet": _het_net,
    "HetNet, no ALGF": partial(_het_net, use_algf=False),
    "HetNet, no noise": partial(_het_net, noise="none"),
    "HetNet, standard normal": partial(_het_net, noise="randn"),
    "HetNet, diagonal": partial(_het_net, noise="diag"),
    "HetNet, gradient to SR": partial(_het_net, stop_gradient=False),
}


class _StepTimes(Callback):
    """Times each step, from the batch to the weights, without loading."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_batch_start(self, *args) -> None:
        """Start."""
        del args
        self._started = time.perf_counter()

    def on_train_batch_end(self, *args) -> None:
        """Stop."""
        del args
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self._started)


def _transforms() -> dict[str, Transform]:
    """Return the perturbations by name."""
    parser = ArgumentParser()
    parser.add_argument("--transform", type=Transform)
    return {
        path.stem: parser.instantiate_classes(parser.parse_object({"transform": yaml.safe_load(path.read_text())}))[
            "transform"
        ]
        for path in sorted(PERTURBATIONS.glob("*.yaml"))
    }


def run(settings: Settings, name: str, product: str, seed: int, perturbed: bool) -> list[dict[str, Any]]:
    """Train and test one model, in a process of its own; on perturbed images too if `perturbed`.

    Returns:
        A row for each kind of test images and, on clean ones, each student if there are several: the metrics; seconds a
        step; peak memory in MiB, resident on a CPU and allocated on a GPU; images a second of the export on one thread.
    """
    # The post-processor would only set thresholds.
    seed_everything(seed)
    evaluator = Evaluator(
        test_metrics=[
            AUROC(fields=["pred_score", "gt_label"], prefix="image_"),
            AUROC(fields=["anomaly_map", "gt_mask"], prefix="pixel_"),
            AUPRO(fields=["anomaly_map", "gt_mask"], prefix="pixel_"),
        ],
    )
    pre_processor = RdAkf.configure_pre_processor((settings.size, settings.size), settings.backbone)
    parts: dict[str, Any] = {"evaluator": evaluator, "visualizer": False, "post_processor": False}
    model = MODELS[name](settings, pre_processor, **parts)
    learned = [p for p in model.model.parameters() if p.requires_grad]
    setattr(model, "configure_optimizers", lambda: torch.optim.Adam(learned, settings.lr, settings.betas))  # noqa: B010
    times = _StepTimes()
    data = partial(MVTecAD, settings.root, product, train_batch_size=settings.batch, num_workers=0)
    with TemporaryDirectory() as folder:
        engine = Engine(
            default_root_dir=folder,
            callbacks=[times, ModelCheckpoint(save_top_k=0)],
            max_steps=settings.steps,
            limit_val_batches=0,
            logger=False,
            enable_model_summary=False,
        )
        engine.fit(model, datamodule=data())
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
        if torch.cuda.is_available():
            peak = torch.cuda.max_memory_allocated() / 2**20
        rows = []
        default = model.model.score_from if isinstance(model, HetNet) else ""
        for student in sorted(("sr", "sd", "both"), key=default.__eq__) if default else ("",):
            if student:
                model.model.score_from = student
            kinds = {"clean": None, **(_transforms() if perturbed and student == default else {})}
            for kind, transform in kinds.items():
                seed_everything(0)  # the same perturbations for all
                (result,) = engine.test(model, datamodule=data(test_augmentations=transform), verbose=False)
                metrics = {metric: float(result[metric]) for metric in TEST_METRICS}
                rows.append({"model": f"{name} {student}".strip(), "images": kind, **metrics})
        path = model.cpu().to_openvino(Path(folder) / "exported", input_size=(settings.size, settings.size))
        # In a process of its own: in this one, the same file may run at a third of its speed.
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            throughput = pool.submit(_throughput, path, settings.size).result()
        costs = {
            "seconds a step": statistics.median(times.seconds[WARM_UP:]),
            "peak MiB": peak,
            "images/s exported": throughput,
        }
    return [{**row, **costs, "product": product, "seed": seed} for row in rows]


def _throughput(path: Path, size: int) -> float:
    """Return images a second, one by one, as median of repeated inferences."""
    import openvino as ov

    compiled = ov.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1})
    image = np.random.default_rng(0).random((1, 3, size, size), dtype=np.float32)
    seconds = []
    for _ in range(25):
        started = time.perf_counter()
        compiled(image)
        seconds.append(time.perf_counter() - started)
    return 1 / statistics.median(seconds[5:])


def _table(title: str, rows: pd.DataFrame, index: str, columns: Sequence[str]) -> None:
    """Print a table of means over the products, with the standard deviation over the seeds if there are several."""
    print(f"\n### {title}\n")
    print("| " + " | ".join([index, *columns]) + " |")
    print("| " + " | ".join(["---"] * (len(columns) + 1)) + " |")
    for name, group in rows.groupby(index, sort=False):
        seeds = group.groupby("seed")[list(columns)].mean()
        spread = seeds.std() if len(seeds) > 1 else None
        cells = [
            f"{seeds[column].mean():.4g}" + (f" ± {spread[column]:.2g}" if spread is not None else "")
            for column in columns
        ]
        print("| " + " | ".join([str(name), *cells]) + " |", flush=True)


def _report(rows: pd.DataFrame) -> None:
    clean = rows[rows["images"] == "clean"]
    columns = [*TEST_METRICS, "seconds a step", "peak MiB", "images/s exported"]
    for product, group in clean.groupby("product", sort=False):
        _table(f"{product}, clean test images", group, "model", columns)
    _table("mean of the products, clean test images", clean, "model", columns)
    if len(clean) < len(rows):
        for name, group in rows[rows["perturbed"]].groupby("model", sort=False):
            _table(f"{name}, mean of the products, by perturbation", group, "images", TEST_METRICS)


def main(
    settings: Settings,
    products: list[str],
    models: list[str] = ["ReverseDistillation", "RdAkf", "HetNet"],  # noqa: B006
    seeds: list[int] = [0, 1, 2],  # noqa: B006
    perturbed: list[int] = [0],  # noqa: B006
    finished: Path = Path("results/distillation.jsonl"),
) -> None:
    """Run the benchmark.

    Args:
        settings: What all trainings have in common.
        products: Names of the products.
        models: Names in `MODELS`.
        seeds: Seeds of the weights and of the order of the images.
        perturbed: Those of the seeds whose models are tested on perturbed images too, which takes long.
        finished: File with a line for each finished training, which is not repeated with the same settings.
    """
    finished.parent.mkdir(parents=True, exist_ok=True)
    lines = finished.read_text(encoding="utf-8").splitlines() if finished.exists() else []
    known = [json.loads(line) for line in lines]
    common = {key: str(value) for key, value in vars(settings).items()}
    rows: list[dict[str, Any]] = []
    for seed in seeds:
        for product in products:
            for name in models:
                key = {"settings": common, "name": name, "product": product, "seed": seed}
                key["perturbed"] = seed in perturbed
                result = next((line["result"] for line in known if line["key"] == key), None)
                if result is None:
                    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                        result = pool.submit(run, *(settings, name, product, seed, seed in perturbed)).result()
                    with finished.open("a", encoding="utf-8") as file:
                        file.write(json.dumps({"key": key, "result": result}) + "\n")
                rows += [{**row, "perturbed": seed in perturbed} for row in result]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    print(f"\n{device}; {', '.join(f'{key} {value}' for key, value in common.items() if key != 'root')}; seeds {seeds}")
    _report(pd.DataFrame(rows))


if __name__ == "__main__":
    auto_cli(main, as_positional=False)

# SPDX-License-Identifier: Apache-2.0
"""RdAkf and HetNet beside Anomalib's ReverseDistillation, with the same teacher, steps, batches and schedule.

Teachers are frozen, so their features are computed once for a product. Each is trained by Adam as it is by default (its
betas, its groups), with one learning rate for all that decays to 0 along a cosine. Every training is judged twice: with
the running statistics of batch normalisation, and with those of the last weights (``estimate_batch_statistics``).

    python tests/benchmarks/distillation.py run --settings.root datasets --products '[pill]' --settings.steps 300
    python tests/benchmarks/distillation.py table

The first command appends the rows of each finished training to a file, and leaves out what is there, so that it can be
stopped at any time. The second prints the file as Markdown tables. What a step costs is in ``distillation_cost.py``.
"""

import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count, islice
from itertools import product as product_of
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import yaml
from anomalib.data import ImageBatch, MVTecAD
from anomalib.data.datasets.base.image import AnomalibDataset
from anomalib.metrics import AUPRO, AUROC
from anomalib.models import HetNet, RdAkf, ReverseDistillation
from anomalib.models.components import AnomalibModule
from anomalib.models.image.reverse_distillation.loss import ReverseDistillationLoss
from jsonargparse import ArgumentParser, auto_cli
from lightning.pytorch import seed_everything
from torch import nn
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import Compose, Transform

from anomalib_ext.models.components.batch_norm import estimate_batch_statistics
from anomalib_ext.models.components.reverse_distillation import score
from anomalib_ext.models.het_net.loss import HetNetLoss
from anomalib_ext.models.het_net.torch_model import STUDENTS, HetNetModel
from anomalib_ext.models.rd_akf.lightning_model import FUSION_RATE
from anomalib_ext.models.rd_akf.torch_model import AsymptoticFusion, RdAkfModel

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results" / "distillation.csv"
METRICS = ("image_AUROC", "pixel_AUROC", "pixel_AUPRO")
SETTINGS = ["steps", "batch", "lr", "size", "precision", "backbone"]
KEY = ["product", "model", "transformer", "seed", *SETTINGS]
FACTS = ["loss", "weights_moved", "seconds_a_step", "seconds"]
COLUMNS = [*KEY, "images", "statistics", *METRICS, *FACTS]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Maps = list[torch.Tensor]
Judged = tuple[ImageBatch, Maps]


@dataclass(frozen=True)
class Settings:
    """What all trainings have in common.

    Attributes:
        root: Folder of the products.
        steps: Number of optimizer steps.
        batch: Number of images in a batch.
        lr: Learning rate of Adam at the start; that of RdAkf's weights is as many times higher as by default.
        size: Height and width of the images.
        precision: Of the training, ``32`` or ``bf16`` (mixed); judging takes 32 bits.
        backbone: Teacher of all models.
        transformer: Second teacher of HetNet.
        transformer_weights: File with its weights; without, it has random ones.
    """

    root: Path = Path("datasets")
    steps: int = 300
    batch: int = 8
    lr: float = 1e-3
    size: int = 256
    precision: str = "bf16"
    backbone: str = "resnet18.tv_in1k"
    transformer: str = "vit_tiny_patch16_224"
    transformer_weights: Path | None = None


# Models


def _parts(settings: Settings) -> dict[str, Any]:
    size = RdAkf.configure_pre_processor((settings.size, settings.size), settings.backbone)
    return {"pre_processor": size, "evaluator": False, "visualizer": False, "post_processor": False}


def _reverse_distillation(settings: Settings) -> ReverseDistillation:
    # Anomalib knows decoders by names without tags, and timm's default weights by them: so a decoder of that name, and
    # the same teacher as the others.
    name = settings.backbone.split(".", maxsplit=1)[0]
    model = ReverseDistillation(name, pre_trained=False, **_parts(settings))
    model.model.encoder = RdAkf(settings.backbone, **_parts(settings)).model.teacher.extractor
    return model


def rd_akf(settings: Settings, **fusion: bool) -> RdAkf:
    """Return RdAkf, perhaps with another fusion."""
    model = RdAkf(settings.backbone, **_parts(settings))
    size = (settings.size, settings.size)
    model.model.fusion = AsymptoticFusion(model.model.teacher.channels, size, **fusion)
    return model


def _het_net(settings: Settings, stop_gradient: bool = True, **kwargs: Any) -> HetNet:  # noqa: ANN401
    model = HetNet(
        settings.backbone,
        settings.transformer,
        transformer_pre_trained=settings.transformer_weights is not None,
        transformer_weights=settings.transformer_weights,
        **kwargs,
        **_parts(settings),
    )
    model.loss = HetNetLoss(stop_gradient)
    return model


# How each is made, and how many times faster the weights of its fusion learn than the rest.
MODELS: dict[str, tuple[Callable[[Settings], AnomalibModule], float]] = {
    "ReverseDistillation": (_reverse_distillation, 1),
    "RdAkf": (rd_akf, FUSION_RATE),
    "RdAkf, weights fixed": (rd_akf, 0),
    "RdAkf, one rate": (rd_akf, 1),
    "RdAkf, rate x 30": (rd_akf, 30),
    "RdAkf, rate x 100": (rd_akf, 100),
    "RdAkf, level 1 to 3 too": (partial(rd_akf, skip=True), FUSION_RATE),
    "RdAkf, softmax": (partial(rd_akf, softmax=True), FUSION_RATE),
    "RdAkf, as formerly": (partial(rd_akf, skip=True, softmax=True), 1),
    "HetNet": (_het_net, 1),
    "HetNet, no ALGF": (partial(_het_net, use_algf=False), 1),
    "HetNet, no noise": (partial(_het_net, noise="none"), 1),
    "HetNet, standard normal": (partial(_het_net, noise="randn"), 1),
    "HetNet, diagonal": (partial(_het_net, noise="diag"), 1),
    "HetNet, gradient to SR": (partial(_het_net, stop_gradient=False), 1),
    "HetNet, sr": (partial(_het_net, score_from="sr"), 1),
    "HetNet, sd": (partial(_het_net, score_from="sd"), 1),
}


def _plain(maps: Maps) -> Maps:
    """Return maps as losses want them, whatever the precision and the order of the memory."""
    return [level.float().contiguous() for level in maps]


class _OneStudent(nn.Module):
    """What is learned of a model with one student."""

    def __init__(self, fuse: nn.Module, student: nn.Module) -> None:
        super().__init__()
        self.fuse, self.student = fuse, student
        self.distance = ReverseDistillationLoss()

    def forward(self, maps: Maps) -> list[Maps]:
        return [self.student(self.fuse(maps))]

    def loss(self, maps: Maps) -> torch.Tensor:
        return self.distance(maps, *map(_plain, self(maps)))


class _TwoStudents(nn.Module):
    """What is learned of HetNet; the last map is the transformer's."""

    def __init__(self, model: HetNet) -> None:
        super().__init__()
        self.model, self.distance = model.model, model.loss

    def forward(self, maps: Maps) -> list[Maps]:
        clean = self.model._fuse(maps[:-1], maps[-1])
        return [getattr(self.model, name)(clean) for name in STUDENTS[self.model.score_from]]

    def loss(self, maps: Maps) -> torch.Tensor:
        local, context = maps[:-1], maps[-1]
        clean = self.model._fuse(local, context)
        noisy = self.model._fuse(self.model.noise(local), context)
        return self.distance(local, _plain(self.model.reconstruction(clean)), _plain(self.model.denoising(noisy)))


def network_of(model: AnomalibModule) -> nn.Module:
    """Return what is learned, which takes features."""
    if isinstance(model, HetNet):
        return _TwoStudents(model)
    if isinstance(model, RdAkf):
        return _OneStudent(model.model.fusion, model.model.student)
    return _OneStudent(model.model.bottleneck, model.model.decoder)


# Features


def maps_of(teachers: HetNetModel | RdAkfModel, images: torch.Tensor) -> Maps:
    """Return the maps of one or two teachers."""
    maps = teachers.teacher(images)
    if isinstance(teachers, HetNetModel):
        maps += teachers.transformer(images * teachers.scale + teachers.shift)
    return maps


class Features:
    """What the teachers say about a product's images; without perturbations, it is kept.

    Args:
        settings: Settings of the teachers.
        product: Name of the product.
        transformer: Whether there is a second teacher.
    """

    def __init__(self, settings: Settings, product: str, transformer: bool) -> None:
        model = _het_net(settings) if transformer else rd_akf(settings)
        self.teachers = model.model.to(DEVICE)
        self.resize, self.normalize = model.pre_processor.transform.transforms
        data = MVTecAD(settings.root, product, num_workers=0)
        data.setup()
        self.test_data = data.test_data
        train = [maps for _, maps in self.batches(data.train_data)]
        self.train = [torch.cat(level) for level in zip(*train, strict=True)]
        self.test = list(self.batches(data.test_data))

    @torch.no_grad()
    def batches(self, images: AnomalibDataset, transform: Transform | None = None) -> Iterator[Judged]:
        """Yield batches of images, perturbed by a transform, with their maps."""
        seed_everything(0, verbose=False)  # the same perturbations for all
        images.augmentations = Compose([transform, self.resize]) if transform else self.resize
        for batch in DataLoader(images, 8, collate_fn=images.collate_fn):
            maps = maps_of(self.teachers, self.normalize(batch.image).to(DEVICE))
            yield batch, [level.cpu() for level in maps]


def _transforms() -> dict[str, Transform]:
    """Return the perturbations by name."""
    parser = ArgumentParser()
    parser.add_argument("--transform", type=Transform)
    paths = sorted((ROOT / "configs" / "perturbations").glob("*.yaml"))
    configs = [parser.parse_object({"transform": yaml.safe_load(path.read_text())}) for path in paths]
    return {path.stem: parser.instantiate_classes(each).transform for path, each in zip(paths, configs, strict=True)}


# Training and judging


def _batches(maps: Maps, size: int, generator: torch.Generator) -> Iterator[Maps]:
    """Yield batches of all images in random order; what is left over is a smaller one."""
    for rows in torch.randperm(len(maps[0]), generator=generator).split(size):
        yield [level[rows].to(DEVICE) for level in maps]


def optimizer_of(settings: Settings, name: str, model: AnomalibModule, network: nn.Module) -> torch.optim.Adam:
    """Return Adam with the betas of the model's own."""
    learned = {key: value for key, value in network.named_parameters() if value.requires_grad}
    weights = [learned.pop(key) for key in list(learned) if key in {"fuse.sum_2.weights", "fuse.sum_3.weights"}]
    groups = [{"params": list(learned.values())}, {"params": weights, "lr": MODELS[name][1] * settings.lr}]
    betas = model.configure_optimizers().defaults["betas"]
    return torch.optim.Adam(groups if weights else groups[:1], settings.lr, betas)


def _train(settings: Settings, name: str, features: Features, seed: int) -> tuple[nn.Module, dict[str, float]]:
    """Train a model; return what was learned, and what is to be said of the training."""
    seed_everything(seed, verbose=False)
    model = MODELS[name][0](settings)
    network = network_of(model).to(DEVICE, memory_format=torch.channels_last).train()  # which CPUs like
    optimizer = optimizer_of(settings, name, model, network)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps)
    if isinstance(model, HetNet) and model.model.noise.needs_statistics:
        model.model.noise.fit([[level.to(DEVICE) for level in features.train[:-1]]], len(features.train[0]))
    generator, losses, seconds = torch.Generator().manual_seed(seed), [], []
    endless = (batch for _ in count() for batch in _batches(features.train, settings.batch, generator))
    for maps in islice(endless, settings.steps):
        started = time.perf_counter()
        with torch.autocast(DEVICE, torch.bfloat16, enabled=settings.precision == "bf16"):
            loss = network.loss(maps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))  # which waits for the device
        schedule.step()
        seconds.append(time.perf_counter() - started)
    facts = {"loss": statistics.fmean(losses[-20:]), "seconds_a_step": statistics.median(seconds)}
    if isinstance(model, RdAkf):
        sums = (model.model.fusion.sum_2, model.model.fusion.sum_3)
        weights = [part.weights.softmax(0) if part.softmax else part.weights for part in sums]
        moved = torch.cat([(each - 1 / len(each)).flatten() for each in weights])
        facts["weights_moved"] = float(moved.detach().square().mean().sqrt())
    return network, facts


@torch.no_grad()
def _judge(settings: Settings, network: nn.Module, test: Iterable[Judged]) -> dict[str, float]:
    """Score test images as reverse distillation does, and rate the scores."""
    network.eval()
    metrics = {
        "image_AUROC": AUROC(fields=["pred_score", "gt_label"]),
        "pixel_AUROC": AUROC(fields=["anomaly_map", "gt_mask"]),
        "pixel_AUPRO": AUPRO(fields=["anomaly_map", "gt_mask"]),
    }
    for batch, kept in test:
        maps = [level.to(DEVICE) for level in kept]
        students = network(maps)
        said = score(maps[0].new_empty(len(maps[0]), 3, settings.size, settings.size), maps[:3], students)
        judged = batch.update(pred_score=said.pred_score.cpu(), anomaly_map=said.anomaly_map.cpu())
        for metric in metrics.values():
            metric.update(judged)
    return {name: float(metric.compute()) for name, metric in metrics.items()}


def _rows(settings: Settings, name: str, features: Features, seed: int, perturbed: bool) -> list[dict[str, Any]]:
    """Train a model and judge it, with either statistics and, with the right ones, on perturbed images."""
    started = time.perf_counter()
    network, facts = _train(settings, name, features, seed)
    rows = [{"statistics": "running", "images": "clean", **_judge(settings, network, features.test)}]
    estimate_batch_statistics(network, _batches(features.train, settings.batch, torch.Generator().manual_seed(0)))
    rows.append({"statistics": "estimated", "images": "clean", **_judge(settings, network, features.test)})
    for kind, transform in _transforms().items() if perturbed else ():
        result = _judge(settings, network, features.batches(features.test_data, transform))
        rows.append({"statistics": "estimated", "images": kind, **result})
    facts["seconds"] = time.perf_counter() - started
    return [{**row, **facts} for row in rows]


def run(
    settings: Settings,
    products: list[str],
    models: list[str] = ["ReverseDistillation", "RdAkf"],  # noqa: B006
    seeds: list[int] = [0],  # noqa: B006
    perturbed: bool = False,
    results: Path = RESULTS,
) -> None:
    """Train and judge what is not yet in the results, and append it.

    Args:
        settings: What all trainings have in common.
        products: Names of the products.
        models: Names in `MODELS`.
        seeds: Seeds of the weights and of the order of the images.
        perturbed: Whether models are tested on perturbed images too, which takes long.
        results: File with a row for each kind of test images and of statistics.
    """
    results.parent.mkdir(parents=True, exist_ok=True)
    common = {name: str(getattr(settings, name)) for name in SETTINGS}
    weights = settings.transformer_weights.stem if settings.transformer_weights else "random"
    known = pd.DataFrame(columns=COLUMNS)
    if results.exists():
        known = pd.read_csv(results, dtype=str, keep_default_na=False)
    done = set(known[[*KEY, "images"]].itertuples(index=False, name=None))
    for product, transformer in product_of(products, (False, True)):
        features = None
        for seed, name in product_of(seeds, models):
            key = {"product": product, "model": name, "seed": str(seed), **common}
            key["transformer"] = f"{settings.transformer} {weights}" if transformer else ""
            wanted = (*(key[column] for column in KEY), "shift" if perturbed else "clean")
            if wanted in done or transformer != name.startswith("HetNet"):
                continue
            features = features or Features(settings, product, transformer)
            rows = [{**key, **row} for row in _rows(settings, name, features, seed, perturbed)]
            rows = [row for row in rows if (*(row[column] for column in KEY), row["images"]) not in done]
            table = pd.DataFrame(rows, columns=COLUMNS)
            with results.open("a", encoding="utf-8") as file:
                file.write(table.to_csv(index=False, header=not file.tell(), float_format="%.5g"))
            print(table[["product", "model", "seed", "images", "statistics", *METRICS]].to_string(), flush=True)


# Tables


def _cell(values: pd.Series) -> str:
    """Return the mean over seeds, with the standard deviation if there are several."""
    return f"{values.mean():.4f}" + (f" ± {values.std():.4f}" if len(values) > 1 else "")


def table(results: Path = RESULTS, images: str = "clean") -> None:
    """Print the results as Markdown: by product, and the mean of the products over the seeds that have them all.

    Args:
        results: File with the results.
        images: Kind of test images.
    """
    rows = pd.read_csv(results, keep_default_na=False)
    rows = rows[rows["images"] == images]
    rows["model"] = (rows["model"] + " " + rows["transformer"]).str.strip()
    for values, group in rows.groupby(SETTINGS, sort=False):
        products = list(group["product"].unique())
        print(f"\n{', '.join(f'{name} {value}' for name, value in zip(SETTINGS, values, strict=True))}\n")
        print("| product | model | statistics | seeds | image AUROC | pixel AUROC | AUPRO | seconds a step |")
        print("| --- | --- | --- | --- | --- | --- | --- | --- |")
        by_seed = group.groupby(["model", "statistics", "seed"], sort=False)
        whole = by_seed.filter(lambda part: len(part) == len(products))  # noqa: B023  # called at once
        means = whole.groupby(["model", "statistics", "seed"], sort=False)[[*METRICS, "seconds_a_step"]].mean()
        parts = [*group.groupby("product", sort=False), ("mean", means.reset_index())]
        for product, part in parts:
            for (model, kind), seeds in part.groupby(["model", "statistics"], sort=False):
                cells = [product, model, kind, str(len(seeds)), *(_cell(seeds[metric]) for metric in METRICS)]
                print(f"| {' | '.join(cells)} | {seeds['seconds_a_step'].mean():.3f} |")


if __name__ == "__main__":
    auto_cli([run, table], as_positional=False)

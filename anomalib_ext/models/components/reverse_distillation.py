# SPDX-License-Identifier: Apache-2.0
"""What models that extend reverse distillation share: frozen teachers, students, anomaly maps, life in a trainer.

Reverse distillation (RD4AD) is by Deng and Li, CVPR 2022, arXiv 2201.10703. The parts are Anomalib's where it has
them. Feature maps are lists of three levels, from the largest map to the smallest, of strides 4, 8 and 16.
"""

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import torch
from anomalib.data import Batch, InferenceBatch
from anomalib.models.components.backbone import get_decoder
from anomalib.models.image.reverse_distillation.anomaly_map import AnomalyMapGenerationMode, AnomalyMapGenerator
from anomalib.models.image.reverse_distillation.components import get_bottleneck_layer
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn

from anomalib_ext.export import BundleContent, BundleExport, WholeGraph

from . import training
from .backbone import load_backbone
from .training import InspectionModule, check_files

logger = logging.getLogger(__name__)

LEVELS = ("layer1", "layer2", "layer3")
# The students halve the smallest level once more and then double it three times.
STRIDE = 32
# With less, a map of one value is left, which batch normalisation cannot work on.
SMALLEST_SIDE = 2 * STRIDE


class Teacher(nn.Module):
    """A frozen feature extractor that stays in evaluation mode, so that its batch normalisation never moves.

    Args:
        backbone: Name of a timm model.
        layers: Layers to extract.
        pre_trained: Whether to use pretrained weights.
        backbone_weights: File with the weights, as for :func:`anomalib_ext.models.components.backbone.load_backbone`.
        tokens: Whether a vision transformer gives its tokens, as there.

    Attributes:
        channels: Number of channels of each layer.
    """

    def __init__(
        self,
        backbone: str,
        layers: Sequence[str] = LEVELS,
        pre_trained: bool = True,
        backbone_weights: str | Path | None = None,
        tokens: bool = False,
    ) -> None:
        super().__init__()
        self.extractor = load_backbone(backbone, layers, pre_trained, backbone_weights, tokens)
        self.channels: list[int] = list(self.extractor.out_dims)
        self.eval()

    def train(self, mode: bool = True) -> "Teacher":
        """Stay in evaluation mode."""
        del mode
        return super().train(mode=False)

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Extract one map ``(B, C, h, w)``, or tokens, for each layer from images of shape ``(B, 3, H, W)``."""
        return list(self.extractor(images).values())


def architecture(backbone: str) -> str:
    """Return the name under which Anomalib knows the decoder of a backbone, which has no tag.

    Raises:
        ValueError: If there is no decoder that mirrors the backbone.
    """
    name = backbone.split(".", maxsplit=1)[0]
    try:
        with torch.device("meta"):  # only to see whether there is one
            get_decoder(name)
    except ValueError as error:
        msg = (
            f"Backbone {backbone!r} has no three levels that a decoder mirrors. Take a ResNet, such as resnet18, "
            "resnet34, resnet50 or wide_resnet50_2, with or without a tag of its weights."
        )
        raise ValueError(msg) from error
    return name


class Student(nn.Module):
    """One-class embedding and decoder of reverse distillation (RD4AD, sections 3.2 and 3.3).

    Args:
        backbone: Name of the teacher's backbone, which the decoder mirrors.
        in_channels: Number of channels of the fused features.
    """

    def __init__(self, backbone: str, in_channels: int) -> None:
        super().__init__()
        name = architecture(backbone)
        self.embedding = get_bottleneck_layer(name).bn_layer
        first = self.embedding[0]
        if first.conv1.in_channels != in_channels:  # Anomalib's takes three concatenated levels
            first.conv1 = _with_inputs(first.conv1, in_channels)
            first.downsample[0] = _with_inputs(first.downsample[0], in_channels)
        self.decoder = get_decoder(name)

    def forward(self, fused: torch.Tensor) -> list[torch.Tensor]:
        """Reconstruct the teacher's maps from fused features of shape ``(B, in_channels, H / 16, W / 16)``."""
        return self.decoder(self.embedding(fused))


def _with_inputs(convolution: nn.Conv2d, channels: int) -> nn.Conv2d:
    """Make a convolution like this one, for another number of input channels."""
    kernel, stride, padding = convolution.kernel_size, convolution.stride, convolution.padding
    return _initialised(nn.Conv2d(channels, convolution.out_channels, kernel, stride, padding, bias=False))


def _initialised(convolution: nn.Conv2d) -> nn.Conv2d:
    """Initialise as reverse distillation does."""
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
    return convolution


def resize_block(channels: Sequence[int]) -> nn.Sequential:
    """Bring maps to a deeper level: 3 x 3 convolution of stride 2, batch normalisation and ReLU for each level.

    Args:
        channels: Number of channels of each level on the way, first and last included.
    """
    layers: list[nn.Module] = []
    for before, after in pairwise(channels):
        convolution = _initialised(nn.Conv2d(before, after, 3, 2, 1, bias=False))
        layers += [convolution, nn.BatchNorm2d(after), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


class MultiScaleFusion(nn.Module):
    """Reverse distillation's own fusion (RD4AD's MFF): all levels brought to the size of the deepest, concatenated.

    Args:
        channels: Number of channels of the three levels.
    """

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        self.resize = nn.ModuleList([resize_block(channels), resize_block(channels[1:])])

    def forward(self, features: Sequence[torch.Tensor]) -> torch.Tensor:
        """Fuse three levels to ``(B, 3 * C3, H / 16, W / 16)``."""
        return torch.cat([self.resize[0](features[0]), self.resize[1](features[1]), features[2]], dim=1)


def check_images(images: torch.Tensor) -> None:
    """Refuse images that cannot be learned or judged.

    Args:
        images: Normalised images, shape ``(B, 3, H, W)``.

    Raises:
        ValueError: If the shape is another one, a value is not finite, or a side is no multiple of 32 or below 64.
    """
    training.check_images(images)
    check_size(images.shape[-2], images.shape[-1])


def check_size(height: int, width: int) -> None:
    """Refuse images whose maps a student cannot give back in the same size.

    Raises:
        ValueError: If a side is no multiple of 32, or below 64.
    """
    if min(height, width) < SMALLEST_SIDE or height % STRIDE or width % STRIDE:
        near = [max(SMALLEST_SIDE, (side + STRIDE // 2) // STRIDE * STRIDE) for side in (height, width)]
        msg = (
            f"Images of {height} x {width} pixels have feature maps that the decoder cannot mirror: both sides must be "
            f"multiples of {STRIDE}, and at least {SMALLEST_SIDE}. Resize to {near[0]} x {near[1]}, for example by "
            f"pre_processor=configure_pre_processor(({near[0]}, {near[1]}))."
        )
        raise ValueError(msg)


def judge(
    images: torch.Tensor,
    teacher: Sequence[torch.Tensor],
    students: Sequence[Sequence[torch.Tensor]],
) -> InferenceBatch:
    """Score images by how far students are from the teacher, as reverse distillation does (RD4AD, section 3.4).

    Args:
        images: Images, shape ``(B, 3, H, W)``.
        teacher: The teacher's feature maps.
        students: Feature maps of each student; their anomaly maps are averaged.

    Returns:
        Anomaly maps ``(B, 1, H, W)``, in [0, 2 * levels] as sums of cosine distances, blurred with a sigma of 4
        pixels; and their maxima as image scores, ``(B,)``.

    Raises:
        ValueError: If a score is not finite.
    """
    height, width = images.shape[-2:]
    generator = AnomalyMapGenerator((height, width), mode=AnomalyMapGenerationMode.ADD)
    with torch.autocast(images.device.type, enabled=False):
        given = [level.float() for student in students for level in student]
        # The blur is linear, so that the mean of maps is the map of all levels.
        anomaly_map = generator(given, [level.float() for level in teacher] * len(students)) / len(students)
        pred_score = anomaly_map.amax(dim=(1, 2, 3))
    training.check_scores(pred_score)
    return InferenceBatch(pred_score=pred_score, anomaly_map=anomaly_map)


class DistillationModule(BundleExport, InspectionModule):
    """Life in a trainer of a model with :class:`Teacher` modules. To be named before ``AnomalibModule`` as base.

    Attributes:
        backbone: Name of the teacher that is reconstructed.
        save_teachers: Whether checkpoints hold the teachers' weights. Without them, they are those of the model that
            a checkpoint is loaded into, which must be the same.
        sized: Ends of the names of tensors of the size of maps, which comes with a checkpoint, as its pre-processor.
    """

    backbone: str
    save_teachers: bool
    sized: tuple[str, ...] = ()
    _resumed_from: tuple[int, str] | None = None  # a trainer's id, for models are copied without trainers

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """Nothing is judged before the first step."""
        return {"num_sanity_val_steps": 0}

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Return what is learned: all but the teachers."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    # Steps

    def learn(self, batch: Batch, batch_idx: int, loss: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """Check a training batch, and return and log its loss.

        Args:
            batch: Batch of normal images.
            batch_idx: Its number in the epoch.
            loss: Gives the loss of images of shape ``(B, 3, H, W)``.

        Raises:
            ValueError: If the images cannot be learned, or come one by one.
        """
        check_files(getattr(batch, "image_path", None))
        images = cast("torch.Tensor", batch.image)
        check_images(images)
        if len(images) == 1 and batch_idx == 0:  # the last batch of an epoch may be smaller than the others
            msg = (
                "The batches have one image, whose statistics batch normalisation would take for those of all images. "
                "Set train_batch_size of the datamodule to 2 or more, and give at least 2 images."
            )
            raise ValueError(msg)
        value = loss(images)
        if not torch.isfinite(value):
            msg = f"The loss is {float(value)}. Train with precision 32-true or bf16-mixed, or a lower learning rate."
            raise ValueError(msg)
        self.log("train_loss", value.detach(), on_epoch=True, prog_bar=True, batch_size=len(images), sync_dist=True)
        return value

    # Checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave the teachers out, if that is wanted, and add the state of the random numbers."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["rng_state"] = torch.get_rng_state()
        if not self.save_teachers:
            state = checkpoint["state_dict"]
            checkpoint["state_dict"] = {key: value for key, value in state.items() if not self._is_teachers(key)}
            checkpoint["teachers"] = self._digest()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint that does not fit, before anything of it is taken over; go on as if never stopped.

        Raises:
            ValueError: If the checkpoint is of another model, backbone or teacher.
        """
        trainer = self._trainer
        came_from, self._resumed_from = self._resumed_from, None
        asked = (id(trainer), str(trainer.ckpt_path)) if trainer is not None else None
        if trainer is not None and trainer.state.fn == TrainerFn.TESTING and asked == came_from:
            # `Engine.train` tests with the checkpoint that it started from; going back there would lose the learned.
            logger.warning("Testing what was learned on top of %s; load it apart to test it alone.", trainer.ckpt_path)
            checkpoint["state_dict"] = self.state_dict()
            checkpoint.pop("callbacks", None)
            return
        if "teachers" in checkpoint:
            own = {key: value for key, value in self.state_dict().items() if self._is_teachers(key)}
            checkpoint["state_dict"] = {**own, **checkpoint["state_dict"]}
        self._check_state(checkpoint["state_dict"], checkpoint.get("hyper_parameters", {}))
        if "teachers" in checkpoint and checkpoint["teachers"] != self._digest():
            msg = (
                "The checkpoint holds no teachers, and was made with other weights of theirs than this model has. Make "
                "the model with the weights that it was trained with (backbone_weights=PATH)."
            )
            raise ValueError(msg)
        super().on_load_checkpoint(checkpoint)
        if trainer is not None and trainer.state.fn == TrainerFn.FITTING:
            self._resumed_from = asked
            torch.set_rng_state(checkpoint["rng_state"].cpu())

    def _check_state(self, state: Mapping[str, torch.Tensor], made_with: Mapping[str, Any]) -> None:
        def shapes(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Size]:
            found = {key: value.shape for key, value in tensors.items() if key.startswith("model.")}
            return {key: shape[:-2] if key.endswith(self.sized) else shape for key, shape in found.items()}

        own, given = shapes(self.state_dict()), shapes(state)
        missing, unknown = sorted(own.keys() - given.keys()), sorted(given.keys() - own.keys())
        reshaped = [key for key in sorted(own.keys() & given.keys()) if own[key] != given[key]]
        other_backbone = made_with.get("encoder", made_with.get("backbone", self.backbone)) != self.backbone
        if not (missing or unknown or reshaped or other_backbone):
            return
        parts = [
            f"{len(keys)} tensors {what}, such as {keys[0]}"
            for keys, what in ((missing, "are missing"), (unknown, "are unknown"), (reshaped, "have other shapes"))
            if keys
        ]
        differing = [
            f"{key}={made_with[key]!r} (here {self.hparams[key]!r})"
            for key in self.hparams
            if key in made_with and made_with[key] != self.hparams[key]
        ]
        msg = (
            f"The checkpoint does not fit this {type(self).__name__}: {'; '.join(parts) or 'another backbone'}. "
            + (f"It was made with {', '.join(differing)}. " if differing else "")
            + "Load it with a model like the one that it was made with."
        )
        raise ValueError(msg)

    def _is_teachers(self, key: str) -> bool:
        return any(isinstance(part, Teacher) and key.startswith(f"{name}.") for name, part in self.named_modules())

    def _digest(self) -> str:
        """Return what tells whether teachers are the same."""
        digest = hashlib.sha256()
        for part in self.modules():
            if isinstance(part, Teacher):
                for tensor in part.state_dict().values():
                    digest.update(tensor.float().cpu().numpy().tobytes())
        return digest.hexdigest()

    # Export

    def bundle_content(self, size: tuple[int, int]) -> BundleContent:
        """What the model brings to its bundle, which resizes by itself."""
        del size
        return BundleContent(graph=WholeGraph(self), metadata={"backbone": self.backbone})


def check_save_teachers(save_teachers: bool, pre_trained: bool) -> None:
    """Refuse to leave teachers out of checkpoints that could not be made again.

    Raises:
        ValueError: If they are random.
    """
    if not (save_teachers or pre_trained):
        msg = "save_teachers=False needs pretrained teachers: random ones would be lost with the model."
        raise ValueError(msg)

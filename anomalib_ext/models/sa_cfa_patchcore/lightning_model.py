# SPDX-License-Identifier: Apache-2.0
"""SaCfaPatchCore in a trainer. See the README beside this file for what is the paper's and what is ours."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from anomalib import LearningType, TaskType
from anomalib.data import AnomalibDataModule, Batch, ImageBatch
from anomalib.deploy import CompressionType
from anomalib.metrics import Evaluator
from anomalib.models.components import AnomalibModule
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import Visualizer
from lightning.pytorch import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import nn
from torchmetrics import Metric

from anomalib_ext.export import Bundle, export_bundle
from anomalib_ext.models.components.backbone import backbone_pre_processor
from anomalib_ext.models.components.training import UnreadableImages, check_files, prepare_fit

from .torch_model import SaCfaPatchCoreModel

logger = logging.getLogger(__name__)


class SaCfaPatchCore(AnomalibModule):
    """PatchCore with self-attention over deep features (SA) and channel aggregation (CFA).

    After Li Bing et al., DOI 10.19651/j.cnki.emt.2518329. With ``attention_ratio=0`` and ``reduction_ratio=1`` it is
    Anomalib's ``Patchcore`` with a faster selection. Every fit learns anew.

    Args:
        backbone: Name of a timm CNN.
        layers: Layers whose features are concatenated; the deepest one has attention.
        pre_trained: Whether to use pretrained weights.
        weights: File with the backbone's weights, such as ``anomalib-ext finetune`` writes; without it they are looked
            up in the Hugging Face cache, in the package of the extra ``offline``, and on the hub, in this order.
        attention_ratio: Share of the deepest layer's channels with attention; 0 switches SA off.
        reduction_ratio: Number of groups of channels / number of channels; 1 switches CFA off.
        coreset_sampling_ratio: Share of the training patches that the memory bank keeps.
        num_neighbors: Neighbors that weigh the image score; 1 takes the largest patch distance as it is.
        channel_seed: Seed of a random order in which channels are grouped; consecutive without one.
        pre_processor: Pre-processor, or whether to use the default one.
        post_processor: Post-processor, or whether to use the default one.
        evaluator: Evaluator, or whether to use the default one.
        visualizer: Visualizer, or whether to use the default one.

    Raises:
        ValueError: If the backbone or a layer is unknown, or a ratio or number is out of range.
        FileNotFoundError: If the weights are nowhere to be found.

    Example:
        >>> from anomalib.data import MVTecAD
        >>> from anomalib.engine import Engine
        >>> from anomalib.models import SaCfaPatchCore
        >>> model = SaCfaPatchCore(backbone="resnet18")
        >>> Engine().train(model, datamodule=MVTecAD(category="bottle"))
    """

    model: SaCfaPatchCoreModel

    def __init__(
        self,
        backbone: str = "wide_resnet50_2",
        layers: Sequence[str] = ("layer2", "layer3"),
        pre_trained: bool = True,
        weights: str | Path | None = None,
        attention_ratio: float = 0.5,
        reduction_ratio: float = 0.1,
        coreset_sampling_ratio: float = 0.01,
        num_neighbors: int = 9,
        channel_seed: int | None = None,
        pre_processor: nn.Module | bool = True,
        post_processor: nn.Module | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        if not 0 < coreset_sampling_ratio <= 1:
            msg = f"coreset_sampling_ratio must lie in (0, 1], got {coreset_sampling_ratio}."
            raise ValueError(msg)
        model = SaCfaPatchCoreModel(
            backbone=backbone,
            layers=layers,
            num_neighbors=num_neighbors,
            pre_trained=pre_trained,
            weights=weights,
            attention_ratio=attention_ratio,
            reduction_ratio=reduction_ratio,
            channel_seed=channel_seed,
        )
        super().__init__(
            # Only here is the backbone, and with it the normalisation, known.
            pre_processor=self.configure_pre_processor(backbone=backbone) if pre_processor is True else pre_processor,
            post_processor=post_processor,
            evaluator=evaluator,
            visualizer=visualizer,
        )
        self.model = model
        self.coreset_sampling_ratio = coreset_sampling_ratio

    @staticmethod
    def configure_pre_processor(
        image_size: tuple[int, int] | None = None,
        backbone: str = "wide_resnet50_2",
    ) -> PreProcessor:
        """Resize, and normalise as the backbone was trained.

        Args:
            image_size: Height and width; by default 256 each, or the only size that the backbone takes.
            backbone: Name of a timm model.
        """
        return backbone_pre_processor(backbone, image_size)

    @staticmethod
    def configure_post_processor() -> PostProcessor:
        """Anomalib's own."""
        return PostProcessor()

    @staticmethod
    def configure_optimizers() -> None:
        """Nothing is optimised."""

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """One pass over the images on one device."""
        return {"gradient_clip_val": 0, "max_epochs": 1, "num_sanity_val_steps": 0, "devices": 1}

    @property
    def learning_type(self) -> LearningType:
        """Learns from normal images."""
        return LearningType.ONE_CLASS

    def to_openvino(
        self,
        export_root: str | Path,
        model_file_name: str = "model",
        input_size: tuple[int, int] | None = None,
        compression_type: CompressionType | None = None,
        datamodule: AnomalibDataModule | None = None,
        metric: Metric | None = None,
        task: TaskType | None = None,
        max_drop: float = 0.01,
        ov_kwargs: dict[str, Any] | None = None,
        onnx_kwargs: dict[str, Any] | None = None,
    ) -> Path:
        """Write a folder with the graph and its description to `export_root/weights/openvino`.

        Args:
            export_root: Folder of exports.
            model_file_name: Must be ``model``.
            input_size: Height and width of the images; those of the pre-processor if not given.
            compression_type: As for :func:`anomalib_ext.export.export_bundle`, of backbone and memory bank.
            datamodule: Its training images calibrate the quantisation, its test images show what compression loses.
            metric: Not used; image AUROC and F1 are compared.
            task: Not used.
            max_drop: Largest loss of AUROC or F1 by compression.
            ov_kwargs: Arguments of ``openvino.convert_model``; ``{"input": [1, 3, H, W]}`` fixes the batch size.
            onnx_kwargs: Arguments of ``torch.onnx.export``.

        Returns:
            Path of ``model.xml``.

        Raises:
            RuntimeError: If nothing was learned yet.
            ValueError: If an argument does not fit, or compression loses more than allowed. An older folder remains.
        """
        del metric, task
        if model_file_name != "model":
            msg = f"The folder holds its graph in model.xml, not in {model_file_name}.xml; name the folder instead."
            raise ValueError(msg)
        return export_bundle(
            self.eval(),
            _bundle_of,
            export_root,
            input_size=input_size,
            compression_type=compression_type,
            datamodule=datamodule,
            max_drop=max_drop,
            ov_kwargs=ov_kwargs,
            onnx_kwargs=onnx_kwargs,
        )

    # Learning

    def configure_callbacks(self) -> list[Callback]:
        """Anomalib's callbacks, and one that names unreadable images."""
        return [*cast("list[Callback]", super().configure_callbacks()), UnreadableImages()]

    def setup(self, stage: str) -> None:
        """Make a further fit with the same trainer possible, and its checkpoints safe against a kill."""
        if stage == TrainerFn.FITTING:
            prepare_fit(self.trainer)

    def on_train_epoch_start(self) -> None:
        """Begin with nothing; the old memory bank stays until there is a new one."""
        self.model.embedding_store.clear()  # a fit that failed may have left some
        self.model.is_selected = True

    def training_step(self, batch: ImageBatch, *args, **kwargs) -> torch.Tensor:
        """Collect the embeddings of a batch of normal images."""
        del args, kwargs
        assert batch.image is not None
        check_files(batch.image_path)
        self.model.collect(batch.image)
        # Lightning wants a loss.
        return torch.tensor(0.0, requires_grad=True, device=self.device)

    def on_validation_start(self) -> None:
        """Select from what the epoch has seen so far; Lightning validates before the epoch ends."""
        if self.trainer.state.fn == TrainerFn.FITTING:
            self._select()

    def on_train_epoch_end(self) -> None:
        """Select, if that is not done, and give the memory back."""
        self._select()
        self.model.embedding_store.clear()

    def _select(self) -> None:
        if not self.model.is_selected:
            self.model.subsample_embedding(self.coreset_sampling_ratio)
            logger.info("The memory bank has %d vectors of %d numbers.", *self.model.memory_bank.shape)

    # Judging

    def validation_step(self, batch: Batch, *args, **kwargs) -> STEP_OUTPUT:
        """Score a batch."""
        del args, kwargs
        return self._judge(batch)

    def test_step(self, batch: Batch, batch_idx: int, *args, **kwargs) -> STEP_OUTPUT:
        """Score a batch."""
        del args, kwargs, batch_idx
        return self._judge(batch)

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> STEP_OUTPUT:
        """Score a batch."""
        del batch_idx, dataloader_idx
        return self._judge(batch)

    def _judge(self, batch: Batch) -> Batch:
        check_files(getattr(batch, "image_path", None))
        return batch.update(**self.model(batch.image)._asdict())

    # Checkpoints

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another model, before anything of it is taken over.

        Raises:
            ValueError: If the checkpoint is of another model, backbone or layers.
        """
        self._check_state(checkpoint["state_dict"])
        super().on_load_checkpoint(checkpoint)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:  # noqa: ANN401
        """Load weights, memory bank and what it depends on, unless they are of another model, backbone or layers."""
        self._check_state(state_dict)
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def _check_state(self, state_dict: Mapping[str, Any]) -> None:
        state = state_dict.get("model.embedding._extra_state")
        if state is None:
            msg = (
                f"The checkpoint is not of SaCfaPatchCore. It has {len(state_dict)} tensors, such as "
                f"{list(state_dict)[:3]}. Load it with the model that it was made with."
            )
            raise ValueError(msg)
        self.model.embedding.check_state(state)


class _Graph(nn.Module):
    """The model as it is exported."""

    def __init__(self, owner: SaCfaPatchCore) -> None:
        super().__init__()
        self.owner = owner

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Judge images of shape ``(B, 3, H, W)`` in [0, 1]."""
        return {name: value for name, value in self.owner(images)._asdict().items() if value is not None}


def _bundle_of(owner: SaCfaPatchCore, size: tuple[int, int]) -> Bundle:
    """What a model brings to its export; nothing in it depends on the size of the images."""
    del size
    embedding = owner.model.embedding
    metadata = {
        **embedding.origin,
        "attention_ratio": embedding.attention_ratio,
        "reduction_ratio": embedding.dimension / sum(embedding.out_dims),
        "num_neighbors": owner.model.num_neighbors,
    }
    return Bundle(graph=_Graph(owner), metadata=metadata)

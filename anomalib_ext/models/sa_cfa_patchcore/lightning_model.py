# SPDX-License-Identifier: Apache-2.0
"""SaCfaPatchCore in a trainer. See the README beside this file for what is the paper's and what is ours."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from anomalib.data import ImageBatch
from anomalib.metrics import Evaluator
from anomalib.models.components import AnomalibModule
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import Visualizer
from torch import nn

from anomalib_ext.export import BundleContent, WholeGraph
from anomalib_ext.models.components.backbone import backbone_pre_processor
from anomalib_ext.models.components.patchcore import PatchCoreModule

from .torch_model import SaCfaPatchCoreModel

logger = logging.getLogger(__name__)


class SaCfaPatchCore(PatchCoreModule, AnomalibModule):
    """PatchCore with self-attention over deep features (SA) and channel aggregation (CFA).

    After Li Bing et al., DOI 10.19651/j.cnki.emt.2518329. With ``attention_ratio=0`` and ``reduction_ratio=1`` it is
    Anomalib's ``Patchcore`` with a faster selection. Every fit learns anew.

    Args:
        backbone: Name of a timm CNN.
        layers: Layers whose features are concatenated; the deepest one has attention.
        pre_trained: Whether to use pretrained weights.
        backbone_weights: File with the backbone's weights, such as ``anomalib-ext finetune`` writes; without it they
            are looked up in the Hugging Face cache, in the package of the extra ``offline``, and on the hub, in this
            order.
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
        backbone_weights: str | Path | None = None,
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
            backbone_weights=backbone_weights,
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

    def bundle_content(self, size: tuple[int, int]) -> BundleContent:
        """What the model brings to its bundle; nothing in it depends on the size of the images."""
        del size
        embedding = self.model.embedding
        metadata = {
            **embedding.origin,
            "attention_ratio": embedding.attention_ratio,
            "reduction_ratio": embedding.dimension / sum(embedding.out_dims),
            "num_neighbors": self.model.num_neighbors,
        }
        return BundleContent(graph=WholeGraph(self), metadata=metadata)

    # Learning

    def on_train_epoch_start(self) -> None:
        """Begin with nothing; the old memory bank stays until there is a new one."""
        self.model.embedding_store.clear()  # a fit that failed may have left some
        self.model.is_selected = True

    def learn_batch(self, batch: ImageBatch) -> None:
        """Collect the embeddings of a batch of normal images."""
        assert batch.image is not None
        self.model.collect(batch.image)
        store = self.model.embedding_store
        store += self.gathered([store.pop()])

    def on_validation_start(self) -> None:
        """Select from what the epoch has seen so far; Lightning validates before the epoch ends."""
        if self._is_fitting:
            self._select()

    def on_train_epoch_end(self) -> None:
        """Select, if that is not done, and give the memory back."""
        self._select()
        self.model.embedding_store.clear()

    def _select(self) -> None:
        if not self.model.is_selected:
            self.model.subsample_embedding(self.coreset_sampling_ratio)
            logger.info("The memory bank has %d vectors of %d numbers.", *self.model.memory_bank.shape)

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

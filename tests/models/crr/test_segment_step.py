# SPDX-License-Identifier: Apache-2.0
"""The head is trained on the images with anomalies, each with its own mask."""

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback
from torch.nn import functional as F  # noqa: N812

from anomalib_ext.models import Crr

Make = Callable[..., Any]
SIDE = 64


class Keep(Callback):
    """Keeps the batch of the last step."""

    def on_train_batch_end(self, trainer: object, pl_module: object, outputs: object, batch: Any, *args: Any) -> None:  # noqa: ANN401
        """Keep it."""
        del trainer, pl_module, outputs, args
        self.batch = batch


def test_segment_step(make_data: Make, make_engine: Make) -> None:
    """It sees the anomalous copies of the first half of the images, and its loss is that of their masks."""
    pre_processor = Crr.configure_pre_processor((SIDE, SIDE), encoder="test_vit")
    small = {"pre_trained": False, "head_width": 8, "segment_steps": 1, "visualizer": False}
    model = Crr("test_vit", stage="segment", pre_processor=pre_processor, **small)
    model.model.steps = [1, 0]  # as after the first stage
    seen: dict[str, torch.Tensor] = {}
    hooks = [
        model.model.encoder.register_forward_pre_hook(lambda _, args: seen.update(images=args[0])),
        model.model.head.register_forward_hook(lambda *given: seen.update(logits=given[-1])),
    ]
    keep = Keep()
    engine = make_engine(callbacks=[keep], limit_val_batches=0)
    engine.fit(model, datamodule=make_data(train_batch_size=4))
    for hook in hooks:
        hook.remove()

    clean, anomalous = keep.batch.image.chunk(2)
    masks = keep.batch.gt_mask[4:6]
    assert (clean != anomalous).flatten(1).any(dim=1).all()
    assert torch.equal(seen["images"], anomalous[:2])
    assert masks.flatten(1).any(dim=1).all()
    assert not torch.equal(masks[0], masks[1])
    positive = F.interpolate(masks[:, None].float(), seen["logits"].shape[-2:], mode="bilinear")[:, 0] >= 0.5
    right = torch.where(positive, *seen["logits"].detach().softmax(dim=1).flip(1).unbind(dim=1))
    focal = (-((1 - right) ** 2) * right.log()).mean()
    torch.testing.assert_close(engine.trainer.callback_metrics["segment_loss"], focal, rtol=1e-3, atol=0)

# SPDX-License-Identifier: Apache-2.0
"""Statistics of batch normalisation, estimated anew for the weights that were learned last."""

from collections.abc import Iterable
from typing import TypeVar

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

Batch = TypeVar("Batch")


@torch.no_grad()
def estimate_batch_statistics(network: nn.Module, batches: Iterable[Batch]) -> None:
    """Set running means and variances to those of all batches, as the network judges them.

    Training leaves moving averages over former weights, which lag behind. Here each batch is normalised by its own
    statistics, and what each layer sees is pooled over the batches: Precise BatchNorm (Wu and Johnson, 2021,
    arXiv 2105.07576). With all images in one batch, that is what training normalises them by. With several batches, it
    is so for layers with no normalisation before them, and nearly so for the others.

    Layers whose parameters are frozen keep their statistics, and so do those that take no part in judging.

    Args:
        network: What is called with each batch, in evaluation mode but for the layers to estimate. It then has the mode
            that it had.
        batches: Batches of images, or of what else the network takes.
    """
    # Of each layer: number of values, and the sums of them and of their squares, by channel.
    sums: dict[_BatchNorm, torch.Tensor] = {}

    def add(layer: nn.Module, inputs: tuple[torch.Tensor]) -> None:
        values = inputs[0].float().flatten(2)
        of_images = torch.stack([torch.ones_like(values).sum(2), values.sum(2), values.square().sum(2)])
        new = of_images.cpu().double().sum(1)
        sums[layer] = sums[layer] + new if layer in sums else new

    learned = [
        layer
        for layer in network.modules()
        if isinstance(layer, _BatchNorm) and any(parameter.requires_grad for parameter in layer.parameters())
    ]
    hooks = [layer.register_forward_pre_hook(add) for layer in learned]
    was_training = network.training
    network.eval()
    try:
        for layer in learned:
            layer.train()
        for batch in batches:
            network(batch)
    finally:
        network.train(was_training)
        for hook in hooks:
            hook.remove()
    for layer, (count, total, squares) in sums.items():
        mean = total / count
        layer.running_mean.copy_(mean)
        layer.running_var.copy_((squares / count - mean.square()).clamp(min=0))

# SPDX-License-Identifier: Apache-2.0
"""PatchCore's search, image score and anomaly map (arXiv 2106.08265, section 3.3) in torch, fast and ready for export.

The results are those of Anomalib's ``Patchcore``. The ways to them are ours: the bank's squared lengths are given and
not taken anew, one matrix product ranks the vectors, and only the nearest one's distance is taken.
"""

import torch

from openvino_export.anomaly_map import map_matrix

# Patches that are looked up at a time; with 64 and 1024 the search was slower.
CHUNK_SIZE = 256


def search(patches: torch.Tensor, bank: torch.Tensor, squares: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Look the patches of images up.

    Args:
        patches: Patch embeddings, shape ``(B, n, d)``.
        bank: Vectors, shape ``(m, d)``.
        squares: Their squared lengths, shape ``(m,)``; infinite for a row that is not used.

    Returns:
        Distance of each patch to its nearest vector, and the index of that vector, each of shape ``(B, n)``.

    Raises:
        ValueError: If an image gives scores that are not finite.
    """
    if torch.compiler.is_compiling():  # for export: one product, the batch dimension stays open
        return nearest_neighbors(patches, bank, squares)
    # Few patches at a time: the distances of a batch would take gigabytes, and those of an image leave a CPU's cache.
    found = [nearest_neighbors(chunk, bank, squares) for chunk in patches.flatten(0, 1).split(CHUNK_SIZE)]
    scores, locations = (torch.cat(part).reshape(patches.shape[:2]) for part in zip(*found, strict=True))
    if not torch.isfinite(scores).all():
        bad = (~torch.isfinite(scores).all(dim=1)).nonzero().flatten().tolist()
        msg = f"Images {bad} of the batch give scores that are not finite; look for NaN in them or the weights."
        raise ValueError(msg)
    return scores, locations


def nearest_neighbors(
    queries: torch.Tensor,
    bank: torch.Tensor,
    squares: torch.Tensor,
    count: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Distances to the nearest vectors and their indices, each ``(..., count)``, squeezed for one.

    Args:
        queries: Shape ``(..., d)``.
        bank: Vectors, shape ``(m, d)``.
        squares: Their squared lengths, shape ``(m,)``; infinite for a row that is not used.
        count: Number of neighbors, at most the number of rows that are used.
    """
    bank = bank.float()
    with torch.autocast(queries.device.type, enabled=False):  # the nearest are too close for half precision
        # The square of the query is the same for all vectors.
        if queries.ndim == 2:
            ranking = torch.addmm(squares, queries, bank.T, alpha=-2)  # one pass over the products
        else:
            ranking = squares - 2 * (queries @ bank.T)
    if count == 1:
        index = ranking.min(dim=-1).indices  # `argmin` takes five times as long on a CPU
        # Taken directly, the distance does not suffer from the difference of large squares.
        return torch.linalg.vector_norm(queries - bank[index], dim=-1), index
    index = ranking.topk(count, dim=-1, largest=False).indices
    return torch.linalg.vector_norm(queries.unsqueeze(-2) - bank[index], dim=-1), index


def image_score(
    scores: torch.Tensor,
    locations: torch.Tensor,
    patches: torch.Tensor,
    bank: torch.Tensor,
    squares: torch.Tensor,
    num_neighbors: int,
) -> torch.Tensor:
    """PatchCore's image score, of shape ``(B,)``: the largest patch distance, weighed by its neighborhood.

    Args:
        scores: Distance of each patch to its nearest vector, shape ``(B, n)``.
        locations: Index of that vector, shape ``(B, n)``.
        patches: Patch embeddings, shape ``(B, n, d)``.
        bank: Vectors, shape ``(m, d)``.
        squares: Their squared lengths, shape ``(m,)``; infinite for a row that is not used.
        num_neighbors: Neighbors that weigh, at most the number of rows that are used; 1 takes the distance as it is.
    """
    largest, position = scores.max(dim=1, keepdim=True)
    if num_neighbors == 1:
        return largest.squeeze(1)
    bank = bank.float()
    patch = patches.gather(1, position.unsqueeze(-1).expand(-1, -1, patches.shape[-1]))
    _, support = nearest_neighbors(bank[locations.gather(1, position)], bank, squares, num_neighbors)
    distances = torch.linalg.vector_norm(patch.unsqueeze(2) - bank[support], dim=-1)
    return (largest * (1 - distances.softmax(dim=-1)[..., 0])).squeeze(1)


def anomaly_maps(scores: torch.Tensor, size: torch.Size) -> torch.Tensor:
    """Anomaly maps of shape ``(B, 1, H, W)`` from patch scores of shape ``(B, 1, h, w)``.

    Raises:
        ValueError: If the height and width are not known while a model is exported.
    """
    if not all(isinstance(side, int) for side in (*scores.shape[2:], *size)):  # symbols, while a model is exported
        msg = "An anomaly map needs images of known size: give input_size, or a pre-processor that resizes."
        raise ValueError(msg)
    rows, columns = (
        torch.from_numpy(map_matrix(patches, pixels)).to(scores.device)
        for patches, pixels in zip(scores.shape[2:], size, strict=True)
    )
    with torch.autocast(scores.device.type, enabled=False):
        return rows @ scores @ columns.T

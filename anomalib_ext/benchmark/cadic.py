# SPDX-License-Identifier: Apache-2.0
"""The replacement rule of CADIC (arXiv 2511.08634)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from openvino_export.memory.k_center import nearest

from .learners import Learner

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from .tasks import Task

    Array = NDArray[np.float32]


class Cadic(Learner):
    """The replacement rule of CADIC (arXiv 2511.08634), image by image.

    The first patches fill the bank. From then on the patch farthest from the bank replaces one of the bank's closest
    pair, as long as it is farther from the bank than these are from each other. The size of a batch is not stated
    there; here it is an image. Backbone and score are the ones of all learners here, not CADIC's.
    """

    title = "CADIC rule"
    learns_images = True

    def learn(self, images: Sequence[Array], seen: Sequence[Array], task: Task | None) -> None:
        """Replace vectors."""
        del seen, task
        full = len(self.vectors) == self.size
        pairs = _OtherNearest(self.vectors) if full else None
        for image in images:
            rest = image
            if pairs is None:
                free = self.size - len(self.vectors)
                self.vectors = np.concatenate([self.vectors.reshape(-1, image.shape[1]), image[:free]])
                rest = image[free:]
                if len(self.vectors) < self.size:
                    continue
                pairs = _OtherNearest(self.vectors)
            if len(rest):
                pairs.replace_by(rest)


class _OtherNearest:
    """Keeps for each vector of a bank the nearest other one, while vectors are replaced in place."""

    def __init__(self, vectors: Array) -> None:
        import faiss

        self.vectors = vectors
        self.squares = np.einsum("ij,ij->i", vectors, vectors)
        self.neighbors = faiss.knn(vectors, vectors, 2)[1]
        own = self.neighbors[:, 0] == np.arange(len(vectors))
        self.neighbors = np.where(own, self.neighbors[:, 1], self.neighbors[:, 0])  # the other, even of two alike
        self.gaps = np.linalg.norm(vectors - vectors[self.neighbors], axis=1)

    def replace_by(self, patches: Array) -> None:
        """Let patches of shape ``(n, d)`` in by CADIC's rule."""
        distances, index = nearest(patches, self.vectors)
        while True:
            best, place = int(distances.argmax()), int(self.gaps.argmin())
            if distances[best] <= self.gaps[place]:
                return
            place = min(place, int(self.neighbors[place]))  # which of the pair goes is not stated
            self.vectors[place] = patches[best]
            self.squares[place] = patches[best] @ patches[best]
            # All that had the replaced vector as nearest must search anew; all others need to look at the new one.
            members = np.flatnonzero(self.neighbors == place)
            members = members[members != place]
            lost = np.flatnonzero((index == place) & (distances >= 0))
            queries = np.concatenate([patches[best : best + 1], self.vectors[members], patches[lost]])
            table = queries @ self.vectors.T
            table *= -2
            table += self.squares
            table += np.einsum("ij,ij->i", queries, queries)[:, None]
            table[np.arange(1 + len(members)), np.concatenate([[place], members])] = np.inf
            found = table.argmin(axis=1)
            gaps = np.sqrt(np.maximum(table[np.arange(len(table)), found], 0))
            new = np.sqrt(np.maximum(table[0], 0))
            nearer = new < self.gaps
            self.gaps[nearer], self.neighbors[nearer] = new[nearer], place
            own = slice(0, 1 + len(members))
            changed = np.concatenate([[place], members])
            self.gaps[changed], self.neighbors[changed] = gaps[own], found[own]
            to_new = np.linalg.norm(patches - patches[best], axis=1)
            closer = to_new < distances
            distances[closer], index[closer] = to_new[closer], place
            distances[lost], index[lost] = gaps[1 + len(members) :], found[1 + len(members) :]
            distances[best] = -1  # was taken

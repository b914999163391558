# SPDX-License-Identifier: Apache-2.0
"""Tells that good parts no longer look as learned, before false alarms do.

Each accepted part gets a conformal p-value: the share of good scores known so far that are as high as its own. As long
as parts look as learned, p-values are even over 0 to 1, whatever the scores look like. When scores rise they become
small. The evidence is a Shiryaev-Roberts statistic of bets on small p-values. If nothing changes, it passes a limit
once in as many parts on the mean, or more seldom (Vovk et al., Retrain or not retrain: conformal test martingales for
change-point detection, 2021; which bets is ours).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .memory.thresholds import good_scores

if TYPE_CHECKING:
    from .decision import Prediction
    from .memory.memory_bank import MemoryBank

# Parts without drift, on the mean, until a false warning; at least.
PARTS_UNTIL_FALSE_WARNING = 10_000
# A bet pays `power * p ** (power - 1)`: the lower the power, the more on small p-values.
POWERS = np.array([0.5, 0.7, 0.85])
# So many good scores of a variant are remembered at most.
KNOWN_SCORES = 1000
# The score at which a part is anomalous; only parts below it are accepted.
LIMIT = 0.5


class DriftMonitor:
    """Watches the scores of accepted parts, variant by variant.

    Args:
        bank: What parts are judged by; make a new monitor when it has changed.

    Example:
        >>> monitor = DriftMonitor(bank)
        >>> if monitor.add(detector.predict("part.png")):
        ...     print("Good parts no longer look as learned.")
    """

    def __init__(self, bank: MemoryBank) -> None:
        self._known = {name: [s for s in good_scores(bank, name).tolist() if s <= LIMIT] for name in bank.variants}
        self._evidence = {name: np.zeros(len(POWERS)) for name in bank.variants}
        self._told: set[str] = set()
        self._rng = np.random.default_rng(0)  # parts ties

    def evidence(self, variant: str) -> float:
        """How strongly the parts of a variant speak for a drift; the warning comes at PARTS_UNTIL_FALSE_WARNING."""
        return float(self._evidence[variant].mean())

    def add(self, prediction: Prediction) -> bool:
        """Take in a verdict.

        Args:
            prediction: With a normalised score. One that is anomalous, or of a variant that is not sure, says nothing.

        Returns:
            Whether this part is the first to show that parts of its variant have drifted.
        """
        variant, score = prediction.variant, prediction.pred_score
        if variant not in self._known or prediction.pred_label is not False or not prediction.is_sure or score > LIMIT:
            return False
        known = self._known[variant]
        higher, equal = sum(other > score for other in known), sum(other == score for other in known)
        p_value = (higher + self._rng.uniform(1e-9, 1) * (equal + 1)) / (len(known) + 1)
        if len(known) < KNOWN_SCORES:
            known.append(score)
        self._evidence[variant] = (1 + self._evidence[variant]) * POWERS * p_value ** (POWERS - 1)
        if variant in self._told or self.evidence(variant) < PARTS_UNTIL_FALSE_WARNING:
            return False
        self._told.add(variant)
        return True

# SPDX-License-Identifier: Apache-2.0
"""Metrics of a station for Prometheus."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from .station import Station

QUANTILES = (0.5, 0.9, 0.99)


class _State:
    """Reads a station when it is asked."""

    def __init__(self, station: Station) -> None:
        self._station = station

    def collect(self) -> Generator[Any]:
        """Metrics as they are now."""
        station = self._station
        parts = CounterMetricFamily("parts", "Parts since the start", labels=("variant", "label"))
        for (variant, label), count in list(station.verdicts.items()):
            parts.add_metric((variant, label), count)
        yield parts
        scores = GaugeMetricFamily(
            "last_scores", "Quantiles of the last scores; 0.5 is the threshold", labels=("variant", "quantile")
        )
        for variant, values in list(station.scores.items()):
            for quantile, value in zip(QUANTILES, np.quantile(list(values), QUANTILES), strict=True):
                scores.add_metric((variant, str(quantile)), float(value))
        yield scores
        known = station.detector.info()
        yield GaugeMetricFamily("bank_vectors", "Vectors in the memory bank", known["vectors"])
        yield GaugeMetricFamily("bank_vectors_limit", "Largest number of vectors", known["memory_size"])
        images = GaugeMetricFamily("learned_images", "Images learned", labels=("variant",))
        for variant, about in known["variants"].items():
            images.add_metric((variant,), about["images"])
        yield images
        yield GaugeMetricFamily("paused", "Whether the station is paused", float(station.paused))


def metrics_of(station: Station) -> Callable[[], bytes]:
    """A function that gives the metrics of a station as text."""
    registry = CollectorRegistry()
    registry.register(_State(station))
    seconds = Histogram(
        "judging_seconds",
        "Time from the image file to the verdict",
        buckets=(0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 5),
        registry=registry,
    )

    def observe(event: dict[str, Any]) -> None:
        if event["event"] == "verdict":
            seconds.observe(event["milliseconds"] / 1e3)

    station.listen(observe)
    return lambda: generate_latest(registry)

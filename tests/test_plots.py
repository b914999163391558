# SPDX-License-Identifier: Apache-2.0
"""Plots of R, and colors."""

import numpy as np
from PIL import Image

from anomalib_ext.plots import colors, heat_maps, to_array


def test_many_variants_have_colors_of_their_own() -> None:
    """More than a palette has, and R grows with them."""
    names = [f"variant {index}" for index in range(25)]
    assert len(set(colors(names).values())) == 25
    few, many = (to_array(heat_maps({"R": np.full((count,) * 2, 0.9)}, *[names[:count]] * 2, "R")) for count in (2, 12))
    assert many.shape[0] > few.shape[0]
    assert Image.fromarray(many).size == many.shape[1::-1]


def test_heat_maps_show_what_was_measured() -> None:
    """A number in its place for each value, nothing for NaN, the axes named, and no axes too many."""
    matrix = np.array([[0.9, np.nan, np.nan], [0.8, 1.0, np.nan]])
    figure = heat_maps({f"learner {number}": matrix for number in range(5)}, ["a", "b"], ["x", "y", "z"], "R")
    shown = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_title() for axes in shown] == [f"learner {number}" for number in range(5)]
    for axes in shown:
        texts = {text.get_position(): text.get_text() for text in axes.texts}
        assert texts == {(0, 0): ".900", (0, 1): ".800", (1, 1): "1.000"}
        assert [label.get_text() for label in axes.get_xticklabels()] == ["x", "y", "z"]
    assert [label.get_text() for label in shown[0].get_yticklabels()] == ["a", "b"]

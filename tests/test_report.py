# SPDX-License-Identifier: Apache-2.0
"""The page of ``anomalib-ext report``: complete, self-contained, and right about names and numbers."""

import base64
import csv
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from anomalib_ext.data import MultiCategory
from anomalib_ext.models.continual_patchcore.post_processor import VariantPostProcessor
from anomalib_ext.plots import colors, heat_maps, to_array
from anomalib_ext.report import report
from anomalib_ext.stream import learn_stream

Make = Callable[..., Any]
NAMES = ["stripes", "$x_1$ <b>&\"'y"]


class Page(HTMLParser):
    """What a page consists of: tags with attributes, and text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.styles: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Keep a tag."""
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        """Keep text."""
        (self.styles if self.tags and self.tags[-1][0] == "style" and "{" in data else self.text).append(data.strip())

    def values(self, *attributes: str) -> list[str]:
        """Return the values of attributes of all tags."""
        return [value for _, attrs in self.tags for name in attributes if (value := attrs.get(name)) is not None]

    @property
    def plots(self) -> list[str]:
        """The plots, which are SVG images."""
        prefix = "data:image/svg+xml;base64,"
        return [base64.b64decode(text.removeprefix(prefix)).decode() for text in self.values("src") if prefix in text]

    @property
    def pictures(self) -> list[dict[str, str | None]]:
        """Attributes of the pictures that are no plots."""
        return [attrs for tag, attrs in self.tags if tag == "img" and "jpeg" in str(attrs["src"])[:20]]


@pytest.fixture(scope="module")
def finished(products: Path, make_model: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a stream that took good images for bad ones."""
    root = tmp_path_factory.mktemp("products")
    for product, name in zip(("stripes", "dots"), NAMES, strict=True):
        shutil.copytree(products / product, root / name)
    model = make_model(post_processor=VariantPostProcessor(image_sensitivity=0.9))
    folder = tmp_path_factory.mktemp("run") / "line & <3>"
    learn_stream(model, MultiCategory(root=root, categories=NAMES, num_workers=0), folder)
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """Return a copy of it, to change."""
    return Path(shutil.copytree(finished, tmp_path / finished.name))


def page_of(run: Path) -> Page:
    """Write the report and return what it consists of."""
    report(run)
    return Page((run / "report.html").read_text(encoding="utf-8"))


def rewrite(path: Path, keep: Callable[[dict[str, str]], bool]) -> None:
    """Leave some rows of a table."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(filter(keep, rows))


def test_nothing_outside_the_page_is_referenced(run: Path) -> None:
    """Pictures are in it, links go to places in it, and no other kind of reference is there; in the plots neither."""
    page = page_of(run)
    assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & {tag for tag, _ in page.tags}
    assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on")]
    references = page.values("src", "href", "srcset", "data", "poster", "background", "action", "xlink:href")
    inside = [text for text in references if text.startswith("#")]
    assert len(references) == len(page.plots) + len(page.pictures) + len(inside)
    assert len(page.plots) == 7  # AUROC of images and pixels, shares, radius bound, thresholds, two histograms
    assert {text[1:] for text in inside} <= set(page.values("id"))
    for style in (*page.styles, *page.values("style")):
        assert "url(" not in style
        assert "@import" not in style
    for svg in page.plots:
        assert "<script" not in svg
        assert all(target.startswith("#") for target in re.findall(r'href="([^"]*)"', svg))
        assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", svg))
    assert "default-src 'none'" in next(attrs["content"] or "" for _, attrs in page.tags if "http-equiv" in attrs)


def test_names_are_shown_as_they_are(run: Path) -> None:
    """A name that looks like HTML or like a formula is a name."""
    page = page_of(run)
    assert "b" not in {tag for tag, _ in page.tags}
    assert page.text.count(NAMES[1]) >= 5  # tables, legends, variants
    assert "line & <3>" in page.text
    assert any(">$x_1$ &lt;b&gt;&amp;" in plot for plot in page.plots)


def test_numbers_are_those_of_the_stream(run: Path) -> None:
    """R, the wrong decisions and the worst mistakes are those in the tables."""
    page = page_of(run)
    text = "\n".join(page.text)
    with (run / "results.csv").open(encoding="utf-8", newline="") as file:
        results = list(csv.DictReader(file))
    assert len(results) == 3
    for row in results:
        assert f"{float(row['image_AUROC']):.3f}" in page.text
        assert f"{float(row['pixel_AUROC']):.3f}" in page.text
    with (run / "scores.csv").open(encoding="utf-8", newline="") as file:
        last = [row for row in csv.DictReader(file) if row["step"] == "2"]
    wrong = sum(row["pred_label"] != row["gt_label"] for row in last)
    assert wrong > 0
    assert f"{wrong} of {len(last)}" in page.text
    worst = [row for row in last if row["picture"]]
    assert len(page.pictures) == len(worst) > 0
    for row in worst:
        assert f"score {float(row['pred_score']):.2f}: {'/'.join(Path(row['image_path']).parts[-3:])}" in text


def test_it_can_be_read_without_seeing_it(run: Path) -> None:
    """Every picture has a text, tables have headings, and what scrolls can be reached by keyboard."""
    page = page_of(run)
    tags = dict(page.tags)
    assert tags["html"]["lang"] == "en"
    assert all(attrs.get("alt") for tag, attrs in page.tags if tag == "img")
    assert all(attrs.get("scope") for tag, attrs in page.tags if tag == "th")
    assert all(attrs.get("tabindex") == "0" for _, attrs in page.tags if attrs.get("class") == "scroll")
    assert any(attrs.get("name") == "viewport" for _, attrs in page.tags)


def test_an_interrupted_stream_shows_complete_steps(run: Path) -> None:
    """A kill between the tables leaves more in the others than in results.csv."""
    rewrite(run / "results.csv", lambda row: row["step"] == "1")
    with (run / "metrics.csv").open("a") as file:
        file.write("2,memory/image_threshold/stripes,999.0\n")
    text = "\n".join(page_of(run).text)
    assert f"The stream did not get to {NAMES[1]}." in text
    assert "learned 1 variants" in text
    assert "threshold at a distance of" in text
    assert "999" not in text


def test_without_a_memory_bank_and_pictures_the_rest_is_there(run: Path) -> None:
    """As for models that log nothing in their fits, or when pictures were removed to save room."""
    rewrite(run / "metrics.csv", lambda row: not row["name"].startswith("memory/"))
    shutil.rmtree(run / "worst")
    page = page_of(run)
    assert page.pictures == []
    assert "There are no pictures." in page.text
    assert "seconds" in page.text
    assert "radius bound" not in page.text
    assert sum(tag == "img" for tag, _ in page.tags) == 4  # AUROC of images and pixels, two histograms


def test_without_a_post_processor_nothing_is_called_wrong(run: Path) -> None:
    """There are scores, but neither thresholds nor decisions."""
    rewrite(run / "scores.csv", lambda row: row.update(threshold="", pred_label="", picture="") is None)
    page = page_of(run)
    assert "wrong decisions now" not in page.text
    assert "There are no pictures." in page.text
    assert not re.search(r"false (positives|negatives)|dashed line", "\n".join(page.text))


@pytest.mark.parametrize("name", ["results.csv", "scores.csv", "metrics.csv", "hparams.json"])
def test_another_folder_is_refused(run: Path, name: str) -> None:
    """The error says what is missing, and nothing is written."""
    (run / name).unlink()
    with pytest.raises(FileNotFoundError, match=rf"There is no {name} in .*anomalib-ext stream"):
        report(run)
    assert not (run / "report.html").exists()


def test_the_command(run: Path) -> None:
    """The folder is an argument without a name."""
    command = [str(Path(sys.executable).with_name("anomalib-ext")), "report", str(run)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert str(run / "report.html") in done.stdout
    assert (run / "report.html").stat().st_size > 50_000


def test_many_variants_have_colors_of_their_own() -> None:
    """More than a palette has, and R grows with them."""
    names = [f"variant {index}" for index in range(25)]
    assert len(set(colors(names).values())) == 25
    few, many = (to_array(heat_maps({"R": np.full((count,) * 2, 0.9)}, *[names[:count]] * 2, "R")) for count in (2, 25))
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

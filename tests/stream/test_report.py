# SPDX-License-Identifier: Apache-2.0
"""The page of ``anomalib-ext report``: complete, self-contained, and right about names and numbers."""

import base64
import csv
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from anomalib_ext.report import report


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


@pytest.fixture
def run(finished: Any, tmp_path: Path) -> Path:  # noqa: ANN401
    """Return a copy of what a report is made from, to change."""
    others = shutil.ignore_patterns("images", "tensorboard", "*.ckpt", "report.html")
    return Path(shutil.copytree(finished.folder, tmp_path / finished.folder.name, ignore=others))


@pytest.fixture(scope="module")
def page(finished: Any, run_command: Callable[..., str]) -> Page:  # noqa: ANN401
    """Return the page about the stream as it is, written by the command, whose argument has no name."""
    path = finished.folder / "report.html"
    assert f"{finished.folder.name}/report.html" in run_command(finished.folder.parent, "report", finished.folder.name)
    return Page(path.read_text(encoding="utf-8"))


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


def test_nothing_outside_the_page_is_referenced(page: Page) -> None:
    """Pictures are in it, links go to places in it, and no other kind of reference is there; in the plots neither."""
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


def test_names_are_shown_as_they_are(page: Page, finished: Any) -> None:  # noqa: ANN401
    """A name that looks like HTML or like a formula is a name."""
    assert "b" not in {tag for tag, _ in page.tags}
    assert page.text.count(finished.names[1]) >= 5  # tables, legends, variants
    assert "line & <3>" in page.text
    assert any(">$x_1$ &lt;b&gt;&amp;" in plot for plot in page.plots)


def test_numbers_are_those_of_the_stream(page: Page, finished: Any) -> None:  # noqa: ANN401
    """R, the wrong decisions and the worst mistakes are those in the tables."""
    text = "\n".join(page.text)
    with (finished.folder / "results.csv").open(encoding="utf-8", newline="") as file:
        results = list(csv.DictReader(file))
    assert len(results) == 3
    for row in results:
        assert f"{float(row['image_AUROC']):.3f}" in page.text
        assert f"{float(row['pixel_AUROC']):.3f}" in page.text
    with (finished.folder / "scores.csv").open(encoding="utf-8", newline="") as file:
        last = [row for row in csv.DictReader(file) if row["step"] == "2"]
    wrong = sum(row["pred_label"] != row["gt_label"] for row in last)
    assert wrong > 0
    assert f"{wrong} of {len(last)}" in page.text
    worst = [row for row in last if row["picture"]]
    assert len(page.pictures) == len(worst) > 0
    for row in worst:
        assert f"score {float(row['pred_score']):.2f}: {'/'.join(Path(row['image_path']).parts[-3:])}" in text


def test_it_can_be_read_without_seeing_it(page: Page) -> None:
    """Every picture has a text, tables have headings, and what scrolls can be reached by keyboard."""
    tags = dict(page.tags)
    assert tags["html"]["lang"] == "en"
    assert all(attrs.get("alt") for tag, attrs in page.tags if tag == "img")
    assert all(attrs.get("scope") for tag, attrs in page.tags if tag == "th")
    assert all(attrs.get("tabindex") == "0" for _, attrs in page.tags if attrs.get("class") == "scroll")
    assert any(attrs.get("name") == "viewport" for _, attrs in page.tags)


def test_an_interrupted_stream_shows_complete_steps(run: Path, finished: Any) -> None:  # noqa: ANN401
    """A kill between the tables leaves more in the others than in results.csv."""
    rewrite(run / "results.csv", lambda row: row["step"] == "1")
    with (run / "metrics.csv").open("a") as file:
        file.write("2,memory/image_threshold/stripes,999.0\n")
    text = "\n".join(page_of(run).text)
    assert f"The stream did not get to {finished.names[1]}." in text
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

# SPDX-License-Identifier: Apache-2.0
"""Tests of the texts of the operator's page."""

import re
from html.parser import HTMLParser
from pathlib import Path

PAGE = Path(__file__).parents[3] / "openvino_export/serve/page"


class Texts(HTMLParser):
    """Collects what a page says by itself, and the keys of what it has said."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []
        self.keys: set[str] = set()
        self.tag = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note the keys."""
        self.tag = tag
        self.keys |= {str(value) for name, value in attrs if name in {"data-text", "data-label"}}

    def handle_data(self, data: str) -> None:
        """Note what is said."""
        if data.strip() and self.tag not in {"title", "kbd"}:
            self.said.append(data)


def test_texts_are_in_one_place() -> None:
    """The page says nothing by itself; all that it names is there, and nothing else."""
    page = Texts()
    page.feed((PAGE / "index.html").read_text(encoding="utf-8"))
    assert not page.said
    texts = (PAGE / "texts.js").read_text(encoding="utf-8")
    known = set(re.findall(r'^    "([\w.]+)": "', texts, re.MULTILINE))
    code = "".join(path.read_text(encoding="utf-8") for path in PAGE.glob("*.js") if path.name != "texts.js")
    groups = "|".join({key.partition(".")[0] for key in known if "." in key})
    named = set(re.findall(rf'"((?:{groups})\.\w+)"', code))
    assert page.keys | named <= known
    # Keys that are put together, such as `verdict.${kind}`
    made = [re.sub(r"\$\{[^}]*\}", r"\\w+", each) for each in re.findall(rf"`((?:{groups})\.[^`]*)`", code)]
    assert not {key for key in known - page.keys - named if not any(re.fullmatch(each, key) for each in made)}


def test_data_is_no_markup() -> None:
    """No way by which data becomes markup is used at all."""
    code = "".join(path.read_text(encoding="utf-8") for path in PAGE.glob("*.js"))
    assert not re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(", code)

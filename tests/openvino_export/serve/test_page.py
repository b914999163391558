# SPDX-License-Identifier: Apache-2.0
"""Tests of the operator's page in a real browser, at a real station."""

import json
import re
from collections.abc import Callable
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

DESK, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 844}


def images(products: Path, product: str, kind: str = "test/good") -> list[Path]:
    """Images of a product."""
    return sorted((products / product / kind).iterdir())


def judge(server: Any, *paths: Path) -> list[dict[str, Any]]:  # noqa: ANN401
    """Have parts judged, one after another."""
    with httpx.Client(timeout=30) as client:
        answers = [client.post(f"{server.url}/predict", content=path.read_bytes()) for path in paths]
    return [answer.raise_for_status().json() for answer in answers]


def text(page: Any, selector: str, pattern: str) -> None:  # noqa: ANN401
    """Wait until an element says something."""
    from playwright.sync_api import expect

    expect(page.locator(selector)).to_have_text(re.compile(pattern), timeout=15_000)


def count(locator: Any, number: int) -> None:  # noqa: ANN401
    """Wait until there are so many elements."""
    from playwright.sync_api import expect

    expect(locator).to_have_count(number, timeout=15_000)


def log(tmp_path: Path) -> list[dict[str, Any]]:
    """Lines of the log of teachings."""
    return [json.loads(line) for line in (tmp_path / "station/teachings.jsonl").read_text("utf-8").splitlines()]


def lit(image: Path, target: Path) -> Path:
    """A good part in a light that was not learned, so that it is called bad, though not by far."""
    from PIL import Image

    with Image.open(image) as opened:
        pixels = np.asarray(opened, np.float32)
    Image.fromarray((pixels * 0.86 + 10).clip(0, 255).astype(np.uint8)).save(target)
    return target


def test_a_line(serve: Callable[..., Any], open_page: Callable[..., Any], products: Path, tmp_path: Path) -> None:
    """60 parts pass; a false alarm is corrected, is accepted then, and the correction is taken back."""
    server = serve()
    page = open_page(server)
    text(page, "#verdict-text", "No part yet")
    assert page.locator("#good").is_disabled()
    line = [*islice(cycle(images(products, "stripes")), 56), *images(products, "stripes", "test/hole")[:3]]
    alarm = lit(images(products, "stripes")[0], tmp_path / "alarm.png")
    *before, last = judge(server, *line, alarm)
    assert (last["pred_label"], sum(part["pred_label"] for part in before)) == (True, 3)

    text(page, "#part-id", f"Part {last['id']}$")
    text(page, "#verdict-text", "Bad")
    text(page, "#verdict-score", f"Score {last['pred_score']:.2f}")
    text(page, "#strip-count", "4 of 60 called bad")
    assert page.locator("#verdict-icon use").get_attribute("href") == "#i-bad"
    count(page.locator("#thumbs .thumb"), 60)
    page.locator("#filter").click()
    count(page.locator("#thumbs .thumb"), 4)
    page.locator("#thumbs .thumb").nth(1).click()
    text(page, "#part-id", f"Part {before[-1]['id']}$")
    page.locator("#latest").click()
    text(page, "#part-id", f"Part {last['id']}$")

    page.wait_for_timeout(800)  # what has just come must be meant twice
    page.locator("#good").click()
    text(page, "#message", f"Part {last['id']} is accepted now")
    text(page, "#verdict-text", "Good")
    text(page, "#verdict-note", f"Before it was taught: Bad, {last['pred_score']:.2f}")
    assert not judge(server, alarm)[0]["pred_label"]
    page.locator("#message .act").click()
    text(page, "#message", "Taken back: Good part of “stripes”")
    assert judge(server, alarm)[0]["pred_label"]
    assert [line["kind"] for line in log(tmp_path)] == ["base", "learn", "undo"]


@pytest.mark.slow
def test_a_defect(serve: Callable[..., Any], open_page: Callable[..., Any], products: Path, tmp_path: Path) -> None:
    """It is shown with a box, in pixels of the image; a single teaching is taken back in the list."""
    server = serve()
    judge(server, *images(products, "stripes")[:2], images(products, "stripes", "test/hole")[0])
    page = open_page(server)
    text(page, "#part-id", "Part 3$")
    for part in (1, 3):
        page.locator("#thumbs .thumb").nth(3 - part).click()
        text(page, "#part-id", f"Part {part}$")
        page.locator("#defect").click()
        if part == 3:
            place = page.locator("#defect-stage").bounding_box()
            side, left = place["height"], place["x"] + (place["width"] - place["height"]) / 2
            page.mouse.move(left + side / 4, place["y"] + side / 2)
            page.mouse.down()
            page.mouse.move(left + side / 2, place["y"] + side * 3 / 4, steps=3)
            page.mouse.up()
        page.locator("#show-defect .primary").click()
        text(page, "#message", rf"Learned.*part {part}|Learned. Part {part}")
    arguments = [line["arguments"] for line in log(tmp_path)[1:]]
    assert [each["defective"] for each in arguments] == [True, True]
    assert arguments[0].get("regions") is None
    assert np.allclose(arguments[1]["regions"], [16, 32, 32, 48], atol=1)

    page.locator("#teachings").click()
    count(page.locator("#teaching-list li"), 3)
    page.locator("#teaching-list img[src]").nth(1).wait_for()
    page.locator("#teaching-list button").nth(1).click()  # the older one
    text(page, "#teaching-list li >> nth=0", "Taken back: no. 2")
    count(page.locator("#teaching-list button"), 1)
    assert log(tmp_path)[-1]["undone"] == 2


@pytest.mark.slow
def test_asks_twice(serve: Callable[..., Any], open_page: Callable[..., Any], products: Path, tmp_path: Path) -> None:
    """A part that is far from good is learned as good only once its like was looked at."""
    server = serve()
    *_, hole = images(products, "stripes", "test/hole")
    judge(server, hole, hole, images(products, "stripes")[0])
    page = open_page(server)
    text(page, "#part-id", "Part 3$")
    page.locator("#thumbs .thumb").nth(1).click()
    text(page, "#part-id", "Part 2$")
    page.locator("#good").click()
    text(page, "#ask-title", "Part 2 is far from good")
    count(page.locator("#would-pass img"), 1)
    page.locator("#would-pass img[src]").wait_for()
    assert page.locator("#ask-yes").is_disabled()
    page.keyboard.press("Escape")
    page.locator("#ask").wait_for(state="hidden")
    assert len(log(tmp_path)) == 1
    page.locator("#good").click()
    page.locator(".tick").click()
    page.locator("#ask-yes").click()
    text(page, "#message", "Part 2 is accepted now")
    assert log(tmp_path)[-1]["arguments"]["force"]


@pytest.mark.slow
def test_new_product(serve: Callable[..., Any], open_page: Callable[..., Any], products: Path, tmp_path: Path) -> None:
    """It is taught from 8 parts that pass, is judged for sure then, and is renamed, decided otherwise and deleted."""
    server = serve()
    page = open_page(server)
    page.locator("#new").click()
    page.locator("#ask-body input").fill("dots")
    page.locator("#ask-yes").click()
    learned = images(products, "dots", "train/good")
    for number, path in enumerate(learned[:8], 1):
        judge(server, path)
        wanted = f"{8 - number} more" if number < 8 else "The verdict is sure"
        text(page, "#state-text", f"“dots”: {number} parts. {wanted}")
        count(page.locator("#state-steps .done"), number)
        # The first one is judged as what is known.
        notes = {1: "Learned as “dots”", 5: r"Not sure yet: \d good parts are known"}
        if number in notes:
            text(page, "#verdict-note", notes[number])
    page.locator("#state-act").click()
    text(page, "#message", "“dots” is learned from 8 parts")
    good, bad = judge(server, images(products, "dots")[0], images(products, "dots", "test/hole")[0])
    assert [good[key] for key in ("pred_label", "variant", "is_sure")] == [False, "dots", True]
    assert [bad[key] for key in ("pred_label", "variant")] == [True, "dots"]

    page.locator("#products").click()
    page.locator("#product-list article").nth(1).locator("select").select_option("0.01")
    text(page, "#message", "1% may be called bad")
    for name in ("a/b", "a/b ö"):
        page.locator("#product-list article").nth(1).get_by_text("Rename").click()
        page.locator("#ask-body input").fill(name)
        page.locator("#ask-yes").click()
        text(page, "#product-list article >> nth=1 >> h3", f"^{name}$")
    about = httpx.get(f"{server.url}/variants").json()
    assert (about["a/b ö"]["images"], about["a/b ö"]["false_alarm_rate"]) == (8, 0.01)
    page.locator("#product-list article").nth(1).get_by_text("Delete").click()
    page.locator("#ask-yes").click()
    page.locator("#product-list article").nth(1).wait_for(state="detached")
    assert [*httpx.get(f"{server.url}/variants").json()] == ["stripes"]
    assert [line["kind"] for line in log(tmp_path)[9:]] == [
        *("set_decision", "rename_variant", "rename_variant", "delete_variant")
    ]


def test_roles(serve: Callable[..., Any], open_page: Callable[..., Any], products: Path, tmp_path: Path) -> None:
    """Without a PIN nothing is seen; the operator looks; who teaches is asked for the supervisor's PIN, and logged."""
    secrets = tmp_path / "secrets"
    secrets.write_text("SUPERVISOR_PIN=7777\n")
    server = serve("--secrets", secrets)
    judge(server, lit(images(products, "stripes")[0], tmp_path / "alarm.png"))
    secrets.write_text("OPERATOR_PIN=1111\nSUPERVISOR_PIN=7777\n")
    server.end()
    server.start()

    def sign_in(name: str, pin: str) -> None:
        page.locator("#person-name").fill(name)
        page.locator("#person-pin").fill(pin)
        page.locator("#person .primary").click()

    page = open_page(server)
    text(page, "#person-why", "takes a PIN")
    assert page.locator("#part-id").inner_text() == ""
    sign_in("", "2222")
    text(page, "#person .alert", "The PIN is wrong")
    sign_in("Ola", "1111")
    text(page, "#part-id", "Part 1$")
    text(page, "#role-text", "Operator · Ola")
    page.locator("#thumbs img[src]").wait_for()
    page.wait_for_timeout(800)

    page.locator("#good").click()
    text(page, "#person-why", "supervisor.s PIN")
    page.locator("#person .close").click()
    assert len(log(tmp_path)) == 1
    page.locator("#good").click()
    sign_in("Ola", "1111")
    text(page, "#person .alert", "does not allow teaching")
    sign_in("Zofia Łuk", "7777")
    text(page, "#message", "accepted now")
    text(page, "#role-text", "Supervisor · Zofia Łuk")
    assert (log(tmp_path)[-1]["kind"], log(tmp_path)[-1]["who"]) == ("learn", "Zofia Łuk")

    page.locator("#role").click()
    page.locator("#person-out").click()
    text(page, "#person-why", "takes a PIN")
    assert page.evaluate("sessionStorage.length") == 0


@pytest.mark.slow
def test_names_are_text(serve: Callable[..., Any], open_page: Callable[..., Any], products: Path) -> None:
    """What people and callers name is never taken for markup."""
    server = serve()
    evil = "<img src=x onerror=document.title='taken'>"
    httpx.post(f"{server.url}/variants/stripes/rename", json={"name": evil}).raise_for_status()
    path = images(products, "stripes")[0]
    httpx.post(f"{server.url}/predict", params={"part": evil}, content=path.read_bytes()).raise_for_status()
    page = open_page(server)
    text(page, "#part-name", re.escape(evil))
    text(page, "#verdict-variant", re.escape(evil))
    page.locator("#products").click()
    text(page, "#product-list h3", re.escape(evil))
    page.locator("#show-products .close").click()
    page.locator("#teachings").click()
    text(page, "#teaching-list li >> nth=0", re.escape(evil))
    count(page.locator("img[src=x]"), 0)
    assert page.title() == "anomalib-edge"


@pytest.mark.slow
def test_comes_back(serve: Callable[..., Any], open_page: Callable[..., Any], products: Path, tmp_path: Path) -> None:
    """It says that it is not connected, and goes on by itself, with what it has missed, a drift as well."""
    server = serve()
    good, *_ = images(products, "stripes")
    judge(server, good)
    page = open_page(server)
    text(page, "#part-id", "Part 1$")
    server.end()
    text(page, "#state-text", "Not connected")
    assert page.locator("#good").is_disabled()
    kept = tmp_path / "station/parts/0000000001.json"
    kept.write_text(json.dumps({**json.loads(kept.read_text("utf-8")), "drift": True}), encoding="utf-8")
    server.start()
    judge(server, good)
    text(page, "#state-text", "Good parts of “stripes” no longer look as learned")
    page.locator("#state-act").click()
    text(page, "#state-text", "Parts are judged")
    text(page, "#part-id", "Part 2$")
    judge(server, good)
    text(page, "#part-id", "Part 3$")
    count(page.locator("#thumbs .thumb"), 3)


@pytest.mark.slow
def test_keyboard(serve: Callable[..., Any], open_page: Callable[..., Any], products: Path, tmp_path: Path) -> None:
    """All that is done often has a key, and the focus stays where it was."""
    server = serve()
    judge(server, *images(products, "stripes")[:2], lit(images(products, "stripes")[0], tmp_path / "alarm.png"))
    page = open_page(server)
    text(page, "#part-id", "Part 3$")
    for key, part in (("ArrowLeft", 2), ("ArrowLeft", 1), ("ArrowLeft", 1), ("ArrowRight", 2), ("Escape", 3)):
        page.keyboard.press(key)
        text(page, "#part-id", f"Part {part}$")
    page.locator("#strip").click(position={"x": 60, "y": 40})
    text(page, "#part-id", "Part 1$")
    page.keyboard.press("Escape")
    page.keyboard.press("?")
    page.locator("#show-help").wait_for()
    page.keyboard.press("p")  # means nothing while a dialog is open
    page.keyboard.press("Escape")
    page.keyboard.press("p")
    text(page, "#state-text", "Paused")
    assert httpx.get(f"{server.url}/mode").json()["paused"]
    page.keyboard.press("p")
    text(page, "#state-text", "Parts are judged")
    page.wait_for_timeout(800)
    page.locator("#good").focus()
    page.keyboard.press("g")
    text(page, "#message", "accepted now")
    assert page.evaluate("document.activeElement.id") == "good"
    page.keyboard.press("u")
    text(page, "#ask-text", "Good part of “stripes”")
    page.keyboard.press("Escape")
    page.locator("#defect:enabled").wait_for()
    page.keyboard.press("d")
    text(page, "#show-defect-title", "part 3")
    page.keyboard.press("Escape")
    assert [line["kind"] for line in log(tmp_path)] == ["base", "learn"]


@pytest.mark.slow
def test_what_has_just_come(serve: Callable[..., Any], open_page: Callable[..., Any], products: Path) -> None:
    """A press right after the part has changed teaches nothing; it holds the part, and asks for another press."""
    server = serve()
    page = open_page(server)
    text(page, "#state-text", "Parts are judged")
    judge(server, *images(products, "stripes", "test/hole")[:1])
    text(page, "#part-id", "Part 1$")
    page.evaluate(
        """() => new MutationObserver(() => document.getElementById("good").click())
        .observe(document.getElementById("part-id"), {childList: true, characterData: true, subtree: true})"""
    )
    judge(server, images(products, "stripes")[0])
    text(page, "#message", "Part 2 has just come")
    judge(server, images(products, "stripes")[1])
    text(page, "#latest-text", "1 newer")
    text(page, "#part-id", "Part 2$")
    assert len(httpx.get(f"{server.url}/teachings").json()) == 1


@pytest.mark.slow
def test_fits(serve: Callable[..., Any], open_page: Callable[..., Any], products: Path) -> None:
    """On a desk and a phone nothing scrolls sideways, gloves hit all, and nothing moves when pictures come."""
    server = serve()
    judge(server, *images(products, "stripes"))
    for viewport in (DESK, PHONE):
        page = open_page(server, viewport, has_touch=True, color_scheme="dark")
        text(page, "#part-id", "Part 6$")
        place = page.locator("#good").bounding_box()
        page.locator("#thumbs").scroll_into_view_if_needed()
        page.locator("#thumbs img[src]").nth(2).wait_for()
        page.evaluate("scrollTo(0, 0)")
        assert page.locator("#good").bounding_box() == place
        width, height = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.scrollHeight]")
        assert width == viewport["width"]
        assert viewport == PHONE or height == viewport["height"]
        for dialog in (None, "new", "products", "teachings", "help", "role", "defect"):
            check_sizes(page, viewport["width"], dialog)


def check_sizes(page: Any, width: int, dialog: str | None) -> None:  # noqa: ANN401
    """The page, or a dialog that a button opens, fits; all that is pressed is at least 56 pixels large."""
    if dialog:
        page.locator(f"#{dialog}").click()
        page.locator("dialog[open]").wait_for()
        size = page.locator("dialog[open]").bounding_box()
        assert size["x"] >= 0
        assert size["x"] + size["width"] <= width
    root = "dialog[open]" if dialog else "body"
    for button in page.locator(f"{root} button:visible, {root} input:visible, {root} select:visible").all():
        size = button.bounding_box()
        assert min(size["width"], size["height"]) >= 56, (dialog, button.inner_text(), size)
    if dialog:
        page.keyboard.press("Escape")
        page.locator("dialog[open]").wait_for(state="detached")

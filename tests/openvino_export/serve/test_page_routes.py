# SPDX-License-Identifier: Apache-2.0
"""Tests of what the operator's page asks beyond other callers."""

import time
from io import BytesIO
from pathlib import Path

from fastapi.testclient import TestClient
from PIL import Image


def test_a_part_is_judged_again(client: TestClient, products: Path) -> None:
    """By what was taught since; neither kept nor counted. A browser's name of a person is decoded."""
    image = (products / "stripes/test/hole/000.png").read_bytes()
    first = client.post("/predict", content=image).json()
    assert client.get("/parts/1/again").json() == {key: first[key] for key in client.get("/parts/1/again").json()}
    said = {"id": 1, "verdict": "good", "confirm": True}
    taught = client.post("/feedback", json=said, headers={"X-Who": "Zofia%20%C5%81uk"}).json()["teaching"]
    assert taught["who"] == "Zofia Łuk"
    again = client.get("/parts/1/again").json()
    assert (again["pred_label"], again["pred_score"] < first["pred_score"]) == (False, True)
    assert client.get("/parts").json() == [first]
    assert client.get("/parts/2/again").status_code == 404

    picture = client.get(f"/teachings/{taught['number']}/image?side=16")
    assert Image.open(BytesIO(picture.content)).size == (16, 16)
    client.post("/undo", json={})
    assert client.get(f"/teachings/{taught['number']}/image").status_code == 404


def test_pictures_tell_the_size_of_the_image(client: TestClient) -> None:
    """So that a box can be drawn on a smaller picture."""
    buffer = BytesIO()
    Image.new("RGB", (120, 80)).save(buffer, "PNG")
    client.post("/predict", content=buffer.getvalue())
    answer = client.get("/parts/1/image?side=60")
    assert Image.open(BytesIO(answer.content)).size == (60, 40)
    assert (answer.headers["X-Width"], answer.headers["X-Height"]) == ("120", "80")


def test_a_new_product_has_a_name_and_someone_who_shows_it(client: TestClient, products: Path) -> None:
    """A name that cannot be one is refused at once; the log says who showed each part."""
    for name in (" ", "a\nb"):
        assert client.post("/mode", json={"learning_as": name}).status_code == 400
    assert client.get("/mode").json()["learning_as"] is None
    client.post("/mode", json={"learning_as": " dots "}, headers={"X-Who": "Ann"})
    client.post("/predict", content=(products / "dots/train/good/000.png").read_bytes())
    deadline = time.monotonic() + 30
    while (line := client.get("/teachings").json()[0])["kind"] == "base" and time.monotonic() < deadline:
        time.sleep(0.05)
    assert (line["who"], line["arguments"]["variant"]) == ("Ann", "dots")
    assert client.get("/info").json()["sure_images"] == 8

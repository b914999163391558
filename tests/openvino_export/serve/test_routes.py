# SPDX-License-Identifier: Apache-2.0
"""Tests of the routes, over HTTP within this process."""

import io
import json
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from openvino_export.serve.app import make_app
from openvino_export.serve.station import Station


def file_of(products: Path, kind: str = "hole") -> bytes:
    """The file of a part of the stripes."""
    return (products / "stripes" / "test" / kind / "000.png").read_bytes()


def test_predict(client: TestClient, products: Path) -> None:
    """A file as the body or in a form gives the same verdict; pictures of it are served."""
    answer = client.post("/predict?part=lid 1", content=file_of(products))
    assert answer.status_code == 200
    verdict = answer.json()
    assert (verdict["id"], verdict["part"], verdict["pred_label"], verdict["variant"]) == (1, "lid 1", True, "stripes")
    other = client.post("/predict", files={"file": ("a.png", file_of(products))}).json()
    assert other["pred_score"] == verdict["pred_score"]
    assert [each["id"] for each in client.get("/parts").json()] == [2, 1]
    assert client.get("/parts/1").json() == verdict
    with Image.open(io.BytesIO(client.get("/parts/1/image?side=32").content)) as image:
        assert (image.format, image.size) == ("JPEG", (32, 32))
    good = client.post("/predict", content=file_of(products, "good")).json()
    opacity = []
    for number in (1, good["id"]):
        with Image.open(io.BytesIO(client.get(f"/parts/{number}/heat_map").content)) as image:
            opacity.append(np.asarray(image)[..., 3].mean())
            assert image.size == (64, 64)
    assert opacity[0] > 100 > opacity[1]
    answer = client.post("/predict?overlay=png", content=file_of(products))
    assert json.loads(answer.headers["X-Verdict"])["pred_score"] == verdict["pred_score"]
    with Image.open(io.BytesIO(answer.content)) as image:
        assert (image.format, image.size) == ("PNG", (64, 64))


@pytest.mark.parametrize(
    ("method", "path", "content", "status", "message"),
    [
        ("POST", "/predict", b"", 400, "The request brings no image"),
        ("POST", "/predict", b"GIF89a", 400, "The image cannot be read as an image"),
        ("POST", "/predict", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", 400, "cannot be read as an image"),
        ("GET", "/parts/9", None, 404, "There is no part 9"),
        ("GET", "/parts/9/image", None, 404, "There is no part 9"),
        ("GET", "/parts/9/heat_map", None, 404, "There is no part 9"),
        ("POST", "/feedback", b'{"id": 9, "verdict": "good"}', 404, "There is no part 9"),
        ("POST", "/undo", b"{}", 404, "nothing to take back"),
        ("POST", "/variants/lid/rename", b'{"name": "x"}', 400, "There is no variant 'lid'"),
        ("POST", "/variants/stripes/rename", b'{"name": " "}', 400, "must not be blank"),
        ("DELETE", "/variants/stripes", None, 400, "the only variant"),
        ("POST", "/thresholds", b'{"false_alarm_rate": 2}', 400, "false_alarm_rate"),
        ("POST", "/mode", b'{"pause": true}', 422, ""),
        ("POST", "/feedback", b"nonsense", 422, ""),
        ("POST", "/feedback", b'{"id": 9, "verdict": "perhaps"}', 422, ""),
        ("GET", "/parts?count=0", None, 422, ""),
    ],
)
def test_mistakes(method: str, path: str, content: bytes | None, status: int, message: str, client: TestClient) -> None:
    """Each is answered by its status, and by what is wrong."""
    headers = {} if path == "/predict" else {"Content-Type": "application/json"}
    answer = client.request(method, path, content=content, headers=headers)
    assert answer.status_code == status
    assert message in answer.json().get("error", "")


def test_teaching(client: TestClient, products: Path) -> None:
    """A false alarm is asked about twice, corrected, and taken back; the log says who."""
    who = {"X-Who": "Ann"}
    first = client.post("/predict", content=file_of(products)).json()
    said = {"id": first["id"], "verdict": "good"}
    answer = client.post("/feedback", json=said, headers=who)
    assert answer.status_code == 409
    assert answer.json()["excess"] > 1
    assert answer.json()["would_pass"] == []
    taught = client.post("/feedback", json={**said, "confirm": True}, headers=who).json()
    assert (taught["learned"], taught["teaching"]["who"]) == ({"stripes": 1}, "Ann")
    assert client.post("/predict", content=file_of(products)).json()["pred_label"] is False
    line = client.get("/teachings").json()[0]
    assert (line["number"], line["undoable"]) == (taught["teaching"]["number"], True)
    assert client.post("/undo", json={"number": line["number"]}, headers=who).json()["number"] == line["number"]
    assert client.post("/predict", content=file_of(products)).json()["pred_label"] is True
    box = {"id": first["id"], "verdict": "defective", "box": [1, 1, 20, 20]}
    assert client.post("/feedback", json=box).json()["shown_defects"] == {"stripes": 1}


def test_variants(client: TestClient, products: Path) -> None:
    """They are learned, listed, renamed, merged and deleted; rates are set."""
    dots = sorted((products / "dots" / "train" / "good").iterdir())
    files = [("files", (path.name, path.read_bytes())) for path in dots[:4]]
    assert client.post("/learn", files=files, data={"variant": "dits"}).json()["learned"] == {"dits": 4}
    assert client.post("/variants/dits/rename", json={"name": "dots / 1"}).status_code == 200
    assert list(client.get("/variants").json()) == ["stripes", "dots / 1"]
    rate = {"variant": "stripes", "false_alarm_rate": 0.1}
    assert client.post("/thresholds", json=rate).status_code == 200
    assert client.get("/variants").json()["stripes"]["false_alarm_rate"] == pytest.approx(0.1)
    assert client.post("/variants/dots %2F 1/merge", json={"into": "stripes"}).status_code == 200
    assert client.get("/info").json()["variants"]["stripes"]["images"] == 24
    files = [("files", (path.name, path.read_bytes())) for path in dots[4:6]]
    assert client.post("/learn", files=files, data={"variant": "dots"}).status_code == 200
    assert client.delete("/variants/stripes").status_code == 200
    assert list(client.get("/variants").json()) == ["dots"]
    held_back = client.post("/learn", files=[("files", ("bad.png", file_of(products)))], data={"variant": "dots"})
    assert held_back.status_code == 409


def test_modes(client: TestClient, products: Path) -> None:
    """A pause refuses parts; a new product is learned from those that are shown."""
    assert client.post("/mode", json={"paused": True}).json() == {"paused": True, "learning_as": None}
    answer = client.post("/predict", content=file_of(products))
    assert (answer.status_code, answer.json()["error"]) == (409, "The station is paused. Go on first.")
    assert client.get("/v2/health/ready").status_code == 503
    client.post("/mode", json={"paused": False, "learning_as": "lid"})
    assert client.post("/predict", content=file_of(products, "good")).json()["learned_as"] == "lid"
    assert client.post("/mode", json={"learning_as": ""}).json() == client.get("/mode").json()
    assert client.get("/mode").json() == {"paused": False, "learning_as": None}


def test_too_many_parts_wait(station: Station, products: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are told to try again; the others are judged."""
    go_on, judge = threading.Event(), station.judge

    def slow(*args: object) -> object:
        go_on.wait(20)
        return judge(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(station, "judge", slow)
    answers: list[int] = []
    with TestClient(make_app(station, queue=1), base_url="http://localhost") as client:

        def post() -> None:
            answers.append(client.post("/predict", content=file_of(products)).status_code)

        threads = [threading.Thread(target=post) for _ in range(3)]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            answer = client.post("/v2/models/model/infer", content=b"{}")
            refused = client.post("/predict", content=file_of(products)) if answer.status_code == 400 else None
            if refused is not None and refused.status_code == 429:
                break
        unread = client.post("/predict", content=b"")
        go_on.set()
        for thread in threads:
            thread.join()
    assert refused is not None
    assert (refused.status_code, refused.headers["Retry-After"]) == (429, "1")
    assert unread.status_code == 429, "before its image is looked at"
    assert answers == [200, 200, 200]


def test_metrics(client: TestClient, products: Path) -> None:
    """Prometheus reads parts, latency, scores and the bank."""
    for kind in ("hole", "good", "good"):
        client.post("/predict", content=file_of(products, kind))
    client.post("/predict", content=b"no image")
    lines = client.get("/metrics").text.splitlines()
    assert 'parts_total{label="good",variant="stripes"} 2.0' in lines
    assert 'parts_total{label="undecided",variant=""} 1.0' in lines
    assert "judging_seconds_count 3.0" in lines
    assert 'learned_images{variant="stripes"} 20.0' in lines
    assert any(line.startswith('last_scores{quantile="0.99",variant="stripes"}') for line in lines)


def test_pages(client: TestClient) -> None:
    """The operator's page and that of the interface load nothing from elsewhere; no path leads out of theirs."""
    for path in ("/", "/docs"):
        page = client.get(path)
        assert page.status_code == 200
        assert "frame-ancestors 'none'" in page.headers["Content-Security-Policy"]
        assert "://" not in page.text
    for path in ("/swagger/swagger-ui-bundle.js", "/docs.js", "/openapi.json"):
        assert client.get(path).status_code == 200
    for path in ("/../app.py", "/%2e%2e/app.py", "/..%2fapp.py", "/swagger/..%2f..%2f__init__.py"):
        assert client.get(path).status_code == 404

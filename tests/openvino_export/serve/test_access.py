# SPDX-License-Identifier: Apache-2.0
"""Tests of who may do what: tokens, PINs, sites, sizes and headers."""

from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from openvino_export.serve import access
from openvino_export.serve.access import Access, RefusedError, Secrets, is_loopback
from openvino_export.serve.app import make_app
from openvino_export.serve.station import Station

TOKEN = "0123456789abcdef"  # noqa: S105
BEARER = {"Authorization": f"Bearer {TOKEN}"}


@pytest.mark.parametrize(
    ("secrets", "headers", "role"),
    [
        (Secrets(), {}, "teach"),
        (Secrets(supervisor="22"), {}, "judge"),
        (Secrets(supervisor="22"), {"x-pin": "22"}, "teach"),
        (Secrets(operator="11", supervisor="22"), {}, None),
        (Secrets(operator="11", supervisor="22"), {"x-pin": "11"}, "judge"),
        (Secrets(operator="11"), {}, "teach"),
        (Secrets(TOKEN), {}, None),
        (Secrets(TOKEN), {"authorization": f"bearer {TOKEN}"}, "teach"),
        (Secrets(TOKEN), {"x-pin": "22"}, None),
        (Secrets(TOKEN, supervisor="22"), {"x-pin": "22"}, "teach"),
        (Secrets(TOKEN, "11", "11"), {"x-pin": "11"}, "teach"),
    ],
)
def test_roles(secrets: Secrets, headers: dict[str, str], role: str | None) -> None:
    """Without secrets everybody on this PC may teach; each secret closes what is its own."""
    assert Access(secrets).role(headers) == role


def test_wrong_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are refused; after some wrong PINs, for a while, right ones too."""
    now = 0.0
    monkeypatch.setattr(access.time, "monotonic", lambda: now)
    guard = Access(Secrets(TOKEN, "11", "22"))
    with pytest.raises(RefusedError, match="token is wrong"):
        guard.role({"authorization": "Bearer nonsense"})
    for _ in range(access.WRONG_PINS):
        with pytest.raises(RefusedError, match="PIN is wrong"):
            guard.role({"x-pin": "33"})
    with pytest.raises(RefusedError, match="Too many wrong PINs") as refused:
        guard.role({"x-pin": "22"})
    assert refused.value.status == 429
    assert guard.role({"authorization": f"Bearer {TOKEN}"}) == "teach"
    now = access.SECONDS_LOCKED + 1
    assert guard.role({"x-pin": "22"}) == "teach"


def test_a_file_of_secrets(tmp_path: Path) -> None:
    """Its lines are keys and values; mistakes are named."""
    path = tmp_path / "secrets"
    path.write_text(f"# line 3\nTOKEN={TOKEN}\n\nSUPERVISOR_PIN = 22\n".replace(" = ", "="), encoding="utf-8")
    assert Secrets.from_file(path) == Secrets(TOKEN, None, "22")
    for text, message in (
        ("PIN=1", "'PIN' is none of TOKEN"),
        ("TOKEN=", "with a value"),
        ("TOKEN=short", "at least 16"),
    ):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            Secrets.from_file(path)


@pytest.fixture
def closed(station: Station) -> TestClient:
    """Return a client, without a token, of a station that needs one, or the PIN of the operator or supervisor."""
    return TestClient(make_app(station, Secrets(TOKEN, "11", "22"), only_loopback=False))


def routes(client: TestClient) -> list[tuple[str, str]]:
    """Method and path of each route that is described."""
    described = client.get("/openapi.json").json()["paths"]
    return [(method.upper(), path) for path, methods in described.items() for method in methods]


OPEN = {"/role", "/v2/health/live"}


def test_each_route_is_closed(closed: TestClient) -> None:
    """Without a token or PIN nothing is answered but the role and that it lives; no route is forgotten."""
    found = routes(closed)
    assert len(found) > 20
    for method, path in found:
        answer = closed.request(method, path.replace("{number}", "1"), json={})
        assert (answer.status_code == 401) == (path not in OPEN), (method, path)


def test_each_route_that_changes_what_is_known_takes_the_supervisor(closed: TestClient) -> None:
    """The operator looks and has parts judged."""
    refused = {
        (method, path)
        for method, path in routes(closed)
        if path != "/events"  # which never ends
        and closed.request(method, path.replace("{number}", "1"), json={}, headers={"X-Pin": "11"}).status_code == 403
    }
    changing = {(method, path) for method, path in routes(closed) if method != "GET"}
    judging = {("POST", path) for _, path in changing if path == "/predict" or path.startswith("/v2")}
    assert refused == changing - judging
    for headers in (BEARER, {"X-Pin": "22"}):
        assert closed.get("/role", headers=headers).json() == {"role": "teach"}
        assert closed.post("/mode", json={}, headers=headers).status_code == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Origin": "http://localhost", "Sec-Fetch-Site": "same-origin"}, 200),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Host": "evil.example"}, 403),
        ({"Host": "127.0.0.1:80"}, 200),
        ({"Host": "[::1]:80"}, 200),
    ],
)
def test_other_sites(headers: dict[str, str], status: int, client: TestClient) -> None:
    """What a page of another site has a browser send changes nothing, under whatever name it reaches this PC."""
    assert client.post("/mode", json={}, headers=headers).status_code == status


def test_sizes(station: Station) -> None:
    """A body that is too large is refused, also one that does not say how large it is."""
    client = TestClient(make_app(station, largest_upload=1 << 20), base_url="http://localhost")
    for content in (bytes(1 + (1 << 20)), iter([bytes(1 << 20)] * 2)):
        answer = client.post("/predict", content=content)
        assert (answer.status_code, answer.json()["error"]) == (413, "A request may bring 1 MiB.")
    assert client.post("/predict", content=bytes(1 << 20)).status_code == 400


def test_headers(client: TestClient) -> None:
    """No frame of another site shows the page, and nothing is taken for what it is not; for refusals, too."""
    for answer in (
        client.get("/"),
        client.get("/parts"),
        client.get("/parts/9"),
        client.get("/", headers={"Host": "x"}),
    ):
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["X-Frame-Options"] == "DENY"
        assert "default-src 'self'" in answer.headers["Content-Security-Policy"]


def test_loopback() -> None:
    """Addresses of this PC."""
    assert all(map(is_loopback, ("127.0.0.1", "127.9.9.9", "::1", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "192.168.0.1", "example.org", "::", "")))  # noqa: S104

# SPDX-License-Identifier: Apache-2.0
"""A station in this process, with a client; the command in a process of its own; and a browser."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient

from openvino_export.serve.app import make_app
from openvino_export.serve.station import Station

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture
def station(bundle: Path, tmp_path: Path) -> Generator[Station, None, None]:
    """Return a station that knows the stripes and keeps 20 parts."""
    station = Station(bundle, tmp_path / "station", keep=20)
    yield station
    station.close()


@pytest.fixture
def client(station: Station) -> Generator[TestClient, None, None]:
    """Return a client of it on this PC."""
    with TestClient(make_app(station), base_url="http://localhost") as client:
        yield client


class Server:
    """The command `serve` in a process of its own.

    Args:
        bundle: Folder of the bundle.
        options: Further arguments.
    """

    def __init__(self, bundle: Path, *options: object, scheme: str = "http") -> None:
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            self.port = found.getsockname()[1]
        self.url = f"{scheme}://localhost:{self.port}"
        self._command = [str(Path(sys.executable).with_name("anomalib-edge")), "serve", str(bundle)]
        self._command += ["--port", str(self.port)]
        self._command += [str(option) for option in options]
        self.start()

    def start(self) -> None:
        """Start it, and wait until it answers."""
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(self._command, stderr=subprocess.PIPE, text=True, env=environment)
        deadline = time.monotonic() + 60
        while self.process.poll() is None and time.monotonic() < deadline:
            with suppress(httpx.TransportError):
                if httpx.get(f"{self.url}/docs", verify=False).status_code:  # noqa: S501
                    return
            time.sleep(0.1)
        self.process.kill()
        pytest.fail(f"serve did not start: {self.process.communicate()[1]}")

    def end(self, number: int = signal.SIGTERM) -> int:
        """End it by a signal, and return its exit code."""
        self.process.send_signal(number)
        code = self.process.wait(30)
        assert self.process.stderr is not None
        self.said = self.process.stderr.read()
        self.process.stderr.close()
        return code


@pytest.fixture
def serve(bundle: Path, tmp_path: Path) -> Generator[Callable[..., Server], None, None]:
    """Return a function that starts a server of the bundle, which ends with the test."""
    servers: list[Server] = []

    def start(*options: object, **kwargs: Any) -> Server:  # noqa: ANN401
        servers.append(Server(bundle, "--folder", tmp_path / "station", *options, **kwargs))
        return servers[-1]

    yield start
    for server in servers:
        if server.process.poll() is None:
            server.end(signal.SIGKILL)


@pytest.fixture(scope="module")
def browser() -> Generator[Any, None, None]:
    """Return the system's Chromium without a window."""
    if not os.environ.get("CI_BROWSER"):  # where it must not be skipped, what is missing is an error
        pytest.importorskip("playwright", reason="the page is tested with the package playwright")
        if CHROMIUM is None:
            pytest.skip("the page is tested in Chromium, which is not installed")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM or "chromium", args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Any) -> Generator[Callable[..., Any], None, None]:  # noqa: ANN401
    """Return a function that opens the page of a server; what goes wrong in the page fails the test."""
    contexts, wrong = [], []

    def start(server: Any, viewport: dict[str, int] | None = None, **options: Any) -> Any:  # noqa: ANN401
        context = browser.new_context(viewport=viewport or {"width": 1280, "height": 800}, locale="en-US", **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(15_000)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto(server.url)
        return page

    yield start
    for context in contexts:
        context.close()
    assert not wrong

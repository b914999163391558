# SPDX-License-Identifier: Apache-2.0
"""Who may do what at a station, and what a request may look like."""

from __future__ import annotations

import hmac
import ipaddress
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from collections.abc import Mapping

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

# Wrong PINs after which, for so many seconds, none is looked at.
WRONG_PINS, SECONDS_LOCKED = 5, 60.0
JUDGE, TEACH = "judge", "teach"
_KEYS = ("TOKEN", "OPERATOR_PIN", "SUPERVISOR_PIN", "MQTT_USER", "MQTT_PASSWORD", "OPCUA_USER", "OPCUA_PASSWORD")
_SHORTEST_TOKEN = 16

HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob: data:; frame-ancestors 'none'; "
    "base-uri 'none'; form-action 'self'; object-src 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class RefusedError(ValueError):
    """A request that is not allowed.

    Attributes:
        status: Status of HTTP.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Secrets:
    """What opens a station and what it opens others with; any may be missing.

    Attributes:
        token: Allows everything.
        operator: PIN of those who have parts judged.
        supervisor: PIN of those who teach.
        mqtt: User and password with which the station opens a broker.
        opcua: User and password that open its OPC UA server.
    """

    token: str | None = None
    operator: str | None = None
    supervisor: str | None = None
    mqtt: tuple[str, str] | None = None
    opcua: tuple[str, str] | None = None

    @classmethod
    def from_file(cls, path: str | Path) -> Secrets:
        """Read lines such as `TOKEN=...`, `OPERATOR_PIN=...` and `SUPERVISOR_PIN=...`.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If a line is another, the token short, or a user without a password.
        """
        found = {}
        for line in Path(path).read_text(encoding="utf-8").splitlines():
            key, _, value = line.strip().partition("=")
            if not key or key.startswith("#"):
                continue
            if key not in _KEYS or not value.strip():
                msg = f"{path}: {key!r} is none of {', '.join(_KEYS)} with a value, such as TOKEN=..."
                raise ValueError(msg)
            found[key] = value.strip()
        token = found.get("TOKEN")
        if token is not None and len(token) < _SHORTEST_TOKEN:
            msg = f"{path}: TOKEN must have at least {_SHORTEST_TOKEN} characters; openssl rand -hex 16 makes one."
            raise ValueError(msg)
        pairs = []
        for user, password in (("MQTT_USER", "MQTT_PASSWORD"), ("OPCUA_USER", "OPCUA_PASSWORD")):
            if (user in found) != (password in found):
                msg = f"{path}: {user} and {password} go together."
                raise ValueError(msg)
            pairs.append((found[user], found[password]) if user in found else None)
        return cls(token, found.get("OPERATOR_PIN"), found.get("SUPERVISOR_PIN"), *pairs)


class Access:
    """Decides what a request may do.

    On the loopback address everybody may look and have parts judged; without a supervisor's PIN everybody may teach.
    With a token nothing is allowed without it, or a PIN.

    Args:
        secrets: The token and PINs.
    """

    def __init__(self, secrets: Secrets) -> None:
        self._secrets = secrets
        self._lock = threading.Lock()
        self._wrong: list[float] = []

    def role(self, headers: Mapping[str, str]) -> str | None:
        """What a request may do: `teach`, `judge` or nothing.

        Args:
            headers: `Authorization: Bearer TOKEN`, or `X-Pin`.

        Raises:
            RefusedError: If a token or PIN is wrong, or too many were.
        """
        secrets = self._secrets
        scheme, _, token = headers.get("authorization", "").partition(" ")
        if secrets.token is not None and scheme.lower() == "bearer":
            if not _same(token.strip(), secrets.token):
                raise RefusedError(401, "The token is wrong.")
            return TEACH
        pin = headers.get("x-pin")
        if pin is not None and (secrets.operator or secrets.supervisor):
            return self._role_of_pin(pin)
        if secrets.token is not None:
            return None
        if secrets.supervisor is not None:
            return None if secrets.operator is not None else JUDGE
        return TEACH

    def check(self, headers: Mapping[str, str], role: str) -> None:
        """Refuse a request that may not do what takes a role.

        Raises:
            RefusedError: If it may not.
        """
        own = self.role(headers)
        if own is None:
            raise RefusedError(401, "A token or a PIN is needed: header Authorization: Bearer TOKEN, or X-Pin.")
        if role == TEACH and own != TEACH:
            raise RefusedError(403, "This takes the supervisor's PIN.")

    def _role_of_pin(self, pin: str) -> str:
        with self._lock:
            now = time.monotonic()
            self._wrong = [when for when in self._wrong if when > now - SECONDS_LOCKED]
            if len(self._wrong) >= WRONG_PINS:
                raise RefusedError(429, f"Too many wrong PINs. Wait {SECONDS_LOCKED:.0f} seconds.")
            if _same(pin, self._secrets.supervisor):
                return TEACH
            if _same(pin, self._secrets.operator):
                return JUDGE
            self._wrong.append(now)
            raise RefusedError(401, "The PIN is wrong.")


def _same(given: str, secret: str | None) -> bool:
    return secret is not None and hmac.compare_digest(given.encode(), secret.encode())


def is_loopback(host: str) -> bool:
    """Whether only this PC reaches an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_origin(method: str, headers: Mapping[str, str], *, only_loopback: bool) -> None:
    """Refuse what a page of another site has a browser send.

    Args:
        method: Method of HTTP.
        headers: The request's.
        only_loopback: Whether the station can be reached by names of this PC alone.

    Raises:
        RefusedError: If it comes from another site.
    """
    host = headers.get("host", "")
    name = urlsplit(f"//{host}").hostname or ""
    if only_loopback and not is_loopback(name):
        raise RefusedError(403, f"This station is not called {name!r}; use localhost.")
    if method in {"GET", "HEAD", "OPTIONS"}:
        return
    origin = headers.get("origin")
    if headers.get("sec-fetch-site", "none") not in {"none", "same-origin"} or (
        origin is not None and urlsplit(origin).netloc != host
    ):
        raise RefusedError(403, "Requests from other sites change nothing here.")


class Guard:
    """Outermost layer of the application: origin, size of the body, and headers of the answer.

    Args:
        app: The application.
        largest_body: Bytes that a request may bring.
        only_loopback: Whether the station can be reached by names of this PC alone.
    """

    def __init__(self, app: ASGIApp, largest_body: int, only_loopback: bool) -> None:
        self._app, self._largest, self._only_loopback = app, largest_body, only_loopback

    def _check_size(self, size: int) -> None:
        if size > self._largest:
            raise RefusedError(413, f"A request may bring {self._largest >> 20} MiB.")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        from starlette.datastructures import Headers, MutableHeaders
        from starlette.responses import JSONResponse

        headers, received, started = Headers(scope=scope), 0, False

        async def count() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            self._check_size(received)
            return message

        async def answer(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                own = MutableHeaders(scope=message)
                for key, value in HEADERS.items():
                    own.setdefault(key, value)
            await send(message)

        try:
            check_origin(scope["method"], headers, only_loopback=self._only_loopback)
            length = headers.get("content-length", "0")
            self._check_size(int(length) if length.isdigit() else self._largest + 1)
            await self._app(scope, count, answer)
        except RefusedError as error:
            if started:
                raise
            response: Any = JSONResponse({"error": str(error)}, error.status, {"Connection": "close"})
            await response(scope, receive, answer)

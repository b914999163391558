# SPDX-License-Identifier: Apache-2.0
"""A station as an OPC UA server: the last verdict, counters and mode; methods, if that is switched on.

It runs on a thread of its own and shows how the station is, not each event: of two verdicts that follow quickly, it may
show the second alone. The counters miss none.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import socket
from collections import Counter
from datetime import datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from asyncua import Server, ua, uamethod
from asyncua.crypto.cert_gen import setup_self_signed_certificate
from asyncua.crypto.permission_rules import User, UserRole
from asyncua.sync import ThreadLoop
from cryptography.x509.oid import ExtendedKeyUsageOID

from .access import is_loopback
from .commands import run_command

if TYPE_CHECKING:
    from pathlib import Path

    from asyncua import Node

    from .station import Station

NAMESPACE = "urn:anomalib-edge"
_LABELS = {True: "anomalous", False: "good", None: "undecided"}
# Variables of the object, in the order in which they are written: who waits for a new Id finds the rest there.
VARIABLES = {
    "Label": ua.VariantType.String,
    "Score": ua.VariantType.Double,
    "Variant": ua.VariantType.String,
    "Part": ua.VariantType.String,
    "Time": ua.VariantType.DateTime,
    "Good": ua.VariantType.Int64,
    "Anomalous": ua.VariantType.Int64,
    "Undecided": ua.VariantType.Int64,
    "Paused": ua.VariantType.Boolean,
    "LearningAs": ua.VariantType.String,
    "Id": ua.VariantType.Int64,
}


class _Users:
    """Lets in those with the right user and password, or everybody if there is none; nobody as an administrator."""

    def __init__(self, login: tuple[str, str] | None) -> None:
        self._login = login

    def get_user(
        self,
        iserver: Any,  # noqa: ANN401
        username: str | None = None,
        password: str | None = None,
        certificate: Any = None,  # noqa: ANN401
    ) -> User | None:
        """The user, None if he is not let in."""
        del iserver, certificate
        if self._login is not None:
            given = ((username or "").encode(), (password or "").encode())
            same = [hmac.compare_digest(a, b.encode()) for a, b in zip(given, self._login, strict=True)]
            if not all(same):
                return None
        return User(UserRole.User, username)


class OpcUaServer:
    """Shows a station until it is closed.

    On the loopback address everybody may look, without encryption. On another, a user is needed, and all is encrypted
    by a certificate that the server makes for itself.

    Args:
        station: What is shown.
        url: Such as `opc.tcp://127.0.0.1:4840`.
        folder: Where key and certificate are kept; made if need be.
        login: User and password that clients must give.
        methods: Whether there are the methods Learn, Undo and Pause.

    Raises:
        ValueError: If the address cannot be used, or needs a user and there is none.
        OSError: If nothing can listen there.
    """

    def __init__(
        self,
        station: Station,
        url: str,
        folder: Path,
        login: tuple[str, str] | None = None,
        *,
        methods: bool = False,
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme != "opc.tcp" or not parts.hostname or parts.port is None:
            msg = f"The OPC UA server is given as opc.tcp://HOST:PORT, got {url!r}."
            raise ValueError(msg)
        self._is_open = is_loopback(parts.hostname)
        if not self._is_open and login is None:
            msg = (
                f"Other PCs reach {parts.hostname}, so a user is needed: give --secrets a file with lines "
                "OPCUA_USER=... and OPCUA_PASSWORD=..."
            )
            raise ValueError(msg)
        self._station, self._login, self._methods = station, login, methods
        self._uri = f"urn:{socket.gethostname()}:anomalib-edge"
        self._last: dict[str, Any] = {}
        self._changed = asyncio.Event()
        # What it says of clients that fail is much, and what it says of itself is raised.
        logging.getLogger("asyncua").setLevel(logging.CRITICAL)
        self._loop = ThreadLoop(timeout=None)
        self._loop.daemon = True
        self._loop.start()
        try:
            self._loop.post(self._start(url, folder))
        except BaseException:
            self._loop.stop()
            raise
        self._end_listening = station.listen(self._on_event)

    def close(self) -> None:
        """End."""
        self._end_listening()
        self._loop.post(self._stop())
        self._loop.stop()

    async def _start(self, url: str, folder: Path) -> None:
        self._server = Server(user_manager=_Users(self._login))  # type: ignore[arg-type]
        await self._server.init()
        self._server.set_endpoint(url)
        self._server.set_server_name("anomalib-edge")
        await self._server.set_application_uri(self._uri)
        self._server.set_identity_tokens([ua.UserNameIdentityToken if self._login else ua.AnonymousIdentityToken])
        self._server.set_security_policy([ua.SecurityPolicyType.NoSecurity])
        if not self._is_open:
            await self._encrypt(folder)
        index = await self._server.register_namespace(NAMESPACE)
        station = await self._server.nodes.objects.add_object(_node_id(index, "Station"), f"{index}:Station")
        self._nodes: dict[str, Node] = {}
        for name, kind in VARIABLES.items():
            node = _node_id(index, f"Station.{name}")
            empty = ua.Variant(ua.get_default_value(kind), kind)
            self._nodes[name] = await station.add_variable(node, f"{index}:{name}", empty)
        if self._methods:
            await self._add_methods(station, index)
        await self._show()
        await self._server.start()
        self._shows = asyncio.get_running_loop().create_task(self._show_changes())

    async def _stop(self) -> None:
        self._shows.cancel()
        await self._server.stop()

    async def _encrypt(self, folder: Path) -> None:
        """Have clients encrypt; the certificate is made anew when it has expired."""
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        key, certificate = folder / "key.pem", folder / "certificate.der"
        names = {"commonName": "anomalib-edge"}
        host, use = socket.gethostname(), [ExtendedKeyUsageOID.SERVER_AUTH]
        await setup_self_signed_certificate(key, certificate, self._uri, host, use, names)
        await self._server.load_certificate(certificate)
        await self._server.load_private_key(key)
        self._server.set_security_policy([
            ua.SecurityPolicyType.Basic256Sha256_SignAndEncrypt,
            ua.SecurityPolicyType.Aes256Sha256RsaPss_SignAndEncrypt,
        ])

    async def _add_methods(self, station: Node, index: int) -> None:
        """Each returns whether it was done, and what there is to say."""

        # They run on threads of their own.
        @uamethod
        def learn(_: Any, number: int, verdict: str, confirm: bool) -> tuple[bool, str]:  # noqa: ANN401
            content = {"id": number, "verdict": verdict, "confirm": confirm}
            return run_command(self._station, "learn", content, "OPC UA")

        @uamethod
        def undo(_: Any) -> tuple[bool, str]:  # noqa: ANN401
            return run_command(self._station, "undo", {}, "OPC UA")

        @uamethod
        def pause(_: Any, paused: bool) -> tuple[bool, str]:  # noqa: ANN401
            return run_command(self._station, "pause", {"paused": paused}, "OPC UA")

        taught = [_argument("Id", "Int64"), _argument("Verdict", "String"), _argument("Confirm", "Boolean")]
        answer = [_argument("Done", "Boolean"), _argument("Message", "String")]
        for name, method, inputs in (
            ("Learn", learn, taught),
            ("Undo", undo, []),
            ("Pause", pause, [_argument("Paused", "Boolean")]),
        ):
            await station.add_method(_node_id(index, f"Station.{name}"), f"{index}:{name}", method, inputs, answer)

    def _on_event(self, event: dict[str, Any]) -> None:
        """Note that something has happened, on whose thread it may be."""
        if event["event"] == "verdict":
            self._last = event
        assert self._loop.loop is not None
        self._loop.loop.call_soon_threadsafe(self._changed.set)

    async def _show_changes(self) -> None:
        while True:
            await self._changed.wait()
            self._changed.clear()
            await self._show()

    async def _show(self) -> None:
        """Write how the station is."""
        counts: Counter[str] = Counter()
        for (_, label), count in list(self._station.verdicts.items()):
            counts[label] += count
        mode, last = self._station.mode(), self._last
        values: dict[str, Any] = {"Good": counts["good"], "Anomalous": counts["anomalous"]}
        values |= {"Undecided": counts["undecided"], "Paused": mode["paused"], "LearningAs": mode["learning_as"] or ""}
        if last:
            values |= {
                "Label": _LABELS[last["pred_label"]],
                "Score": last["pred_score"],
                "Variant": last["variant"] or "",
            }
            values |= {"Part": last["part"] or "", "Time": datetime.fromisoformat(last["time"]), "Id": last["id"]}
        for name in VARIABLES:
            if name in values:
                await self._nodes[name].write_value(ua.Variant(values[name], VARIABLES[name]))


def _node_id(index: int, name: str) -> ua.NodeId:
    return ua.NodeId.from_string(f"ns={index};s={name}")


def _argument(name: str, kind: str) -> ua.Argument:
    return ua.Argument(Name=name, DataType=ua.NodeId(getattr(ua.ObjectIds, kind)), ValueRank=-1)

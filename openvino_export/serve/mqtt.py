# SPDX-License-Identifier: Apache-2.0
"""A station over MQTT: its events as JSON, one topic each; commands, if that is switched on.

The thread of the client sends and reconnects, so that judging never waits for the broker.
"""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path
from queue import Full, Queue
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from uuid import uuid4

from paho.mqtt.client import Client, MQTTErrorCode
from paho.mqtt.enums import CallbackAPIVersion
from pydantic_core import from_json

from .commands import COMMANDS, run_command

if TYPE_CHECKING:
    from .station import Station

PORTS = {"mqtt": 1883, "mqtts": 8883}
# Messages that wait while the broker is away; later ones are lost.
WAITING = 1000
# Commands that wait, and the bytes of one.
_COMMANDS, _LONGEST = 16, 4096
# Seconds: between signs of life, between tries to connect at most, and to say goodbye.
_ALIVE, _PAUSE, _GOODBYE = 20, 10, 2.0


class MqttLink:
    """Tells a broker what happens at a station, until it is closed.

    `<prefix>/status` is `online` or, also by last will, `offline`. Each event has the topic `<prefix>/<event>`, such as
    `<prefix>/verdict`. Commands come as JSON on `<prefix>/command/learn`, `undo` and `pause`; `<prefix>/answer` says
    what became of them.

    Args:
        station: What is told of.
        url: Such as `mqtt://host:1883/line1`, or `mqtts://` for TLS; the path is the prefix.
        login: User and password.
        authority: File of certificates that the broker's must be signed by; those of the system by default.
        commands: Whether commands are taken.

    Raises:
        ValueError: If the address or the certificates cannot be used. A broker that is away is waited for.
        FileNotFoundError: If there is no such file of certificates.
    """

    def __init__(
        self,
        station: Station,
        url: str,
        login: tuple[str, str] | None = None,
        authority: str | None = None,
        *,
        commands: bool = False,
    ) -> None:
        scheme, host, port, self._prefix = read_url(url)
        self._station, self._broker, self._takes_commands = station, f"{host}:{port}", commands
        self._told, self._lost = "", 0
        self._commands: Queue[tuple[str, bytes] | None] = Queue(_COMMANDS)
        self._worker = threading.Thread(target=self._work, name="mqtt commands", daemon=True)
        self._client = Client(CallbackAPIVersion.VERSION2, f"anomalib-edge-{uuid4().hex[:8]}")
        self._client.max_queued_messages = WAITING
        self._client.reconnect_delay_set(1, _PAUSE)
        self._client.will_set(f"{self._prefix}/status", "offline", qos=1, retain=True)
        if login is not None:
            self._client.username_pw_set(*login)
        if scheme == "mqtts":
            self._use_tls(authority)
        elif authority is not None:
            msg = f"Certificates are for mqtts://, the address is {url}."
            raise ValueError(msg)
        self._client.on_connect = self._on_connect
        self._client.on_connect_fail = self._on_connect_fail
        self._client.on_disconnect = self._on_disconnect
        self._client.on_message = self._on_message
        self._client.connect_async(host, port, _ALIVE)
        self._end_listening = station.listen(self._on_event)
        self._worker.start()
        self._client.loop_start()

    def _use_tls(self, authority: str | None) -> None:
        if authority is not None:
            Path(authority).read_bytes()  # whose error names the file
        try:
            self._client.tls_set(authority)
        except OSError as error:
            msg = f"{authority} holds no certificates in PEM format: {error}"
            raise ValueError(msg) from error

    def close(self) -> None:
        """Say goodbye, and end when the commands that wait are done. What the broker has not taken by then is lost."""
        self._end_listening()
        self._commands.put(None)
        self._worker.join()
        is_there = self._client.is_connected()
        if is_there:
            goodbye = self._client.publish(f"{self._prefix}/status", "offline", retain=True)
            goodbye.wait_for_publish(_GOODBYE)
            is_there = goodbye.is_published()
        self._client.disconnect()
        if is_there:  # its thread would wait for a broker that hangs
            self._client.loop_stop()

    # To the broker

    def _on_event(self, event: dict[str, Any]) -> None:
        content = dict(event)
        self._publish(content.pop("event"), content)

    def _publish(self, topic: str, content: dict[str, Any]) -> None:
        """Send a message, or have it wait for the broker."""
        sent = self._client.publish(f"{self._prefix}/{topic}", json.dumps(content), qos=1, retain=topic == "mode")
        if sent.rc == MQTTErrorCode.MQTT_ERR_QUEUE_SIZE:
            self._lost += 1
            self._tell(f"{WAITING} messages wait, so further ones are lost until it takes them.")

    def _tell(self, message: str) -> None:
        """Say something about the broker on stderr, once."""
        if message != self._told:
            self._told = message
            print(f"MQTT broker {self._broker}: {message}", file=sys.stderr, flush=True)

    def _on_connect(self, client: Client, _: Any, __: Any, reason: Any, ___: Any) -> None:  # noqa: ANN401
        if reason.is_failure:
            self._tell(f"it refuses: {reason}. See MQTT_USER and MQTT_PASSWORD in the file of secrets.")
            return
        self._tell(f"connected; {self._lost} messages were lost." if self._lost else "connected.")
        self._lost = 0
        if self._takes_commands:  # before it is said to be online, so that no command is missed from then on
            client.subscribe(f"{self._prefix}/command/+", qos=1)
        # Without the queue, which may be full.
        client.publish(f"{self._prefix}/status", "online", retain=True)
        client.publish(f"{self._prefix}/mode", json.dumps(self._station.mode()), retain=True)

    def _on_connect_fail(self, _: Client, __: Any) -> None:  # noqa: ANN401
        self._tell(f"it cannot be reached, and is tried again: {sys.exc_info()[1]}.")

    def _on_disconnect(self, _: Client, __: Any, ___: Any, reason: Any, ____: Any) -> None:  # noqa: ANN401
        if reason.is_failure:
            self._tell(f"the connection is lost ({reason}), and is made anew.")

    # From the broker

    def _on_message(self, _: Client, __: Any, message: Any) -> None:  # noqa: ANN401
        """Have a command wait for its thread, so that the connection is kept up meanwhile."""
        name = message.topic.rpartition("/")[2]
        if message.retain:
            self._answer(name, done=False, message="A retained message would command again and again.")
        elif name not in COMMANDS:
            self._answer(name, done=False, message=f"It is none of {', '.join(COMMANDS)}.")
        elif len(message.payload) > _LONGEST:
            self._answer(name, done=False, message=f"It has more than {_LONGEST} bytes.")
        else:
            try:
                self._commands.put_nowait((name, message.payload))
            except Full:
                self._answer(name, done=False, message="Too many commands wait. Try again.")

    def _work(self) -> None:
        for name, payload in iter(self._commands.get, None):
            try:
                content = from_json(payload or b"{}")
            except ValueError as error:
                self._answer(name, done=False, message=f"It is no JSON: {error}")
                continue
            done, message = run_command(self._station, name, content, "MQTT")
            self._answer(name, done=done, message=message)

    def _answer(self, command: str, *, done: bool, message: str) -> None:
        self._publish("answer", {"command": command, "done": done, "message": message})


def read_url(url: str) -> tuple[str, str, int, str]:
    """Scheme, host, port and prefix of topics of an address such as `mqtt://host:1883/line1`.

    Raises:
        ValueError: If it is none.
    """
    msg = f"The broker is given as mqtt://HOST:PORT/PREFIX or mqtts://HOST:PORT/PREFIX, got {url!r}."
    try:
        parts = urlsplit(url)
        port = parts.port or PORTS[parts.scheme]
    except (KeyError, ValueError) as error:
        raise ValueError(msg) from error
    if parts.password is not None or parts.username is not None:
        msg = "User and password of the broker belong in the file of secrets: MQTT_USER=... and MQTT_PASSWORD=..."
        raise ValueError(msg)
    if not parts.hostname or parts.query or parts.fragment or set(parts.path) & {"+", "#"}:
        raise ValueError(msg)
    return parts.scheme, parts.hostname, port, parts.path.strip("/") or "anomalib-edge"

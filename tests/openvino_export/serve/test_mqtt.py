# SPDX-License-Identifier: Apache-2.0
"""A station at a real broker."""

import json
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Generator
from contextlib import suppress
from pathlib import Path
from queue import Empty, Queue
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from paho.mqtt.client import Client
from paho.mqtt.enums import CallbackAPIVersion

from openvino_export.serve import mqtt
from openvino_export.serve.mqtt import MqttLink, read_url
from openvino_export.serve.station import Station

MOSQUITTO = shutil.which("mosquitto", path=f"{os.environ['PATH']}:/usr/sbin")
pytestmark = pytest.mark.skipif(
    MOSQUITTO is None and not os.environ.get("CI_BROKER"), reason="there is no mosquitto: apt-get install mosquitto"
)
GOODBYE = 5.0


class Broker:
    """A mosquitto of this PC alone.

    Args:
        folder: For its configuration.
        lines: Further lines of it.
    """

    def __init__(self, folder: Path, *lines: str) -> None:
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            self.port = found.getsockname()[1]
        self._config = folder / f"mosquitto_{self.port}.conf"
        # As root it would become another user, who may not read these folders.
        self._config.write_text(f"listener {self.port} 127.0.0.1\nuser root\n" + "\n".join(lines) + "\n")
        self.url = f"mqtt://127.0.0.1:{self.port}/line1"
        self.start()

    def start(self) -> None:
        """Start it, and wait until it listens."""
        self.process = subprocess.Popen([str(MOSQUITTO), "-c", self._config], stderr=subprocess.DEVNULL)
        for _ in range(100):
            with suppress(OSError), socket.create_connection(("127.0.0.1", self.port)):
                return
            time.sleep(0.05)
        pytest.fail("mosquitto did not start")

    def end(self) -> None:
        """End it."""
        self.process.kill()
        self.process.wait()


class Machine:
    """Another client of the broker, which hears all that is said below `line1`."""

    def __init__(self, broker: Broker) -> None:
        self._heard: Queue[Any] = Queue()
        self.client = Client(CallbackAPIVersion.VERSION2)
        self.client.on_message = lambda _, __, message: self._heard.put((
            message.topic,
            message.payload,
            message.retain,
        ))
        self.client.on_connect = lambda client, *_: client.subscribe("line1/#", qos=1)
        self.client.connect("127.0.0.1", broker.port)
        self.client.loop_start()

    def hear(self, name: str) -> tuple[bytes, bool]:
        """Wait for the next message of a topic, and return it and whether it was retained."""
        while True:
            topic, payload, retained = self._heard.get(timeout=20)
            if topic == f"line1/{name}":
                return payload, retained

    def status(self, wanted: bytes) -> None:
        """Wait for a status."""
        while self.hear("status")[0] != wanted:
            pass

    def json(self, name: str) -> dict[str, Any]:
        """Wait for the next message of a topic, and return what it says."""
        return json.loads(self.hear(name)[0])

    def hears_nothing(self, name: str, seconds: float = 0.5) -> bool:
        """Whether no message of a topic comes for a time."""
        end = time.monotonic() + seconds
        with suppress(Empty):
            while True:
                topic, _, _ = self._heard.get(timeout=max(0.0, end - time.monotonic()))
                if topic == f"line1/{name}":
                    return False
        return True

    def command(self, name: str, content: object, *, retain: bool = False) -> dict[str, Any]:
        """Send a command, as JSON or as it is, and return the answer."""
        payload = content if isinstance(content, bytes) else json.dumps(content)
        self.client.publish(f"line1/command/{name}", payload, qos=1, retain=retain)
        return self.json("answer")


@pytest.fixture
def broker(tmp_path: Path) -> Generator[Broker, None, None]:
    """Return a broker that everybody may use."""
    broker = Broker(tmp_path, "allow_anonymous true")
    yield broker
    broker.end()


@pytest.fixture
def machine(broker: Broker) -> Generator[Machine, None, None]:
    """Return another client of it."""
    machine = Machine(broker)
    yield machine
    machine.client.disconnect()
    machine.client.loop_stop()


@pytest.fixture
def link(station: Station, broker: Broker) -> Generator[Callable[..., MqttLink], None, None]:
    """Return a function that links the station to the broker, until the test ends."""
    links: list[MqttLink] = []

    def make(**options: Any) -> MqttLink:  # noqa: ANN401
        links.append(MqttLink(station, broker.url, **options))
        return links[-1]

    yield make
    for each in links:
        each.close()


@pytest.fixture
def parts(products: Path) -> list[bytes]:
    """Return a good part and a bad one."""
    return [(products / "stripes" / "test" / kind / "000.png").read_bytes() for kind in ("good", "hole")]


def test_events(station: Station, broker: Broker, machine: Machine, parts: list[bytes]) -> None:
    """Each event is told; status and mode are kept for those who come later."""
    link = MqttLink(station, broker.url)
    machine.status(b"online")
    verdicts = [station.judge(part, f"A{number}") for number, part in enumerate(parts)]
    assert [machine.json("verdict") for _ in parts] == verdicts
    assert [verdict["pred_label"] for verdict in verdicts] == [False, True]
    with pytest.raises(ValueError, match="The image"):
        station.judge(b"no image", "A2")
    undecided = machine.json("undecided")
    assert undecided["part"] == "A2"
    assert "The image" in undecided["error"]
    teaching, _ = station.feedback(verdicts[1]["id"], "good", "Ann", confirm=True)
    assert teaching
    taught = machine.json("taught")
    assert (taught["number"], taught["who"]) == (teaching.number, "Ann")
    assert taught["variants"]["stripes"]["images"] == 21
    station.undo("Ben")
    assert machine.json("undone")["number"] == teaching.number
    station.pause(paused=True)
    assert machine.json("mode") == {"paused": True, "learning_as": None}
    late = Machine(broker)
    assert late.hear("mode") == (b'{"paused": true, "learning_as": null}', True)
    link.close()
    machine.status(b"offline")
    station.pause(paused=False)  # which nobody is told
    assert machine.hears_nothing("mode")


def test_broker_restarts(
    station: Station,
    broker: Broker,
    link: Callable[..., MqttLink],
    parts: list[bytes],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What is judged meanwhile waits for it, up to a number, and judging does not."""
    monkeypatch.setattr(mqtt, "WAITING", 30)
    monkeypatch.setattr(mqtt, "_PAUSE", 1)
    broker.end()
    link()
    verdicts = [station.judge(parts[0]) for _ in range(33)]
    broker.start()
    machine = Machine(broker)
    machine.status(b"online")
    assert [machine.json("verdict") for _ in range(30)] == verdicts[:30]
    verdict = station.judge(parts[0])
    assert machine.json("verdict") == verdict
    said = capsys.readouterr().err
    assert "cannot be reached, and is tried again" in said
    assert "30 messages wait" in said
    assert "connected; 3 messages were lost." in said
    broker.end()
    broker.start()
    machine.status(b"online")


def test_broker_hangs(station: Station, broker: Broker, parts: list[bytes]) -> None:
    """Neither judging nor the end waits for it."""
    link = MqttLink(station, broker.url)
    Machine(broker).status(b"online")
    broker.process.send_signal(signal.SIGSTOP)
    for _ in range(50):
        station.judge(parts[0])
    start = time.monotonic()
    link.close()
    assert time.monotonic() - start < GOODBYE


def test_last_will(serve: Callable[..., Any], broker: Broker, machine: Machine, parts: list[bytes]) -> None:
    """The command tells its verdicts; when it is killed, everybody knows."""
    server = serve("--mqtt", broker.url)
    machine.status(b"online")
    verdict = httpx.post(f"{server.url}/predict", content=parts[1]).json()
    assert machine.json("verdict") == verdict
    assert verdict["pred_label"]
    server.end(signal.SIGKILL)
    machine.status(b"offline")


def test_no_commands(station: Station, machine: Machine, link: Callable[..., MqttLink]) -> None:
    """Unless that is switched on."""
    link()
    machine.status(b"online")
    machine.client.publish("line1/command/pause", '{"paused": true}', qos=1)
    assert machine.hears_nothing("answer")
    assert not station.paused


def test_commands(station: Station, machine: Machine, link: Callable[..., MqttLink], parts: list[bytes]) -> None:
    """They teach, take back and pause; the answer says what became of them."""
    link(commands=True)
    machine.status(b"online")
    verdict = station.judge(parts[1])
    learning = {"id": verdict["id"], "verdict": "good"}
    answer = machine.command("learn", learning)
    assert (answer["command"], answer["done"]) == ("learn", False)
    assert "times the threshold" in answer["message"]
    assert machine.command("learn", {**learning, "confirm": True})["done"]
    assert not station.judge(parts[1])["pred_label"]
    assert machine.command("learn", {**learning, "confirm": True})["message"] == "The image is known."
    assert [line["who"] for line in station.teacher.history(1)] == ["MQTT"]
    number = station.teacher.teachings[-1].number
    assert machine.command("undo", b"")["message"] == f"Teaching {number} is taken back."
    assert station.judge(parts[1])["pred_label"]
    assert not machine.command("undo", {"number": number})["done"]
    assert machine.command("pause", {"paused": True}) == {"command": "pause", "done": True, "message": ""}
    assert station.paused


MALFORMED = {
    "no JSON": ("learn", b"{"),
    "no text": ("learn", b"\xff\x00"),
    "nested": ("learn", b"[" * 4000),
    "a list": ("learn", [1]),
    "nothing": ("learn", b""),
    "no such part": ("learn", {"id": 10**6, "verdict": "good"}),
    "a number too large": ("learn", {"id": 10**400, "verdict": "good"}),
    "a third verdict": ("learn", {"id": 1, "verdict": "so-so"}),
    "no box": ("learn", {"id": 1, "verdict": "defective", "box": [5, 5, 1, 1]}),
    "misspelled": ("pause", {"pause": True}),
    "empty": ("pause", b""),
    "too long": ("pause", {"paused": True, "why": 5000 * "."}),
    "unknown": ("format", {}),
    "nothing to take back": ("undo", {}),
}


def test_malformed_commands(
    station: Station, machine: Machine, link: Callable[..., MqttLink], parts: list[bytes]
) -> None:
    """They are refused and do no harm; nor does one that the broker would repeat."""
    link(commands=True)
    machine.status(b"online")
    station.judge(parts[0])
    for name, (command, content) in MALFORMED.items():
        answer = machine.command(command, content)
        assert answer["command"] == command, name
        assert answer["message"], name
        assert not answer["done"], name
    machine.client.publish("line1/command/pause", '{"paused": true}', qos=1, retain=True)
    assert machine.json("answer")["done"]  # for those who are there, it is not retained
    station.pause(paused=False)
    link(commands=True)
    assert "again and again" in machine.json("answer")["message"]
    assert not station.paused
    assert not station.teacher.teachings
    assert machine.command("pause", {"paused": True})["done"]


def test_many_commands(
    station: Station, machine: Machine, link: Callable[..., MqttLink], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that wait are bounded."""
    go_on = threading.Event()

    def undo(*_: Any) -> SimpleNamespace:  # noqa: ANN401
        go_on.wait(30)
        return SimpleNamespace(number=1)

    monkeypatch.setattr(mqtt, "_COMMANDS", 2)
    monkeypatch.setattr(station, "undo", undo)
    link(commands=True)
    machine.status(b"online")
    for _ in range(6):
        machine.client.publish("line1/command/undo", "{}", qos=1)
    assert [machine.json("answer")["message"] for _ in range(3)] == 3 * ["Too many commands wait. Try again."]
    go_on.set()


def test_encrypted(station: Station, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Certificate and password must be right; what is wrong is said."""
    certificate, key, passwords = (tmp_path / name for name in ("ca.pem", "key.pem", "passwords"))
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    files = ["-keyout", str(key), "-out", str(certificate)]
    command = ["openssl", "req", "-x509", "-nodes", "-newkey", "rsa:2048", *files, *subject]
    subprocess.run(command, check=True, capture_output=True)
    subprocess.run(["mosquitto_passwd", "-b", "-c", str(passwords), "line", "right"], check=True)
    broker = Broker(tmp_path, f"certfile {certificate}", f"keyfile {key}", f"password_file {passwords}")
    url = f"mqtts://localhost:{broker.port}/line1"
    for login, authority, expected in (
        (("line", "right"), str(certificate), "connected."),
        (("line", "wrong"), str(certificate), "it refuses: Not authorized. See MQTT_USER"),
        (("line", "right"), None, "CERTIFICATE_VERIFY_FAILED"),
    ):
        linked = MqttLink(station, url, login, authority)
        said, end = "", time.monotonic() + 20
        while expected not in said and time.monotonic() < end:
            time.sleep(0.05)
            said += capsys.readouterr().err
        linked.close()
        assert expected in said
    broker.end()
    with pytest.raises(FileNotFoundError, match=r"missing\.pem"):
        MqttLink(station, url, None, str(tmp_path / "missing.pem"))
    with pytest.raises(ValueError, match="no certificates in PEM"):
        MqttLink(station, url, None, str(passwords))
    with pytest.raises(ValueError, match="Certificates are for mqtts"):
        MqttLink(station, url.replace("mqtts", "mqtt"), None, str(certificate))


def test_addresses() -> None:
    """Port and prefix may be left out; what cannot be meant is refused."""
    assert read_url("mqtt://broker") == ("mqtt", "broker", 1883, "anomalib-edge")
    assert read_url("mqtts://broker:9883/plant/line1/") == ("mqtts", "broker", 9883, "plant/line1")
    for url in ("broker", "http://broker", "mqtt://", "mqtt://broker:x", "mqtt://broker/a/+", "mqtt://broker/a#b"):
        with pytest.raises(ValueError, match="mqtt://HOST:PORT/PREFIX"):
            read_url(url)
    with pytest.raises(ValueError, match="belong in the file of secrets"):
        read_url("mqtt://line:right@broker")

# SPDX-License-Identifier: Apache-2.0
"""A station as a server for a client of OPC UA."""

import asyncio
import socket
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import httpx
import pytest
from asyncua import ua
from asyncua.crypto.cert_gen import setup_self_signed_certificate
from asyncua.sync import Client
from cryptography.x509.oid import ExtendedKeyUsageOID

from openvino_export.serve.opcua import NAMESPACE, OpcUaServer
from openvino_export.serve.station import Station


def free_url(host: str = "127.0.0.1") -> str:
    """Return an address that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return f"opc.tcp://{host}:{found.getsockname()[1]}"


def assert_refused(client: Client) -> None:
    """See that a client cannot connect."""
    with pytest.raises(ua.UaError):
        client.connect()
    client.tloop.stop()


class Plc:
    """A client that is connected.

    Args:
        client: The client.
    """

    def __init__(self, client: Client) -> None:
        self._client = client
        self.index = client.get_namespace_index(NAMESPACE)

    def node(self, name: str) -> Any:  # noqa: ANN401
        """Return a node of the station."""
        return self._client.get_node(f"ns={self.index};s=Station.{name}")

    def read(self, *names: str) -> list[Any]:
        """Return values of variables."""
        return [self.node(name).read_value() for name in names]

    def wait(self, name: str, value: object) -> None:
        """Wait until a variable has a value."""
        for _ in range(100):
            if self.node(name).read_value() == value:
                return
            time.sleep(0.05)
        pytest.fail(f"{name} is {self.node(name).read_value()}, not {value}")

    def call(self, name: str, *arguments: object) -> list[Any]:
        """Call a method, and return whether it was done, and what was said."""
        station = self._client.get_node(f"ns={self.index};s=Station")
        return station.call_method(f"{self.index}:{name}", *arguments)

    def learn(self, number: int, verdict: str, *, confirm: bool = False) -> list[Any]:
        """Call the method that teaches."""
        return self.call("Learn", ua.Variant(number, ua.VariantType.Int64), verdict, confirm)


@pytest.fixture
def plc(station: Station, tmp_path: Path) -> Generator[Plc, None, None]:
    """Return a client of a server with methods, on this PC."""
    url = free_url()
    server = OpcUaServer(station, url, tmp_path / "opcua", methods=True)
    with Client(url) as client:
        yield Plc(client)
    server.close()


def test_station(plc: Plc, station: Station, products: Path) -> None:
    """It shows the last verdict, counts, and the mode; it is taught, takes back, and pauses."""
    good, bad = ((products / "stripes" / "test" / kind / "000.png").read_bytes() for kind in ("good", "hole"))
    assert plc.read("Id", "Label", "Good", "Anomalous", "Undecided", "Paused") == [0, None, 0, 0, 0, False]
    station.judge(good, "A1")
    verdict = station.judge(bad, "A2")
    plc.wait("Id", verdict["id"])
    assert plc.read("Label", "Score", "Variant", "Part") == ["anomalous", verdict["pred_score"], "stripes", "A2"]
    assert plc.read("Time")[0].isoformat(timespec="milliseconds") == verdict["time"]
    assert plc.read("Good", "Anomalous", "Undecided") == [1, 1, 0]
    with pytest.raises(ValueError, match="The image"):
        station.judge(b"no image")
    plc.wait("Undecided", 1)
    assert plc.read("Id") == [verdict["id"]]
    with pytest.raises(ua.UaStatusCodeError):  # nobody writes
        plc.node("Good").write_value(5, ua.VariantType.Int64)

    done, message = plc.learn(verdict["id"], "good")
    assert not done
    assert "times the threshold" in message
    assert plc.learn(verdict["id"], "good", confirm=True)[0]
    assert not station.judge(bad)["pred_label"]
    assert station.teacher.history(1)[0]["who"] == "OPC UA"
    assert plc.call("Undo")[0]
    assert station.judge(bad)["pred_label"]
    assert not plc.call("Undo")[0]
    assert plc.learn(99, "good") == [False, "There is no part 99; the last 20 are kept."]
    assert not plc.learn(1, "so-so")[0]
    with pytest.raises(ua.UaStatusCodeError):
        plc.call("Learn")
    assert plc.call("Pause", True) == [True, ""]  # noqa: FBT003
    plc.wait("Paused", value=True)
    station.show_new_product("lid")
    plc.wait("LearningAs", "lid")


@pytest.mark.slow
def test_other_pcs(station: Station, tmp_path: Path) -> None:
    """They need user and password, which are only taken encrypted; the key is the owner's alone."""
    url = free_url("0.0.0.0")  # noqa: S104
    with pytest.raises(ValueError, match="OPCUA_USER"):
        OpcUaServer(station, url, tmp_path / "opcua")
    server = OpcUaServer(station, url, tmp_path / "opcua", ("plc", "right"))
    assert (tmp_path / "opcua").stat().st_mode & 0o077 == 0
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.der"
    use, names = [ExtendedKeyUsageOID.CLIENT_AUTH], {"commonName": "plc"}
    asyncio.run(setup_self_signed_certificate(key, certificate, "urn:plc", socket.gethostname(), use, names))

    def client(password: str | None, *, encrypted: bool = True) -> Client:
        made = Client(url.replace("0.0.0.0", "127.0.0.1"))  # noqa: S104
        made.application_uri = "urn:plc"
        if password is not None:
            made.set_user("plc")
            made.set_password(password)
        if encrypted:
            made.set_security_string(f"Basic256Sha256,SignAndEncrypt,{certificate},{key}")
        return made

    with client("right") as connected:
        assert Plc(connected).read("Paused") == [False]
    for password, encrypted in (("wrong", True), (None, True), ("right", False), (None, False)):
        assert_refused(client(password, encrypted=encrypted))
    server.close()


@pytest.mark.slow
def test_command(serve: Callable[..., Any], products: Path) -> None:
    """The command runs it beside the rest, to look at alone, and ends well when a service manager ends it."""
    url = free_url("localhost")
    server = serve("--opcua", url)
    part = (products / "stripes" / "test" / "good" / "000.png").read_bytes()
    verdict = httpx.post(f"{server.url}/predict", content=part).json()
    with Client(url) as client:
        plc = Plc(client)
        plc.wait("Id", verdict["id"])
        with pytest.raises(ua.UaStatusCodeError):
            plc.call("Pause", True)  # noqa: FBT003
        with pytest.raises(ua.UaStatusCodeError):
            client.nodes.objects.add_object(plc.index, "Mine")
    administrator = Client(url)  # whom the package knows by this name
    administrator.set_user("admin")
    administrator.set_password("admin")
    assert_refused(administrator)
    assert server.end() == 0, server.said


@pytest.mark.slow
def test_address_in_use(station: Station, tmp_path: Path) -> None:
    """That is said."""
    url = free_url()
    with socket.create_server(("127.0.0.1", int(url.rpartition(":")[2]))), pytest.raises(OSError, match="in use"):
        OpcUaServer(station, url, tmp_path / "opcua")


@pytest.mark.parametrize("url", ["localhost:4840", "opc.tcp://localhost", "http://localhost:4840", "opc.tcp://:4840"])
def test_addresses(url: str, tmp_path: Path) -> None:
    """What cannot be meant is refused."""
    with pytest.raises(ValueError, match=r"opc\.tcp://HOST:PORT"):
        OpcUaServer(None, url, tmp_path)  # type: ignore[arg-type]

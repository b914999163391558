# SPDX-License-Identifier: Apache-2.0
"""What the command `serve` refuses before it starts."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from openvino_export.serve.access import Secrets

Run = Callable[..., tuple[int, list[dict[str, Any]], str]]


@pytest.mark.parametrize(
    ("package", "extra", "options"),
    [
        ("uvicorn", "serve", []),
        ("paho.mqtt.client", "mqtt", ["--mqtt", "mqtt://localhost"]),
        ("asyncua", "opcua", ["--opcua", "opc.tcp://localhost:4840"]),
    ],
)
def test_missing_extra(run: Run, monkeypatch: pytest.MonkeyPatch, package: str, extra: str, options: list[str]) -> None:
    """It is named."""
    monkeypatch.setitem(sys.modules, package, None)
    for module in ("mqtt", "opcua"):
        monkeypatch.delitem(sys.modules, f"openvino_export.serve.{module}", raising=False)
    code, _, errors = run("serve", "no_bundle", *options)
    assert code == 1
    assert f"{extra} needs more packages ({package} is missing): pip install 'anomalib-ext[{extra}]'" in errors


def test_logins(tmp_path: Path) -> None:
    """The file of secrets holds users with their passwords; one without the other is a mistake."""
    path = tmp_path / "secrets"
    path.write_text("MQTT_USER=line\nMQTT_PASSWORD=a=b\nOPCUA_USER=plc\nOPCUA_PASSWORD=c\n")
    secrets = Secrets.from_file(path)
    assert (secrets.mqtt, secrets.opcua) == (("line", "a=b"), ("plc", "c"))
    path.write_text("OPCUA_USER=plc\n")
    with pytest.raises(ValueError, match="OPCUA_USER and OPCUA_PASSWORD go together"):
        Secrets.from_file(path)

# SPDX-License-Identifier: Apache-2.0
"""The command ``serve``: a station at the line, over HTTP."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from openvino_export.cli.output import GOOD

if TYPE_CHECKING:
    from collections.abc import Generator

# Pixels of the largest picture, unless the environment sets another number: callers may be many, and each picture is
# held in memory.
_LARGEST_IMAGE = 64_000_000


def serve(
    bundle: str,
    source: str | None = None,
    folder: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8085,
    secrets: str | None = None,
    certificate: str | None = None,
    key: str | None = None,
    keep: int = 1000,
    largest_upload: int = 64,
    queue: int = 16,
    mqtt: str | None = None,
    mqtt_authority: str | None = None,
    mqtt_commands: bool = False,
    opcua: str | None = None,
    opcua_methods: bool = False,
    device: str = "CPU",
) -> int:
    """Judge parts over HTTP, show them to the operator, and be taught, until it is interrupted.

    The operator's page is at http://localhost:8085, the interface at /docs. Needs the extra serve, and those of the
    options that are used: mqtt, opcua, basler.

    Args:
        bundle: Folder that the export to openvino has written.
        source: What is judged by itself: a folder, a video file, the number of a camera, or basler for the first camera
            that pylon finds. Without it, parts come by request.
        folder: Where the last parts and what was taught are kept; beside the bundle by default.
        host: Address to listen on. One that other PCs reach needs a TOKEN in the file of secrets.
        port: Port to listen on.
        secrets: File with lines TOKEN=..., OPERATOR_PIN=..., SUPERVISOR_PIN=..., MQTT_USER=..., MQTT_PASSWORD=...,
            OPCUA_USER=... and OPCUA_PASSWORD=...; each may be missing.
        certificate: File of the certificate for https.
        key: File of its private key.
        keep: Number of parts whose images are kept.
        largest_upload: MiB that a request may bring. Pictures have at most 64 megapixels, or as many as the environment
            variable ANOMALIB_EXT_LARGEST_IMAGE says.
        queue: Parts that may wait to be judged; more are refused.
        mqtt: Broker that is told of each verdict, such as mqtt://host:1883/line1, or mqtts:// for TLS.
        mqtt_authority: File of certificates that the broker's must be signed by; those of the system by default.
        mqtt_commands: Whether the station takes commands from the broker.
        opcua: Address of an OPC UA server, such as opc.tcp://127.0.0.1:4840. One that other PCs reach needs a user.
        opcua_methods: Whether OPC UA clients may teach.
        device: Device of OpenVINO.
    """
    from openvino_export.images import LARGEST_IMAGE_VARIABLE
    from openvino_export.serve.access import Secrets, is_loopback

    os.environ.setdefault(LARGEST_IMAGE_VARIABLE, str(_LARGEST_IMAGE))
    known = Secrets() if secrets is None else Secrets.from_file(secrets)
    only_loopback = is_loopback(host)
    if not only_loopback and known.token is None:
        msg = f"Other PCs reach {host}, so a token is needed: give --secrets a file with a line TOKEN=..."
        raise ValueError(msg)
    with needs("serve"):
        import uvicorn

        from openvino_export.serve.app import make_app
    if mqtt is not None:
        with needs("mqtt"):
            from openvino_export.serve.mqtt import MqttLink
    if opcua is not None:
        with needs("opcua"):
            from openvino_export.serve.opcua import OpcUaServer
    from openvino_export.serve.sources import Feeder
    from openvino_export.serve.station import Station

    own = Path(bundle).resolve()
    kept = Path(folder or own.with_name(f"{own.name}_station"))
    with ExitStack() as stack:
        # So that the rest is closed when a service manager ends it, too.
        stack.callback(signal.signal, signal.SIGTERM, signal.signal(signal.SIGTERM, lambda *_: sys.exit(GOOD)))
        station = Station(bundle, kept, keep, device)
        stack.callback(station.close)
        if mqtt is not None:
            link = MqttLink(station, mqtt, known.mqtt, mqtt_authority, commands=mqtt_commands)
            stack.callback(link.close)
        if opcua is not None:
            server = OpcUaServer(station, opcua, kept / "opcua", known.opcua, methods=opcua_methods)
            stack.callback(server.close)
        app = make_app(station, known, only_loopback=only_loopback, largest_upload=largest_upload << 20, queue=queue)
        if source is not None:
            stack.callback(Feeder(station, source).close)
        address = f"http{'s' if certificate else ''}://{host}:{port}"
        print(f"{bundle} judges at {address}; the interface is at {address}/docs.", file=sys.stderr, flush=True)
        uvicorn.run(
            app,
            host=host,
            port=port,
            ssl_certfile=certificate,
            ssl_keyfile=key,
            log_level="warning",
            timeout_graceful_shutdown=3,
        )
    return GOOD


@contextmanager
def needs(extra: str) -> Generator[None, None, None]:
    """Name the extra that a missing package comes with.

    Raises:
        ValueError: If one is missing.
    """
    try:
        yield
    except ImportError as error:
        msg = f"{extra} needs more packages ({error.name} is missing): pip install 'anomalib-ext[{extra}]'"
        raise ValueError(msg) from error

# SPDX-License-Identifier: Apache-2.0
"""The command ``serve``: a station at the line, over HTTP."""

from __future__ import annotations

from openvino_export.cli.output import GOOD


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
    device: str = "CPU",
) -> int:
    """Judge parts over HTTP, show them to the operator, and be taught, until it is interrupted.

    The operator's page is at http://localhost:8085, the interface at /docs. Needs the extra serve.

    Args:
        bundle: Folder that the export to openvino has written.
        source: Folder, video file, or number of a camera whose images are judged; without it, parts come by request.
        folder: Where the last parts and what was taught are kept; beside the bundle by default.
        host: Address to listen on. One that other PCs reach needs a TOKEN in the file of secrets.
        port: Port to listen on.
        secrets: File with lines TOKEN=..., OPERATOR_PIN=... and SUPERVISOR_PIN=...; each may be missing.
        certificate: File of the certificate for https.
        key: File of its private key.
        keep: Number of parts whose images are kept.
        largest_upload: MiB that a request may bring.
        queue: Parts that may wait to be judged; more are refused.
        device: Device of OpenVINO.
    """
    import sys
    from pathlib import Path

    from openvino_export.serve.access import Secrets, is_loopback

    known = Secrets() if secrets is None else Secrets.from_file(secrets)
    only_loopback = is_loopback(host)
    if not only_loopback and known.token is None:
        msg = f"Other PCs reach {host}, so a token is needed: give --secrets a file with a line TOKEN=..."
        raise ValueError(msg)
    try:
        import uvicorn

        from openvino_export.serve.app import make_app
    except ImportError as error:
        msg = f"serve needs more packages ({error.name} is missing): pip install 'anomalib-ext[serve]'"
        raise ValueError(msg) from error
    from openvino_export.serve.sources import Feeder
    from openvino_export.serve.station import Station

    own = Path(bundle).resolve()
    station = Station(bundle, folder or own.with_name(f"{own.name}_station"), keep, device)
    app = make_app(station, known, only_loopback=only_loopback, largest_upload=largest_upload << 20, queue=queue)
    feeder = None if source is None else Feeder(station, source)
    address = f"http{'s' if certificate else ''}://{host}:{port}"
    print(f"{bundle} judges at {address}; the interface is at {address}/docs.", file=sys.stderr, flush=True)
    try:
        uvicorn.run(
            app,
            host=host,
            port=port,
            ssl_certfile=certificate,
            ssl_keyfile=key,
            log_level="warning",
            timeout_graceful_shutdown=3,
        )
    finally:
        if feeder is not None:
            feeder.close()
        station.close()
    return GOOD

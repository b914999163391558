# SPDX-License-Identifier: Apache-2.0
"""The application over HTTP: who may do what, how errors are answered, and the pages."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse
from fastapi.staticfiles import StaticFiles

from .access import Access, Guard, RefusedError, Secrets
from .inference_protocol import protocol_routes
from .parts import NotThereError
from .routes import Served, judging_routes, state_routes, teaching_routes
from .station import HeldBackError, PausedError, Station

PAGE = Path(__file__).parent / "page"


def make_app(
    station: Station,
    secrets: Secrets | None = None,
    *,
    only_loopback: bool = True,
    largest_upload: int = 64 << 20,
    queue: int = 16,
) -> FastAPI:
    """The application.

    Args:
        station: What it gives access to.
        secrets: Token and PINs; none by default.
        only_loopback: Whether only this PC can reach it.
        largest_upload: Bytes that a request may bring.
        queue: Parts that may wait; more are refused with status 429.
    """
    served = Served(station, Access(secrets or Secrets()), queue)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
        try:
            yield
        finally:
            served.close()

    app = FastAPI(title="anomalib-edge", docs_url=None, redoc_url=None, lifespan=lifespan)
    app.add_middleware(Guard, largest_body=largest_upload, only_loopback=only_loopback)  # type: ignore[arg-type]
    kinds: dict[type[Exception], int] = {NotThereError: 404, PausedError: 409, ValueError: 400, OSError: 503}
    for kind, status in kinds.items():
        app.add_exception_handler(kind, partial(_failed, status))
    app.add_exception_handler(RefusedError, _refused)
    app.add_exception_handler(HeldBackError, _held_back)
    for routes in (judging_routes, teaching_routes, state_routes):
        app.include_router(routes(served))
    app.include_router(protocol_routes(station, served.judged, served.may_judge))
    _add_pages(app)
    return app


def _failed(status: int, request: Request, error: Exception) -> JSONResponse:
    del request
    return JSONResponse({"error": str(error)}, status)


def _refused(request: Request, error: Exception) -> JSONResponse:
    del request
    assert isinstance(error, RefusedError)
    return JSONResponse({"error": str(error)}, error.status, {"Retry-After": "1"} if error.status == 429 else {})


def _held_back(request: Request, error: Exception) -> JSONResponse:
    del request
    assert isinstance(error, HeldBackError)
    content = {"error": str(error), "excess": max(error.excess.values()), "would_pass": error.would_pass}
    return JSONResponse(content, 409)


def _add_pages(app: FastAPI) -> None:
    """The operator's page, and the page of the interface; nothing of them comes from elsewhere."""
    import swagger_ui_bundle

    app.mount("/swagger", StaticFiles(directory=swagger_ui_bundle.swagger_ui_path))

    @app.get("/docs", include_in_schema=False)
    def docs() -> HTMLResponse:
        page = (PAGE / "docs.html").read_text(encoding="utf-8")
        policy = "default-src 'self'; img-src 'self' data:; style-src 'self' 'unsafe-inline'; frame-ancestors 'none'"
        return HTMLResponse(page, headers={"Content-Security-Policy": policy})

    app.mount("/", StaticFiles(directory=PAGE, html=True))

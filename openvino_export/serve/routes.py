# SPDX-License-Identifier: Apache-2.0
"""Plain routes for people and scripts: judging, teaching, and the state of a station."""

import asyncio
import json
import tempfile
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import unquote

from fastapi import APIRouter, Depends, File, Form, Header, Query, Request, UploadFile
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from openvino_export.memory.report import Report

from .access import JUDGE, TEACH, Access, RefusedError
from .metrics import metrics_of
from .pictures import heat_map_of, jpeg_of, overlay_of
from .station import Station
from .teacher import Teaching

# Threads that judge at a time; each image runs on all cores already, but reading the next one goes beside.
_THREADS = 2
# Seconds between signs of life to who listens to events, and events that wait for one who is slow.
_ALIVE, _WAITING = 15.0, 100

# Headers hold Latin letters alone, so a browser sends other names percent-encoded.
Who = Annotated[str, Header(alias="X-Who", description="Who says so, for the log"), AfterValidator(unquote)]
Count = Annotated[int, Query(ge=1, le=1000)]


class Served:
    """What the routes share.

    Args:
        station: What they give access to.
        access: Who may do what.
        queue: Parts that may wait to be judged.
    """

    def __init__(self, station: Station, access: Access, queue: int) -> None:
        self.station, self.access = station, access
        self.may_judge, self.may_teach = (self._may(role) for role in (JUDGE, TEACH))
        self.closed = asyncio.Event()
        self._judging, self._teaching = ThreadPoolExecutor(_THREADS, "judge"), ThreadPoolExecutor(1, "teach")
        self._most, self._there = queue + _THREADS, 0

    def _may(self, role: str) -> list[Any]:
        async def check(request: Request) -> None:  # noqa: RUF029  # FastAPI would run another on a thread
            self.access.check(request.headers, role)

        return [Depends(check)]

    async def judged(self, work: Callable[[], Any]) -> Any:  # noqa: ANN401
        """Run something on the threads that judge.

        Raises:
            RefusedError: If too many parts wait.
        """
        self.check_queue()
        self._there += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._judging, work)
        finally:
            self._there -= 1

    def check_queue(self) -> None:
        """Refuse a part if too many wait, before its image is read.

        Raises:
            RefusedError: If too many wait.
        """
        if self._there >= self._most:
            raise RefusedError(429, "Too many parts wait to be judged. Try again.")

    async def taught(self, work: Callable[[], Any]) -> Any:  # noqa: ANN401
        """Run something on the thread that teaches."""
        return await asyncio.get_running_loop().run_in_executor(self._teaching, work)

    def close(self) -> None:
        """End when what runs is done."""
        self.closed.set()
        self._judging.shutdown()
        self._teaching.shutdown()


class _Body(BaseModel):
    """What a request brings as JSON; what is misspelled is refused."""

    model_config = ConfigDict(extra="forbid")


class Feedback(_Body):
    """What a person says of a part."""

    id: int = Field(description="The verdict's id")
    verdict: Literal["good", "defective"]
    variant: str | None = Field(default=None, description="Product variant; that of the verdict by default")
    box: tuple[float, float, float, float] | None = Field(
        default=None, description="Where the defect is: left, top, right and bottom in pixels of the image"
    )
    confirm: bool = Field(default=False, description="Learn it as good though it scores far above its threshold")

    def arguments(self) -> dict[str, Any]:
        """What it says besides id and verdict, as arguments of :meth:`Station.feedback`."""
        given = {"variant": self.variant, "regions": self.box}
        return {"confirm": self.confirm, **{name: value for name, value in given.items() if value is not None}}


class Undo(_Body):
    """A teaching to be taken back."""

    number: int | None = Field(default=None, description="Number of the teaching; the last one by default")


class Rename(_Body):
    """A new name."""

    name: str


class Merge(_Body):
    """The variant that another becomes a part of."""

    into: str


class Decision(_Body):
    """How to decide; with neither rate nor threshold, by good images at the rate of the bundle."""

    variant: str | None = Field(default=None, description="Product variant; all by default")
    false_alarm_rate: float | None = None
    threshold: float | None = None


class Mode(_Body):
    """Whether parts are judged, and learned as a new product."""

    paused: bool | None = None
    learning_as: str | None = Field(default=None, description="Product variant that is shown now; empty to end that")


def judging_routes(served: Served) -> APIRouter:
    """Routes that judge parts and show them."""
    routes, station = APIRouter(tags=["Judging"], dependencies=served.may_judge), served.station

    @routes.post("/predict", openapi_extra=_IMAGE)
    async def predict(
        request: Request,
        part: Annotated[str | None, Query(max_length=200)] = None,
        overlay: Annotated[Literal["png"] | None, Query()] = None,
    ) -> Response:
        """Judge a part: an image file as the body, or as `file` of a form; `overlay=png` answers with its heat map."""
        served.check_queue()
        image, name = await _uploaded(request)
        verdict = await served.judged(partial(station.judge, image, part, name))
        if overlay is None:
            return JSONResponse(verdict)
        number, parts = verdict["id"], station.parts
        picture = await served.judged(lambda: overlay_of(parts.path(number), parts.levels(number)))
        return Response(picture, media_type="image/png", headers={"X-Verdict": json.dumps(verdict)})

    @routes.get("/parts")
    def parts(count: Count = 60, *, anomalous: bool = False) -> list[dict[str, Any]]:
        """The last verdicts, the newest first."""
        return station.parts.latest(count, anomalous=anomalous)

    @routes.get("/parts/{number}")
    def part(number: int) -> dict[str, Any]:
        """A verdict."""
        return station.parts.verdict(number)

    @routes.get("/parts/{number}/image")
    def part_image(number: int, side: Annotated[int, Query(ge=16, le=4096)] = 1024) -> Response:
        """The part as a JPEG picture, its longer side at most so long; X-Width and X-Height are those of the image."""
        station.parts.verdict(number)
        return _jpeg(station.parts.path(number), side)

    @routes.get("/parts/{number}/again")
    async def part_again(number: int) -> dict[str, Any]:
        """How the part is judged now, with what was taught since."""
        return await served.judged(partial(station.judge_again, number))

    @routes.get("/parts/{number}/heat_map")
    def part_heat_map(number: int) -> Response:
        """Its anomaly map as a PNG picture, transparent where nothing is wrong, to be laid over the part."""
        return Response(heat_map_of(station.parts.levels(number)), media_type="image/png")

    return routes


def teaching_routes(served: Served) -> APIRouter:
    """Routes that change what is known."""
    routes, station = APIRouter(tags=["Teaching"], dependencies=served.may_teach), served.station

    @routes.post("/learn")
    async def learn(
        files: Annotated[list[UploadFile], File()],
        variant: Annotated[str | None, Form()] = None,
        *,
        force: Annotated[bool, Form()] = False,
        defective: Annotated[bool, Form()] = False,
        who: Who = "",
    ) -> dict[str, Any]:
        """Learn good images, or what a defect looks like."""
        with tempfile.TemporaryDirectory() as folder:
            names = {}
            for number, file in enumerate(files):
                path = Path(folder) / f"{number:04}"
                path.write_bytes(await file.read())
                names[path] = file.filename or f"image {number + 1}"
            work = partial(station.learn, [*names], who, variant=variant, force=force, defective=defective)
            teaching, report = await served.taught(work)
        return _told(teaching, report, {str(path): name for path, name in names.items()})

    @routes.post("/feedback")
    async def feedback(said: Feedback, who: Who = "") -> dict[str, Any]:
        """Say that a part is good or defective; the next one like it is judged so."""
        work = partial(station.feedback, said.id, said.verdict, who, **said.arguments())
        return _told(*await served.taught(work))

    @routes.post("/undo")
    async def undo(which: Undo, who: Who = "") -> dict[str, Any]:
        """Take a teaching back; what was taught after it stays."""
        return vars(await served.taught(partial(station.undo, who, which.number)))

    @routes.post("/variants/{variant:path}/rename")
    async def rename(variant: str, new: Rename, who: Who = "") -> dict[str, Any]:
        """Give a product variant another name."""
        return await change("rename_variant", who, variant=variant, new=new.name)

    @routes.post("/variants/{variant:path}/merge")
    async def merge(variant: str, other: Merge, who: Who = "") -> dict[str, Any]:
        """Let a product variant become a part of another."""
        return await change("merge_variants", who, variant=variant, into=other.into)

    @routes.delete("/variants/{variant:path}")
    async def delete(variant: str, who: Who = "") -> dict[str, Any]:
        """Forget a product variant."""
        return await change("delete_variant", who, variant=variant)

    @routes.post("/thresholds")
    async def decide(decision: Decision, who: Who = "") -> dict[str, Any]:
        """Decide by another false-alarm rate, or a threshold by hand."""
        return await change("set_decision", who, **decision.model_dump())

    async def change(kind: str, who: str, **arguments: Any) -> dict[str, Any]:  # noqa: ANN401
        return vars(await served.taught(partial(station.change, kind, who, **arguments)))

    @routes.post("/mode")
    async def set_mode(wanted: Mode, who: Who = "") -> dict[str, Any]:
        """Pause or go on; show a new product, each part of which is learned, or end that."""
        if wanted.learning_as is not None:
            station.show_new_product(wanted.learning_as or None, who)
        if wanted.paused is not None:
            station.pause(paused=wanted.paused)
        return station.mode()

    return routes


def state_routes(served: Served) -> APIRouter:
    """Routes that tell how a station is."""
    routes, station, measure = APIRouter(tags=["State"]), served.station, metrics_of(served.station)

    @routes.get("/role")
    def role(request: Request) -> dict[str, Any]:
        """What the token or PIN of this request allows: teach, judge or nothing."""
        return {"role": served.access.role(request.headers)}

    @routes.get("/mode", dependencies=served.may_judge)
    def mode() -> dict[str, Any]:
        """Whether parts are judged, and learned as a new product."""
        return station.mode()

    @routes.get("/info", dependencies=served.may_judge)
    def info() -> dict[str, Any]:
        """What the bundle is and knows."""
        return station.detector.info()

    @routes.get("/variants", dependencies=served.may_judge)
    def variants() -> dict[str, Any]:
        """What is known of each product variant, with its threshold and rate."""
        return station.detector.info()["variants"]

    @routes.get("/teachings", dependencies=served.may_judge)
    def teachings(count: Count = 100) -> list[dict[str, Any]]:
        """The log of teachings, the newest first; `undoable` tells which can be taken back."""
        there = {each.number for each in station.teacher.teachings}
        return [{**line, "undoable": line["number"] in there} for line in station.teacher.history(count)]

    @routes.get("/teachings/{number}/image", dependencies=served.may_judge)
    def teaching_image(number: int, side: Annotated[int, Query(ge=16, le=4096)] = 256) -> Response:
        """The first image of a teaching that can be taken back, as a JPEG picture."""
        return _jpeg(station.teacher.image(number), side)

    @routes.get("/events", dependencies=served.may_judge)
    async def events() -> StreamingResponse:
        """Server-sent events: verdict, undecided, taught, undone, mode and failed."""
        return StreamingResponse(_events(station, served.closed), media_type="text/event-stream")

    @routes.get("/metrics", dependencies=served.may_judge)
    def metrics() -> Response:
        """Metrics for Prometheus."""
        return Response(measure(), media_type="text/plain; version=0.0.4")

    return routes


_IMAGE = {
    "requestBody": {
        "required": True,
        "content": {
            "image/*": {"schema": {"type": "string", "format": "binary"}},
            "multipart/form-data": {
                "schema": {"type": "object", "properties": {"file": {"type": "string", "format": "binary"}}}
            },
        },
    }
}


async def _uploaded(request: Request) -> tuple[bytes, str]:
    """Content and name of an image file that a request brings.

    Raises:
        ValueError: If it brings none.
    """
    content, name = b"", "The image"
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        content = await request.body()
    else:
        file = (await request.form()).get("file")
        if file is not None and not isinstance(file, str):
            content, name = await file.read(), file.filename or name
    if not content:
        msg = "The request brings no image. Send the file as the body, or as 'file' of a form."
        raise ValueError(msg)
    return content, name


def _told(teaching: Teaching | None, report: Report, names: dict[str, str] | None = None) -> dict[str, Any]:
    """What was taught, fit for JSON."""
    return {
        "teaching": None if teaching is None else vars(teaching),
        "learned": dict(report.variants),
        "shown_defects": dict(report.shown),
        "known_images": report.known_images,
        "held_back": {(names or {}).get(name, name): excess for name, excess in report.held_back.items()},
        "still_good": bool(report.still_good),
        "advice": report.advice,
    }


def _jpeg(path: Path, side: int) -> Response:
    picture, (width, height) = jpeg_of(path, side)
    return Response(picture, media_type="image/jpeg", headers={"X-Width": str(width), "X-Height": str(height)})


async def _events(station: Station, closed: asyncio.Event) -> AsyncGenerator[str]:
    """Events as they happen. Who is too slow misses the oldest."""
    loop, queue = asyncio.get_running_loop(), asyncio.Queue[dict[str, Any]](_WAITING)

    def put(event: dict[str, Any]) -> None:
        if queue.full():
            queue.get_nowait()
        queue.put_nowait(event)

    def tell(event: dict[str, Any]) -> None:
        loop.call_soon_threadsafe(put, event)

    end = station.listen(tell)
    try:
        yield f"event: mode\ndata: {json.dumps(station.mode())}\n\n"
        while not closed.is_set():
            try:
                event = await asyncio.wait_for(queue.get(), _ALIVE)
            except asyncio.TimeoutError:
                yield ": alive\n\n"
                continue
            yield f"event: {event.pop('event')}\ndata: {json.dumps(event)}\n\n"
    finally:
        end()

# SPDX-License-Identifier: Apache-2.0
"""What machines may have a station do, over MQTT and OPC UA alike."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, ValidationError

from .parts import NotThereError
from .routes import Feedback, Undo

if TYPE_CHECKING:
    from .station import Station


class Pause(BaseModel):
    """Whether parts are refused from now on."""

    model_config = ConfigDict(extra="forbid")

    paused: bool


COMMANDS: dict[str, type[BaseModel]] = {"learn": Feedback, "undo": Undo, "pause": Pause}


def run_command(station: Station, name: str, content: Any, who: str) -> tuple[bool, str]:  # noqa: ANN401
    """Do what a machine asks for.

    Args:
        station: The station.
        name: One of COMMANDS.
        content: What the command takes, as from JSON; it is checked.
        who: Who asks, for the log.

    Returns:
        Whether it was done, and what there is to say; nothing has changed if it was not.
    """
    try:
        asked = COMMANDS[name].model_validate(content)
        return _do(station, asked, who)
    except ValidationError as error:
        wrong = (f"{'.'.join(map(str, each['loc'])) or name}: {each['msg']}" for each in error.errors())
        return False, "; ".join(wrong)
    except (NotThereError, OSError, ValueError) as error:
        return False, str(error)


def _do(station: Station, asked: BaseModel, who: str) -> tuple[bool, str]:
    if isinstance(asked, Feedback):
        teaching, report = station.feedback(asked.id, asked.verdict, who, **asked.arguments())
        return teaching is not None, " ".join(report.advice) or ("The image is known." if teaching is None else "")
    if isinstance(asked, Undo):
        return True, f"Teaching {station.undo(who, asked.number).number} is taken back."
    assert isinstance(asked, Pause)
    station.pause(paused=asked.paused)
    return True, ""

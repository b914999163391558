# SPDX-License-Identifier: Apache-2.0
"""What watch survives: folders, images, disks and bundles that are not as they should be."""

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from openvino_export.cli import main
from openvino_export.detector import EdgeDetector

from .test_watch import COMMAND, Run, SetClock


@pytest.fixture
def folder(products: Path, tmp_path: Path) -> Path:
    """Return a watched folder with three good images of stripes, one of them in a folder below it."""
    folder = tmp_path / "camera"
    (folder / "deep").mkdir(parents=True)
    for number, name in enumerate(("a.png", "b.png", "deep/c.png")):
        shutil.copy(products / "stripes" / "test" / "good" / f"00{number}.png", folder / name)
    return folder


def names(lines: list[dict[str, Any]]) -> list[str]:
    """Return the names of the files that lines are about."""
    return [Path(line["source"]).name for line in lines]


def recorded(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a record, all of which are whole."""
    text = path.read_text(encoding="utf-8")
    assert text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def test_it_keeps_a_verdict_whose_heat_map_fails(
    run: Run, set_clock: SetClock, bundle: Path, products: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The image is taken away just then: the verdict is recorded and printed, and it goes on."""
    from openvino_export.detector import EdgeDetector

    folder, maps = tmp_path / "camera", tmp_path / "maps"
    folder.mkdir()
    for name in ("a.png", "b.png"):
        shutil.copy(products / "stripes" / "test" / "good" / "000.png", folder / name)
    judge = EdgeDetector.predict

    def take_away(self: EdgeDetector, image: Path) -> Any:  # noqa: ANN401
        result = judge(self, image)
        if image.name == "a.png":
            image.unlink()
        return result

    monkeypatch.setattr(EdgeDetector, "predict", take_away)
    set_clock()
    code, lines, errors = run("watch", bundle, folder, "--output", maps, "--idle", "0.5", "--interval", "0.1")
    assert code == 0
    assert [Path(line["source"]).name for line in lines] == ["a.png", "b.png"]
    recorded = [json.loads(line) for line in (maps / "predictions.jsonl").read_text().splitlines()]
    assert [line["pred_label"] for line in recorded] == [False, False]
    assert "a.png was not written" in errors
    assert (maps / "b.png").is_file()
    assert not (maps / "a.png").exists()


def test_images_are_taken_away_before_they_are_judged(
    run: Run, set_clock: SetClock, exported: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are named, and nothing is recorded of them; they are judged if they come back."""
    judge, away = EdgeDetector.predict, folder.with_name("away")

    def take_away(self: EdgeDetector, image: Path) -> Any:  # noqa: ANN401
        if (folder / "b.png").exists():
            (folder / "deep").rename(away)
            (folder / "b.png").unlink()
        return judge(self, image)

    monkeypatch.setattr(EdgeDetector, "predict", take_away)
    set_clock(*[None] * 4, lambda: away.rename(folder / "deep"))
    code, lines, errors = run("watch", exported, folder, "--idle", "1", "--interval", "0.1")
    assert (code, names(lines)) == (0, ["a.png", "c.png"])
    assert names(recorded(folder / "predictions.jsonl")) == ["a.png", "c.png"]
    assert errors == f"Taken away before being judged: {folder / 'b.png'} and 1 more.\n"


def test_the_watched_folder_goes_and_returns(
    run: Run, set_clock: SetClock, exported: Path, folder: Path, products: Path
) -> None:
    """As that of a network does, with the record in it: that is said once, and what comes meanwhile is judged."""
    away = folder.with_name("away")

    def come_back() -> None:
        shutil.copy(products / "stripes" / "test" / "hole" / "000.png", away / "d.png")
        away.rename(folder)

    set_clock(*[None] * 3, lambda: folder.rename(away), *[None] * 3, come_back)
    code, lines, errors = run("watch", exported, folder, "--idle", "1", "--interval", "0.1")
    assert (code, names(lines)) == (3, ["a.png", "b.png", "c.png", "d.png"])
    assert names(recorded(folder / "predictions.jsonl")) == names(lines)
    assert errors.count("\n") == errors.count(str(folder / "x").removesuffix("/x") + " can") == 2
    assert f"The folder {folder} cannot be read; it is tried again: [Errno 2]" in errors
    assert f"The folder {folder} can be read again." in errors


def test_the_output_folder_goes_and_returns(
    run: Run, set_clock: SetClock, exported: Path, folder: Path, tmp_path: Path
) -> None:
    """It is not made anew in its place: verdicts wait until they can be recorded. A moved record is begun anew."""
    maps, away = tmp_path / "maps", tmp_path / "away"
    new = folder / "deep" / "new.png"

    def go() -> None:
        maps.rename(away)
        shutil.copy(folder / "a.png", new)

    def see() -> None:
        assert not maps.exists()
        away.rename(maps)

    def move_the_record() -> None:
        (maps / "predictions.jsonl").rename(maps / "old.jsonl")
        shutil.copy(folder / "a.png", folder / "last.png")

    set_clock(*[None] * 5, go, *[None] * 5, see, *[None] * 5, move_the_record)
    code, lines, errors = run("watch", exported, folder, "--output", maps, "--idle", "1", "--interval", "0.1")
    assert (code, names(lines)) == (0, ["a.png", "b.png", "c.png", "new.png", "last.png"])
    assert names(recorded(maps / "old.jsonl")) == names(lines)[:-1]
    assert names(recorded(maps / "predictions.jsonl")) == ["last.png"]
    assert (maps / "deep" / "new.png").is_file()
    said = errors.splitlines()
    assert len(said) == 2
    assert said[0].startswith(f"The record {maps / 'predictions.jsonl'} cannot be written; until it can, no more")
    assert said[1] == f"The record {maps / 'predictions.jsonl'} is written again."


def test_an_image_that_the_system_cannot_read_now(
    run: Run, set_clock: SetClock, exported: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It waits: its verdict would be the network's. That is said once."""
    is_broken = True
    module = import_module("openvino_export.cli.watch")
    judge, read_through = EdgeDetector.predict, module._read_through

    def predict(self: EdgeDetector, image: Path) -> Any:  # noqa: ANN401
        if is_broken and image.name == "a.png":
            msg = "a.png cannot be read as an image"
            raise ValueError(msg)
        return judge(self, image)

    def read(path: Path) -> None:
        if is_broken and path.name == "a.png":
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        read_through(path)

    def mend() -> None:
        nonlocal is_broken
        is_broken = False

    monkeypatch.setattr(EdgeDetector, "predict", predict)
    monkeypatch.setattr(module, "_read_through", read)
    set_clock(*[None] * 6, mend)
    code, lines, errors = run("watch", exported, folder, "--idle", "1", "--interval", "0.1")
    assert (code, names(lines)) == (0, ["b.png", "c.png", "a.png"])
    assert [line.split(":")[0] for line in errors.splitlines()] == [
        "Not all images can be read; they are tried again",
        "All images can be read again.",
    ]


def test_no_room_for_heat_maps(
    run: Run, set_clock: SetClock, exported: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Said once, not for each image; verdicts come as ever."""
    overlay = import_module("openvino_export.cli.overlay")
    write, count = overlay.write_overlay, 0

    def fail_twice(*args: Any) -> None:  # noqa: ANN401
        nonlocal count
        count += 1
        if count < 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(*args)

    monkeypatch.setattr(overlay, "write_overlay", fail_twice)
    set_clock()
    code, lines, errors = run("watch", exported, folder, "--output", tmp_path / "maps", "--idle", "1")
    assert (code, len(lines)) == (0, 3)
    assert [path.name for path in tmp_path.glob("maps/**/*.png")] == ["c.png"]
    assert [part in line for part, line in zip(("No space left", "again"), errors.splitlines(), strict=True)] == [
        True
    ] * 2


@pytest.mark.skipif(sys.platform != "linux", reason="limits of another process")
def test_no_room_for_the_record(exported: Path, folder: Path, tmp_path: Path) -> None:
    """The second line does not fit: nothing of it is written or printed; with room again, nothing is lost or twice."""
    import resource

    record = tmp_path / "out" / "predictions.jsonl"
    arguments = ["watch", exported, folder, "--output", tmp_path / "out", "--interval", "0.05"]
    others = [(folder / name, tmp_path / Path(name).name) for name in ("b.png", "deep/c.png")]
    for inside, outside in others:
        inside.rename(outside)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    worker: subprocess.Popen[str] = subprocess.Popen([*COMMAND, *arguments], **pipes)  # type: ignore[call-overload]
    try:
        assert worker.stdout is not None
        assert worker.stderr is not None
        first = worker.stdout.readline()
        while not (folder.parent / "out" / "a.png").exists():  # heat maps are larger than the limit
            pass
        resource.prlimit(worker.pid, resource.RLIMIT_FSIZE, (record.stat().st_size + 50, resource.RLIM_INFINITY))
        for inside, outside in others:
            outside.rename(inside)
        assert (
            "cannot be written; until it can, no more is judged: [Errno 28] No space left" in worker.stderr.readline()
        )
        assert [record.read_text().count(part) for part in ("\n", "{")] == [1, 1]
        resource.prlimit(worker.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        assert worker.stderr.readline() == f"The record {record} is written again.\n"
        lines = [json.loads(line) for line in (first, worker.stdout.readline(), worker.stdout.readline())]
    finally:
        worker.terminate()
        rest = worker.communicate(timeout=60)
    assert rest == ("", "")
    assert names(lines) == ["a.png", "b.png", "c.png"]
    assert [{**line, "state": None} for line in recorded(record)] == [{**line, "state": None} for line in lines]


def test_a_record_with_foreign_lines(run: Run, set_clock: SetClock, exported: Path, folder: Path) -> None:
    """What is no line of watch is passed over and counted; a last line that was not finished is cut off."""
    arguments = ("watch", exported, folder, "--idle", "0.5")
    set_clock()
    assert len(run(*arguments)[1]) == 3
    record = folder / "predictions.jsonl"
    whole = record.read_bytes()
    foreign = [
        b"[1, 2]",
        b"7",
        b'{"source": 1, "state": [1, 2]}',
        b'{"source": "no state"}',
        b'{"source": "other state", "state": {"a": 1}}',
        b"\xff\xfe\x00no UTF-8",
        bytes(range(1, 9)),
        b"[" * 100_000,
    ]
    record.write_bytes(b"\n".join(foreign) + b"\n" + whole + b'{"source": "cut')
    shutil.copy(folder / "a.png", folder / "d.png")
    code, lines, errors = run(*arguments)
    assert (code, names(lines)) == (0, ["d.png"])
    assert errors == f"8 lines of the record {record} are damaged, or not of watch; they are passed over.\n"
    left = record.read_bytes()
    assert left.startswith(b"\n".join(foreign) + b"\n" + whole)
    assert json.loads(left.splitlines()[-1])["source"] == str(folder / "d.png")


def test_a_bundle_that_is_copied_over(
    run: Run, set_clock: SetClock, bundle: Path, folder: Path, products: Path, tmp_path: Path
) -> None:
    """File by file: what was known before judges until all is there, and that is said once."""
    newer = Path(shutil.copytree(bundle, tmp_path / "newer"))
    assert run("learn", newer, products / "dots" / "train" / "good", "--variant", "dots")[0] == 0
    dot = products / "dots" / "test" / "good" / "000.png"
    files = [path for path in sorted(newer.iterdir()) if path.is_file()]
    files.sort(key=lambda path: path.name != "metadata.json")
    events: list[Any] = []
    for number, path in enumerate(files):
        events += [partial(shutil.copy, path, bundle / path.name), partial(shutil.copy, dot, folder / f"{number}.png")]
        events += [None] * 30  # seconds in which it is not read again
    events.append(partial(shutil.copy, dot, folder / "last.png"))
    set_clock(*events)
    code, lines, errors = run("watch", bundle, folder, "--idle", "4", "--interval", "0.1")
    assert code == 3
    assert names(lines)[3:] == [*(f"{number}.png" for number in range(len(files))), "last.png"]
    variants = [line["variant"] for line in lines[3:]]
    assert variants == sorted(variants, reverse=True)  # first stripes, then dots
    assert (variants[0], variants[-1]) == ("stripes", "dots")
    said = [line for line in errors.splitlines() if "bundle" in line]
    assert said[0].startswith(f"The bundle {bundle} cannot be taken up now; what was known before goes on judging: ")
    assert said[1:] == [f"The bundle {bundle} is whole again."]


def test_a_bundle_of_another_model(
    run: Run, set_clock: SetClock, bundle: Path, without_bank: Path, folder: Path, products: Path, tmp_path: Path
) -> None:
    """It is gone for a while, and another model is in its place, which judges from then on; both are said."""
    bad = products / "stripes" / "test" / "hole"
    events = [
        lambda: bundle.rename(tmp_path / "old"),
        lambda: shutil.copy(bad / "000.png", folder / "gone.png"),
        *[None] * 5,
        lambda: shutil.copytree(without_bank, bundle),
        *[None] * 30,
        lambda: shutil.copy(bad / "001.png", folder / "other.png"),
    ]
    set_clock(*[None] * 3, *events)
    _, lines, errors = run("watch", bundle, folder, "--idle", "4", "--interval", "0.1")
    assert names(lines) == ["a.png", "b.png", "c.png", "gone.png", "other.png"]
    assert [line["variant"] for line in lines[3:]] == ["stripes", None]
    expected = EdgeDetector(without_bank).predict(folder / "other.png")
    assert lines[-1]["pred_score"] == pytest.approx(expected.pred_score, abs=1e-5)
    assert [line.removeprefix(f"The bundle {bundle} ") for line in errors.splitlines()] == [
        "cannot be taken up now; what was known before goes on judging: its metadata cannot be read.",
        "is of another model now, which judges from here on.",
        "is whole again.",
    ]


def test_lines_that_cannot_be_printed(
    set_clock: SetClock,
    exported: Path,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They go to a file on a full disk, for example: all images are judged and recorded."""
    with Path("/dev/full").open("w", encoding="utf-8") as full:
        set_clock()
        monkeypatch.setattr("sys.stdout", full)
        assert main(["watch", str(exported), str(folder), "--idle", "0.5"]) == 0
        monkeypatch.undo()
        with pytest.raises(OSError, match="No space left"):
            full.close()
    assert len(recorded(folder / "predictions.jsonl")) == 3
    assert capsys.readouterr().err.count("Lines cannot be printed: [Errno 28] No space left") == 1


def test_in_a_thread(exported: Path, folder: Path) -> None:
    """Where no signal can be set, it watches all the same."""
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(main(["watch", str(exported), str(folder), "--idle", "1"])))
    thread.start()
    thread.join()
    assert codes == [0]
    assert len(recorded(folder / "predictions.jsonl")) == 3

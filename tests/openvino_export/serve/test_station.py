# SPDX-License-Identifier: Apache-2.0
"""Tests of a station: what it judges, keeps and is taught."""

import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from openvino_export import EdgeDetector
from openvino_export.serve.parts import KeptParts, NotThereError
from openvino_export.serve.station import HeldBackError, PausedError, Station
from openvino_export.serve.teacher import Teacher


@pytest.fixture
def bad(products: Path) -> bytes:
    """Return the file of a defective part."""
    return (products / "stripes" / "test" / "hole" / "000.png").read_bytes()


def of(products: Path, product: str, kind: str = "test/good") -> list[bytes]:
    """Files of parts."""
    return [path.read_bytes() for path in sorted((products / product / kind).iterdir())]


# Judging


def test_a_verdict(station: Station, bundle: Path, products: Path, bad: bytes) -> None:
    """It is that of the detector, is told to who listens, and is kept with image and map."""
    told: list[dict[str, Any]] = []
    end = station.listen(told.append)
    path = products / "stripes" / "test" / "hole" / "000.png"
    verdict, expected = station.judge(bad, "part 7"), EdgeDetector(bundle).predict(path)
    assert (verdict["pred_label"], verdict["variant"], verdict["part"]) == (True, "stripes", "part 7")
    assert verdict["pred_score"] == pytest.approx(expected.pred_score, abs=1e-6)
    assert told == [{"event": "verdict", **verdict}]
    assert station.parts.verdict(verdict["id"]) == verdict
    assert station.parts.path(verdict["id"]).read_bytes() == bad
    levels = station.parts.levels(verdict["id"])
    np.testing.assert_allclose(levels / 255, expected.anomaly_map, atol=1 / 255)
    end()
    with Image.open(path) as image:
        frame = station.judge(np.asarray(image.convert("RGB")))
    assert frame["pred_score"] == verdict["pred_score"]
    assert len(told) == 1
    assert station.verdicts == {("stripes", "anomalous"): 2}


def test_what_cannot_be_judged(station: Station) -> None:
    """It is named, counted, and not kept."""
    with pytest.raises(ValueError, match=r"lid\.png cannot be read as an image"):
        station.judge(b"no image", name="lid.png")
    assert station.verdicts == {("", "undecided"): 1}
    assert not station.parts.latest(9)
    assert not list(station.parts.folder.iterdir())


def test_paused(station: Station, bad: bytes) -> None:
    """Parts are refused until it goes on."""
    station.pause(paused=True)
    with pytest.raises(PausedError):
        station.judge(bad)
    station.pause(paused=False)
    assert station.judge(bad)["id"] == 1


# Parts


def test_parts_are_bounded_and_survive(tmp_path: Path) -> None:
    """The oldest go; who starts anew goes on counting, and deletes what a kill left without a verdict."""
    parts = KeptParts(tmp_path, keep=3)
    for _ in range(5):
        number, _ = parts.begin(b"image")
        parts.say(number, {"id": number, "pred_label": number % 2 == 0}, np.full((2, 2), number, np.uint8))
    parts.begin(b"killed")
    assert [each["id"] for each in parts.latest(9)] == [5, 4, 3]
    assert [each["id"] for each in parts.latest(9, anomalous=True)] == [4]
    (tmp_path / f"{4:010}.json").write_text('{"cut', encoding="utf-8")
    again = KeptParts(tmp_path, keep=3)
    assert [each["id"] for each in again.latest(9)] == [5, 3]
    assert len(list(tmp_path.iterdir())) == 6
    assert again.begin(b"next")[0] == 7
    assert (again.levels(3) == 3).all()
    with pytest.raises(NotThereError, match="no part 4; the last 3 are kept"):
        again.levels(4)
    with pytest.raises(ValueError, match="At least one part"):
        KeptParts(tmp_path, keep=0)


# Teaching


def test_a_false_alarm_is_corrected(station: Station, bundle: Path, bad: bytes) -> None:
    """It must be confirmed; then the next one like it is good, also for who opens the bundle; undo goes back."""
    first = station.judge(bad)
    with pytest.raises(HeldBackError, match="times the threshold") as held_back:
        station.feedback(first["id"], "good", "Ann")
    assert next(iter(held_back.value.excess.values())) > 1
    assert held_back.value.would_pass == []
    assert not station.teacher.teachings
    teaching, report = station.feedback(first["id"], "good", "Ann", confirm=True)
    assert teaching is not None
    assert report.variants == {"stripes": 1}
    assert station.judge(bad)["pred_label"] is False
    assert EdgeDetector(bundle).predict(station.parts.path(first["id"])).pred_label is False
    assert station.undo("Bob").number == teaching.number
    again = station.judge(bad)
    assert (again["pred_label"], again["pred_score"]) == (True, first["pred_score"])
    assert [(line["who"], line["kind"]) for line in station.teacher.history(2)] == [("Bob", "undo"), ("Ann", "learn")]


def test_what_else_would_pass(station: Station, bad: bytes) -> None:
    """The same part, judged twice, is named when one of both is to be good."""
    one, other = station.judge(bad), station.judge(bad)
    with pytest.raises(HeldBackError) as held_back:
        station.feedback(one["id"], "good", "Ann")
    assert held_back.value.would_pass == [other["id"]]
    assert station.judge(bad)["pred_label"] is True


def test_a_missed_defect(station: Station, products: Path) -> None:
    """The next one like it is found."""
    with Image.open(products / "stripes" / "test" / "good" / "000.png") as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    pixels[20:28, 20:28] += 5
    missed = np.clip(pixels, 0, 255).astype(np.uint8)
    first = station.judge(missed)
    assert first["pred_label"] is False
    _, report = station.feedback(first["id"], "defective", "Ann", regions=(20, 20, 28, 28))
    assert report.shown == {"stripes": 1}
    assert station.judge(missed)["pred_score"] > first["pred_score"]
    with pytest.raises(ValueError, match="good or defective, got 'odd'"):
        station.feedback(first["id"], "odd", "Ann")
    with pytest.raises(NotThereError):
        station.feedback(99, "good", "Ann")


def test_a_new_product(station: Station, products: Path) -> None:
    """Each part that is shown is learned; from then on it is judged as that."""
    station.show_new_product("dots")
    for part in of(products, "dots", "train/good")[:8]:
        assert station.judge(part)["learned_as"] == "dots"
    station.show_new_product(None)
    station.close()
    known = station.detector.info()["variants"]["dots"]
    assert (known["images"], known["is_sure"]) == (8, True)
    verdict = station.judge(of(products, "dots")[0])
    assert (verdict["variant"], "learned_as" in verdict) == ("dots", False)


def test_any_teaching_can_be_taken_back(station: Station, products: Path, bundle: Path) -> None:
    """Also after a restart, and not only the last; one that others rest on stays."""
    files = {name: sorted((products / name / "train" / "good").iterdir()) for name in ("dots", "checks")}
    teacher = station.teacher
    first, _ = station.learn(files["dots"][:4], "Ann", variant="dots")
    second, _ = station.learn(files["checks"][:4], "Bob", variant="checks", force=True)
    third = station.change("set_decision", "Ann", variant="checks", false_alarm_rate=0.1)
    station.learn(files["dots"][4:6], "Ann", variant="dots", force=True)
    assert first is not None
    assert second is not None
    again = Teacher(bundle, station.parts.folder.parent)
    assert again.teachings == teacher.teachings
    with pytest.raises(ValueError, match=f"Teaching {third.number} rests on it"):
        again.undo("Bob", second.number)
    assert list(EdgeDetector(bundle).info()["variants"]) == ["stripes", "dots", "checks"]
    again.undo("Bob", first.number)
    expected = EdgeDetector(bundle)
    assert expected.info()["variants"]["dots"]["images"] == 2
    with pytest.raises(NotThereError, match=f"Teaching {first.number} cannot be taken back"):
        again.undo("Bob", first.number)
    for number in (third.number, second.number, None):
        again.undo("Bob", number)
    assert list(EdgeDetector(bundle).info()["variants"]) == ["stripes"]
    with pytest.raises(NotThereError, match="nothing to take back"):
        again.undo("Bob")


@pytest.mark.parametrize("error", [OSError("gone"), MemoryError("full"), KeyboardInterrupt()])
def test_an_undo_that_fails_on_its_way(
    error: BaseException, station: Station, products: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it is that fails, all that is known stays, also when more is taught afterwards."""
    dots = sorted((products / "dots" / "train" / "good").iterdir())
    first, _ = station.learn(dots[:3], "Ann", variant="dots")
    station.learn(dots[3:5], "Ann", variant="dots", force=True)
    assert first is not None
    with monkeypatch.context() as patch:
        patch.setattr(EdgeDetector, "learn", lambda *_, **__: (_ for _ in ()).throw(error))
        with pytest.raises((ValueError, type(error))):
            station.undo("Bob", first.number)
    station.learn(dots[5:6], "Ann", variant="dots", force=True)
    assert EdgeDetector(bundle).info()["variants"]["dots"]["images"] == 6


def test_a_teaching_whose_image_is_gone(
    station: Station, products: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The station starts all the same, and forgets nothing."""
    monkeypatch.setattr("openvino_export.serve.teacher.KEPT_TEACHINGS", 1)
    dots = sorted((products / "dots" / "train" / "good").iterdir())
    for path in dots[:3]:
        station.learn([path], "Ann", variant="dots", force=True)
    for gone in (station.parts.folder.parent / "taught").rglob("*.png"):
        gone.unlink()
    assert not Teacher(bundle, station.parts.folder.parent).teachings
    assert EdgeDetector(bundle).info()["variants"]["dots"]["images"] == 3


def test_many_teachings(station: Station, products: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a start the last ones can be taken back, the others stay learned and their images go."""
    monkeypatch.setattr("openvino_export.serve.teacher.KEPT_TEACHINGS", 2)
    for path in sorted((products / "dots" / "train" / "good").iterdir())[:4]:
        station.learn([path], "Ann", variant="dots", force=True)
    station.change("rename_variant", "Ann", variant="dots", new="spots")
    folder = station.parts.folder.parent
    numbers = [each.number for each in station.teacher.teachings]
    again = Teacher(bundle, folder)
    assert [each.number for each in again.teachings] == numbers[-2:]
    assert [int(path.name) for path in (folder / "taught").iterdir()] == numbers[3:4]
    assert len(list(folder.glob("base-*.safetensors"))) == 1
    assert Teacher(bundle, folder).teachings == again.teachings
    again.undo("Bob", numbers[4])
    again.undo("Bob", numbers[3])
    assert EdgeDetector(bundle).info()["variants"]["dots"]["images"] == 3
    assert not Teacher(bundle, folder).teachings


def test_another_program_teaches_too(station: Station, products: Path, bundle: Path) -> None:
    """Both are known; what was taught before can then not be taken back one by one."""
    dots, checks = (sorted((products / name / "train" / "good").iterdir()) for name in ("dots", "checks"))
    station.learn(dots[:3], "Ann", variant="dots")
    other = EdgeDetector(bundle)
    other.learn(checks[:3], "checks", force=True)
    other.save()
    station.learn(dots[3:5], "Ann", variant="dots", force=True)
    known = EdgeDetector(bundle).info()["variants"]
    assert {name: each["images"] for name, each in known.items()} == {"stripes": 20, "dots": 5, "checks": 3}
    assert len(station.teacher.teachings) == 1
    station.undo("Ann")
    assert EdgeDetector(bundle).info()["variants"]["dots"]["images"] == 3
    assert station.detector.info()["variants"]["dots"]["images"] == 3


def test_judging_takes_up_what_another_program_saves(station: Station, products: Path, bundle: Path) -> None:
    """Soon, without a teaching; a bundle that is damaged is told of once, and what was known before judges."""
    told: list[dict[str, Any]] = []
    other = EdgeDetector(bundle)
    other.learn(sorted((products / "dots" / "train" / "good").iterdir())[:8], "dots")
    other.save()
    station._next_look = 0
    assert station.judge(of(products, "dots")[0])["variant"] == "dots"
    station.listen(told.append)
    (bundle / "bank.safetensors").write_bytes(b"damaged")
    metadata = json.loads((bundle / "metadata.json").read_text(encoding="utf-8"))
    (bundle / "metadata.json").write_text(json.dumps(metadata, indent=3), encoding="utf-8")
    for _ in range(2):
        station._next_look = 0
        assert station.judge(of(products, "dots")[0])["variant"] == "dots"
    assert [each["event"] for each in told] == ["failed", "verdict", "verdict"]


def test_a_log_that_was_cut(station: Station, products: Path, bundle: Path) -> None:
    """Lines that cannot be read are passed over, and the next one begins anew."""
    station.learn(sorted((products / "dots" / "train" / "good").iterdir())[:3], "Ann", variant="dots")
    log = station.parts.folder.parent / "teachings.jsonl"
    log.write_bytes(log.read_bytes() + b'{"number": 9, "ki')
    again = Teacher(bundle, log.parent)
    assert len(again.teachings) == 1
    again.undo("Bob")
    assert json.loads(log.read_text(encoding="utf-8").splitlines()[-1])["kind"] == "undo"


def test_a_teaching_that_fails_changes_nothing(station: Station, products: Path, tmp_path: Path) -> None:
    """Neither what is known nor the log."""
    before = station.detector.info()
    log = (station.parts.folder.parent / "teachings.jsonl").read_bytes()
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    for call in (
        lambda: station.learn([*sorted((products / "dots" / "train" / "good").iterdir())[:2], broken], "Ann"),
        lambda: station.change("rename_variant", "Ann", variant="lid", new="cap"),
        lambda: station.change("delete_variant", "Ann", variant="stripes"),
    ):
        with pytest.raises(ValueError, match=r"broken\.png|no variant 'lid'|only variant"):
            call()
    assert station.detector.info() == before
    assert (station.parts.folder.parent / "teachings.jsonl").read_bytes() == log


def test_judging_while_teaching(station: Station, products: Path) -> None:
    """Nothing fails, and each verdict is that of before or after."""
    parts = of(products, "stripes", "test/hole")[:2]
    failures: list[BaseException] = []

    def judge() -> None:
        try:
            for _ in range(30):
                for part in parts:
                    assert station.judge(part)["pred_label"] is not None
        except BaseException as error:  # noqa: BLE001
            failures.append(error)

    threads = [threading.Thread(target=judge) for _ in range(3)]
    for thread in threads:
        thread.start()
    for path in sorted((products / "dots" / "train" / "good").iterdir())[:5]:
        station.learn([path], "Ann", variant="dots", force=True)
    station.undo("Ann")
    for thread in threads:
        thread.join()
    assert not failures
    assert sum(station.verdicts.values()) == 180
    assert len(station.parts.latest(99)) == 20
    assert len(list(station.parts.folder.iterdir())) == 60

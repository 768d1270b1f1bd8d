"doctor --self-test: silent where all is as recorded, and it names the part that differs."
import copy
import json
import math
import shutil

import pytest
from typer.testing import CliRunner

from qualivision.cli import app
from qualivision.commands import machine


@pytest.fixture(scope="module")
def here() -> dict: return machine.measured()


def call(*args):
    r = CliRunner().invoke(app, ["doctor", "--self-test", *args])
    assert r.exception is None or isinstance(r.exception, SystemExit), r.exception
    return r.exit_code, json.loads(r.stdout) if "--json" in args else " ".join(r.stdout.split())


def test_this_machine_computes_what_was_recorded(here, monkeypatch):
    "Towers, readers, text and heads; after heads were exchanged on purpose, `record_due` in chapter 93 records them anew."
    monkeypatch.setattr(machine, "measured", lambda: here)
    assert call("--json") == (0, {"compared": 28, "differ": []}) and call()[1] == "self-test: all 28 numbers are as recorded"


OTHER = [("text", "number 96"), ("tower", "features, mean"), ("reader, flicker.gif", "frames"), ("scores, steady.mp4", "temporal")]

@pytest.mark.parametrize("part,what", OTHER)
def test_a_difference_has_an_address(here, monkeypatch, part, what):
    other = copy.deepcopy(here)
    other[part][what] += .0025 if what != "frames" else 1
    monkeypatch.setattr(machine, "measured", lambda: other)
    status, found = call("--json")
    assert status == 1 and [(d["part"], d["what"]) for d in found["differ"]] == [(part, what)]
    assert f"{part}: {what} is" in call()[1]
    other[part][what] = here[part][what] + (.0005 if what != "frames" else 0)
    assert call("--json")[0] == 0, "what rounding may do is no difference"
    del other[part][what]
    assert call("--json")[1]["differ"][0]["found"] is None, "a number that is gone is one"


def test_what_cannot_be_computed_is_named(tmp_path, monkeypatch):
    "A damaged clip: reader and scores of that clip have a reason, all others their numbers."
    shutil.copytree(machine.TEST, tmp_path/"t")
    (tmp_path/"t"/"steady.mp4").write_bytes(b"no video")
    monkeypatch.setattr(machine, "TEST", tmp_path/"t")
    monkeypatch.setattr(machine, "_tower_numbers", lambda: json.loads((tmp_path/"t"/"due.json").read_text())["tower"])
    status, found = call("--json")
    assert status == 1 and [d["part"] for d in found["differ"]] == ["reader, steady.mp4", "scores, steady.mp4"]
    assert all("steady.mp4" in d["what"] for d in found["differ"]) and "steady.mp4" in call()[1]


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_what_is_no_number_is_never_close(here, monkeypatch, number):
    "NaN compares false with everything, and strict JSON has neither."
    for name in ("tower", "text"): monkeypatch.setattr(machine, f"_{name}_numbers", lambda name=name: dict(here[name]))
    for name in ("reader", "scores"): monkeypatch.setattr(machine, f"_{name.removesuffix('s')}_numbers", lambda c, name=name: here[f"{name}, {c}"])
    assert call("--json")[0] == 0
    monkeypatch.setattr(machine, "_tower_numbers", lambda: here["tower"] | {"features, mean": number})
    status, found = call("--json")
    assert status == 1 and [(d["part"], d["what"]) for d in found["differ"]] == [("tower", "features, mean: no finite number")]
    assert "tower: features, mean: no finite number" in call()[1]

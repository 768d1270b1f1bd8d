"`score-set --report`: which clips are shown, what a card says, text of others, lost films; and the page in a browser."
import io
import json
import re
import sqlite3
from contextlib import closing
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import tiny
from test_page import Tags
from typer.testing import CliRunner

from qualivision.cli import app
from qualivision.commands.sets import picture_or_film
from qualivision.evaluation.ranks import Distribution, ReferenceSet
from qualivision.inference.bulk import BulkError
from qualivision.pipeline.gallery import FAILED, ScoredRow, chosen, gallery, scored_rows
from qualivision.pipeline.page import film
from qualivision.quality import DIMENSIONS
from qualivision.toy import toy_clip

RUDE = '"><script>document.title="gone"</script><img src=x onerror=alert(1)> & \'q\''


def row(k, path, prompt="a cat", **scores):
    return ScoredRow(f"{k}.mp4", str(path), prompt, dict.fromkeys(DIMENSIONS) | scores, None, None)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "Twenty clips of one film: Overall has no score, one text is hostile, one film is lost, one prompt was cut; two files failed."
    at = tmp_path_factory.mktemp("gallery")
    path, rng = toy_clip(at/"a.mp4", (200, 60, 20)), np.random.default_rng(0)
    rows = [row(k, path, traditional=1 + k / 10, alignment=float(rng.uniform(1, 5)), temporal=2. if k else None) for k in range(20)]
    rows[3] = ScoredRow(RUDE, str(path), RUDE, rows[3].scores, None, None)
    rows[4] = ScoredRow("lost.mp4", str(at/"lost.mp4"), "a film that is gone", rows[4].scores, None, None)
    rows[5].scores.update(warnings=["the rest of the prompt is not seen"], reasons={"overall": "nobody was asked <b>"})
    rows += [ScoredRow(f"bad{k}.mp4", str(at/"x"), "", None, f"bad{k}: it is damaged", kind) for k, kind in enumerate(("crash", "timeout"))]
    intervals = {"level": .9, "source": "me", "dimensions": {"traditional": {"half_width": .5, "clips": 9, "prompts": 3}}, "reason": "none"}
    page = gallery(lambda: iter(rows), "set <i>", "dover", DIMENSIONS, intervals)
    (at/"page.html").write_text(page, encoding="utf-8")
    return SimpleNamespace(page=page, rows=rows, at=at, path=path, intervals=intervals)


def card(page, name): return next(c for c in page.split("<article")[1:] if f'data-name="{name}"' in c)


@pytest.mark.parametrize("n,most", [(0, 10), (1, 10), (7, 10), (10, 10), (11, 10), (5000, 500)])
def test_the_ends_and_an_even_sample(n, most):
    values = np.random.default_rng(n).random(n)
    found = chosen(values, most)
    ranks = [sorted(values).index(values[k]) for k in found]
    assert len(found) == min(n, most) and ranks == sorted(ranks)
    if n > most:
        assert ranks[:2 * most // 5] == list(range(2 * most // 5)) and ranks[-1] == n - 1
        between, end = ranks[2 * most // 5:most - 2 * most // 5], 2 * most // 5
        assert (between[0], between[-1]) == (end, n - 1 - end) and np.ptp(np.diff(between)) <= 1


def test_what_has_no_score_is_of_neither_end():
    found = chosen(np.array([np.nan, 3, 1, np.nan, 2, 4, 5]))
    assert [found[k] for k in (0, 3)] == ["between"] * 2 and found[2] == "worst" and found[6] == "best"
    assert set(chosen(np.full(3, np.nan)).values()) == {"between"}


def test_a_card_says_all_that_is_known(made):
    "Scores, intervals, places, flags; a score that no clip has is not a column, and its reason stands once."
    assert "Overall" not in card(made.page, "7.mp4") and "nobody was asked &lt;b&gt;" in made.page and made.page.count("nobody was asked") == 1
    cells = re.findall(r"<td>([^<]*)</td>", card(made.page, "7.mp4"))
    assert cells[0] == "1.70" and cells[3:6] == ["1.2–2.2", "–", "–"] and cells[6] == "35 %"           # seven of twenty lie below
    assert "not seen" in card(made.page, "5.mp4") and made.page.count(' data-flag>') == 1
    assert "no such file" in card(made.page, "lost.mp4") and "1.40" in card(made.page, "lost.mp4")
    assert all(f"bad{k}: it is damaged" in made.page for k in (0, 1)) and "1 crash, 1 timeout" in made.page
    assert made.page == gallery(lambda: iter(made.rows), "set <i>", "dover", DIMENSIONS, made.intervals)


def test_raw_scores_and_reference_sets(made):
    "Of DOVER the last score decides the order; its published sets are places too."
    rows = [ScoredRow(f"{k}", str(made.path), "", {"technical": -.1 * k, "fused": k / 10}, None, None) for k in range(6)]
    sets = [ReferenceSet("KNOWN", "dover", {"fused": Distribution.of(np.linspace(0, 1, 100))})]
    page = gallery(lambda: iter(rows), "s", "dover", ("technical", "fused"), None, sets)
    assert re.findall(r'data-name="(\d)', page) == list("012345") and "KNOWN" in page
    assert re.findall(r"<td>([^<]*)</td>", card(page, "3")) == ["−0.300", "0.300", "33 %", "50 %", "–", "29 %"]


def test_of_many_failures_the_first_are_shown():
    rows = [ScoredRow(f"{k}.mp4", "x", "", None, f"{k} is bad", "crash") for k in range(FAILED + 50)]
    page = gallery(lambda: iter(rows), "s", "dover", DIMENSIONS)
    assert f"{FAILED} of {FAILED + 50} are shown: {FAILED + 50} crash" in page and "<article" not in page
    assert len(re.findall("<td[^>]*>[0-9]+ is bad", page)) == FAILED


def test_text_of_others_is_text(made):
    tags = Tags(made.page)
    assert len(tags.of("script")) == len(tags.of("style")) == 1 and "<i>" not in made.page
    assert not [a for _, a in tags.tags if any(k.startswith("on") or k == "style" for k in a)]
    assert all(a["src"].startswith("data:image/") and len(a["alt"]) > 10 for a in tags.of("img")) and len(tags.of("img")) == 20
    assert RUDE in [a.get("data-name") for a in tags.of("article")]


def call(*args):
    done = CliRunner().invoke(app, [*map(str, args)])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, json.loads(done.stdout) if "--json" in args and done.stdout else done.stdout


@pytest.mark.usefixtures("one_thread")
def test_the_command_writes_it(tmp_path, monkeypatch):
    "One row has no file; the page has both clips, and a second call takes the scores over."
    monkeypatch.chdir(tmp_path)
    tiny.checkpoint(tmp_path/"model"), toy_clip(tmp_path/"a.mp4", (9, 200, 9)), toy_clip(tmp_path/"b.mp4", (200, 9, 9))
    pd.DataFrame({"video": ["a.mp4", "b.mp4", "none.mp4"], "Prompt": "a box"}).to_csv("set.csv", index=False)
    asked = ("score-set", "set.csv", "--model", "qualivision", "--checkpoint", "model", "--out", "s.csv", "--no-isolate")
    status, about = call(*asked, "--report", "page.html", "--json")
    page = (tmp_path/"page.html").read_text(encoding="utf-8")
    assert status == 1 and about["report"] == "page.html" and about["scored"] == 2 and page.count("<article") == 2 and "none.mp4" in page
    assert "report" not in call(*asked, "--json")[1]
    assert call(*asked, "--report", "page.pdf")[0] == 2 and call(*asked, "--report", str(tmp_path/"set.csv"/"p.html"))[0] != 0
    with closing(sqlite3.connect("s.csv.journal", isolation_level=None)) as db:
        db.execute("PRAGMA locking_mode = EXCLUSIVE"), db.execute("BEGIN EXCLUSIVE")
        with pytest.raises(BulkError, match="another process writes"): list(scored_rows("s.csv", SimpleNamespace(settings={})))
    with pytest.raises(BulkError, match="no journal"): list(scored_rows("other.csv", SimpleNamespace(settings={})))
    assert not list(scored_rows("s.csv", SimpleNamespace(settings={"other": 1}))), "rows of other settings are not of this run"


def test_a_still_picture_is_shown_as_it_is(tmp_path, made):
    "COVER scores pictures; the widest is no wider than a strip. A video is four frames."
    from PIL import Image
    Image.new("RGB", (900, 300), (9, 99, 200)).save(tmp_path/"a.png"), Image.new("RGB", (30, 90)).save(tmp_path/"b.png")
    def size(path): return Image.open(io.BytesIO(picture_or_film(path))).size
    assert size(tmp_path/"a.png") == (432, 144) and size(tmp_path/"b.png") == (30, 90)
    assert picture_or_film(made.path) == film(made.path)
    (tmp_path/"c.png").write_bytes((tmp_path/"a.png").read_bytes()[:60])
    rows = [ScoredRow("c.png", str(tmp_path/"c.png"), "", {"overall": .1}, None, None)]
    page = gallery(lambda: iter(rows), "s", "cover", ("overall",), open_film=picture_or_film)
    assert "No film: " in page and page.count("<article") == 1


def test_clicks_sort_and_filter(browser, made):
    browser.size(1200)
    browser.open((made.at/"page.html").as_uri())
    assert browser.loaded() == [(made.at/"page.html").as_uri()]
    assert not browser.seen("Runtime.exceptionThrown") and not browser.seen("Log.entryAdded") and "gone" not in browser.js("document.title")
    seen = "[...document.querySelectorAll('.gallery .clip')].filter(c => c.checkVisibility()).map(c => c.dataset.%s)"

    def click(what): browser.js(f"document.querySelector('button[data-{what}]').click()")
    click("sort=c0")
    assert browser.js(seen % "c0") == [str(1 + k / 10) for k in range(20)]
    click("sort=c0")
    assert browser.js(seen % "c0") == [str(1 + k / 10) for k in range(19, -1, -1)]
    click("sort=c2")
    assert browser.js(seen % "c2")[-1] == "", "without a score: last"
    click("show=worst")
    assert set(browser.js(seen % "kind")) == {"worst"} and browser.js("document.querySelector('#told').textContent") == "4 of 20 clips"
    click("show=flag")
    assert browser.js(seen % "name") == ["5.mp4"]
    click("show=all")
    browser.js("find.value = 'FILM that'; find.dispatchEvent(new Event('input'))")
    assert browser.js(seen % "name") == ["lost.mp4"]


def test_a_narrow_screen(browser, made):
    browser.size(360)
    browser.open((made.at/"page.html").as_uri())
    assert browser.js("document.documentElement.scrollWidth") == 360

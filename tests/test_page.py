"results/report.html: it stands alone, obeys no text of others, and a browser shows all of it on any screen."
import re
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from chapters import ROOT
from qualivision.evaluation.metrics import MetricError
from qualivision.evaluation.plots import save_figure
from qualivision.evaluation.protocol import results_table
from qualivision.pipeline.compare import by_generator
from qualivision.pipeline.page import FRAMES, ROOM, film, results_page
from qualivision.pipeline.table import described
from qualivision.quality import DIMENSIONS, MOS_COLUMNS
from qualivision.toy import toy_clip

LIMIT = 900_000
PROMPT = '"><script>document.title="gone"</script><img src="https://example.org/a.png" onerror=alert(1)> & \'quotes\''
NAME = "A_<script src=x>\"'&.mp4"


class Tags(HTMLParser):
    "What a page consists of: its tags, and all that it would load or run."
    def __init__(self, text: str):
        super().__init__()
        self.tags = []
        self.feed(text)

    def handle_starttag(self, tag, attrs): self.tags.append((tag, dict(attrs)))

    def of(self, name: str) -> list[dict]: return [a for tag, a in self.tags if tag == name]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "The page of invented results on 30 clips, all of one film; one of them has a hostile prompt and name."
    at, rng, n = tmp_path_factory.mktemp("page"), np.random.default_rng(0), 30
    labels, groups = rng.uniform(1, 5, (n, 5)), np.repeat(np.arange(6), 5)
    labels[3] = np.nan                                  # a clip without opinions
    of = {"dover": labels + rng.normal(0, .5, (n, 5)), "vjepa2": labels + rng.normal(0, 1, (n, 5)), "constant": np.full((n, 5), 3.)}
    for scores in of.values(): scores[3] = 3
    of["dover"][0] += 4
    results = results_table(of, labels, groups, ("dover", "vjepa2"), n=30)
    asked = pd.DataFrame({"video_name": [NAME, *(f"{'ABCDE'[k % 5]}_{k}.mp4" for k in range(1, n))], "Prompt": [PROMPT] + ["a cat"] * (n - 1),
                          "group": groups, "generator": [*"ABCD", '"><script src=x>'] * 6, "path": toy_clip(at/NAME, (200, 60, 20))})
    asked[list(MOS_COLUMNS)] = labels
    scores = {f"{row}_{d}": x[:, k] for row, x in {"label": labels, **of}.items() for k, d in enumerate(DIMENSIONS)}
    rows = asked[["video_name", "Prompt", "group", "generator"]].assign(**scores)
    about = {"models": ["dover", "vjepa2"], "compare": {"split": "test", "labels": "labels of <b>me</b>", "parameters": {"resamples": 20}}}
    names = ("asked", "meaning", "limits", "marks", "rows", "verdicts", "differences", "intervals", "training", "facts", "settings")
    texts = {name: f"*{name}* [chapter 1](https://example.org) ![x](https://example.org/x.png) <script>" for name in names}
    within = by_generator({m: of[m] for m in about["models"]}, asked, 20)
    save_figure(Figure((9, 2)), at/"drawn.png")

    def write(rows=rows):
        drawn = {name: (at/"drawn.png", f"caption of {name}") for name in ("rows", "scatter", "curves", "road")}
        return results_page(results, within, about, {"train": asked[:0], "val": asked, "test": asked}, rows, texts, drawn)
    page = write()
    (at/"report.html").write_text(page, encoding="utf-8")
    return SimpleNamespace(page=page, write=write, rows=rows, within=within, at=at, path=asked["path"][0])


@pytest.fixture(params=["invented", "results/report.html"])
def page(request, made) -> str:
    if request.param == "invented": return made.page
    if not (ROOT/request.param).exists(): pytest.skip("the report stage has not run")
    return (ROOT/request.param).read_text(encoding="utf-8")


def test_it_stands_alone(page):
    "Nothing is loaded, one script and one style are allowed by their hashes, pictures are inside and have texts."
    tags = Tags(page)
    addresses = [v for _, a in tags.tags for k, v in a.items() if k in ("src", "href", "srcset", "action", "data")]
    assert addresses and all(v.startswith(("data:", "#")) for v in addresses) and "url(" not in page and "@import" not in page
    policy = next(a["content"] for a in tags.of("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; img-src data:; ") and "unsafe" not in policy and "http" not in policy
    assert len(tags.of("script")) == len(tags.of("style")) == 1
    assert not [a for _, a in tags.tags if any(k.startswith("on") or k == "style" for k in a)]
    assert len(tags.of("img")) >= 18 and all(len(a["alt"]) > 10 and a["src"].startswith("data:image/") for a in tags.of("img"))
    assert len(page.encode()) <= LIMIT


def test_text_of_others_is_text(made):
    tags = Tags(made.page)
    assert made.page.count("document.title") >= 2        # in a card and in an alternative text
    assert PROMPT in "".join(a["alt"] for a in tags.of("img")) and NAME in "".join(a["alt"] for a in tags.of("img"))
    assert not [a for a in tags.of("a") if not a["href"].startswith("#")] and "<b>me" not in made.page
    assert "https://example.org" not in "".join(v or "" for tag, a in tags.tags for k, v in a.items() if k != "alt")


def test_the_same_again_and_not_of_other_clips(made):
    assert made.write() == made.page
    with pytest.raises(MetricError, match="dvc repro"): made.write(made.rows[::-1])


def test_the_worst_clip_comes_first(made):
    cards = re.findall(r"mean error ([\d.]+)", made.page)
    errors = np.array([float(e) for e in cards]).reshape(4, 3)         # of both models: the worst, the best
    assert errors[0, 0] > 3 and all((np.diff(e) <= 0).all() for e in errors[::2]) and all((np.diff(e) >= 0).all() for e in errors[1::2])
    assert errors[::2].min() > errors[1::2].max()
    assert "D_3.mp4" not in made.page, "nobody has an opinion on it"


def test_each_bar_has_its_number(made):
    "The table under the bars holds what compare wrote, interval included."
    for model, name in (("dover", "DOVER++"), ("vjepa2", "V-JEPA 2")):
        line, = re.findall(rf'<tr><th scope="row" data-v="B, {re.escape(name)}">.*', made.page)
        cells = [made.within[model]["B"][d] for d in DIMENSIONS]
        assert re.findall(r'<td data-v="([^"]+)">', line) == [str(c["srocc"]) for c in cells]
        assert re.findall(r"\[([^]]+)\]", line) == ["{:.2f},\u00a0{:.2f}".format(*c["interval"]) for c in cells]


def test_every_row_says_what_it_sees(made):
    "A row that nobody has described is an error, not a row that sees pixels."
    assert described("low_level")[0] == described("hand_crafted")[0] == "pixels, no network"
    assert described("dover_scratch")[0] == described("dover")[0]
    assert made.page.count('<td data-v="nothing">') == 3
    with pytest.raises(KeyError): described("another")


def test_strips_are_small(made, tmp_path, monkeypatch):
    "Noise, which JPEG cannot make small, takes a lower quality; a tall clip keeps 96 pixels."
    from PIL import Image
    monkeypatch.setattr("qualivision.pipeline.page.read_frames",
                        lambda path, indices: np.random.default_rng(0).integers(0, 256, (len(indices(48)), 320, 60, 3), np.uint8))
    (tmp_path/"noise.jpg").write_bytes(film("noise.mp4"))
    image = Image.open(tmp_path/"noise.jpg")
    assert image.size == (FRAMES * 96 + 2 * (FRAMES - 1), 144) and (tmp_path/"noise.jpg").stat().st_size <= ROOM


def opened(browser, made):
    browser.size(1200)
    browser.open((made.at/"report.html").as_uri())
    return browser


def test_a_browser_loads_nothing_and_complains_of_nothing(browser, made):
    opened(browser, made)
    assert browser.loaded() == [(made.at/"report.html").as_uri()]
    assert not browser.seen("Runtime.exceptionThrown") and not browser.seen("Runtime.consoleAPICalled") and not browser.seen("Log.entryAdded")
    assert browser.js("document.title").startswith("QualiVision")
    assert browser.js("[...document.images].every(i => i.complete && i.naturalWidth > 0 && i.getBoundingClientRect().width > 200)")
    fetched = browser.js("fetch('https://example.org').then(() => 'loaded', () => 'refused')")
    assert fetched == "refused" and any("Content Security Policy" in e["entry"]["text"] for e in browser.seen("Log.entryAdded"))


def test_a_click_sorts(browser, made):
    opened(browser, made)
    rows = "[...document.querySelector('table.sort').tBodies[0].rows].map(r => r.cells[0].textContent)"
    assert browser.js(rows) == ["DOVER++", "V-JEPA 2", "constant"]

    def click(column):
        browser.js(f"document.querySelector('table.sort').tHead.rows[0].cells[{column}].querySelector('button').click()")
        return browser.js(rows)
    click(1)
    values = "[...document.querySelector('table.sort').tBodies[0].rows].map(r => r.cells[1].dataset.v)"
    high = browser.js(values)
    assert float(high[0]) > float(high[1]) and high[2] == "" and browser.js("document.querySelector('th[aria-sort]').ariaSort") == "descending"
    click(1)
    assert browser.js(values) == [high[1], high[0], ""], "without a value: last, either way"
    assert click(0) == ["constant", "DOVER++", "V-JEPA 2"] and click(0) == ["V-JEPA 2", "DOVER++", "constant"], "words: from A on, first"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_narrow_dark_and_on_paper(browser, made, scheme):
    "At 360 pixels the page does not scroll sideways; letters stand out from the ground; paper is white."
    opened(browser, made)
    browser("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    browser.size(360)
    assert browser.js("document.documentElement.scrollWidth") == 360 == browser.js("innerWidth")
    assert browser.js("parseFloat(getComputedStyle(document.body).fontSize)") >= 16
    ground = "[...getComputedStyle(document.body).%s.matchAll(/\\d+/g)].slice(0, 3).reduce((a, b) => a + +b, 0)"
    back, ink = browser.js(ground % "backgroundColor"), browser.js(ground % "color")
    assert (back < 120 and ink > 600) if scheme == "dark" else (back > 700 and ink < 120)
    browser("Emulation.setEmulatedMedia", media="print", features=[{"name": "prefers-color-scheme", "value": scheme}])
    assert browser.js(ground % "backgroundColor") == 765
    browser("Emulation.setEmulatedMedia", media="", features=[])

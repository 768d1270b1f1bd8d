"The certificate of official weights, with stand-ins: a tiny network for the weights, a local clip for the one on the network."
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch

from qualivision.data.container import write_video
from qualivision.models.weights import WeightsError
from qualivision.official import certify, scorer


@pytest.fixture
def call(tmp_path, monkeypatch):
    "The command among a clip and small weights; nothing was pulled, and what is published is what they give."
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QUALIVISION_WEIGHTS", str(tmp_path/"w"))
    monkeypatch.setitem(scorer.NETWORKS, "dover", tiny.Mobile)
    cells = np.random.default_rng(0).integers(0, 256, (12, 16, 16, 3), dtype=np.uint8)
    write_video(tmp_path/"clip.mp4", cells.repeat(16, 1).repeat(16, 2))
    torch.manual_seed(0)
    torch.save(tiny.Mobile().state_dict(), tmp_path/"small.pth")
    rated = scorer.OfficialScorer.from_weights("dover", "small.pth", device="cpu").score("clip.mp4")
    scores = {b: rated[b] for b in ("technical", "aesthetic")}
    known = replace(certify.CERTIFICATES["dover"], scores=scores, ranks=certify._ranks(scores, "dover"))
    monkeypatch.setitem(certify.CERTIFICATES, "dover", known)
    def run(*args):
        status, said, err = tiny.command("weights", "certify", *args)
        return status, said, " ".join(err.split())
    run.known = known
    return run


GIVEN = "--weights", "small.pth", "--device", "cpu", "--seeds", "1"


def test_the_numbers_agree_or_are_named(call, monkeypatch):
    "Twenty-two of them; a published score that is another is named, and a rank."
    status, about, _ = call("DOVER", *GIVEN, "--clip", "clip.mp4", "--json")
    assert status == 0 and about["agrees"] and len(about["numbers"]) == 22 and about["seeds"] == 1 and "non-commercial" in about["weights"]["licence"]
    other = {**call.known.scores, "technical": call.known.scores["technical"] + 1}
    monkeypatch.setitem(certify.CERTIFICATES, "dover", replace(call.known, scores=other))
    status, about, _ = call("dover", *GIVEN, "--clip", "clip.mp4", "--json")
    assert status == 1 and [r["what"] for r in about["numbers"] if not r["agrees"]] == ["technical"]
    status, text, _ = call("dover", *GIVEN, "--clip", "clip.mp4")
    assert status == 1 and "21 of 22 published numbers agree" in text and text.count("  differs") == 1
    at = call.known.ranks["LIVE-VQC"]
    ranks = {**call.known.ranks, "LIVE-VQC": {**at, "aesthetic": (-1, at["aesthetic"][1])}}
    monkeypatch.setitem(certify.CERTIFICATES, "dover", replace(call.known, ranks=ranks))
    status, about, _ = call("dover", *GIVEN, "--clip", "clip.mp4", "--json")
    assert status == 1 and [r["what"] for r in about["numbers"] if not r["agrees"]] == ["LIVE-VQC, aesthetic, percent"]


def test_the_clip_comes_from_its_address_once(call, tmp_path, monkeypatch):
    "Weights are pulled unless given; the clip lies beside them, and is not fetched again."
    fetched, pulled = [], []
    def download(url, to, **_):
        fetched.append(url)
        to.parent.mkdir(parents=True)
        to.write_bytes((tmp_path/"clip.mp4").read_bytes())
        return to
    def pull(name, **_):
        pulled.append(name)
        raise WeightsError(name, "it is not on this machine and there is no way to its server", "Pull it elsewhere.")
    monkeypatch.setattr(certify, "download", download)
    monkeypatch.setattr(certify, "pull", pull)
    assert call("dover", *GIVEN, "--json")[1]["clip"] == str(tmp_path/"w"/"clips"/"17734.mp4")
    assert call("dover", *GIVEN)[0] == 0 and fetched == [call.known.url] and "VQAssessment/DOVER" in fetched[0] and not pulled
    status, text, err = call("dover", "--device", "cpu")
    assert status == 1 and not text and "no way to its server" in err and pulled == ["dover"] and len(fetched) == 1


def test_what_has_no_published_number(call):
    for name in ("cover", "dover-mobile", "dover++"):
        status, _, err = call(name)
        assert status == 1 and err.startswith(f"{name}: no published number of a public file") and "There is one for dover" in err
    assert call("nothing")[0] == 1

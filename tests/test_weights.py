"Weights: what may not be loaded is refused with a reason, and a checkpoint is whole at every moment."
import hashlib
import json
import os
import pickle
import random
import shutil
import signal
import threading
import time
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.request import Request

import numpy as np
import pytest
import torch
from forked import Forked
from safetensors.torch import save_file
from torch import nn

from qualivision.files import FileError, file_sha256
from qualivision.models import store
from qualivision.models.store import REGISTRY, Entry, download, list_weights, pull
from qualivision.models.weights import (
    WeightsError, compare, inspect, inspect_file, load_checkpoint, load_strict, read_file,
    read_state, save_checkpoint)

META = dict(config=dict(width=8), data_hash="0" * 64, metrics=dict(srocc=0.5), licence="MIT", trained_on="simulated labels")


def net(width=8, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 5))


class Trap:
    def __init__(self, path): self.path = path
    def __reduce__(self): return os.system, (f"touch {self.path}",)


# ---------------------------------------------------------------- files

@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s}, lambda s: {"state_dict": s, "validation_results": {"plcc": 0.8}}])
def test_layouts_of_a_pth(tmp_path, wrap):
    torch.save(wrap(net().state_dict()), tmp_path/"w.pth")
    assert load_strict(net(seed=1), read_state(tmp_path/"w.pth")).coverage == 1


def test_old_zipless_pth(tmp_path):
    torch.save(net().state_dict(), tmp_path/"w.pth", _use_new_zipfile_serialization=False)
    assert read_state(tmp_path/"w.pth").keys() == net().state_dict().keys()


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_runs_code_is_refused_and_does_not_run(tmp_path, zipped):
    torch.save({"weight": torch.ones(2), "x": Trap(tmp_path/"ran")}, tmp_path/"w.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(WeightsError, match=r"w\.pth: it wants to call posix\.system"): read_state(tmp_path/"w.pth")
    assert not (tmp_path/"ran").exists()


def test_a_plain_pickle_is_refused_and_does_not_run(tmp_path):
    (tmp_path/"w.pth").write_bytes(pickle.dumps(Trap(tmp_path/"ran")))
    with pytest.raises(WeightsError): read_state(tmp_path/"w.pth")
    assert not (tmp_path/"ran").exists()


@pytest.mark.parametrize("number", [np.float64(0.25), np.float32(0.25), np.int64(3)])
def test_numpy_numbers_beside_the_state_dict(tmp_path, number):
    "As DOVER++'s file may hold them, of either numpy."
    torch.save({"state_dict": net().state_dict(), "validation_results": {"plcc": number, "all": [number]}}, tmp_path/"w.pth",
               _use_new_zipfile_serialization=False)
    data = (tmp_path/"w.pth").read_bytes()
    assert b"numpy._core.multiarray" in data
    (tmp_path/"old.pth").write_bytes(data.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    for name in ("w.pth", "old.pth"):
        state, beside = read_file(tmp_path/name)
        assert state.keys() == net().state_dict().keys() and beside == {"validation_results": {"plcc": number, "all": [number]}}


class Numpy:
    "A numpy number of which the pickle is up to something."
    def __init__(self, *reduced): self.reduced = reduced
    def __reduce__(self): return self.reduced


SCALAR = np.float64(0).__reduce__()[0]


@pytest.mark.parametrize("thing", [np.ones(3), np.array([None]), np.dtype([("a", "O")]), np.datetime64("2020-01-01"), Numpy(np.load, ("x.npy",)),
                                   Numpy(np.save, ("ran", [1])), Numpy(SCALAR, (np.dtype("O"), b"x"))])
def test_of_numpy_only_numbers(tmp_path, thing):
    torch.save({"state_dict": net().state_dict(), "x": thing}, tmp_path/"w.pth")
    with pytest.raises(WeightsError, match=r"w\.pth"): read_state(tmp_path/"w.pth")
    assert not (tmp_path/"ran.npy").exists() and not Path("ran.npy").exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_truncated_pth(tmp_path, zipped):
    torch.save(net().state_dict(), tmp_path/"w.pth", _use_new_zipfile_serialization=zipped)
    whole = (tmp_path/"w.pth").read_bytes()
    for share in (0, 0.01, 0.3, 0.6, 0.9, 0.999):
        (tmp_path/"w.pth").write_bytes(whole[:int(share * len(whole))])
        with pytest.raises(WeightsError, match=r"w\.pth"): read_state(tmp_path/"w.pth")


def test_truncated_safetensors(tmp_path):
    save_file(net().state_dict(), tmp_path/"w.safetensors")
    whole = (tmp_path/"w.safetensors").read_bytes()
    for share in (0, 0.01, 0.3, 0.6, 0.999):
        (tmp_path/"w.safetensors").write_bytes(whole[:int(share * len(whole))])
        with pytest.raises(WeightsError, match="not a whole safetensors file"): read_state(tmp_path/"w.safetensors")


@pytest.mark.parametrize("content", [b"<html>not found</html>", b"\x00" * 200, bytes(range(256)) * 4, b"PK\x03\x04broken", b"version https://git-lfs"])
def test_files_that_are_no_weights(tmp_path, content):
    for name in ("w.pth", "w.pt", "w.bin", "w.safetensors", "w.h5", "w"):
        (tmp_path/name).write_bytes(content)
        with pytest.raises(WeightsError, match=rf"{name}: "): read_state(tmp_path/name)


@pytest.mark.parametrize("thing", [[torch.ones(2)], {}, {"weight": torch.ones(2), "epoch": 3}, {"model": {"weight": torch.ones(2)}}, torch.ones(3)])
def test_a_pth_without_a_state_dict(tmp_path, thing):
    torch.save(thing, tmp_path/"w.pth")
    with pytest.raises(WeightsError): read_state(tmp_path/"w.pth")


@pytest.mark.parametrize("wrap,layout", [(lambda s: s, "state dict"), (lambda s: {"state_dict": s}, "state_dict entry"),
                                         (lambda s: {"state_dict": s, "epoch": 3}, "state_dict entry")])
def test_the_layout_is_named(tmp_path, wrap, layout):
    torch.save(wrap(net().state_dict()), tmp_path/"w.PTH")
    assert inspect_file(tmp_path/"w.PTH")["layout"] == layout


def test_missing_file(tmp_path):
    with pytest.raises(WeightsError, match="no such file"): read_state(tmp_path/"w.pth")
    with pytest.raises(WeightsError, match="no such file"): read_state(tmp_path)


# ---------------------------------------------------------------- loading

def test_report_accounts_for_every_tensor():
    state = net().state_dict()
    state["new"] = state.pop("0.bias")
    state["2.weight"] = torch.ones(5, 9)
    report = compare(net(), state)
    assert report.matched == ("0.weight", "2.bias") and report.missing == ("0.bias",) and report.unexpected == ("new",)
    assert report.mismatched == (("2.weight", (5, 9), (5, 8)),) and report.coverage == (32 + 5) / (32 + 8 + 40 + 5)
    assert all(word in str(report) for word in ("2 tensors match", "1 missing: 0.bias", "1 unexpected: new", "2.weight (5, 9) for (5, 8)"))


@pytest.mark.parametrize("damage", [lambda s: s.pop("0.bias"), lambda s: s.update(extra=torch.ones(1)), lambda s: s.update({"2.bias": torch.ones(4)}),
                                    lambda s: s["2.bias"].fill_(torch.nan), lambda s: s["2.bias"].fill_(torch.inf), lambda s: s.clear()])
def test_what_does_not_fit_is_refused_and_changes_nothing(damage):
    state, module = {k: v.clone() for k, v in net().state_dict().items()}, net(seed=1)
    before = {k: v.clone() for k, v in module.state_dict().items()}
    damage(state)
    with pytest.raises(WeightsError): load_strict(module, state)
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())


def test_weights_of_another_model():
    "0 of the official names are those of the published model: once silent, now an error with the numbers."
    official = {f"stages.{i}.dwconv.weight": torch.ones(2) for i in range(381)}
    with pytest.raises(WeightsError, match="0 tensors match, 0.0% .* 381 unexpected"): load_strict(net(), official)


def test_the_file_is_named_where_it_is_known():
    with pytest.raises(WeightsError, match=r"^who/sent\.pth: these weights do not fit Sequential \(.*weights inspect"):
        load_strict(net(), {}, source=Path("who/sent.pth"))
    bad = {k: v * torch.nan for k, v in net().state_dict().items()}
    with pytest.raises(WeightsError, match=r"^sent\.pth: 4 tensors hold NaN"): load_strict(net(), bad, source="sent.pth")


def test_what_may_miss_must_be_named():
    state = {k: v for k, v in net().state_dict().items() if k.startswith("0.")}
    with pytest.raises(WeightsError): load_strict(net(), state, may_miss=["1.*"])
    report = load_strict(net(seed=1), state, may_miss=["2.*"])
    assert report.missing == ("2.weight", "2.bias") and 0 < report.coverage < 1
    with pytest.raises(WeightsError): load_strict(net(), {**state, "2.bias": torch.ones(3)}, may_miss=["2.*"])   # missing is not misshapen


def test_inspect_says_what_is_in_a_file_and_how_it_fits(tmp_path):
    state = {**net().state_dict(), "2.bias": torch.full((5,), torch.nan)}
    torch.save({"state_dict": state, "validation_results": [1]}, tmp_path/"w.pth")
    save_file(net().state_dict(), tmp_path/"w.safetensors")
    about = inspect_file(tmp_path/"w.pth")
    assert about["layout"] == "state_dict entry" and about["beside"] == ["validation_results"] and about["not_finite"] == ["2.bias"]
    assert about["numbers"] == 85 and about["parts"] == {"0": {"tensors": 2, "numbers": 40}, "2": {"tensors": 2, "numbers": 45}}
    assert about["sha256"] == file_sha256(tmp_path/"w.pth") and about["bytes"] == (tmp_path/"w.pth").stat().st_size
    assert inspect_file(tmp_path/"w.safetensors")["layout"] == "safetensors" and json.dumps(about)
    module = net(seed=1)
    before = module[0].weight.clone()
    assert inspect(tmp_path/"w.pth", module).coverage == 1 and torch.equal(module[0].weight, before)           # it only looks
    other = inspect(tmp_path/"w.safetensors", net(width=9))
    assert other.matched == ("2.bias",) and len(other.mismatched) == 3
    for name in ("gone.pth", "cut.pth"):
        (tmp_path/"cut.pth").write_bytes((tmp_path/"w.pth").read_bytes()[:900])
        with pytest.raises(WeightsError, match=name): inspect_file(tmp_path/name)


# ---------------------------------------------------------------- checkpoints

def test_there_and_back(tmp_path):
    save_checkpoint(tmp_path/"a", net(), META)
    state, meta = load_checkpoint(tmp_path/"a")
    assert all(torch.equal(v, state[k]) for k, v in net().state_dict().items()) and META.items() <= meta.items()
    assert sorted(p.name for p in (tmp_path/"a").iterdir()) == ["model.json", "model.safetensors"]
    save_checkpoint(tmp_path/"b", net(), META)
    for name in ("model.json", "model.safetensors"): assert file_sha256(tmp_path/"a"/name) == file_sha256(tmp_path/"b"/name)


def test_files_that_do_not_belong_together(tmp_path):
    save_checkpoint(tmp_path/"a", net(), META)
    save_checkpoint(tmp_path/"b", net(seed=1), META)
    shutil.copy(tmp_path/"a/model.json", tmp_path/"b/model.json")
    with pytest.raises(WeightsError, match="SHA-256 differs"): load_checkpoint(tmp_path/"b")
    flipped = bytearray((tmp_path/"a/model.safetensors").read_bytes())
    flipped[-1] ^= 1
    (tmp_path/"a/model.safetensors").write_bytes(flipped)
    with pytest.raises(WeightsError, match="SHA-256 differs"): load_checkpoint(tmp_path/"a")


@pytest.mark.parametrize("text", ["", "{", "[1]", "{}", '{"trained_on": "x"}'])
def test_a_json_that_says_nothing(tmp_path, text):
    save_checkpoint(tmp_path, net(), META)
    (tmp_path/"model.json").write_text(text)
    with pytest.raises(WeightsError): load_checkpoint(tmp_path)


def test_half_a_checkpoint(tmp_path):
    with pytest.raises(WeightsError, match="not both"): load_checkpoint(tmp_path/"nothing")
    for name in ("model.json", "model.safetensors"):
        save_checkpoint(tmp_path, net(), META)
        (tmp_path/name).unlink()
        with pytest.raises(WeightsError, match="not both"): load_checkpoint(tmp_path)


def test_what_json_cannot_hold_leaves_the_old_checkpoint(tmp_path):
    save_checkpoint(tmp_path, net(), META)
    for bad in (dict(srocc=float("nan")), dict(tensor=torch.ones(1))):
        with pytest.raises(WeightsError, match="JSON"): save_checkpoint(tmp_path, net(seed=1), bad)
        assert torch.equal(load_checkpoint(tmp_path)[0]["0.bias"], net().state_dict()["0.bias"])


def save_for_ever(folder: Path, ready: Path):
    module, i = nn.Linear(300, 300), 0
    while True:
        with torch.no_grad(): module.weight.fill_(i)
        save_checkpoint(folder, module, dict(i=i))
        if i == 0: ready.touch()
        i += 1


def test_killed_for_real(tmp_path, one_thread):
    "A process that does nothing but save is killed; what it leaves is one of its checkpoints, whole, and it can go on from there."
    rng, folder = random.Random(0), tmp_path/"saved"
    for k in range(3):
        process, ready = Forked(partial(save_for_ever, folder, tmp_path/str(k))), tmp_path/str(k)
        while not ready.exists() and process.poll() is None: time.sleep(.01)
        time.sleep(rng.uniform(0, 0.1))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, process.communicate()
        state, meta = load_checkpoint(folder)
        assert (state["weight"] == meta["i"]).all()
    assert json.loads((folder/"model.json").read_text())["i"] == meta["i"]


# ---------------------------------------------------------------- published weights

CONTENT = np.random.default_rng(0).bytes(300_000)


class Server(BaseHTTPRequestHandler):
    "One file at /w.bin, and the hub's way of offering it. What goes wrong is set on the server."
    protocol_version = "HTTP/1.1"
    def log_message(self, *a): pass

    def reply(self, code, body=b"", sent=None, **headers):
        self.send_response(code)
        for name, value in {"Content-Length": len(body), **headers}.items(): self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command == "GET": self.wfile.write(body[:sent])
        if sent is not None: self.close_connection = True

    def do_HEAD(self): self.do_GET()

    def do_GET(self):
        s, content = self.server, self.server.content
        if self.command == "GET": s.asked.append((self.path, self.headers.get("Range")))
        if self.path == "/": return self.reply(200)
        if self.path.startswith("/api/models/who/what/revision"):
            return self.reply(200, json.dumps({"id": "who/what", "sha": "a" * 40, "siblings": []}).encode(), Content_Type="application/json")
        if self.path.startswith("/api/models/who/what/tree"):
            sha = s.sha or hashlib.sha256(content).hexdigest()
            large = {"size": len(content), "lfs": {"oid": sha, "size": len(content), "pointerSize": 9}}
            files = [{"type": "file", "path": "config.json", "size": 2, "oid": "b" * 40}, {"type": "file", "path": "w.bin", "oid": "c" * 40, **large}]
            return self.reply(200, json.dumps(files).encode(), Content_Type="application/json")
        if self.path.endswith("config.json"): return self.reply(200, b"{}", ETag=f'"{"b" * 40}"', X_Repo_Commit="a" * 40)
        if self.path in s.leads: return self.reply(302, Location=s.leads[self.path])
        if not self.path.endswith("w.bin"): return self.reply(404)
        tag = f'"{s.sha or hashlib.sha256(content).hexdigest()}"' if s.etag is None else s.etag
        headers = {"X_Repo_Commit": "a" * 40, **({"ETag": tag} if tag else {})}
        start, same = int((self.headers.get("Range") or "bytes=0-")[6:].split("-")[0]), self.headers.get("If-Range") in (None, tag)
        if not s.ranges or not same: start = 0
        if start >= len(content): return self.reply(416)
        if start and same: headers["Content_Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        sent = s.cuts.pop(0) if s.cuts and self.command == "GET" else None
        self.reply(206 if start else 200, content[start:], sent, **headers)


@pytest.fixture
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as s:
        s.leads = {}
        s.content, s.asked, s.cuts, s.etag, s.ranges, s.sha, s.url = CONTENT, [], [], None, True, None, f"http://127.0.0.1:{s.server_port}"
        threading.Thread(target=s.serve_forever, args=(0.02,), daemon=True).start()
        yield s
        s.shutdown()


@pytest.fixture
def tool(server, monkeypatch):
    "An entry of the registry that lives on the server."
    def add(**more):
        e = Entry("tool", "w.bin", "MIT", "nothing", **{"url": f"{server.url}/w.bin", **more})
        monkeypatch.setitem(REGISTRY, "tool", e)
        return e
    return add


@pytest.mark.parametrize("url", ["http://example.org/w.bin", "http://127.0.0.1.example.org/w.bin", "ftp://example.org/w.bin", "file:/w.bin"])
def test_only_what_is_encrypted_is_fetched(server, tmp_path, url):
    "Neither at once nor where a server leads there; nothing is written. This machine needs no encryption, but nobody is led to it from outside."
    server.leads["/away/w.bin"] = url
    for asked in (url, f"{server.url}/away/w.bin"):
        with pytest.raises(WeightsError, match="https|is not allowed"): download(asked, tmp_path/"w.bin", progress=False)
    assert not list(tmp_path.iterdir())
    redirect = partial(store._Encrypted().redirect_request, Request("https://example.org/w.bin"), None, 302, "", {})
    for lower in (url, f"{server.url}/w.bin"):
        with pytest.raises(WeightsError, match="https"): redirect(lower)
    assert redirect("https://other.example.org/w.bin").full_url == "https://other.example.org/w.bin"
    server.leads["/near/w.bin"] = "/w.bin"
    assert download(f"{server.url}/near/w.bin", tmp_path/"w.bin", progress=False).read_bytes() == CONTENT


def test_the_registered_addresses_are_encrypted():
    found = [e for e in REGISTRY.values() if not e.shipped]
    assert len(found) > 5
    for e in found: store.check_address(e.address)


def ranges(server): return [r for path, r in server.asked if path == "/w.bin"]


def test_a_download_that_breaks_goes_on(server, tmp_path):
    server.cuts = [100_000, 50_000]
    assert download(f"{server.url}/w.bin", tmp_path/"w.bin", progress=False).read_bytes() == CONTENT
    assert ranges(server) == [None, "bytes=100000-", "bytes=150000-"] and [p.name for p in tmp_path.iterdir()] == ["w.bin"]


def test_a_download_goes_on_in_another_process_s_place(server, tmp_path):
    server.cuts = [100_000]
    with pytest.raises(WeightsError, match="100,000 of 300,000 bytes"): download(f"{server.url}/w.bin", tmp_path/"w.bin", progress=False, attempts=1)
    assert not (tmp_path/"w.bin").exists()
    assert download(f"{server.url}/w.bin", tmp_path/"w.bin", progress=False).read_bytes() == CONTENT and ranges(server)[1:] == ["bytes=100000-"]


@pytest.mark.parametrize("change", ["content", "no ranges", "no etag"])
def test_halves_of_two_files_are_never_joined(server, tmp_path, change):
    "The file changed meanwhile, the server cannot go on, or cannot say whether it is the same file: it is fetched from its beginning."
    server.etag = "" if change == "no etag" else None
    server.cuts = [100_000]
    with pytest.raises(WeightsError): download(f"{server.url}/w.bin", tmp_path/"w.bin", progress=False, attempts=1)
    if change == "content": server.content = CONTENT[::-1]
    if change == "no ranges": server.ranges = False
    assert download(f"{server.url}/w.bin", tmp_path/"w.bin", progress=False).read_bytes() == server.content


def test_a_part_that_is_too_long_is_no_part(server, tmp_path):
    (tmp_path/"w.bin.part").write_bytes(b"x" * 400_000)
    assert download(f"{server.url}/w.bin", tmp_path/"w.bin", resumable=True, progress=False).read_bytes() == CONTENT


def test_pull_and_its_hash(server, tool, tmp_path):
    "Known beforehand: right or refused. Not known: the first download records it, later ones must match."
    sha = hashlib.sha256(CONTENT).hexdigest()
    tool(bytes=300_000, sha256=sha)
    assert pull("TOOL", tmp_path/"a", progress=False).read_bytes() == CONTENT and not (tmp_path/"a"/"hashes.json").exists()
    asked = len(server.asked)
    assert pull("tool", tmp_path/"a", offline=True) == tmp_path/"a"/"w.bin" and len(server.asked) == asked       # it is there: nobody is asked
    tool(sha256="0" * 64)
    with pytest.raises(WeightsError, match="SHA-256 is .* tool has 000000"): pull("tool", tmp_path/"b", progress=False)
    assert not (tmp_path/"b"/"w.bin").exists()
    tool()
    pull("tool", tmp_path/"c", progress=False)
    assert json.loads((tmp_path/"c"/"hashes.json").read_text()) == {"tool": sha}
    (tmp_path/"c"/"w.bin").unlink()
    server.content = CONTENT[::-1]
    for _ in range(2):
        with pytest.raises(WeightsError, match="the first download had"): pull("tool", tmp_path/"c", progress=False)
    assert json.loads((tmp_path/"c"/"hashes.json").read_text()) == {"tool": sha}
    row = {w["name"]: w for w in list_weights(tmp_path/"c")}["tool"]
    assert row["sha256"] == sha and row["licence"] == "MIT" and row["path"] == str(tmp_path/"c"/"w.bin")


PAGES = [b"  <!DOCTYPE html><html>please log in</html>", b"<HTML><body>", b"<?xml version='1.0'?><Error>", b"version https://git-lfs.github.com/spec/v1"]


@pytest.mark.parametrize("page", PAGES)
def test_a_page_is_never_the_first_download(server, tool, tmp_path, page):
    "A login page comes with status 200; its hash must not turn the right file away later."
    tool()
    server.content = page
    with pytest.raises(WeightsError, match="a page, or a pointer"): pull("tool", tmp_path, progress=False)
    assert not (tmp_path/"w.bin").exists() and not (tmp_path/"hashes.json").exists()
    server.content = CONTENT
    assert pull("tool", tmp_path, progress=False).read_bytes() == CONTENT
    (tmp_path/"hashes.json").unlink(); (tmp_path/"w.bin").write_bytes(page)                 # saved from a browser, by hand
    with pytest.raises(WeightsError, match="a page, or a pointer"): pull("tool", tmp_path)
    assert not (tmp_path/"hashes.json").exists()


def test_two_first_downloads_at_once_record_both(tmp_path, monkeypatch):
    "Two terminals, two entries: neither hash is lost, whoever reads and writes when."
    entries, real = [Entry(f"e{k}", f"{k}.bin", "MIT", "nothing", url="http://127.0.0.1:9/") for k in range(4)], store._hashes
    def slow(folder):
        known = real(folder)
        time.sleep(.1)
        return known
    monkeypatch.setattr(store, "_hashes", slow)
    for e in entries: (tmp_path/e.file).write_text(e.name)
    jobs = [threading.Thread(target=store.verify, args=(tmp_path/e.file, e, tmp_path)) for e in entries]
    for j in jobs: j.start()
    for j in jobs: j.join()
    assert set(real(tmp_path)) == {e.name for e in entries}


def test_a_folder_that_cannot_be_written(server, tool, tmp_path):
    tool()
    (tmp_path/"file").write_text("x")
    with pytest.raises(WeightsError, match=r"nothing can be written there .*QUALIVISION_WEIGHTS"): pull("tool", tmp_path/"file"/"w", progress=False)
    assert not server.asked


def test_a_file_of_another_size_is_refused_before_it_comes(server, tool, tmp_path):
    tool(bytes=299_999, sha256="0" * 64)
    with pytest.raises(WeightsError, match="300,000 bytes, 299,999 are due"): pull("tool", tmp_path, progress=False)
    assert not list(tmp_path.glob("w.bin*[!k]"))
    (tmp_path/"w.bin").write_bytes(b"put here by hand")
    with pytest.raises(WeightsError, match="it has 16 bytes"): pull("tool", tmp_path)


def test_what_is_not_there(server, tool, tmp_path):
    tool(url=f"{server.url}/gone.bin")
    with pytest.raises(WeightsError, match="answers 404"): pull("tool", tmp_path, progress=False)
    assert len([p for p, _ in server.asked if p == "/gone.bin"]) == 1                                            # and is not asked for again
    with pytest.raises(WeightsError, match="Did you mean dover-mobile"): pull("dover-mobil", tmp_path)


def test_no_network_and_the_answer_comes_at_once(server, tool, tmp_path, monkeypatch):
    tool(url="http://127.0.0.1:9/w.bin")
    with pytest.raises(WeightsError, match=r"no way to its server\. Pull it where there is a network, or save http"): pull("tool", tmp_path)
    tool()
    with pytest.raises(WeightsError, match="no way"): pull("tool", tmp_path, offline=True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(WeightsError, match="no way"): pull("tool", tmp_path)
    assert not server.asked                                                                                      # nobody was asked


def test_too_little_space(server, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda p: shutil._ntuple_diskusage(10, 10, 10))
    with pytest.raises(FileError, match="the bytes of w.bin that are to come need 0.00 GB"): download(f"{server.url}/w.bin", tmp_path/"w.bin")


@pytest.fixture
def hub(server, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path/"hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    return server


def test_pull_from_the_hub(hub, tool, tmp_path):
    tool(url="", repo="who/what", beside=("*.json",))
    path = pull("tool", tmp_path, progress=False)
    assert path.read_bytes() == CONTENT and (path.parent/"config.json").read_text() == "{}"
    asked = len(hub.asked)
    assert pull("tool", tmp_path) == path and len(hub.asked) == asked
    assert json.loads((tmp_path/"hashes.json").read_text()) == {"tool": hashlib.sha256(CONTENT).hexdigest()}
    path.resolve().write_bytes(CONTENT[::-1])
    with pytest.raises(WeightsError, match="the first download had"): pull("tool", tmp_path)


def test_a_file_that_the_hub_did_not_mean(hub, tool, tmp_path):
    tool(url="", repo="who/what")
    hub.sha = "1" * 64
    with pytest.raises(WeightsError, match="not what the hub says"): pull("tool", tmp_path, progress=False)
    assert not (tmp_path/"hashes.json").exists()
    tool(url="", repo="who/nobody")
    with pytest.raises(WeightsError, match="the download failed"): pull("tool", tmp_path, progress=False)


def test_every_entry_says_what_it_is():
    for name, e in REGISTRY.items():
        assert e.name == name and e.file and e.licence and e.trained_on
        assert [bool(e.repo), bool(e.url), bool(e.shipped)].count(True) == 1 and e.address.startswith(e.shipped or "https://")
    assert {"dover", "dover++", "dover-mobile"} == {n for n, e in REGISTRY.items() if "non-commercial" in e.licence}

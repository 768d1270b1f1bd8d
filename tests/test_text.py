"Text: every distinct prompt is encoded once, and an encoder that is not there is known at once."
import hashlib
import http.server
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import huggingface_hub.constants as hub
import pytest
import torch

from qualivision.models import text
from qualivision.models.text import BGE_LARGE, MINILM, TextEncoder, TextError, encoder_folder, encoder_of_width
from qualivision.models.store import REGISTRY
from qualivision.quality import QualiVisionError


class Counting:
    "Stands in for the network: counts what it is asked."
    def __init__(self): self.asked = []
    def __call__(self, prompt):
        self.asked.append(prompt)
        return torch.nn.functional.normalize(torch.tensor([float(len(prompt)), 1., 2.]), dim=0)


def counting(cache=None, name=MINILM):
    e = TextEncoder(name, cache=cache)
    e.network = Counting()
    return e


@pytest.fixture
def encoder(): return counting()


@pytest.fixture
def empty_hub(tmp_path, monkeypatch):
    "No cached models, and a hub at a port where nobody listens."
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path/"hub"))
    monkeypatch.setattr(hub, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", False)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"): monkeypatch.delenv(name, raising=False)
    return tmp_path/"hub"


@pytest.fixture(scope="module")
def minilm(): return TextEncoder(cache=None)


def test_each_distinct_prompt_once(encoder):
    a = encoder.encode(["a boat", "a tree", "a boat"])
    b = encoder.encode(["a tree", "a cat", "a boat"])
    assert encoder.network.asked == ["a boat", "a tree", "a cat"] and encoder.calls == 3
    assert a.shape == (3, 3) and torch.equal(a[0], a[2]) and torch.equal(a[1], b[0])


def test_once_on_disk_too(tmp_path):
    first, second = counting(tmp_path), counting(tmp_path)
    a = first.encode(["a boat", "a tree"])
    assert torch.equal(second.encode(["a tree", "a boat"]).flip(0), a) and second.calls == 0
    assert len(list(tmp_path.rglob("*.f32"))) == 2 and not list(tmp_path.rglob("*.tmp*"))


@pytest.mark.parametrize("harm", [lambda b: b"", lambda b: b[:20], lambda b: b[:-1] + bytes([b[-1] ^ 1]), lambda b: bytes(len(b))])
def test_what_is_damaged_on_disk_is_computed_again(tmp_path, harm):
    want, (file,) = counting(tmp_path).embed("a boat"), tmp_path.rglob("*.f32")
    whole = file.read_bytes()
    file.write_bytes(harm(whole))
    again = counting(tmp_path)
    assert torch.equal(again.embed("a boat"), want) and again.calls == 1 and file.read_bytes() == whole


def test_a_known_prompt_needs_neither_network_nor_hash(tmp_path, monkeypatch):
    first = TextEncoder(cache=tmp_path)
    want, key = first.embed("a boat"), first.key
    monkeypatch.setattr(text, "MiniLM", lambda *a: pytest.fail("the network was loaded"))
    monkeypatch.setattr(text, "file_sha256", lambda *a: pytest.fail("90 MB were hashed again"))
    second = TextEncoder(cache=tmp_path)
    assert second.key == key and torch.equal(second.embed("a boat"), want) and second.calls == 0


def test_the_hash_of_an_encoder_follows_its_files(tmp_path, monkeypatch, minilm):
    "It is the hash that checkpoints hold, and it is not remembered where a file has changed or has just been written."
    files = [minilm.folder/"model.safetensors", minilm.folder/"tokenizer.json"]
    digest = hashlib.sha256("".join(hashlib.sha256(f.read_bytes()).hexdigest() for f in files).encode()).hexdigest()
    assert minilm.key == f"minilm-{digest[:12]}"
    folder, kept = tmp_path/"encoder", text.Kept(tmp_path/"kept")
    folder.mkdir()
    (folder/"tokenizer.json").write_text("one")
    one = text.content_key(folder, kept)
    assert not (tmp_path/"kept").exists()                # changed just now: its times prove nothing
    monkeypatch.setattr(text.time, "time_ns", lambda: 2 ** 62)
    assert text.content_key(folder, kept) == one and (tmp_path/"kept").exists()
    (folder/"tokenizer.json").write_text("two")
    assert text.content_key(folder, kept) != one


def test_where_embeddings_are_kept(monkeypatch):
    def place(**env):
        for name in ("QUALIVISION_CACHE", "XDG_CACHE_HOME", "HOME"): monkeypatch.delenv(name, raising=False)
        for name, value in env.items(): monkeypatch.setenv(name, value)
        found = text.text_cache()
        return found and found.as_posix()
    assert place(QUALIVISION_CACHE="/c", XDG_CACHE_HOME="/x", HOME="/h") == "/c/text"
    assert place(XDG_CACHE_HOME="/x", HOME="/h") == "/x/qualivision/text"
    assert place(HOME="/h") == place(HOME="/h", XDG_CACHE_HOME="relative") == "/h/.cache/qualivision/text"
    monkeypatch.setattr(text.os.path, "expanduser", lambda p: p)         # a user whom the system does not know
    assert place() is None and TextEncoder().kept.folder is None


def test_a_place_that_cannot_be_written_is_no_error(tmp_path, monkeypatch, capfd):
    (tmp_path/"file").touch()
    monkeypatch.setenv("QUALIVISION_CACHE", str(tmp_path/"file"))
    e = counting("auto")
    assert e.encode(["a boat", "a tree", "a boat"]).shape == (3, 3) and e.calls == 2
    said = capfd.readouterr().err
    assert said.count("\n") == 1 and "not kept" in said and "QUALIVISION_CACHE" in said


def test_a_million_prompts_are_no_million_files(tmp_path):
    e = counting(tmp_path)
    e.most = 2
    for k in range(5): e.embed(f"boat {k}")
    assert len(e._known) <= 2 and len(list(tmp_path.rglob("*.f32"))) == 2


def test_another_encoder_does_not_find_them(tmp_path, minilm):
    folder = tmp_path/"encoder"
    shutil.copytree(minilm.folder, folder)
    with open(folder/"model.safetensors", "r+b") as f: f.seek(-1, 2); f.write(b"\x01")
    assert TextEncoder(str(folder)).key.split("-")[-1] != minilm.key.split("-")[-1]


@pytest.mark.parametrize("bad", ["one string", [""], ["  "], [None], [3], ["good", ""]])
def test_bad_prompts(encoder, bad):
    with pytest.raises(TextError): encoder.encode(bad)
    assert encoder.calls == 0


UNREADABLE = ["🚀", "🚀🌕", "🚀 🌕", "สวัสดีครับ", "\u200b", "\u200b\u2060", "\ufeff\u00ad"]

@pytest.mark.parametrize("prompt", UNREADABLE)
def test_a_prompt_of_which_nothing_is_known_is_no_prompt(encoder, prompt):
    for use in (encoder.read, encoder.embed, lambda p: encoder.encode([p])):
        with pytest.raises(TextError, match="nothing"): use(prompt)
    with pytest.raises(TextError): encoder.encode(["a boat", prompt])
    assert encoder.calls == 0


@pytest.mark.parametrize("prompt, unknown, content", [
    ("a rocket flies to the moon", 0, 6), ("a rocket flies to the moon 🚀", 1, 7), ("🚀 moon", 1, 2), ("boat 🚀 🌕 🌊", 3, 4),
    ("一只红色的猫在雪地里奔跑", 8, 12), ("a cat, 一只红色的猫", 4, 9), ("a b c 🚀", 1, 4)])
def test_how_much_of_a_prompt_is_known(minilm, prompt, unknown, content):
    r = minilm.read(prompt)
    assert (r.unknown, r.content, r.share) == (unknown, content, unknown / content) and not r.cut
    assert [f"{unknown} of the {content} tokens" in w and f"({r.share:.0%})" in w for w in r.warnings("minilm")] == [True] * (r.share >= .25)


def test_what_is_cut_off_is_said(minilm):
    r = minilm.read("word " * 300)
    assert r.cut and len(r.ids) == 256 and "reads 256 tokens; the rest of this prompt of 302" in r.warnings("minilm")[0]
    assert not minilm.read("word " * 254).cut


def test_bytes_that_are_no_text(minilm):
    with pytest.raises(TextError, match=r"prompt 'caf\\udce9': it holds bytes that are no text in UTF-8"): minilm.read("caf\udce9")


def test_a_list_is_warned_about_once(encoder):
    prompts = [f"🚀 {k}" for k in range(5)] + [f"{k} " * 300 for k in range(3)] + ["a boat"]
    with pytest.warns(UserWarning) as told: encoder.encode(prompts)
    assert len(told) == 1 and "tokens of 5 of 9 prompts" in str(told[0].message) and "end of 3 of 9" in str(told[0].message)
    encoder.encode(prompts)                                              # they are known now, and nothing is said twice


def test_minilm(minilm):
    a = minilm.encode(["a red ball rolls", "a red ball is rolling", "snow at night"])
    assert a.shape == (3, minilm.dim) == (3, 384) and a.dtype == torch.float32 and a.device.type == "cpu" and not a.requires_grad
    assert torch.allclose(a.norm(dim=1), torch.ones(3), atol=1e-5) and a[0] @ a[1] > 0.8 > 0.4 > a[0] @ a[2]
    assert torch.equal(TextEncoder(cache=None).encode(["snow at night"])[0], a[2])            # whatever else is asked for


def test_absent_and_unreachable_is_known_at_once(empty_hub):
    start = time.perf_counter()
    with pytest.raises(TextError, match="not in the local cache and the Hugging Face hub cannot be reached. Run `hf download"): TextEncoder(BGE_LARGE)
    assert time.perf_counter() - start < 3


def test_offline_by_setting(empty_hub, monkeypatch):
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("urllib.request.urlopen", lambda *a, **k: pytest.fail("asked the network"))
    with pytest.raises(TextError, match="cannot be reached"): TextEncoder(BGE_LARGE)


def test_reachable_but_not_there(empty_hub, monkeypatch):
    class Nothing(http.server.BaseHTTPRequestHandler):
        def do_GET(self): self.send_response(404); self.send_header("Content-Length", "0"); self.end_headers()
        do_HEAD = do_GET
        def log_message(self, *a): pass
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Nothing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(hub, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", hub.ENDPOINT, raising=False)
        assert text.server_answers(hub.ENDPOINT)
        with pytest.raises(TextError, match="download failed"): TextEncoder("nobody/nothing")
        server.shutdown()


def test_bge_from_the_local_cache(empty_hub, minilm):
    "The layout in which huggingface_hub keeps a download; the network is not asked."
    repo = empty_hub/"models--BAAI--bge-large-en-v1.5"
    pinned = repo/"snapshots"/REGISTRY[BGE_LARGE].revision
    shutil.copytree(minilm.folder, pinned)
    (repo/"refs").mkdir()
    (repo/"refs/main").write_text("0" * 40)              # what its authors have made of it since then is not taken
    assert encoder_folder(BGE_LARGE) == pinned
    assert TextEncoder(BGE_LARGE).dim == 1024 and TextEncoder(BGE_LARGE).key.startswith("bge-large-en-v1.5-")


def test_the_library_computes_the_same(tmp_path, minilm):
    "Any other encoder goes through sentence-transformers; here it reads the same files."
    (tmp_path/"mine").symlink_to(minilm.folder)
    e = TextEncoder(str(tmp_path/"mine"), cache=None)
    prompts = ["a boat", "Über den Dächern: ça va?", "word " * 300, "a 🚀 over 北 and 海, at dawn", "x" * 150 + " and a boat"]
    assert e.read(prompts[2]) == minilm.read(prompts[2]) and "network" not in vars(e)        # the tokenizer alone
    with pytest.warns(UserWarning, match="see the end of 1 of 5"): mine = e.encode(prompts)
    with pytest.warns(UserWarning): assert torch.allclose(mine, minilm.encode(prompts), atol=1e-6, rtol=0)
    assert e.dim == 384


def test_folders_that_hold_no_encoder(tmp_path):
    (tmp_path/"empty").mkdir()
    with pytest.raises(TextError, match="not a sentence-transformers model"): TextEncoder(str(tmp_path/"empty"), cache=None).encode(["a boat"])
    (tmp_path/"empty"/"tokenizer.json").write_text("{}")
    with pytest.raises(TextError, match="tokenizer.json: it cannot be read"): TextEncoder(str(tmp_path/"empty"), cache=None).encode(["a boat"])
    with pytest.raises(TextError): TextEncoder("not a name")


def test_names_and_widths():
    assert encoder_of_width(384) == MINILM and encoder_of_width(1024) == BGE_LARGE
    with pytest.raises(QualiVisionError): encoder_of_width(77)


def test_importing_the_chapter_is_light(root):
    code = ("import sys, qualivision.models.registry; "
            "print([m for m in ('sentence_transformers', 'transformers') if m in sys.modules])")
    assert subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True).stdout.strip() == "[]"
    assert Path(text.__file__).is_relative_to(root)

"Text: every distinct prompt is encoded once, and an encoder that is not there is known at once."
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
from qualivision.models.weights import REGISTRY
from qualivision.quality import QualiVisionError


class Counting:
    "Stands in for the network: counts what it is asked."
    def __init__(self): self.asked, self.max_seq_length = [], 6
    def tokenizer(self, prompt, **_): return {"input_ids": prompt.split()}
    def get_embedding_dimension(self): return 3
    def encode(self, prompts, **_):
        self.asked += prompts
        return torch.nn.functional.normalize(torch.tensor([[float(len(p)), 1., 2.] for p in prompts]), dim=1)


@pytest.fixture
def encoder():
    e = TextEncoder()
    e._model = Counting()
    return e


@pytest.fixture
def empty_hub(tmp_path, monkeypatch):
    "No cached models, and a hub at a port where nobody listens."
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path/"hub"))
    monkeypatch.setattr(hub, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", False)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"): monkeypatch.delenv(name, raising=False)
    return tmp_path/"hub"


@pytest.fixture(scope="module")
def minilm(): return TextEncoder()


def test_each_distinct_prompt_once(encoder):
    a = encoder.encode(["a boat", "a tree", "a boat"])
    b = encoder.encode(["a tree", "a cat", "a boat"])
    assert encoder.model.asked == ["a boat", "a tree", "a cat"] and encoder.calls == 3
    assert a.shape == (3, 3) and torch.equal(a[0], a[2]) and torch.equal(a[1], b[0])


def test_once_on_disk_too(tmp_path):
    first, second = TextEncoder(cache=tmp_path), TextEncoder(cache=tmp_path)
    first._model, second._model = Counting(), Counting()
    a = first.encode(["a boat", "a tree"])
    assert torch.equal(second.encode(["a tree", "a boat"]).flip(0), a) and second.calls == 0
    assert not list(tmp_path.rglob("*.part")) and len(list(tmp_path.rglob("*.npy"))) == 2


def test_another_encoder_does_not_find_them(tmp_path, minilm):
    folder = tmp_path/"encoder"
    shutil.copytree(minilm.folder, folder)
    with open(folder/"model.safetensors", "r+b") as f: f.seek(-1, 2); f.write(b"\x01")
    assert TextEncoder(str(folder)).key.split("-")[-1] != minilm.key.split("-")[-1]


@pytest.mark.parametrize("bad", ["one string", [""], ["  "], [None], [3], ["good", ""]])
def test_bad_prompts(encoder, bad):
    with pytest.raises(TextError): encoder.encode(bad)
    assert encoder.calls == 0


def test_what_is_cut_off_is_said(encoder):
    with pytest.warns(UserWarning, match="reads 6 tokens; the rest of a prompt of 7"): encoder.encode(["one two three four five six seven"])


def test_minilm(minilm):
    a = minilm.encode(["a red ball rolls", "a red ball is rolling", "snow at night"])
    assert a.shape == (3, minilm.dim) == (3, 384) and a.dtype == torch.float32 and a.device.type == "cpu" and not a.requires_grad
    assert torch.allclose(a.norm(dim=1), torch.ones(3), atol=1e-5) and a[0] @ a[1] > 0.8 > 0.4 > a[0] @ a[2]
    alone = TextEncoder()
    alone._model = minilm.model
    assert torch.equal(alone.encode(["snow at night"])[0], a[2])            # whatever else is asked for
    assert not any(p.requires_grad for p in minilm.model.parameters()) and not minilm.model.training


def test_absent_and_unreachable_is_known_at_once(empty_hub):
    start = time.perf_counter()
    with pytest.raises(TextError, match="not in the local cache and the Hugging Face hub cannot be reached. Run `hf download"): TextEncoder(BGE_LARGE)
    assert time.perf_counter() - start < 3


def test_offline_by_setting(empty_hub, monkeypatch):
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(text.urllib.request, "urlopen", lambda *a, **k: pytest.fail("asked the network"))
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
        assert text.hub_answers()
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


def test_a_folder(tmp_path, minilm):
    (tmp_path/"mine").symlink_to(minilm.folder)
    e = TextEncoder(str(tmp_path/"mine"))
    assert torch.equal(e.encode(["a boat"]), minilm.encode(["a boat"])) and e.dim == 384
    (tmp_path/"empty").mkdir()
    with pytest.raises(TextError, match="not a sentence-transformers model"): TextEncoder(str(tmp_path/"empty")).encode(["a boat"])
    with pytest.raises(TextError): TextEncoder("not a name")


def test_names_and_widths():
    assert encoder_of_width(384) == MINILM and encoder_of_width(1024) == BGE_LARGE
    with pytest.raises(QualiVisionError): encoder_of_width(77)


def test_importing_the_chapter_is_light(root):
    code = ("import sys, qualivision.models.text, qualivision.models.qualivision; "
            "print([m for m in ('sentence_transformers', 'transformers') if m in sys.modules])")
    assert subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True).stdout.strip() == "[]"
    assert Path(text.__file__).is_relative_to(root)

"qualivision weights: what a user asks of published weights and of a file that somebody sent."
import os
from functools import partial

import pytest
import torch
from safetensors.torch import save_file
from tiny import command
from torch import nn

from qualivision.commands.app import OFFICIAL
from qualivision.files import file_sha256
from qualivision.models.store import REGISTRY, Entry
from qualivision.official.scorer import NETWORKS


@pytest.fixture
def call(tmp_path, monkeypatch):
    "The command, in a folder of its own, with its own folder of weights."
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QUALIVISION_WEIGHTS", str(tmp_path/"w"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path/"hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return partial(command, "weights")


def test_list(call, tmp_path):
    status, rows, _ = call("list", "--json")
    assert status == 0 and [r["name"] for r in rows] == list(REGISTRY) and not any(r["path"] for r in rows if not REGISTRY[r["name"]].shipped)
    assert all(set(r) == {"name", "file", "address", "bytes", "sha256", "licence", "trained_on", "path"} for r in rows)
    (tmp_path/"w").mkdir()
    (tmp_path/"w"/"COVER.pth").write_bytes(b"x")
    status, text, _ = call("list")
    assert status == 0 and str(tmp_path/"w"/"COVER.pth") in text.replace("\n  ", "\n") and text.count("non-commercial") == 3


def test_pull(call, tmp_path, monkeypatch):
    status, said, err = call("pull", "dover-mobile", "--json")
    assert status == 1 and "no way to its server" in said["error"] and "non-commercial" in err            # the licence is said first
    status, text, err = call("pull", "dover-mobil")
    assert status == 1 and not text and "Did you mean dover-mobile" in err
    monkeypatch.setitem(REGISTRY, "tool", Entry("tool", "w.bin", "MIT", "nothing", url="http://127.0.0.1:9/w.bin"))
    (tmp_path/"w"/"w.bin").write_bytes(b"by hand")
    status, row, _ = call("pull", "tool", "--offline", "--json")
    assert status == 0 and row["path"] == str(tmp_path/"w"/"w.bin") and row["bytes"] == 7 and row["sha256"] == file_sha256(tmp_path/"w"/"w.bin")
    (tmp_path/"w"/"w.bin").write_bytes(b"exchanged")
    assert call("pull", "tool")[0] == 1


class Tiny(nn.Module):
    "Two branches and their heads."
    def __init__(self):
        super().__init__()
        self.technical, self.technical_head = nn.Linear(3, 4), nn.Linear(4, 1)
        self.aesthetic, self.aesthetic_head = nn.Linear(3, 4), nn.Linear(4, 1)


class Trap:
    def __reduce__(self): return os.system, ("touch ran",)


def test_inspect(call, tmp_path):
    "A file against its model, against another, without a head, with code in it, cut."
    state, tiny = Tiny().state_dict(), f"{__name__}:Tiny"
    torch.save({"state_dict": state, "validation_results": [0.5]}, "tiny.pth")
    status, about, _ = call("inspect", "tiny.pth", "--model", tiny, "--json")
    assert status == 0 and about["layout"] == "state_dict entry" and about["fits"]["coverage"] == 1 and about["fits"]["matched"] == len(state)
    save_file({k: v for k, v in state.items() if not k.startswith("technical_head")}, "headless.safetensors")
    status, about, _ = call("inspect", "headless.safetensors", "--model", tiny, "--json")
    assert status == 1 and about["fits"]["missing"] and all(k.startswith("technical_head") for k in about["fits"]["missing"])
    torch.save(nn.Linear(2, 3).state_dict(), "other.pth")
    status, text, _ = call("inspect", "other.pth", "--model", tiny)
    assert status == 1 and "0 tensors match" in " ".join(text.split()) and "2 unexpected: weight, bias" in " ".join(text.split())
    assert call("inspect", "other.pth")[0] == 0
    torch.save({**state, "x": Trap()}, "trap.pth")
    (tmp_path/"cut.pth").write_bytes((tmp_path/"tiny.pth").read_bytes()[:2000])
    for name, said in {"trap.pth": "posix.system", "cut.pth": "not a whole one", "gone.pth": "no such file"}.items():
        status, about, err = call("inspect", name, "--json")
        assert status == 1 and name in about["error"] and said in err
    assert not (tmp_path/"ran").exists()
    for name in ("dove", "nowhere:DOVER", "torch.nn:Nothing", "torch.nn:Linear"):
        assert call("inspect", "other.pth", "--model", name)[0] == 2


def test_every_short_name_is_a_model():
    assert list(OFFICIAL) == list(NETWORKS) and set(NETWORKS) <= set(REGISTRY)

"Weights: what may not be loaded is refused with a reason, and a checkpoint is whole at every moment."
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from qualivision.models.weights import (WeightsError, compare, file_sha256, load_checkpoint, load_strict, read_state,
                                        save_checkpoint)

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


def test_what_may_miss_must_be_named():
    state = {k: v for k, v in net().state_dict().items() if k.startswith("0.")}
    with pytest.raises(WeightsError): load_strict(net(), state, may_miss=["1.*"])
    report = load_strict(net(seed=1), state, may_miss=["2.*"])
    assert report.missing == ("2.weight", "2.bias") and 0 < report.coverage < 1
    with pytest.raises(WeightsError): load_strict(net(), {**state, "2.bias": torch.ones(3)}, may_miss=["2.*"])   # missing is not misshapen


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


SAVER = """
import sys, torch
from torch import nn
from qualivision.models.weights import save_checkpoint
module, i = nn.Linear(300, 300), 0
while True:
    with torch.no_grad(): module.weight.fill_(i)
    save_checkpoint(sys.argv[1], module, dict(i=i))
    if i == 0: print("ready", flush=True)
    i += 1
"""


def test_killed_for_real(tmp_path, root):
    "A process that does nothing but save is killed; what it leaves is one of its checkpoints, whole, and it can go on from there."
    rng = random.Random(0)
    for _ in range(3):
        saver = [sys.executable, "-c", SAVER, str(tmp_path)]
        with subprocess.Popen(saver, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(root)}) as process:
            assert process.stdout.readline().strip() == b"ready"
            time.sleep(rng.uniform(0, 0.1))
            process.send_signal(signal.SIGKILL)
        state, meta = load_checkpoint(tmp_path)
        assert (state["weight"] == meta["i"]).all()
    assert json.loads((tmp_path/"model.json").read_text())["i"] == meta["i"]

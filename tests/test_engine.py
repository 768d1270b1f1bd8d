"Engines: the choice and its cache, what is refused and how, nothing in the home folder, the commands. What engines compute: test_export."
import inspect
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from itertools import cycle
from types import SimpleNamespace

import pytest
import torch

import tiny
from qualivision.models.text import Kept
from qualivision.official import engine
from qualivision.official.dover import Branches, QualityHead
from qualivision.official.engine import Engine, EngineError, choose, put_on_engine, scorer_on
from qualivision.official.scorer import OfficialScorer

pytest.importorskip("onnx", reason="ONNX is an extra: pip install -e '.[onnx]'")
needs_openvino = pytest.mark.skipif(find_spec("openvino") is None, reason="OpenVINO is an extra: pip install -e '.[openvino]'")
BOTH = [pytest.param("openvino", marks=needs_openvino), "onnx"]
WEIGHTS = dict(file="random", sha256="0" * 64, licence="none", trained_on="nothing")


class Twice(Branches):
    "Its network doubles its views: a graph of one operation each."
    views = ("technical", "aesthetic")

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.add({v: QualityHead(3, 4) for v in self.views})
        self.calls = 0

    def network(self, views):
        self.calls += 1
        return {v: 2 * x for v, x in views.items()}


@pytest.fixture
def recorded(monkeypatch):
    "In place of recording, which takes seconds: the graph written by hand. `.factor` can be made wrong; `.count` counts."
    from onnx import TensorProto, helper
    about = SimpleNamespace(factor=2., count=0)

    def record(module, example, open_axes, inputs, outputs=None):
        module(*example)
        about.count += 1
        def of(name, x): return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", *x.shape[1:]])
        graph = helper.make_graph(
            [helper.make_node("Mul", [name, "factor"], [f"{name}_made"]) for name in inputs], "twice",
            [of(name, x) for name, x in zip(inputs, example)], [of(f"{name}_made", x) for name, x in zip(inputs, example)],
            [helper.make_tensor("factor", TensorProto.FLOAT, [], [about.factor])])
        return SimpleNamespace(model_proto=helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9))

    monkeypatch.setattr(engine, "record", record)
    monkeypatch.setattr(engine, "view_shapes", lambda model: {"technical": (5, 33, 40), "aesthetic": (3, 40, 33)})
    return about


def scorer() -> OfficialScorer: return OfficialScorer(Twice(), "dover", WEIGHTS)


def ratio(value: float):
    "A stopwatch: torch takes so many times as long as the engine."
    seconds = cycle((value, 1.))
    def timer(run):
        run()
        return next(seconds)
    return timer


def never(run): pytest.fail("it was measured again")


def test_ties_go_to_the_former():
    assert choose({}) == choose({"openvino": 1.19, "onnx": 1.1}) == "torch"
    assert choose({"openvino": 1.2}) == choose({"openvino": 2., "onnx": 2.39}) == "openvino" and choose({"openvino": 2., "onnx": 2.41}) == "onnx"


@needs_openvino
def test_auto_measures_once(recorded, tmp_path, monkeypatch, capsys):
    kept = Kept(tmp_path)
    s = scorer()
    assert put_on_engine(s, kept=kept, timer=ratio(1.1)) == "torch" and s.model.engine is None and not s.note
    assert "engine: torch (openvino 1.1 times as fast as torch, onnx 1.1" in capsys.readouterr().err and recorded.count == 1
    assert put_on_engine(scorer(), kept=kept, timer=never) == "torch", "kept"
    other = scorer()
    monkeypatch.setattr(engine, "cpu_name", lambda: "another CPU")
    assert put_on_engine(other, kept=kept, timer=ratio(3.)) == "openvino", "measured on another machine, recorded no second time"
    assert recorded.count == 1 and other.note == {"engine": "openvino"} and other.settings["engine"] == "openvino"
    again = scorer()
    assert put_on_engine(again, kept=kept, timer=never) == "openvino" and again.model.engine.name == "openvino"
    changed = scorer()
    torch.nn.init.zeros_(changed.model.technical_head.fc_last.weight)
    assert put_on_engine(changed, kept=kept, timer=ratio(1.)) == "torch" and recorded.count == 2, "other weights"


@pytest.mark.parametrize("name", BOTH)
def test_a_damaged_cache_is_made_again(name, recorded, tmp_path):
    put_on_engine(scorer(), name, kept=Kept(tmp_path), timer=ratio(2.))
    files = sorted(tmp_path.iterdir())
    assert [f.suffix for f in files if f.suffix == ".onnx"] == [".onnx"] and len(files) == 2
    for file in files: file.write_bytes(file.read_bytes()[:-1])
    measured = []
    def timer(run): return measured.append(1) or 1.
    assert put_on_engine(scorer(), name, kept=Kept(tmp_path), timer=timer) == name and recorded.count == 2 and measured
    assert put_on_engine(scorer(), name, kept=Kept(tmp_path), timer=never) == name and recorded.count == 2


@pytest.mark.parametrize("name", BOTH)
def test_any_batch_and_other_sizes(name, recorded, capsys):
    s = scorer()
    put_on_engine(s, name, kept=Kept(None), timer=ratio(2.))
    before = s.model.calls
    for batch in (1, 3):
        views = {"aesthetic": torch.randn(1, 3, 3, 40, 33), "technical": torch.randn(batch, 3, 5, 33, 40)}
        for v, x in s.model.engine(views).items(): assert torch.equal(x, 2 * views[v])
    assert s.model.calls == before, "torch computed nothing"
    capsys.readouterr()
    longer = {v: torch.cat([x, x], 2) for v, x in views.items()}
    for _ in range(2): assert torch.equal(s.model.features(longer)["technical"], 2 * longer["technical"])
    assert s.model.calls == before + 2 and capsys.readouterr().err.count("torch computes it") == 1, "said once"


@pytest.mark.parametrize("name", BOTH)
def test_what_cannot_run_falls_back_with_a_word(name, recorded, tmp_path, monkeypatch, capsys):
    recorded.factor = 2.01
    s = scorer()
    assert put_on_engine(s, name, kept=Kept(tmp_path), timer=ratio(9.)) == "torch" and s.model.engine is None and not s.note
    assert "differ from PyTorch's" in capsys.readouterr().err
    def broken(*_): raise RuntimeError("no such operation")
    monkeypatch.setattr(engine, "record", broken)
    assert put_on_engine(scorer(), name, kept=Kept(None)) == "torch" and "no such operation" in capsys.readouterr().err
    monkeypatch.setitem(engine.RUNNERS, name, broken)
    assert put_on_engine(scorer(), name, kept=Kept(tmp_path), timer=ratio(9.)) == "torch"
    monkeypatch.delattr(Branches, "network")
    monkeypatch.delattr(Twice, "network")
    assert put_on_engine(scorer(), name, kept=Kept(None)) == "torch" and "names no network" in capsys.readouterr().err


def test_formats_that_an_engine_has_not(recorded, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("qualivision.devices.cpu_has_bf16", lambda: False)
    made = []
    def make(precision):
        made.append(precision)
        return scorer()
    assert scorer_on(make, "onnx", "bf16", Kept(tmp_path)).model.engine is None and made == ["fp32", "bf16"], "torch computes it in bf16"
    assert "onnxruntime computes it in float32 alone" in capsys.readouterr().err
    from qualivision.devices import DeviceError
    with pytest.raises(DeviceError, match="float16 needs"): scorer_on(make, "onnx", "fp16", Kept(tmp_path))


@needs_openvino
def test_bfloat16_needs_its_instructions(recorded, monkeypatch):
    class Core:
        def get_property(self, *_): return ["FP32"]
    monkeypatch.setattr(engine, "openvino_package", lambda: type("openvino", (), {"Core": Core}))
    with pytest.raises(EngineError, match="no bfloat16 instructions. Use --precision fp32"):
        Engine(Twice(), {"technical": torch.zeros(1, 3, 3, 32, 32)}, "openvino", "bf16")


def test_an_engine_that_is_not_there(recorded, tmp_path, monkeypatch, capsys):
    "Asked for by name it is an error; `auto` does without it."
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(EngineError, match=r"openvino is not installed.*\[openvino\]"): scorer_on(lambda p: scorer(), "openvino")
    assert put_on_engine(scorer(), kept=Kept(tmp_path), timer=ratio(2.)) == "onnx" and "openvino is not installed" in capsys.readouterr().err
    other = scorer()
    other.device = "cuda"
    with pytest.raises(EngineError, match="it computes on a CPU, the device is cuda"): scorer_on(lambda p: other, "onnx")
    assert scorer_on(lambda p: other, "auto") is other and "the device is cuda" in capsys.readouterr().err


@needs_openvino
def test_the_home_folder_and_signals_are_left_alone(tmp_path):
    """Merely importing OpenVINO or onnxruntime writes an identity into the home folder. And a second core of OpenVINO puts back, at its
    end, the stack for signals of the first, which is gone: the next child that ended took the process along. The functions alone, without
    torch: two seconds, not five."""
    code = "\n".join(["import os, signal, sys; from functools import cache; from importlib import import_module",
                      "class EngineError(Exception): pass", "ExportError = EngineError",
                      *map(inspect.getsource, (engine.openvino_package, engine._core, engine.onnx_packages)),
                      "signal.signal(signal.SIGUSR1, lambda *_: print('handled'))",
                      "first, second = (_core(openvino_package()) for _ in range(2))",
                      "for core in (first, second): core.get_property('CPU', 'FULL_DEVICE_NAME')",      # now it has a stack of its own
                      "del core, first; del second; signal.raise_signal(signal.SIGUSR1); onnx_packages()",
                      "assert {'openvino', 'onnxruntime'} <= set(sys.modules) and 'openvino_telemetry' not in sys.modules"])
    env = {k: v for k, v in os.environ.items() if not k.startswith(("XDG_", "ORT_")) and k != "CI"}
    done = subprocess.run([sys.executable, "-X", "faulthandler", "-c", code], env={**env, "HOME": str(tmp_path)}, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "handled\n"), done.stderr
    assert list(tmp_path.rglob("*")) == []


@pytest.mark.parametrize("words", ["score a.mp4 --prompt cat", "predict --data . --out o.csv", "dover a.mp4", "cover a.mp4", "infer-datasets l.csv",
                                   "score-set . --model dover --out o.csv", "score-set . --model qualivision --out o.csv"])
def test_commands_ask_for_it(words, tmp_path, monkeypatch):
    def asked(make, name, precision): raise EngineError("engine", f"{name} was asked in {precision}", "Good.")
    monkeypatch.setattr(engine, "scorer_on", asked)
    monkeypatch.chdir(tmp_path)
    status, _, _ = tiny.command(*words.split(), "--engine", "none")
    assert status == 2
    status, out, err = tiny.command(*words.split(), "--engine", "auto")
    assert status == 1 and "auto was asked in fp32" in " ".join((out + err).split())


def test_the_answer_names_it(recorded, tmp_path):
    s = scorer()
    put_on_engine(s, "onnx", kept=Kept(tmp_path), timer=ratio(2.))
    assert s.record("a.mp4", None, "x")["engine"] == "onnx"
    from qualivision.commands.official import _sources
    assert "computed in onnx" in " ".join(" ".join(_sources("dover", s, 0, "official")).split())
    assert json.loads(json.dumps(s.settings))["engine"] == "onnx"

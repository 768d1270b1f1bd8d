"The benchmarks' harness, without a clock: what there is, a section that replaces its own alone, ways that take turns, a child's peak."
import ast
import sys

import pytest

from benchmarks.__main__ import main, names
from benchmarks.common import ROOT, Report, compared, interleaved, peak_mb, section, table, write_section


def test_the_list_tells_of_every_benchmark(capsys):
    assert main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == names() and {"backbone", "score_set", "startup", "official"} <= set(names())
    assert all(line.rstrip().endswith(("?", ".")) for line in lines), "each docstring begins with its question"
    for name in names():
        parts = ast.parse((ROOT/"benchmarks"/f"{name}.py").read_text(encoding="utf-8")).body
        assert any(isinstance(p, ast.FunctionDef) and p.name == "run" for p in parts), f"{name} cannot be run by its name"
    assert main(["no_such"]) == 1 and "score_set" in capsys.readouterr().err
    assert main(["official"]) == 2 and "--checkout" in capsys.readouterr().err
    import torch
    if not torch.cuda.is_available():
        assert main(["roofline", "--device", "cuda"]) == 2 and "no CUDA device" in capsys.readouterr().err


def test_several_take_the_same_options(monkeypatch):
    "One call for a machine that is lent for minutes; each has a process of its own, and one that cannot run here is no failure."
    calls = []
    class Done: returncode = 2
    monkeypatch.setattr("benchmarks.__main__.subprocess.run", lambda command: calls.append(command[3:]) or Done)
    assert main(["depthwise3d", "training_step", "--device", "cuda", "--full"]) == 0
    assert calls == [[name, "--device", "cuda", "--full"] for name in ("depthwise3d", "training_step")]
    Done.returncode = 1
    assert main(["decode", "engines"]) == 1


def test_a_section_replaces_its_own_alone(tmp_path):
    "Sections before and behind keep every byte, also where their names begin alike; a new one goes to the end."
    file = tmp_path/"R.md"
    def put(title, text): write_section(title, section(title, "Why?", Report([{"way": "a|b", "n": text}]), {"cpu": "x"}, "run"), file)
    for title in ("decode", "decode (full)", "engines"): put(title, "old")
    before = file.read_text().split("## ")
    put("decode (full)", "new")
    after = file.read_text().split("## ")
    assert [k for k, (a, b) in enumerate(zip(before, after, strict=True)) if a != b] == [2] and "new" in after[2] and "old" not in after[2]
    put("decode", "old")
    assert file.read_text().split("## ") == after, "the same text again changes nothing"
    put("last", "x")
    assert file.read_text().startswith("## ".join(after).rstrip()) and file.read_text().count("\n## ") == 4


def test_ways_take_turns_and_rounds_are_compared_with_themselves():
    called, seconds = [], {"base": iter((9, 4., 8.)), "ours": iter((9, 2., 1.))}
    def way(name): return lambda: called.append(name) or {"seconds": next(seconds[name]), "peak_mb": 10}
    rows = compared(interleaved({name: way(name) for name in seconds}, repeat=2))
    assert called == ["base", "ours"] * 3, "the first turn does not count"
    assert rows[1] == {"way": "ours", "seconds": 1.5, "times as fast": 5, "least": 2, "most": 8, "peak MB": 10} and rows[0]["most"] == 1
    assert table(rows).splitlines()[0].split() == "| way | seconds | times as fast | least | most | peak MB |".split()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="another system has no such file")
def test_the_peak_is_of_this_process():
    before = peak_mb()
    block = bytearray(int((before + 60) * 1e6))        # more than it ever was
    assert peak_mb() - before > 50
    del block
    assert peak_mb() - before > 50

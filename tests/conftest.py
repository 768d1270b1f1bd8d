"What every test shares: threads, a cache of its own, an identity for git, the official numbers, and markers that say why a test is left out."
import json
import os
import tempfile
from pathlib import Path

import pytest
from browser import CHROMIUM, Browser

ROOT = Path(__file__).resolve().parent.parent

# before torch is imported anywhere, and for every process that a test starts
for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, str(min(os.cpu_count() or 1, 4)))
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("DVC_NO_ANALYTICS", "1")
os.environ.pop("QUALIVISION_PRECISION", None)   # tests force both answers themselves
if "PYTEST_XDIST_WORKER" not in os.environ:                             # a worker has it from the process that started it
    KEPT = tempfile.TemporaryDirectory(prefix="qualivision-tests-")     # of prompt embeddings; gone at the end
    os.environ["QUALIVISION_CACHE"] = KEPT.name
for role in ("AUTHOR", "COMMITTER"):        # commits in temporary clones, on machines where git has no identity
    os.environ.setdefault(f"GIT_{role}_NAME", "QualiVision")
    os.environ.setdefault(f"GIT_{role}_EMAIL", "qualivision@users.noreply.github.com")

MARKERS = {
    "slow": "takes minutes; runs with --slow",
    "online": "needs the network; runs with --online",
    "cuda": "needs a CUDA device",
}


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the tests marked slow")
    parser.addoption("--online", action="store_true", help="run the tests marked online")


def pytest_configure(config):
    for name, meaning in MARKERS.items(): config.addinivalue_line("markers", f"{name}: {meaning}")


def left_out(config, marker: str) -> bool:
    "Is a test with this marker skipped in this run?"
    if marker == "cuda":
        import torch
        return not torch.cuda.is_available()
    return not config.getoption(f"--{marker}")


LONG = ("test_pipeline", "test_pretrain", "test_trainer", "test_hygiene", "test_train_dover", "test_video", "test_tools", "test_vjepa2")


def pytest_collection_modifyitems(config, items):
    # the long files first, so that of two processes none works on them alone at the end
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))
    for marker, meaning in MARKERS.items():
        marked = [item for item in items if item.get_closest_marker(marker)]
        if marked and left_out(config, marker):
            for item in marked: item.add_marker(pytest.mark.skip(reason=f"{marker}: {meaning}"))


@pytest.fixture(scope="session")
def root() -> Path: return ROOT


@pytest.fixture(scope="session")
def official_keys() -> dict:
    "Names and shapes of DOVER, DOVER-Mobile, COVER and its image encoder, as their manifests have them."
    return json.loads((ROOT/"tests/fixtures/official_keys.json").read_text())


@pytest.fixture(scope="session")
def official_numbers() -> dict:
    "What the official code gave, stage by stage, with weights and inputs from `weights_formula`."
    import numpy as np
    return dict(np.load(ROOT/"tests/fixtures/official_parity.npz"))


def threads(count: int):
    "torch with this many threads, then as before."
    import torch
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def one_thread():
    "Tiny networks are faster with one thread."
    yield from threads(1)


@pytest.fixture
def two_threads():
    "torch enlarges with another kernel where it has one thread alone; its last bit is another, and some pixels round the other way (LOG.md)."
    yield from threads(2)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not CHROMIUM: pytest.skip("there is no Chromium here: apt install chromium")
    one = Browser(tmp_path_factory.mktemp("chromium"))
    yield one
    one.close()

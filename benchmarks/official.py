"""How much faster is `qualivision dover` than the official code on one video, from the shell to the score?

The official code is not part of this package. Give a checkout of it, with its weights where its script looks for them:
    python -m benchmarks official --checkout DOVER --video FILE [--python OTHER_PYTHON]
Its evaluate_one_video.py runs there, with dover.yml and dover-mobile.yml, in the Python that you name (its own requirements). The weights that
those two files name are given to `qualivision dover` too. Whole commands are compared: imports, weights, decoding, network.
"""
import re
import sys
from pathlib import Path

from benchmarks.common import Report, Unavailable, child, compared, interleaved

SCRIPT = "evaluate_one_video.py"


def options(parser):
    parser.add_argument("--checkout", type=Path, help="folder of the official code")
    parser.add_argument("--video", type=Path, help="a video file")
    parser.add_argument("--python", default=sys.executable, help="interpreter for the official code")


def weights_of(settings: Path) -> Path:
    "The file of weights that a settings file names."
    found = re.search(r"^test_load_path:\s*['\"]?([^'\"\s]+)", settings.read_text(encoding="utf-8"), re.M)
    path = settings.parent/found[1] if found else None
    if path is None or not path.exists(): raise Unavailable(f"the weights that {settings} names are not there")
    return path


def run(args) -> Report:
    if args.checkout is None or args.video is None:
        raise Unavailable("give --checkout FOLDER of the official code, which is not part of this package, and --video FILE")
    if not (args.checkout/SCRIPT).is_file(): raise Unavailable(f"{args.checkout} holds no {SCRIPT}: clone the official DOVER there")
    rows, video = [], str(args.video.resolve())
    for model, name in (("dover", "dover.yml"), ("dover-mobile", "dover-mobile.yml")):
        settings = args.checkout.resolve()/name
        if not settings.is_file(): continue
        ours = [sys.executable, "-c", "from qualivision.cli import program; program()", "dover", video, "--weights", str(weights_of(settings)),
                "--device", args.device, *(["--mobile"] if model == "dover-mobile" else [])]
        theirs = [args.python, SCRIPT, "-o", str(settings), "-v", video, "-d", args.device]
        samples = interleaved({"official": child("benchmarks.common:command", argv=theirs, folder=str(settings.parent)),
                               "ours": child("benchmarks.common:command", argv=ours)}, args.repeat)
        rows += [{"model": model, **row} for row in compared(samples)]
    return Report(rows, [f"{args.video.name}; whole commands"])

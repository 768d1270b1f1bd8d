"""What does it cost to decode in processes that can be ended, against threads of this process?

Both ways are warm: the processes are there. A clip's views are decoded by two workers and handed over; no network follows. `cpu` is the
processors' time of all processes. Embedded clips are small, so that what a hand-over costs shows most; 480p clips with DOVER's published
64 frames of 640 pixels hand over 79 MB each.
"""
import os
import tempfile
import time
from pathlib import Path

from benchmarks.common import Report, compared, interleaved
from benchmarks.score_set import clips, files_of


def cpu_seconds() -> float:
    "Of this process and of all below it."
    import psutil
    me = psutil.Process()
    return sum(sum(p.cpu_times()[:2]) for p in [me, *me.children(recursive=True)])


def way(call, paths: list, workers: int = 2):
    "All files through the one pool."
    from qualivision.devices import Job, ahead
    def run() -> dict:
        before, start = cpu_seconds(), time.perf_counter()
        for job in ahead(map(Job, paths), lambda job: call(job.item), workers):
            if job.wrong: raise job.wrong.error
        return {"seconds": time.perf_counter() - start, "cpu": cpu_seconds() - before}
    return run


def run(args) -> Report:
    from qualivision.inference.apart import Apart
    from qualivision.data.container import Limits
    from qualivision.data.sampling import Looks, Sampling
    rows, count = [], 16
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for kind, sampling in (("embedded", Sampling(16, 128)), ("480p", Sampling(64, 640))):
        with tempfile.TemporaryDirectory() as folder:
            clips(Path(folder), kind, count, False)
            paths, there = files_of(folder), Apart(Looks(sampling), Limits())
            ways = {f"{kind}, threads": way(Looks(sampling), paths), f"{kind}, processes": way(there, paths)}
            rows += compared(interleaved(ways, args.repeat))
            there.close()
    return Report(rows, notes=[f"{count} clips, two workers, views of 16×128² and 64×640²"])

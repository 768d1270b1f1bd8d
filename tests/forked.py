"""Programs of the package in a process of their own that has nothing to import: a fork of this one.

`python -m` of a stage imports torch and half of PyPI for seconds before it does anything. A fork does what the program does, in another
folder, with other arguments and variables, and can be killed like any process; what imports do is tested elsewhere (test_imports)."""
import io
import os
import runpy
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path


class Forked:
    "A running program; poll, wait, communicate, send_signal and returncode as of `subprocess.Popen`."
    def __init__(self, program, *arguments, cwd=".", env=None):   # program: a function, or the name of a module that `python -m` would run
        self.files = [tempfile.TemporaryFile() for _ in range(2)]
        self.returncode = None
        sys.stdout.flush(), sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0: self._child(program, list(map(str, arguments)), cwd, env or {})

    def _child(self, program, arguments, cwd, env):
        status = 1
        try:
            os.chdir(cwd)
            os.environ.update(env)
            sys.stdin = open(os.devnull)
            for fd, file in zip((1, 2), self.files): os.dup2(file.fileno(), fd)
            sys.stdout, sys.stderr = (io.TextIOWrapper(os.fdopen(fd, "wb", 0, closefd=False), "utf-8", write_through=True) for fd in (1, 2))
            sys.argv = [program if isinstance(program, str) else "qualivision", *arguments]
            status = self._run(program)
        finally:
            if sys.exc_info()[0]: traceback.print_exc()
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(status)

    @staticmethod
    def _run(program) -> int:
        try:
            if callable(program): program()
            else: runpy.run_module(program, run_name="__main__", alter_sys=True)
        except SystemExit as e:
            if isinstance(e.code, str): print(e.code, file=sys.stderr)
            return 1 if isinstance(e.code, str) else e.code or 0
        return 0

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid: self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float = 300) -> int:
        until = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > until:
                self.send_signal(signal.SIGKILL)
                raise TimeoutError(f"{timeout} s")
            time.sleep(.005)
        return self.returncode

    def send_signal(self, number):
        if self.poll() is None: os.kill(self.pid, number)

    def communicate(self, timeout: float = 300) -> tuple[str, str]:      # stdout, stderr
        self.wait(timeout)
        for file in self.files: file.seek(0)
        return tuple(file.read().decode() for file in self.files)


def at_hand():
    "Imports what the stages import inside their functions: seconds, that every fork would spend again."
    import accelerate  # noqa: F401
    import scipy.stats  # noqa: F401
    import seaborn  # noqa: F401
    import sklearn.ensemble  # noqa: F401
    import sklearn.model_selection  # noqa: F401
    import transformers.models.vjepa2.modeling_vjepa2  # noqa: F401


def stage(folder: Path, module: str, *arguments, **env) -> Forked:
    "A stage of the pipeline, as `python -m qualivision.MODULE ARGUMENTS` in that folder."
    return Forked(f"qualivision.{module}", *arguments, cwd=folder, env=env)

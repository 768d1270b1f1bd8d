"Headless Chromium, driven by the DevTools protocol over two pipes; nothing but the standard library."
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Browser:
    "One page in a browser of its own; `events` holds what the page did."
    def __init__(self, home: Path):
        read, self.write = os.pipe()
        self.read, write = os.pipe()

        def places():       # the browser reads from 3 and writes to 4
            ends = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (read, write)]
            for end, place in zip(ends, (3, 4)): os.dup2(end, place)

        self.process = subprocess.Popen(
            [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--remote-debugging-pipe",
             "--disable-background-networking", "--disable-component-update", "--disable-sync", f"--user-data-dir={home}", "about:blank"],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, preexec_fn=places, pass_fds=(3, 4),
            env={**os.environ, "HOME": str(home)})
        for fd in (read, write): os.close(fd)
        self.left, self.events, self.number, self.session = b"", [], 0, None
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self.session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"): self(f"{domain}.enable")

    def message(self, until: float) -> dict:
        while b"\0" not in self.left:
            ready, _, _ = select.select([self.read], [], [], max(0, until - time.monotonic()))
            if not ready: raise TimeoutError("Chromium does not answer")
            more = os.read(self.read, 1 << 16)
            if not more: raise EOFError(f"Chromium ended with status {self.process.wait()}")
            self.left += more
        one, self.left = self.left.split(b"\0", 1)
        return json.loads(one)

    def __call__(self, method: str, **params) -> dict:
        "One command and its answer."
        self.number += 1
        asked = {"id": self.number, "method": method, "params": params} | ({"sessionId": self.session} if self.session else {})
        data = json.dumps(asked).encode() + b"\0"
        while data: data = data[os.write(self.write, data):]
        until = time.monotonic() + 120
        while True:
            said = self.message(until)
            if said.get("id") == self.number:
                assert "error" not in said, f"{method}: {said['error']}"
                return said["result"]
            self.events.append(said)

    def open(self, url: str):
        "Returns when the page has loaded."
        self.events.clear()
        self("Page.navigate", url=url)
        until = time.monotonic() + 120
        while not self.seen("Page.loadEventFired"): self.events.append(self.message(until))

    def seen(self, method: str) -> list[dict]: return [e["params"] for e in self.events if e.get("method") == method]

    def loaded(self) -> list[str]:
        "Addresses that the page has asked for, without what it carries inside."
        asked = [r["request"]["url"] for r in self.seen("Network.requestWillBeSent")]
        return [u for u in asked if not u.startswith("data:")]

    def js(self, expression: str):
        "The value of an expression in the page."
        answer = self("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def size(self, width: int, height: int = 800):
        self("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 500)

    def close(self):
        self.process.terminate()
        try: self.process.wait(20)
        except subprocess.TimeoutExpired: self.process.kill()
        for fd in (self.read, self.write): os.close(fd)

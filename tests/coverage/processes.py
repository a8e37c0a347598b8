"""Processes that answer one JSON line with one JSON line, and are killed and started anew when they don't."""

from __future__ import annotations

import json
import selectors
import subprocess
import time
from pathlib import Path
from typing import Any


class Worker:
    """A worker process, started at the first question. `versions` is the line it starts with."""

    def __init__(self, python: str, script: Path, log: Path, environment: dict[str, str]) -> None:
        self._command = [python, str(script)]
        self._log = log
        self._environment = environment
        self._process: subprocess.Popen[str] | None = None
        self.versions: dict[str, str] = {}

    def start(self) -> None:
        if self._process is not None:
            return
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log.open("a"), text=True, bufsize=1,
            env=self._environment,
        )
        answer = self._read(300.0)
        if "status" in answer:
            raise RuntimeError(f"{' '.join(self._command)} does not start; {self._log} says why")
        self.versions = answer

    def ask(self, question: dict[str, Any], seconds: float) -> dict[str, Any]:
        """The answer, with the `seconds` it took. A process that crashes or takes longer has the status "crash" or "timeout"."""
        self.start()
        assert self._process is not None and self._process.stdin is not None
        began = time.monotonic()
        print(json.dumps(question), file=self._process.stdin, flush=True)
        return {**self._read(seconds), "seconds": round(time.monotonic() - began, 2)}

    def _read(self, seconds: float) -> dict[str, Any]:
        assert self._process is not None and self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            if not selector.select(seconds):
                self.close()
                return {"status": "timeout", "reason": f"took longer than {seconds:.0f} s"}
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            self.close()
            return {"status": "crash", "reason": f"the process ended with {code}"}
        return json.loads(line)  # type: ignore[no-any-return]

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

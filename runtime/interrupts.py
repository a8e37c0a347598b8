"""Interrupts put off: Ctrl-C comes before or after what must not be left half done, never in between."""

from __future__ import annotations

# What `signal` is made of, without the enumerations that it turns all into: 5 µs less for each turn.
import _signal  # type: ignore[import-not-found]
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

# What programs raise exceptions from: KeyboardInterrupt, a server's SystemExit, a test's TimeoutError.
_SIGNALS = tuple(int(getattr(signal, name)) for name in ("SIGINT", "SIGTERM", "SIGALRM") if hasattr(signal, name))


class Interrupts:
    """Between `hold` and `let_go` no handler that the program gave a signal runs; what came in between is handled then. Python runs handlers in
    the main thread alone, so in others both do nothing. An exception that one thread throws into another is not put off.
    """

    def __init__(self) -> None:
        self._handlers: dict[int, Callable[[int, FrameType | None], Any]] = {}
        self._came: list[int] = []

    def hold(self) -> None:
        """Twice is fine."""
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                handler = _signal.getsignal(number)
                if number not in self._handlers and callable(handler):
                    self._handlers[number] = handler
                    _signal.signal(number, self._note)

    def let_go(self) -> None:
        """May raise what a handler raises."""
        if self._handlers and threading.current_thread() is threading.main_thread():
            for number in list(self._handlers):
                # Removed last: an interrupt in between leaves a handler that the next call puts back.
                _signal.signal(number, self._handlers[number])
                del self._handlers[number]
            while self._came:
                number = self._came.pop()
                # Called and not raised again: an event loop's wakeup descriptor has been told of the signal already.
                if callable(handler := _signal.getsignal(number)):
                    handler(number, None)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._came.append(number)

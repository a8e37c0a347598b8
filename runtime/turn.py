"""Whose turn it is: many threads drive one engine, one at a time."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

from .interrupts import Interrupts


class Turn:
    """A lock that is handed on in order of arrival, so that a thread that steps in a loop can't keep others out. Not reentrant.

    There are two queues: who only submits, cancels or reads goes before those who want a step, for the next step may be the one that serves it; but
    who comes after the last step's end not before the next step's, or a few that ask all the time would keep everybody's steps from being run.
    Who has the turn is not interrupted: a signal's handler runs when it is given back, so that nothing is left half done, the turn itself included.
    """

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._interrupts = Interrupts()
        self._held = False
        self._calls: deque[_Waiter] = deque()       # who want no step
        self._first: int | None = None              # so many of them go before the next step; None: all that are there when the turn is given back
        self._waiting: deque[_Waiter] = deque()

    @property
    def num_waiting(self) -> int:
        """Threads of either queue."""
        return len(self._calls) + len(self._waiting)

    def take(self, ready: Callable[[], bool] | None = None) -> bool:
        """Waits for the turn, which is then the caller's to give back; False where `ready` came true while it waited, and the turn is not needed.

        With `ready` the caller wants steps until it is true. It is asked by whoever gives the turn back: who wants nothing more need not wait
        behind those who do.
        """
        self._interrupts.hold()
        with self._mutex:
            if not self._held:
                self._held = True
                if ready is not None:
                    self._first = None
                return True
            waiter = _Waiter(ready)
            queue = self._calls if ready is None else self._waiting
            queue.append(waiter)
        try:
            self._interrupts.let_go()
            waiter.gate.acquire()
            self._interrupts.hold()
        except BaseException:
            self._interrupts.hold()
            with self._mutex:
                if waiter in queue:
                    queue.remove(waiter)
            if waiter.has_turn:
                self.give()
            else:
                self._interrupts.let_go()
            raise
        if not waiter.has_turn:
            self._interrupts.let_go()
        return waiter.has_turn

    def give(self) -> None:
        """Hands the turn on; before, all go that no longer need it."""
        with self._mutex:
            for _ in range(len(self._waiting)):
                waiter = self._waiting.popleft()
                if waiter.ready is not None and waiter.ready():
                    waiter.gate.release()
                else:
                    self._waiting.append(waiter)
            if self._first is None:
                self._first = len(self._calls)
            if self._calls and (self._first or not self._waiting):
                queue, self._first = self._calls, max(0, self._first - 1)
            else:
                queue, self._first = self._waiting, None
            if queue:
                queue[0].has_turn = True
                queue.popleft().gate.release()
            else:
                self._held = False
        self._interrupts.let_go()

    def __enter__(self) -> None:
        self.take()

    def __exit__(self, *_: object) -> None:
        self.give()


class _Waiter:
    def __init__(self, ready: Callable[[], bool] | None) -> None:
        self.ready = ready
        self.has_turn = False
        self.gate = threading.Lock()
        self.gate.acquire()     # opened by the one before, who leaves the turn held for us

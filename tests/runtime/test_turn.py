"""Who waits for a step, and who need not."""

from __future__ import annotations

import threading
from time import monotonic, sleep

import pytest
from octavo.runtime.turn import Turn


def waiting(turn: Turn, count: int) -> None:
    until = monotonic() + 10
    while (queued := turn.num_waiting) < count and monotonic() < until:
        sleep(0.001)
    assert queued == count


def served_in_order(turn: Turn, threads: list[threading.Thread]) -> None:
    """Who has the turn gives it back once all `threads` wait, in this order; returns when all have had it."""
    for count, thread in enumerate(threads, 1):
        thread.start()
        waiting(turn, count)
    turn.give()
    for thread in threads:
        thread.join(10)


def test_who_is_served_waits_for_nobody_elses_step():
    """The turn goes to the first who still needs it; one behind him, whose answer the last step has brought, goes at once and without it."""
    turn, served, begun, over = Turn(), threading.Event(), threading.Event(), threading.Event()
    got: dict[str, bool] = {}

    def first() -> None:
        got["first"] = turn.take(lambda: False)
        begun.set()
        over.wait(10)
        turn.give()

    def second() -> None:
        got["second"] = turn.take(served.is_set)

    turn.take()
    threads = [threading.Thread(target=first), threading.Thread(target=second)]
    for count, thread in enumerate(threads, 1):
        thread.start()
        waiting(turn, count)
    served.set()
    turn.give()
    threads[1].join(10)
    assert begun.wait(10)
    assert got == {"first": True, "second": False} and threads[0].is_alive()
    over.set()
    threads[0].join(10)
    assert turn.take()      # nobody holds it now


def test_order_of_arrival():
    turn, order = Turn(), list[int]()

    def work(number: int) -> None:
        with turn:
            order.append(number)

    turn.take()
    threads = [threading.Thread(target=work, args=(number,)) for number in range(5)]
    served_in_order(turn, threads)
    assert order == list(range(5))


def test_who_wants_no_step_waits_for_one_alone():
    turn, order = Turn(), list[str]()

    def work(name: str, steps: bool) -> None:
        turn.take((lambda: False) if steps else None)
        order.append(name)
        turn.give()

    turn.take()
    threads = [threading.Thread(target=work, args=(name, name in "ab")) for name in ("a", "b", "submit", "cancel")]
    served_in_order(turn, threads)
    assert order == ["submit", "cancel", "a", "b"]


def test_who_asks_all_the_time_keeps_no_step_from_being_run():
    """One call after the other, each there before the last has ended: what came after the last step waits for the next."""
    turn, order = Turn(), list[str]()

    def step() -> None:
        turn.take(lambda: False)
        order.append("step")
        turn.give()

    def call(number: int) -> None:
        with turn:
            order.append(f"call {number}")
            if number:
                threads.append(threading.Thread(target=call, args=(number - 1,)))
                threads[-1].start()
                waiting(turn, 1 if "step" in order else 2)

    threads = [threading.Thread(target=step), threading.Thread(target=call, args=(3,))]
    turn.take()
    for count, thread in enumerate(threads, 1):
        thread.start()
        waiting(turn, count)
    turn.give()
    for thread in threads:      # it grows
        thread.join(10)
    assert order == ["call 3", "step", "call 2", "call 1", "call 0"]


def test_one_who_is_interrupted_while_waiting_leaves_the_queue(monkeypatch):
    turn = Turn()
    turn.take()

    class Gate:
        def __init__(self) -> None:
            self.taken = False

        def acquire(self) -> None:
            if self.taken:
                raise KeyboardInterrupt
            self.taken = True

    with monkeypatch.context() as patch:
        lock = threading.Lock
        patch.setattr("octavo.runtime.turn.threading.Lock", Gate)
        with pytest.raises(KeyboardInterrupt):
            turn.take(lambda: False)
        patch.setattr("octavo.runtime.turn.threading.Lock", lock)
    assert not turn.num_waiting
    turn.give()
    assert turn.take()

"""Ctrl-C at any point: it is raised, and leaves the engine, other threads' work and its own sequences as if it had come before or after."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import sys
import threading
from pathlib import Path

import octavo
import pytest
from octavo import runtime
from octavo.runtime.turn import Turn

HERE = str(Path(runtime.__file__).parent)
GREEDY = octavo.SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
PROMPTS = [[5 + i, 9, 30 + i] * 4 for i in range(3)]


@pytest.fixture(autouse=True)
def signals():
    """SIGINT raises, whatever the shell made of it; and who waits for ever for a turn that was lost is told so."""
    def too_long(*_):
        raise TimeoutError

    before = signal.signal(signal.SIGINT, signal.default_int_handler), signal.signal(signal.SIGALRM, too_long)
    signal.setitimer(signal.ITIMER_REAL, 60, 5)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    assert signal.signal(signal.SIGINT, before[0]) is signal.default_int_handler, "the program's own handler is back"
    assert signal.signal(signal.SIGALRM, before[1]) is too_long


class InterruptAt:
    """A profile function: SIGINT at the n-th call or return in `octavo.runtime`, where Python looks whether a signal has come."""

    def __init__(self, point):
        self.left, self.where = point, ""

    def __call__(self, frame, event, _):
        # A generator's clean-up and a finalizer can raise nothing: Python prints what they do, and goes on.
        if event != "c_call" and frame.f_code.co_filename.startswith(HERE) and frame.f_code.co_name not in ("<genexpr>", "_drop", "drop"):
            self.left -= 1
            if self.left == 0:
                sys.setprofile(None)
                self.where = f"{frame.f_code.co_filename}:{frame.f_lineno} {event}"
                signal.raise_signal(signal.SIGINT)


def interrupted(work, point):
    """Where SIGINT came, "" where `work` has fewer points."""
    profile = InterruptAt(point)
    try:
        sys.setprofile(profile)
        work()
    except KeyboardInterrupt:
        pass
    else:
        assert not profile.where, f"{profile.where}: it was not raised"
    finally:
        sys.setprofile(None)
    gc.collect()
    return profile.where


def everything(model):
    """Each operation once, on a pool too small."""
    with model.begin_session() as session:
        sequence = session.new_sequence()
        sequence.append(PROMPTS[0] * 3)
        model.generate(PROMPTS[:2], octavo.SamplingParams(n=2, max_tokens=3, seed=1, ignore_eos=True))
        fork = sequence.fork()
        fork.append([3])
        fork.truncate(5)
        session.append_batch([(fork, [4]), (sequence, [5, 6])])
        sequence.generate(GREEDY)
        stream = fork.stream(GREEDY)
        next(stream)
        del stream
        fork.append([3])
        with model.stream(PROMPTS[2], GREEDY) as stream:
            next(stream)
        model.predict(PROMPTS[1])


def test_an_interrupt_anywhere(tools, paths, op_library):
    """Every 311th point of some eleven thousand; a prime, so that loops are hit at all of theirs."""
    with tools.small_paged(paths, 12, max_step_tokens=16, max_sequences=3, swap_memory="40 kB") as model:
        expected = [completion.token_ids for result in model.generate(PROMPTS, GREEDY) for completion in result.completions]
        point = 1
        while where := interrupted(lambda: everything(model), point):
            answers = []
            other = threading.Thread(target=lambda: answers.extend(model.generate(PROMPTS, GREEDY)), daemon=True)   # noqa: B023
            other.start()
            other.join(20)
            assert [completion.token_ids for result in answers for completion in result.completions] == expected, where
            tools.check_idle(model)
            assert model.stats()["sequences"] == 0, where
            point += 311
        assert point > 20 * 311, "so many were tried"


def test_an_append_that_was_interrupted_before_it_was_computed_is_undone(paged, monkeypatch):
    """Its caller has no logits, so the sequence has none of its tokens, and nothing is left that would add them later."""
    sequence, submit = paged.begin_session().new_sequence(), paged.engine.submit
    sequence.append([5, 6])
    with monkeypatch.context() as patch:
        patch.setattr(paged.engine, "submit", lambda requests: (submit(requests), signal.raise_signal(signal.SIGINT)))
        with pytest.raises(KeyboardInterrupt):
            sequence.append([7, 8])
    assert sequence.tokens == (5, 6) and paged.stats()["requests_running"] == 0
    assert (sequence.append([7]) == paged.predict([5, 6, 7])[-1:]).all()


@pytest.mark.parametrize("how", ["with", "take"])
def test_no_interrupt_loses_the_turn(how):
    turn, done = Turn(), 0

    def use():
        nonlocal done
        if how == "with":
            with turn:
                done += 1
        elif turn.take(lambda: False):
            try:
                done += 1
            finally:
                turn.give()

    point = 1
    while interrupted(use, point):
        assert turn.take(), "nobody holds it"
        turn.give()
        point += 1
    assert 2 < done < point, "some came before it was taken, some after"


def test_who_is_interrupted_while_waiting_gets_out_at_once():
    turn = Turn()
    begun, over = threading.Event(), threading.Event()

    def hold():
        with turn:
            begun.set()
            over.wait(30)

    holder = threading.Thread(target=hold)
    holder.start()
    begun.wait(30)
    threading.Timer(0.05, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        turn.take()
    assert holder.is_alive() and not turn.num_waiting
    over.set()
    holder.join(30)
    assert turn.take()
    turn.give()


def test_an_event_loop_hears_of_a_signal_once():
    turn, heard = Turn(), []

    async def main():
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, lambda: heard.append(signal.SIGTERM))
        with turn:
            os.kill(os.getpid(), signal.SIGTERM)
        for _ in range(20):
            await asyncio.sleep(0.005)
        loop.remove_signal_handler(signal.SIGTERM)

    asyncio.run(main())
    assert heard == [signal.SIGTERM]

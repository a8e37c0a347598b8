"""One request's misfortune is its own: a tokenizer that fails, memory that runs out, a model that is closed, a stream dropped in the middle of a step."""

from __future__ import annotations

import gc
import threading
import time
import weakref

import numpy as np
import octavo
import pytest
from octavo.errors import OptionError, RequestError, StepError
from octavo.runtime.request import AppendRequest

GREEDY = octavo.SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
PROMPTS = [[5 + i, 9, 30 + i] for i in range(6)]


def until(condition):
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_a_tokenizer_that_fails_ends_its_request_alone(model, monkeypatch):
    expected = [result.completions for result in model.generate(PROMPTS, GREEDY)]
    poison = expected[2][0].token_ids[4]
    decode = type(model.tokenizer).decode

    def failing(self, ids):
        if len(ids) > 4 and list(ids[:3]) == PROMPTS[2] and poison in ids:
            raise ValueError("no such piece")
        return decode(self, ids)

    streams = [model.stream(prompt, GREEDY) for prompt in PROMPTS]
    monkeypatch.setattr(type(model.tokenizer), "decode", failing)
    pieces = [list(stream) for stream in streams]
    for at, (mine, [completion]) in enumerate(zip(pieces, expected)):
        if at == 2:
            assert mine[-1].finish_reason == "error" and "no such piece" in mine[-1].error
        else:
            assert tuple(token for piece in mine for token in piece.token_ids) == completion.token_ids
    assert any(d.stage == "run" and "no such piece" in d.reason for d in model.decisions)


def test_rows_that_there_is_no_memory_for(model, monkeypatch):
    session = model.begin_session()
    good, bad = session.new_sequence(), session.new_sequence()
    accept = AppendRequest.accept

    def failing(self, *given):
        if self.sequence is bad._state:
            raise MemoryError
        accept(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(AppendRequest, "accept", failing)
        with pytest.raises(StepError, match="MemoryError"):
            session.append_batch([(good, [5, 6]), (bad, [7, 8])])
    assert (len(good), len(bad)) == (2, 0)
    np.testing.assert_array_equal(bad.append([5, 6]), model.predict([5, 6])[-1:])


def test_closing_the_model_ends_what_runs(paths, op_library):
    model = octavo.load(paths.paged, options=octavo.RuntimeOptions(threads=1, max_sequences=2))
    streams = [model.stream(prompt, GREEDY) for prompt in PROMPTS]
    sequence = model.begin_session().new_sequence()
    sequence.append([4])
    mine, tokens = sequence.stream(GREEDY), [next(streams[0]).token_ids]
    model.close()
    tokens += [piece.token_ids for piece in streams[0]]
    assert tokens[-1] == () and 0 < len(tokens) < 12
    for stream in streams[1:]:
        *_, last = stream
        assert last.finish_reason == "error" and "closed" in last.error
    assert list(mine) == [], "closed with its sequence"
    with pytest.raises(RequestError, match="closed"):
        sequence.append([1])
    model.close()


def test_closing_the_model_while_others_wait(paths, op_library, monkeypatch):
    """Their threads get an answer, whatever they were doing."""
    model = octavo.load(paths.paged, options=octavo.RuntimeOptions(threads=1))
    sequence = model.begin_session().new_sequence()
    turn, answers = model.engine.turn, []

    def ask(work):
        try:
            answers.append(work())
        except RequestError as error:
            answers.append(error)

    work = [lambda: sequence.append([1, 2]), lambda: model.predict([3]), lambda: model.generate([[4]], GREEDY)[0].completions[0].finish_reason]
    threads = [threading.Thread(target=ask, args=(job,)) for job in work]
    with turn:
        for thread in threads:
            thread.start()
        until(lambda: turn.num_waiting == 3)
        closing = threading.Thread(target=model.close)
        closing.start()
        until(lambda: turn.num_waiting == 4)
    for thread in (*threads, closing):
        thread.join(30)
        assert not thread.is_alive()
    assert len(answers) == 3 and all(answer == "error" or isinstance(answer, RequestError) for answer in answers), answers


@pytest.mark.parametrize("ask", ["stats", "engine"])
def test_closing_the_model_while_another_thread_asks(paths, op_library, ask):
    """After it has seen that the model is open: it gets an answer or is told that the model is closed."""
    model = octavo.load(paths.paged, options=octavo.RuntimeOptions(threads=1))
    check_open = model.check_open

    def closed_behind_its_back():
        check_open()
        model.check_open = check_open
        model.close()

    model.check_open = closed_behind_its_back
    if ask == "stats":
        assert model.stats()["requests_running"] == 0
    else:
        with pytest.raises(RequestError, match="closed"):
            model.generate([[1]], GREEDY)
    with pytest.raises(RequestError, match="closed"):
        model.stats()


@pytest.mark.parametrize("scope", ["session", "model"])
def test_closing_while_another_thread_adds_to_it(paths, op_library, scope):
    """Who comes while what is open is counted comes after it, and is told."""
    model = octavo.load(paths.paged, options=octavo.RuntimeOptions(threads=1))
    session, told = model.begin_session(), []
    kept = [(model.begin_session(), session.new_sequence()) for _ in range(4)]

    def add():
        try:
            sequence = (session if scope == "session" else model.begin_session()).new_sequence()
            sequence.append([1])
        except RequestError as error:
            told.append(error.message)

    class Slow(weakref.WeakSet):
        def __iter__(self):
            for at, item in enumerate(super().__iter__()):
                if at == 2:
                    adding.start()
                    adding.join(0.1)
                yield item

    adding, place = threading.Thread(target=add), (session, "_sequences") if scope == "session" else (model, "_sessions")
    setattr(*place, Slow(getattr(*place)))
    (session if scope == "session" else model).close()
    adding.join(30)
    assert len(told) == 1 and "closed" in told[0] and all(sequence.closed for _, sequence in kept)
    if scope == "session":
        assert model.stats()["sequences"] == 0
        model.close()


def test_a_stream_dropped_in_the_middle_of_a_step(paged, monkeypatch):
    """The step of another thread still brings its token; what is appended after that comes after it."""
    sequence = paged.begin_session().new_sequence()
    sequence.append(PROMPTS[0])
    stream, other = sequence.stream(GREEDY), paged.stream(PROMPTS[1], GREEDY)
    next(stream)
    while other.ready:
        next(other)
    inside, go = threading.Event(), threading.Event()
    execute = paged.engine.executor.execute

    def slow(plan):
        inside.set()
        assert go.wait(30)
        return execute(plan)

    with monkeypatch.context() as patch:
        patch.setattr(paged.engine.executor, "execute", slow)
        stepping = threading.Thread(target=lambda: next(other))
        stepping.start()
        assert inside.wait(30)
        del stream
        gc.collect()
        rows = []
        appending = threading.Thread(target=lambda: rows.append(sequence.append([7, 8])))
        appending.start()
        until(lambda: paged.engine.turn.num_waiting >= 1)
        go.set()
        stepping.join(30)
        appending.join(30)
    assert rows[0].shape == (1, 320) and sequence.tokens[-2:] == (7, 8)
    np.testing.assert_array_equal(rows[0], paged.predict(sequence.tokens)[-1:])
    list(other)


def test_many_threads_appends_share_steps(paged):
    """Eight threads, each with a sequence of its own: what waits at the same time is computed at the same time."""
    session = paged.begin_session()
    sequences = [session.new_sequence() for _ in range(8)]
    turn, rows, rounds = paged.engine.turn, {}, 5
    before = paged.stats()["steps"]
    for round_ in range(rounds):
        def work(i, new=round_ + 1):
            rows[i] = sequences[i].append([3 + i, new])

        threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
        with turn:
            for thread in threads:
                thread.start()
            until(lambda: turn.num_waiting == 8)
        for thread in threads:
            thread.join(30)
    assert paged.stats()["steps"] - before == rounds
    for i, sequence in enumerate(sequences):
        np.testing.assert_array_equal(rows[i], paged.predict(sequence.tokens)[-1:])


def test_one_sequence_and_two_threads_take_turns(model):
    sequence = model.begin_session().new_sequence()
    threads = [threading.Thread(target=lambda i=i: [sequence.append([3 + i] * 4) for _ in range(5)]) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    parts = [sequence.tokens[at : at + 4] for at in range(0, 40, 4)]
    assert all(len(set(part)) == 1 for part in parts) and len(sequence) == 40


@pytest.mark.parametrize("work", [None, 5, [5], [()], [([1],)], [("a", [1])]])
def test_batches_that_are_none(paged, work):
    with pytest.raises(RequestError):
        paged.begin_session().append_batch(work)


@pytest.mark.parametrize("deadline", [10**400, -(10**400), float("inf"), True, "1"])
def test_deadlines_that_are_none(paged, deadline):
    with pytest.raises(OptionError, match="deadline"):
        paged.generate([[1]], GREEDY, deadline=deadline)

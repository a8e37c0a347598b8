"""Priorities, deadlines, a queue that is full: refused or ended with the cause, and nobody else notices."""

from __future__ import annotations

import octavo
import pytest
from octavo.errors import DeadlineError, OptionError, QueueFullError

GREEDY = octavo.SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
PROMPTS = [[5 + i, 9, 30 + i] for i in range(6)]


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        self.now += 0.001
        return self.now


def test_a_deadline_ends_its_request_alone(paged):
    expected = paged.generate(PROMPTS[:2], GREEDY)
    clock = paged.engine.clock = Clock()
    stream = paged.stream(PROMPTS[2], GREEDY, deadline=5.0)
    assert next(stream).finish_reason is None
    clock.now = 6.0
    assert paged.generate(PROMPTS[:2], GREEDY) == expected
    *_, last = stream
    assert last.finish_reason == "error" and "deadline" in last.error
    assert paged.stats()["requests_running"] == 0
    ample = paged.generate(PROMPTS[:2], GREEDY, deadline=1e6)
    assert ample == expected


@pytest.mark.parametrize("deadline", [0, -1.0])
def test_a_deadline_that_has_passed_is_refused(paged, deadline):
    with pytest.raises(DeadlineError):
        paged.generate(PROMPTS[:1], GREEDY, deadline=deadline)
    sequence = paged.begin_session().new_sequence()
    sequence.append(PROMPTS[0])
    with pytest.raises(DeadlineError):
        sequence.generate(GREEDY, deadline=deadline)
    sequence.append([1])


def test_a_full_queue_says_when_to_come_back(tools, paths, op_library):
    with tools.small_paged(paths, 24, max_sequences=2, max_waiting=1) as model:
        streams = [model.stream(prompt, GREEDY) for prompt in PROMPTS[:3]]
        with pytest.raises(QueueFullError) as error:
            model.stream(PROMPTS[3], GREEDY)
        assert error.value.retry_after > 0 and "max_waiting=1" in str(error.value)
        assert [len([p for p in stream if p.token_ids]) for stream in streams] == [12] * 3
        assert len(model.generate(PROMPTS[:3], GREEDY)) == 3
        sequence = model.begin_session().new_sequence()
        sequence.append(PROMPTS[0])     # appends don't queue


def test_steps_hold_no_more_sequences_and_tokens_than_asked(tools, paths, op_library, monkeypatch):
    with tools.small_paged(paths, 24, max_sequences=3, max_step_tokens=16) as model:
        seen = []
        execute = model.engine.executor.execute
        monkeypatch.setattr(model.engine.executor, "execute", lambda plan: (seen.append((len(plan.slices), plan.num_tokens)), execute(plan))[1])
        model.generate([[7] * 40, *PROMPTS], GREEDY)
        assert max(n for n, _ in seen) == 3 and max(t for _, t in seen) == 16


def test_higher_priority_ends_first(tools, paths, op_library):
    with tools.small_paged(paths, 24, max_sequences=1) as model:
        streams = [model.stream(PROMPTS[p], GREEDY, priority=p) for p in (0, 1, 2)]
        next(streams[0])        # runs the others first: they outrank it
        assert [stream.ended for stream in streams] == [False, True, True]
        assert len(list(streams[0])) == 11


@pytest.mark.parametrize("wrong", [{"priority": 1.5}, {"priority": True}, {"deadline": "soon"}, {"deadline": float("nan")}, {"salt": 3}])
def test_wrong_requests_are_refused(paged, wrong):
    with pytest.raises(OptionError):
        paged.generate(PROMPTS[:1], GREEDY, **wrong)


@pytest.mark.parametrize("wrong", [{"max_sequences": 0}, {"max_step_tokens": 3}, {"max_waiting": -1}, {"policy": "fast"}, {"max_sequences": True}])
def test_wrong_options_are_refused(wrong):
    with pytest.raises(OptionError):
        octavo.RuntimeOptions(**wrong)

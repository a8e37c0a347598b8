"""The scheduler on integers: random arrivals over a small pool, with the invariants after every step."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from octavo.runtime.kv.tables import BlockTables
from octavo.runtime.plan import Limits, SequenceState, Slice, StepPlan
from octavo.runtime.scheduler import Scheduler


class Memory:
    """The memory side of an executor, and a step that always works."""

    def __init__(self, blocks):
        self.tables = BlockTables([None], blocks, 4)

    def reserve(self, sequence, stop):
        return self.tables.reserve(sequence.cache, sequence.num_cached, stop)

    def adopt(self, sequence, limit):
        sequence.num_cached = self.tables.adopt(sequence.cache, sequence.tokens, limit)

    def unreserve(self, sequence):
        self.tables.unreserve(sequence.cache)

    def disown(self, sequence):
        sequence.num_cached = 0
        self.tables.truncate(sequence.cache, 0)

    put_aside = disown

    def execute(self, plan):
        for part in plan.slices:
            self.tables.commit(self.tables.extend(part.sequence.cache, part.start, part.stop))
            part.sequence.num_cached = part.stop


@dataclass(eq=False)
class Job:
    sequence: SequenceState
    left: int
    preemptable: bool = True
    first_row: int = 0
    last_turn: int = -1
    priority: int = 0
    arrival: int = -1
    overdue: bool = False
    seen: list = field(default_factory=list)

    num_reusable = 0

    @property
    def num_pending(self):
        return len(self.sequence.tokens) - self.sequence.num_cached


def step(scheduler, memory, limits):
    schedule = scheduler.schedule()
    assert len(schedule.requests) == len(set(map(id, schedule.requests))) == len(schedule.plan.slices)
    assert len(schedule.requests) <= limits.max_sequences and schedule.plan.num_tokens <= limits.max_tokens
    memory.execute(schedule.plan)
    for job in schedule.requests:
        if job.num_pending == 0:
            job.left -= 1
            job.sequence.tokens.append(1)
        if job.left == 0:
            finish(scheduler, memory, job)
    scheduler.check()
    memory.tables.check()
    assert not any(any(job.sequence.cache.reserved) for job in scheduler._waiting), "who waits is promised nothing"
    return schedule


def finish(scheduler, memory, job):
    scheduler.remove(job)
    memory.tables.close(job.sequence.cache)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(1, 30), st.integers(1, 12)), min_size=1, max_size=8), st.integers(11, 24),
       st.sampled_from([Limits(1, 8), Limits(3, 8), Limits(4, 64)]))
def test_everyone_is_served(arrivals, blocks, limits):
    """No pool too small for one is too small for many; none is starved, nobody stalls, everything is given back."""
    memory = Memory(blocks)
    scheduler = Scheduler(limits, memory)
    jobs, clock = [], 0
    queue = sorted(arrivals, key=lambda arrival: arrival[0])
    while queue or any(job.left for job in jobs):
        while queue and queue[0][0] <= clock:
            _, prompt, count = queue.pop(0)
            jobs.append(Job(SequenceState([0] * prompt, memory.tables.open()), count))
            scheduler.add(jobs[-1])
        oldest = scheduler._running[0] if scheduler._running else None
        cached = oldest.sequence.num_cached if oldest else 0
        schedule = step(scheduler, memory, limits)
        assert not schedule.starved
        assert oldest is None or limits.max_sequences == 1 or oldest.left == 0 or oldest.sequence.num_cached > cached, "the oldest gets on"
        clock += 1
        assert clock < 2000
    assert memory.tables.pools[0].num_free == blocks


def test_a_long_prompt_does_not_stall_a_stream():
    memory, limits = Memory(100), Limits(4, 8)
    scheduler = Scheduler(limits, memory)
    streams = [Job(SequenceState([0], memory.tables.open()), 40) for _ in range(3)]
    for job in streams:
        scheduler.add(job)
    step(scheduler, memory, limits)
    prompt = Job(SequenceState([0] * 40, memory.tables.open()), 1)
    prompt.arrival = 0
    scheduler._running.insert(0, prompt)    # older than all of them
    for _ in range(8):
        left = [job.left for job in streams]
        step(scheduler, memory, limits)
        assert [job.left for job in streams] == [n - 1 for n in left]
    assert prompt.left == 0, "and the prompt had the rest of the budget"


def test_first_come_first_served():
    memory, limits = Memory(12), Limits(4, 64)
    scheduler = Scheduler(limits, memory)
    first, big, small = (Job(SequenceState([0] * n, memory.tables.open()), 2) for n in (20, 32, 4))
    for job in (first, big, small):
        scheduler.add(job)
    assert step(scheduler, memory, limits).requests == (first,), "the small one does not overtake the one that waits for room"
    step(scheduler, memory, limits)
    assert step(scheduler, memory, limits).requests == (big, small)


def test_starved_where_nobody_will_free_anything():
    memory, limits = Memory(3), Limits(4, 64)
    scheduler = Scheduler(limits, memory)
    held = SequenceState([0] * 8, memory.tables.open())
    memory.tables.commit(memory.tables.extend(held.cache, 0, 8))
    job = Job(SequenceState([0] * 5, memory.tables.open()), 1)
    scheduler.add(job)
    assert scheduler.schedule().starved == (job,) and scheduler.num_waiting == scheduler.num_running == 0


def test_more_forks_than_a_step_takes_turns():
    memory, limits = Memory(40), Limits(2, 64)
    scheduler = Scheduler(limits, memory)
    jobs = [Job(SequenceState([0, 0], memory.tables.open()), 4) for _ in range(5)]
    for job in jobs:
        memory.execute(StepPlan((Slice(job.sequence, 0, 1, 1),)))
        scheduler.add(job, admitted=True)
    for _ in range(5):
        step(scheduler, memory, limits)
    assert [job.left for job in jobs] == [2] * 5


def test_the_youngest_gives_way():
    memory, limits = Memory(6), Limits(4, 64)
    scheduler = Scheduler(limits, memory)
    old, middle, young = (Job(SequenceState([0] * 8, memory.tables.open()), 9) for _ in range(3))
    for job in (old, middle, young):
        scheduler.add(job)
    step(scheduler, memory, limits)
    assert step(scheduler, memory, limits).requests == (old, middle)
    assert (scheduler.num_preemptions, young.sequence.num_cached, scheduler.num_waiting) == (1, 0, 1)


def test_higher_priority_goes_first_and_takes_the_room():
    memory, limits = Memory(6), Limits(2, 64)
    scheduler = Scheduler(limits, memory)
    low, lower, high = (Job(SequenceState([0] * 8, memory.tables.open()), 3, priority=p) for p in (0, -1, 5))
    for job in (lower, low):
        scheduler.add(job)
    assert step(scheduler, memory, limits).requests == (low, lower)
    scheduler.add(high)
    assert step(scheduler, memory, limits).requests == (low, high), "the lowest gave way; streams come before prompts"
    assert (scheduler.num_preemptions, lower.sequence.num_cached) == (1, 0)
    while any(job.left for job in (low, lower, high)):
        step(scheduler, memory, limits)


def test_prompts_beside_streams_are_bounded():
    memory, limits = Memory(100), Limits(4, 64)
    scheduler = Scheduler(limits, memory)
    stream = Job(SequenceState([0], memory.tables.open()), 40)
    scheduler.add(stream)
    step(scheduler, memory, limits)
    prompts = [Job(SequenceState([0] * 30, memory.tables.open()), 1) for _ in range(2)]
    for job in prompts:
        scheduler.add(job)
    memory.execute(plan := scheduler.schedule(12).plan)
    assert [s.stop - s.start for s in plan.slices] == [1, 12]
    stream.sequence.tokens.append(0)
    assert scheduler.num_decoding == 1
    assert [s.stop - s.start for s in scheduler.schedule(None).plan.slices] == [1, 18, 30]


@pytest.mark.parametrize("places", [1, 2])
def test_a_step_without_prompts_still_serves_streams(places):
    """Where they take every place too, and a prompt would have had one of them."""
    memory = Memory(100)
    scheduler = Scheduler(Limits(places, 64), memory)
    streams = [Job(SequenceState([0], memory.tables.open()), 40) for _ in range(2)]
    for job in streams:
        memory.execute(StepPlan((Slice(job.sequence, 0, 1, 1),)))
        job.sequence.tokens.append(1)
        scheduler.add(job, admitted=True)
    scheduler.add(Job(SequenceState([0] * 9, memory.tables.open()), 1), admitted=True)
    for _ in range(3):
        schedule = scheduler.schedule(0)
        assert schedule.requests and set(schedule.requests) <= set(streams)
        memory.execute(schedule.plan)
        for job in schedule.requests:
            job.sequence.tokens.append(1)


def test_idle_caches_go_before_running_ones():
    memory, limits = Memory(4), Limits(4, 64)
    idle = SequenceState([0] * 8, memory.tables.open())
    memory.execute(StepPlan((Slice(idle, 0, 8, 8),)))
    given = []

    def give_up():
        if idle.num_cached:
            given.append(idle)
            memory.put_aside(idle)
            return True
        return False

    scheduler = Scheduler(limits, memory, give_up)
    jobs = [Job(SequenceState([0] * 7, memory.tables.open()), 2) for _ in range(2)]
    scheduler.add(jobs[0])
    step(scheduler, memory, limits)
    assert not given
    scheduler.add(jobs[1])
    assert step(scheduler, memory, limits).requests == tuple(jobs) and given == [idle] and scheduler.num_preemptions == 0


@pytest.mark.parametrize("limits", [Limits(1, 16), Limits(3, 16)])
def test_nobody_starves_under_a_stream_of_higher_priorities(limits):
    """Always more of them waiting than there are places: the low one ends all the same, and they had most of the time."""
    memory = Memory(60)
    scheduler = Scheduler(limits, memory)
    low = Job(SequenceState([0] * 5, memory.tables.open()), 6, priority=-3)
    scheduler.add(low)
    jobs, steps = [], 0
    while low.left:
        while scheduler.num_waiting < 4:
            jobs.append(Job(SequenceState([0] * 5, memory.tables.open()), 3, priority=2))
            scheduler.add(jobs[-1])
        step(scheduler, memory, limits)
        steps += 1
        assert steps < 200
    assert sum(job.left == 0 for job in jobs) >= 15


def test_a_prompt_gets_a_place_among_more_streams_than_places():
    memory, limits = Memory(100), Limits(4, 64)
    scheduler = Scheduler(limits, memory)
    streams = [Job(SequenceState([0], memory.tables.open()), 40) for _ in range(9)]
    for job in streams:
        memory.execute(StepPlan((Slice(job.sequence, 0, 1, 1),)))
        job.sequence.tokens.append(1)
        scheduler.add(job, admitted=True)
    prompt = Job(SequenceState([0] * 100, memory.tables.open()), 1)
    scheduler.add(prompt, admitted=True)
    for _ in range(2):
        assert step(scheduler, memory, limits).requests[-1] is prompt
    assert prompt.left == 0
    for _ in range(8):
        step(scheduler, memory, limits)
    assert {job.left for job in streams} <= {35, 36, 37}, "and those behind it took turns"


def test_one_place_alternates():
    memory, limits = Memory(100), Limits(1, None)
    scheduler = Scheduler(limits, memory)
    stream = Job(SequenceState([0], memory.tables.open()), 40)
    scheduler.add(stream)
    scheduler.schedule()
    memory.execute(StepPlan((Slice(stream.sequence, 0, 1, 0),)))
    stream.sequence.tokens.append(1)
    for turn in range(3):
        prompt = Job(SequenceState([0] * 9, memory.tables.open()), 1)
        scheduler.add(prompt, admitted=True)
        served = []
        for _ in range(2):
            served += (schedule := scheduler.schedule()).requests
            memory.execute(schedule.plan)
            if schedule.requests == (stream,):
                stream.sequence.tokens.append(1)
            else:
                finish(scheduler, memory, prompt)
        assert set(map(id, served)) == {id(stream), id(prompt)}, turn


def test_higher_priority_rows_go_first_and_lower_ones_get_on():
    memory, limits = Memory(100), Limits(2, 64)
    scheduler = Scheduler(limits, memory)
    rows = [Job(SequenceState([0], memory.tables.open()), 60, priority=p) for p in (0, 1, 1, 1)]
    for job in rows:
        memory.execute(StepPlan((Slice(job.sequence, 0, 1, 1),)))
        job.sequence.tokens.append(1)
        scheduler.add(job, admitted=True)
    for _ in range(30):
        step(scheduler, memory, limits)
    low, *high = (60 - job.left for job in rows)
    assert 0 < low < min(high)


def test_who_gives_way_for_a_place_keeps_its_cache_while_there_is_room():
    memory, limits = Memory(20), Limits(1, 64)
    scheduler = Scheduler(limits, memory)
    low, high = (Job(SequenceState([0] * 8, memory.tables.open()), 3, priority=p) for p in (0, 5))
    scheduler.add(low)
    step(scheduler, memory, limits)
    scheduler.add(high)
    assert step(scheduler, memory, limits).requests == (high,)
    assert (scheduler.num_preemptions, low.sequence.num_cached) == (1, 8)
    big = Job(SequenceState([0] * 78, memory.tables.open()), 1, priority=5)
    scheduler.add(big)
    while big.left:
        step(scheduler, memory, limits)
    assert low.sequence.num_cached == 0, "the room was needed"
    while low.left:
        step(scheduler, memory, limits)

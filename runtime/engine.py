"""The engine: schedule → execute → sample → commit → emit, one step at a time, by whichever thread wants something done.

There is no engine thread. A thread that waits for its request takes the turn, runs one step for everybody, and passes the turn on: so many
threads' sequences share steps, and a program with one thread has no other.
"""

from __future__ import annotations

import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence

from ..errors import CapacityError, DeadlineError, OctavoError, QueueFullError, RequestError, StepError
from .decisions import DecisionLog
from .executor import Executor, Logits, step_error
from .pace import Pace, Policy
from .plan import SequenceState, Slice, StepPlan
from .request import AppendRequest, GenerateRequest, Request
from .sampler import Row, open_sampler
from .saved import CacheState
from .scheduler import Schedule, Scheduler
from .turn import Turn


class Engine:
    """One per model. Everything that touches the executor or the scheduler happens under `turn`."""

    def __init__(self, executor: Executor, decisions: DecisionLog, *, policy: Policy = "auto", max_waiting: int | None = None) -> None:
        self.turn = Turn()
        self.executor = executor
        self.counters: Counter[str] = Counter()
        self.clock = time.monotonic
        self._decisions = decisions
        self._sampler = open_sampler(executor.vocab_size, decisions)
        self._scheduler: Scheduler[Request] = Scheduler(executor.limits, executor, self._drop_idle)
        self._pace = Pace(policy, executor.limits.max_tokens)
        self._max_waiting = max_waiting
        self._timed: set[Request] = set()       # requests with a deadline
        self._closed = False
        self._last_end: float | None = None
        self._seconds_per_request = 1.0         # between two that end, on average
        # Sequences with something cached that nobody computes, the longest untouched first.
        self._idle: OrderedDict[SequenceState, None] = OrderedDict()
        # Filled by finalizers, which may run anywhere, even in the middle of a step; emptied by the next step.
        self._dropped: deque[Callable[[], None]] = deque()

    def run(self, requests: Sequence[Request], until: Callable[[], bool] | None = None) -> None:
        """Steps until all `requests` are done, or `until` says so. An interrupt cancels them."""
        ready = until or (lambda: all(request.done for request in requests))
        try:
            while not ready():
                self.step_unless(ready)
        except BaseException:
            self.cancel_soon(requests)
            raise

    def step_unless(self, ready: Callable[[], bool]) -> None:
        """One step, unless `ready` says that it isn't needed any more."""
        if not self.turn.take(ready):
            return
        try:
            if not ready():
                self._step()
        finally:
            self.turn.give()

    def let_the_overdue_in(self) -> None:
        """Before an append: steps for who has waited too long already, or one append after the other would keep it out for ever."""
        self.run((), lambda: not self._scheduler.overdue_waits)

    def submit(self, requests: Iterable[Request]) -> None:
        """Under the turn. Queues requests, all or none.

        Raises CapacityError for an append for which there is no room now, QueueFullError, and DeadlineError for one that is late already.
        """
        requests = list(requests)
        if self._closed:
            raise _closed_error()
        self.collect_dropped()
        self._refuse(requests)
        for request in requests:
            self._idle.pop(request.sequence, None)
        for at, request in enumerate(requests):
            if not request.preemptable and not self._scheduler.make_room(request, len(request.sequence.tokens)):
                for earlier in requests[:at]:
                    self._undo(earlier)     # it may have adopted a prefix already
                for other in requests:
                    self.rest(other.sequence)
                raise self._no_room(request)
        for request in requests:
            self._scheduler.add(request, admitted=not request.preemptable)
            if request.deadline is not None:
                self._timed.add(request)

    def close(self) -> None:
        """Fails every request, of whichever thread, and takes no more."""
        with self.turn:
            self._closed = True
            self.collect_dropped()
            for request in self._scheduler.requests:
                self._fail(request, _closed_error())

    def cancel(self, requests: Iterable[Request]) -> None:
        """Under the turn. Ends requests that nobody waits for any more, queued or not; an append leaves its sequence as it was."""
        for request in requests:
            if not request.done:
                request.done = True
                self._retire(request, undo=True)

    def cancel_soon(self, requests: Iterable[Request]) -> None:
        """`cancel`, before anybody else's next step."""
        with self.turn:
            self.cancel(requests)

    def drop(self, action: Callable[[], None]) -> None:
        """From a finalizer: `action` runs under the turn, with the next step at the latest."""
        self._dropped.append(action)

    def collect_dropped(self) -> None:
        """Under the turn."""
        while self._dropped:
            self._dropped.popleft()()

    def stats(self) -> dict[str, int]:
        """Under the turn."""
        self.collect_dropped()
        return {
            **self.executor.stats(), "steps": self.counters["steps"], "tokens": self.counters["tokens"], "forks": self.counters["forks"],
            "failed_steps": self.counters["failed_steps"], "preemptions": self._scheduler.num_preemptions,
            "idle_drops": self.counters["idle_drops"], "sequences_idle": len(self._idle),
            "requests_waiting": self._scheduler.num_waiting, "requests_running": self._scheduler.num_running,
        }

    def check(self) -> None:
        """Under the turn. The invariants of scheduler and executor."""
        self._scheduler.check()
        self.executor.check()
        assert not any(request.done for request in self._timed), "a deadline outlives its request"

    def rest(self, sequence: SequenceState) -> None:
        """Under the turn. Nobody computes this sequence for now: what it has cached may be dropped where room lacks."""
        if sequence.cache is not None and sequence.num_cached:
            self._idle[sequence] = None

    def _drop_idle(self) -> bool:
        while self._idle:
            sequence, _ = self._idle.popitem(last=False)
            if sequence.num_cached:
                self.counters.update(idle_drops=1)
                self.executor.put_aside(sequence)
                return True
        return False

    def _refuse(self, requests: Sequence[Request]) -> None:
        if any(request.deadline is not None and request.deadline <= self.clock() for request in requests):
            raise DeadlineError("the deadline has passed", hint="give the request more time")
        waiting = self._scheduler.num_waiting + sum(request.preemptable for request in requests)
        if self._max_waiting is not None and waiting > self._max_waiting + max(0, self.executor.limits.max_sequences - self._scheduler.num_running):
            raise QueueFullError(
                f"the queue is full: {self._scheduler.num_waiting} requests wait, max_waiting={self._max_waiting}",
                hint=f"try again in {self._seconds_per_request:.1f} s", retry_after=self._seconds_per_request,
            )

    def _step(self) -> None:
        start = self.clock()
        self.collect_dropped()
        if self._timed:
            now = self.clock()
            for late in [request for request in self._timed if request.deadline is not None and request.deadline <= now]:
                self._fail(late, DeadlineError("the deadline has passed"))
        decoding = self._scheduler.num_decoding
        prompts = self._scheduler.num_running + self._scheduler.num_waiting - decoding
        schedule = self._scheduler.schedule(self._pace.prompt_tokens(decoding, prompts))
        for request in schedule.starved:
            self._fail(request, self._no_room(request))
        unread: dict[Request, Slice] = dict(zip(schedule.requests, schedule.plan.slices))
        try:
            for outcomes in self._execute(schedule):
                self._settle(outcomes, unread)
        finally:
            # An interrupt came in between: rows that nobody has read are computed again.
            for request, part in unread.items():
                self.executor.truncate(request.sequence, part.start)
        if plan := schedule.plan.slices:
            rows = sum([start > 0 and stop - start == 1 for _, start, stop, _ in plan])
            self._pace.observe(rows, schedule.plan.num_tokens - rows, self.clock() - start)

    def _execute(self, schedule: Schedule[Request]) -> Iterator[list[tuple[Request, Slice, Logits | OctavoError]]]:
        """Each request with its logits, which last until the next run, or with what went wrong; run by run.

        A step of several that fails is done again one by one, so that only the culprit ends.
        """
        plan = schedule.plan
        if not plan.slices:
            return
        try:
            outcomes: Sequence[Logits | OctavoError] = self.executor.execute(plan)
            self.counters["steps"] += 1
            self.counters["tokens"] += plan.num_tokens
        except OctavoError as error:
            self._record(error, plan)
            if len(plan.slices) > 1:
                for request, part in zip(schedule.requests, plan.slices):
                    yield from self._execute(Schedule((request,), StepPlan((part,)), ()))
                return
            outcomes = [error]
        yield list(zip(schedule.requests, plan.slices, outcomes))

    def _settle(self, outcomes: list[tuple[Request, Slice, Logits | OctavoError]], unread: dict[Request, Slice]) -> None:
        """Hands out logits, draws the tokens of all completions at once, emits them, ends what is done. Leaves in `unread` what it did not get to."""
        work: list[tuple[GenerateRequest, Slice, Row]] = []
        for request, part, outcome in outcomes:
            if isinstance(outcome, OctavoError):
                self._fail(request, outcome)
                del unread[request]
                continue
            try:
                request.accept(part, outcome, self._sampler)
            except Exception as error:
                self._fail(request, self._fault(error, part))
                del unread[request]
                continue
            if isinstance(request, GenerateRequest) and request.num_pending == 0:
                if request.forks_wanted:
                    work += [(fork, part, outcome[-1]) for fork in self._forks(request, part, unread)]
                work.append((request, part, outcome[-1]))
                continue
            del unread[request]
            if request.done:
                self._retire(request)
        self._sampler.choose([(request.draw, row) for request, _, row in work])
        for request, part, _ in work:
            if request.draw.failure:    # logits that nothing can be drawn from
                failure = StepError(request.draw.failure)
                self._record(failure, StepPlan((part,)))
                self._fail(request, failure)
            else:
                try:
                    request.take()
                except Exception as error:
                    self._fail(request, self._fault(error, part))
                else:
                    if request.done:
                        self._retire(request)
            del unread[request]

    def _forks(self, request: GenerateRequest, part: Slice, unread: dict[Request, Slice]) -> list[GenerateRequest]:
        """The other completions of a prompt that has just been computed."""
        forks = []
        for index in request.forks_wanted:
            fork = request.fork(self.fork(request.sequence), index)
            request.generation.requests.append(fork)
            self._scheduler.add(fork, admitted=True)
            unread[fork] = part
            forks.append(fork)
        return forks

    def fork(self, sequence: SequenceState) -> SequenceState:
        """Under the turn."""
        self.counters.update(forks=1)
        return self.executor.fork(sequence)

    def restore(self, sequence: SequenceState, cache: CacheState) -> None:
        """Under the turn. As the executor's; idle sequences make room."""
        while True:
            try:
                return self.executor.restore(sequence, cache)
            except CapacityError:
                if not self._drop_idle():
                    raise

    def release(self, sequence: SequenceState) -> None:
        """Under the turn. Frees a sequence; twice is fine."""
        self._idle.pop(sequence, None)
        if sequence.cache is not None:
            self.executor.close(sequence)
            sequence.cache = None

    def _fail(self, request: Request, error: OctavoError) -> None:
        request.fail(error)
        self._retire(request, undo=True)

    def _retire(self, request: Request, *, undo: bool = False) -> None:
        self._scheduler.remove(request)
        self._timed.discard(request)
        if request.arrival >= 0:    # else it was never queued
            now = self.clock()
            if self._last_end is not None:
                self._seconds_per_request += 0.2 * (now - self._last_end - self._seconds_per_request)
            self._last_end = now
        if request.sequence.cache is None:
            return      # its sequence was dropped together with it
        if isinstance(request, GenerateRequest) and request.generation.owns_sequence:
            self.release(request.sequence)
            return
        if undo:
            self._undo(request)
        else:
            self.executor.unreserve(request.sequence)
        self.rest(request.sequence)

    def _undo(self, request: Request) -> None:
        self.executor.unreserve(request.sequence)
        if isinstance(request, AppendRequest):
            self.executor.truncate(request.sequence, request.length_before)
            del request.sequence.tokens[request.length_before :]

    def _fault(self, error: Exception, part: Slice) -> OctavoError:
        """What a request ends with that could not take its row (memory ran out, a tokenizer failed), so that nobody else ends with it."""
        fault = step_error(error)
        if not isinstance(fault, OctavoError):
            raise fault
        self._record(fault, StepPlan((part,)))
        return fault

    def _record(self, error: OctavoError, plan: StepPlan) -> None:
        self.counters.update(failed_steps=1)
        self._decisions.run("step", "failed", str(error), where=f"{len(plan.slices)} sequences" if len(plan.slices) > 1 else "")

    def _no_room(self, request: Request) -> CapacityError:
        stats = self.executor.stats()
        return CapacityError(
            f"no room to grow a sequence from {request.sequence.num_cached} to {len(request.sequence.tokens)} tokens: "
            f"{stats['blocks_free'] - stats['blocks_reserved']} of {stats['blocks_total']} blocks can be had, other sequences hold the rest",
            hint="close sequences, or load the model with more memory=",
        )


def _closed_error() -> RequestError:
    return RequestError("the model was closed", hint="load it again")

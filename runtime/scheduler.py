"""Which requests run in the next step, and how many of their tokens. Policy on integers only: no arrays, no sessions, no clocks.

Higher priority first, and within one first come, first served; but who has waited while `_PATIENCE` others overtook goes next, whatever its
priority, so that nobody starves. A request is admitted when the memory for all tokens it has so far is promised; then every step takes one token of each
decoding request and fills what is left of the token budget with prompts, in chunks. Where memory runs out, sequences that nobody is computing
give up what they have cached, then the last in that order gives its cache back and waits; it is copied back or computed again later. An `append` is
never put off that way: what it needs was promised at once. It overtakes like any other, and takes nothing from who is overdue.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from .plan import Limits, SequenceState, Slice, StepPlan


class Memory(Protocol):
    """The part of an Executor that admission and preemption need."""

    def reserve(self, sequence: SequenceState, stop: int) -> bool: ...
    def unreserve(self, sequence: SequenceState) -> None: ...
    def adopt(self, sequence: SequenceState, limit: int) -> None: ...
    def disown(self, sequence: SequenceState) -> None: ...
    def put_aside(self, sequence: SequenceState) -> None: ...


class Schedulable(Protocol):
    """What the scheduler knows of a request. Logits are wanted for positions ≥ `first_row`, and for those before `num_reusable` no more.

    `arrival`, `last_turn` and `overdue` are the scheduler's own.
    """

    sequence: SequenceState
    first_row: int
    preemptable: bool
    priority: int
    arrival: int
    last_turn: int
    overdue: bool

    @property
    def num_pending(self) -> int: ...
    @property
    def num_reusable(self) -> int: ...


R = TypeVar("R", bound=Schedulable)

# So many admissions may overtake a waiting request: of places under load, low priorities get one in as many.
_PATIENCE = 16
# A decoding row of higher priority goes before one that has waited for so many steps longer, where there are more rows than a step takes.
_HEAD_START = 8


@dataclass(frozen=True)
class Schedule(Generic[R]):
    """`requests[i]` has `plan.slices[i]`. `starved` wait for memory that nothing now running will free."""

    requests: tuple[R, ...]
    plan: StepPlan
    starved: tuple[R, ...]


class Scheduler(Generic[R]):
    """`give_up` takes the cache of a sequence that nobody computes at the moment; False where there is none left."""

    def __init__(self, limits: Limits, memory: Memory, give_up: Callable[[], bool] = lambda: False) -> None:
        self.limits = limits
        self.num_preemptions = 0
        self._memory = memory
        self._give_up = give_up
        self._waiting: list[R] = []     # both in order of rank
        self._running: list[R] = []
        self._turn = 0
        self._arrivals = 0
        self._overtakings = 0
        self._prompt_last = False

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def requests(self) -> list[R]:
        return [*self._running, *self._waiting]

    @property
    def overdue_waits(self) -> bool:
        """Somebody is overdue, and the next steps will admit it: who can't be put off later does not come in before. Any thread may ask."""
        first = next(iter(self._waiting), None)
        return first is not None and first.overdue and not (self._running and all(request.overdue for request in self._running))

    @property
    def num_decoding(self) -> int:
        """Rows of the next step that go on with a sequence, token by token."""
        return min(sum(map(_decodes, self._running)), self.limits.max_sequences)

    def add(self, request: R, *, admitted: bool = False) -> None:
        """Queues a request. `admitted`: its memory is there already (an append's promise, a fork's shared blocks)."""
        self._arrivals += 1
        request.arrival, request.last_turn, request.overdue = self._arrivals, self._turn, False
        self._overtakings += bool(self._waiting) and not request.preemptable
        insort(self._running if admitted else self._waiting, request, key=_rank)

    def remove(self, request: R) -> None:
        """Forgets a request, wherever it is."""
        if request in self._running:
            self._running.remove(request)
        elif request in self._waiting:
            self._waiting.remove(request)

    def make_room(self, request: R, stop: int) -> bool:
        """Promises `request` the memory for `stop` tokens, at the cost of idle sequences, then of those that come after it.

        Of any of its priority or below that is not overdue, if it is not running.
        """
        while not self._reserve(request, stop):
            if self._free_memory(request):
                continue
            after = self._running[self._running.index(request) + 1 :] if request in self._running else self._running
            lesser = (r for r in reversed(after) if r.preemptable and (request.overdue or (not r.overdue and r.priority <= request.priority)))
            victim = next(lesser, None)
            if victim is None:
                return False
            self._preempt(victim)
        return True

    def schedule(self, prompt_tokens: int | None = None) -> Schedule[R]:
        """`prompt_tokens`: how many tokens of prompts may join rows that decode; None: as many as the step takes."""
        starved = self._admit()
        preemptions = self.num_preemptions
        chosen: list[tuple[R, int]] = []
        budget = self.limits.max_tokens
        for request in self._by_turn():
            if len(chosen) == self.limits.max_sequences or budget == 0:
                break
            if self.num_preemptions > preemptions and request not in self._running:
                continue    # preempted by one of those before
            if prompt_tokens is not None and not _decodes(request):
                if prompt_tokens == 0:
                    continue
                budget = prompt_tokens if budget is None else min(budget, prompt_tokens)
                prompt_tokens = None
            length = len(request.sequence.tokens)
            if length > request.sequence.room and not self.make_room(request, length):
                starved += self._put_off(request)
                continue
            count = request.num_pending
            if budget is not None:
                count = min(count, budget)
                budget -= count
            chosen.append((request, count))
        if self.num_preemptions > preemptions:
            # Memory for a later one may have been taken from an earlier one that ranks below it.
            chosen = [(request, count) for request, count in chosen if request in self._running]
        self._prompt_last = bool(chosen) and not _decodes(chosen[-1][0])
        slices = []
        for request, count in chosen:
            self._turn += 1
            request.last_turn = self._turn
            slices.append(_slice(request, count))
        return Schedule(tuple([request for request, _ in chosen]), StepPlan(tuple(slices)), tuple(starved))

    def _by_turn(self) -> list[R]:
        """Running requests in the order in which they are served: decoding ones first, so that no prompt stalls a stream; among them the one
        that has waited longest. Where those take all places, one is a prompt's; where there is one place, every other step.
        """
        bound = self.limits
        places = bound.max_sequences if bound.max_tokens is None else min(bound.max_sequences, bound.max_tokens)
        prompts: list[R] = []
        decoding: list[R] = []
        for request in self._running:
            (decoding if _decodes(request) else prompts).append(request)
        decoding.sort(key=lambda r: r.last_turn - _HEAD_START * places * r.priority)
        if prompts and len(decoding) >= places and not (places == 1 and self._prompt_last):
            decoding.insert(places - 1, prompts.pop(0))
        return decoding + prompts

    def _admit(self) -> list[R]:
        starved: list[R] = []
        while self._waiting:
            self._mind_the_overdue()
            request = self._waiting[0]
            lesser = (r for r in reversed(self._running) if r.preemptable and not r.overdue and (request.overdue or r.priority < request.priority))
            below = next(lesser, None)
            if len(self._running) >= self.limits.max_sequences:
                if below is None:
                    break
                self._preempt(below)
            elif self._reserve(request, len(request.sequence.tokens)):
                insort(self._running, self._waiting.pop(0), key=_rank)
                self._overtakings += any(other.arrival < request.arrival for other in self._waiting)
            elif self._free_memory(request):
                continue
            elif below is not None:
                self._preempt(below)
            elif self._running:
                break       # one of them will end and free its blocks
            else:
                starved.append(self._waiting.pop(0))
        return starved

    def _mind_the_overdue(self) -> None:
        """Puts the one that has waited longest first, once enough others have overtaken."""
        if self._overtakings >= _PATIENCE:
            self._overtakings = 0
            longest = min(self._waiting, key=lambda request: request.arrival)
            self._waiting.remove(longest)
            longest.overdue = True
            insort(self._waiting, longest, key=_rank)

    def _free_memory(self, wanting: R) -> bool:
        """Takes the cache of a sequence that nobody computes, or else of one that waits, the last first; False where there is none."""
        if self._give_up():
            return True
        holder = next((r for r in reversed(self._waiting) if r is not wanting and r.sequence.num_cached), None)
        if holder is not None:
            self._memory.put_aside(holder.sequence)
        return holder is not None

    def _reserve(self, request: R, stop: int) -> bool:
        """Promises the memory for `stop` tokens, less those that are cached already, by this sequence or another with the same beginning."""
        sequence = request.sequence
        fresh = sequence.num_cached == 0
        if fresh:
            self._memory.adopt(sequence, request.num_reusable)
        if self._memory.reserve(sequence, stop):
            return True
        if fresh:
            self._memory.disown(sequence)
        return False

    def _put_off(self, request: R) -> list[R]:
        """Makes a request wait that memory lacks for; returns it where nothing else runs that could free some."""
        if len(self._running) > 1 and request.preemptable:
            self._preempt(request)
            self._memory.put_aside(request.sequence)
            return []
        self._running.remove(request)
        return [request]

    def _preempt(self, request: R) -> None:
        """Makes a request wait. What it has cached stays as long as nobody needs the room."""
        self.num_preemptions += 1
        self._running.remove(request)
        self._memory.unreserve(request.sequence)
        insort(self._waiting, request, key=_rank)

    def check(self) -> None:
        """Every request is in one place, once, and in order."""
        everyone = [id(request) for request in (*self._running, *self._waiting)]
        assert len(set(everyone)) == len(everyone), "a request is queued twice"
        assert all(request.num_pending > 0 for request in (*self._running, *self._waiting)), "a request has nothing to compute"
        for queue in (self._running, self._waiting):
            assert queue == sorted(queue, key=_rank), "a queue is out of order"


def _decodes(request: Schedulable) -> bool:
    return request.num_pending == 1 and request.sequence.num_cached > 0


def _rank(request: Schedulable) -> tuple[bool, int, int]:
    return not request.overdue, -request.priority, request.arrival


def _slice(request: Schedulable, count: int) -> Slice:
    sequence = request.sequence
    start = sequence.num_cached
    stop = start + count
    first_row = request.first_row
    return Slice(sequence, start, stop, start if first_row <= start else min(first_row, stop))

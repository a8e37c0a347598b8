"""What one step computes: the frozen hand-over from the scheduler to an executor."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any


@dataclass(eq=False)
class SequenceState:
    """A growing sequence. tokens[:num_cached] have their keys and values in `cache`, tokens[num_cached:] are still to be computed.

    Work on a sequence of higher `priority` comes first. Sequences of one `scope` may share what is cached. `cache` belongs to the executor that
    opened it; only that executor changes `cache` and `num_cached`.
    """

    tokens: list[int]
    cache: Any
    num_cached: int = 0
    scope: str | None = None
    priority: int = 0


@dataclass(frozen=True)
class Slice:
    """Positions [start, stop) of one sequence; start == sequence.num_cached. Logits are wanted for [first_row, stop): none where equal."""

    sequence: SequenceState
    start: int
    stop: int
    first_row: int

    def __post_init__(self) -> None:
        assert 0 <= self.start <= self.first_row <= self.stop <= len(self.sequence.tokens) and self.start < self.stop

    @property
    def num_rows(self) -> int:
        return self.stop - self.first_row


@dataclass(frozen=True)
class StepPlan:
    """Slices of different sequences, in order of their rows."""

    slices: tuple[Slice, ...]

    @cached_property
    def num_tokens(self) -> int:
        return sum(s.stop - s.start for s in self.slices)

    @cached_property
    def num_rows(self) -> int:
        return sum(s.num_rows for s in self.slices)


@dataclass(frozen=True)
class Limits:
    """How much one step takes: sequences at once, and tokens over all of them (None: as many as there are)."""

    max_sequences: int
    max_tokens: int | None

"""What one step computes: the frozen hand-over from the scheduler to an executor."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple


@dataclass(eq=False)
class SequenceState:
    """A growing sequence. tokens[:num_cached] have their keys and values in `cache`, tokens[num_cached:] are still to be computed.

    Work on a sequence of higher `priority` comes first. Sequences of one `scope` may share what is cached. `cache` belongs to the executor that
    opened it; only that executor changes `cache`, `num_cached` and `room`: up to so many tokens no memory need be reserved.
    """

    tokens: list[int]
    cache: Any
    num_cached: int = 0
    scope: str | None = None
    priority: int = 0
    room: int = 0


class Slice(NamedTuple):
    """Positions [start, stop) of one sequence; start == sequence.num_cached. Logits are wanted for [first_row, stop): none where equal."""

    sequence: SequenceState
    start: int
    stop: int
    first_row: int

    @property
    def num_rows(self) -> int:
        return self.stop - self.first_row


@dataclass(frozen=True)
class StepPlan:
    """Slices of different sequences, in order of their rows."""

    slices: tuple[Slice, ...]
    num_tokens: int = field(init=False)
    num_rows: int = field(init=False)

    def __post_init__(self) -> None:
        tokens = rows = 0
        for sequence, start, stop, first_row in self.slices:
            assert 0 <= start <= first_row <= stop <= len(sequence.tokens) and start < stop
            tokens += stop - start
            rows += stop - first_row
        object.__setattr__(self, "num_tokens", tokens)
        object.__setattr__(self, "num_rows", rows)


@dataclass(frozen=True)
class Limits:
    """How much one step takes: sequences at once, and tokens over all of them (None: as many as there are)."""

    max_sequences: int
    max_tokens: int | None

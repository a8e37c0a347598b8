"""What runs a plan: the protocol that every kind of decoder fulfils, and the turning of a runtime's failure into ours."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ..errors import OctavoError, StepError
from .plan import Limits, SequenceState, StepPlan
from .saved import CacheState

Logits = NDArray[np.float32]
"""float32 (rows, V)."""


class Executor(Protocol):
    """Owns the caches of all sequences of a model, and the onnxruntime session that fills them. Used by one thread at a time.

    `vocab_size` is V; `max_context` the longest sequence the graph can express (None: unknown); `max_cached` the most tokens of one
    sequence that the cache can ever hold (None: no limit of its own).
    """

    limits: Limits
    vocab_size: int
    max_context: int | None
    max_cached: int | None

    def open(self, scope: str | None = None) -> SequenceState:
        """A new, empty sequence, which shares cached prefixes with those of its scope alone."""
        ...

    def fork(self, sequence: SequenceState) -> SequenceState:
        """A second sequence with the same tokens, sharing what is cached."""
        ...

    def truncate(self, sequence: SequenceState, length: int) -> None:
        """Keeps at most the first `length` tokens cached; none, where a window has moved past them. Tokens are the caller's."""
        ...

    def close(self, sequence: SequenceState) -> None:
        """Frees all that the sequence holds."""
        ...

    def adopt(self, sequence: SequenceState, limit: int) -> None:
        """Gives a sequence with nothing cached what is cached elsewhere of its first `limit` tokens, under the same scope; often nothing."""
        ...

    def disown(self, sequence: SequenceState) -> None:
        """Undoes `adopt`."""
        ...

    def put_aside(self, sequence: SequenceState) -> None:
        """Frees the memory of what is cached. It is copied elsewhere if there is room for it, and comes back with a later `reserve`."""
        ...

    def reserve(self, sequence: SequenceState, stop: int) -> bool:
        """Promises the memory for caching up to `stop` tokens, in place of an earlier promise; False, and no promise, where it lacks.

        What was put aside is cached again then.
        """
        ...

    def unreserve(self, sequence: SequenceState) -> None: ...

    def save(self, sequence: SequenceState) -> CacheState:
        """Copies of what is cached, perhaps not of the last tokens."""
        ...

    def restore(self, sequence: SequenceState, state: CacheState) -> None:
        """Gives a sequence with nothing cached what `save` gave; nothing where it is of another layout.

        Raises CapacityError where there is no room, SavedSequenceError where the arrays are not a cache of this model's.
        """
        ...

    def execute(self, plan: StepPlan) -> list[Logits]:
        """Runs the plan and returns each slice's logits, (num_rows, V), valid until the next call.

        All or nothing: it commits (`num_cached` of each sequence is its slice's stop), or raises with every cache as it was before.
        Raises StepError for a kernel or an allocation that failed, CapacityError where no block was left.
        """
        ...

    def stats(self) -> dict[str, int]: ...

    def check(self) -> None:
        """The invariants of what it holds."""
        ...


def step_error(error: Exception) -> Exception:
    """What a failed run is raised as: our own errors and broken invariants as they are, all else as a StepError."""
    if isinstance(error, OctavoError | AssertionError):
        return error
    cause = f"{type(error).__name__}: {str(error).strip()}"
    return StepError(f"a step failed: {cause}", hint="it was rolled back; model.decisions has the record")

"""The protocol through which `check`, `evaluate` and `diff` drive a model without knowing whether it is an artifact or a plain graph.

`octavo.Model` satisfies it; the compiler never imports the runtime, the facade hands it `octavo.load`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from .spec import Kind

Ids = Sequence[int] | NDArray[np.integer[Any]]
Rows = Literal["last", "all"]


class RunnerSequence(Protocol):
    """One sequence as a value: it grows, forks and shrinks."""

    def append(self, token_ids: Ids, *, rows: Rows = "last") -> NDArray[np.float32]: ...
    def fork(self) -> RunnerSequence: ...
    def truncate(self, length: int) -> None: ...
    def close(self) -> None: ...
    def __len__(self) -> int: ...


class RunnerSession(Protocol):
    """A scope of sequences."""

    def new_sequence(self) -> RunnerSequence: ...
    def append_batch(self, work: Sequence[tuple[Any, Ids]], *, rows: Rows = "last") -> list[NDArray[np.float32]]:
        """Appends to several sequences in as few steps as the model allows (one, where it can batch)."""
        ...
    def close(self) -> None: ...


class Runner(Protocol):
    """A loaded model."""

    @property
    def kind(self) -> Kind: ...
    def run(self, inputs: Mapping[str, Any]) -> dict[str, NDArray[Any]]: ...
    def predict(self, token_ids: Ids) -> NDArray[np.float32]: ...
    def begin_session(self) -> RunnerSession: ...
    def close(self) -> None: ...

"""Meanings that a mask may have. Each reads its parameters off what was seen and says which keys it would leave visible."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .laboratory import Array
from .mask_source import HIDDEN, MaskError, Situation
from .site import Mask

# Of the largest bias in a row: a product and a sum or two, each rounded to float32.
_ROUNDING = 8 * float(np.finfo(np.float32).eps)


@dataclass(frozen=True, eq=False)
class Seen:
    """A mask's values at one situation: `added` to the scores, and which keys that leaves `visible`; [B|1, H|1, S, T]."""

    at: Situation
    added: Array
    visible: Array

    @staticmethod
    def of(at: Situation, added: Array) -> Seen:
        return Seen(at, added, added > HIDDEN)


class Candidate(ABC):
    """A meaning that a mask may have. `fit` reads its parameters off what was seen, `predict` says what it would leave visible."""

    name: str

    @abstractmethod
    def fit(self, seen: Sequence[Seen]) -> Mask | None: ...

    @abstractmethod
    def predict(self, mask: Mask, queries: Array, keys: Array) -> Array:
        """bool [S, T] for queries at positions [S] and keys at positions [T]."""


class Causal(Candidate):
    """Position p sees 0 … p."""

    name = "causal"

    def fit(self, seen: Sequence[Seen]) -> Mask:
        return Mask("causal")

    def predict(self, mask: Mask, queries: Array, keys: Array) -> Array:
        return keys[None, :] <= queries[:, None]


class Window(Candidate):
    """Position p sees p−w+1 … p; w is read off the first row that hides a key before a visible one."""

    name = "window"

    def fit(self, seen: Sequence[Seen]) -> Mask | None:
        for one in seen:
            for position, row in zip(one.at.queries, one.visible[0, 0]):
                if row.any() and not row[0]:
                    return Mask("window", window=max(1, int(position - one.at.keys[np.argmax(row)]) + 1))
        return None

    def predict(self, mask: Mask, queries: Array, keys: Array) -> Array:
        assert mask.window is not None
        return (keys[None, :] <= queries[:, None]) & (keys[None, :] > queries[:, None] - mask.window)


class Chunked(Candidate):
    """Position p sees floor(p / c)·c … p; c is where the first row starts that hides a key before a visible one."""

    name = "chunked"

    def fit(self, seen: Sequence[Seen]) -> Mask | None:
        firsts = [int(one.at.keys[np.argmax(row)]) for one in seen for row in one.visible[0, 0] if row.any() and not row[0]]
        return Mask("chunked", chunk=min(firsts)) if firsts else None

    def predict(self, mask: Mask, queries: Array, keys: Array) -> Array:
        assert mask.chunk is not None
        return (keys[None, :] <= queries[:, None]) & (keys[None, :] >= queries[:, None] // mask.chunk * mask.chunk)


class Prefix(Candidate):
    """Position p sees 0 … p and the first n; n is what the first position sees."""

    name = "prefix"

    def fit(self, seen: Sequence[Seen]) -> Mask | None:
        counts = {int(one.visible[0, 0, 0].sum()) for one in seen if one.at.queries[0] == 0}
        return Mask("prefix", prefix=max(counts)) if counts and max(counts) > 1 else None

    def predict(self, mask: Mask, queries: Array, keys: Array) -> Array:
        assert mask.prefix is not None
        return (keys[None, :] <= queries[:, None]) | (keys[None, :] < mask.prefix)


class Bidirectional(Candidate):
    """Every position sees every one."""

    name = "bidirectional"

    def fit(self, seen: Sequence[Seen]) -> Mask:
        return Mask("bidirectional")

    def predict(self, mask: Mask, queries: Array, keys: Array) -> Array:
        return np.ones((len(queries), len(keys)), np.bool_)


CANDIDATES: tuple[Candidate, ...] = (Causal(), Window(), Chunked(), Bidirectional(), Prefix())


def meaning(mask: Mask) -> str:
    """A mask in words: "window 4096"."""
    number = mask.window or mask.chunk or mask.prefix
    return f"{mask.kind} {number}" if number else mask.kind


def find_slopes(seen: Sequence[Seen], heads: int, *, anchored: bool) -> tuple[float, ...]:
    """The slope of each head where what is added to visible scores is slope·(key − query position) and, unless `anchored`, any number for
    the row, which a softmax takes no notice of. Empty where nothing is added. Raises MaskError where it is anything else.
    """
    if not any(np.any(one.added[one.visible]) for one in seen):
        return ()
    longest = max(seen, key=lambda one: int(one.visible[0, 0, -1].sum()) and int(one.at.keys[-1]))
    slopes = np.broadcast_to([_slope(longest, head) for head in range(longest.added.shape[1])], (heads,))
    for one in seen:
        rest = np.where(one.visible, one.added.astype(np.float64) - slopes[: one.added.shape[1], None, None] * _far(one.at), np.nan)
        with np.errstate(invalid="ignore"):
            bound = _ROUNDING * np.max(np.where(one.visible, np.abs(one.added), 0), axis=-1, keepdims=True)
            low = np.fmin.reduce(rest, axis=-1, keepdims=True) if not anchored else 0.0
            wrong = np.abs(rest - low) > 2 * bound
        if np.any(wrong):
            b, h, query, key = (int(i) for i in np.argwhere(wrong)[0])
            raise MaskError(
                f"{one.added[b, h, query, key]} is added to the score of query {query} and key {key}, which is visible; "
                f"nearest is a slope of {slopes[h]:g}, at {one.at}"
            )
    return tuple(float(slope) for slope in slopes) if np.any(slopes) else ()


def _far(at: Situation) -> Array:
    return (at.keys[None, :] - at.queries[:, None]).astype(np.float64)


def _slope(one: Seen, head: int) -> float:
    """Between the first and the last visible key of the last row, to float32."""
    row = np.flatnonzero(one.visible[0, min(head, one.visible.shape[1] - 1), -1])
    if len(row) < 2:
        return 0.0
    values, keys = one.added[0, head, -1].astype(np.float64), one.at.keys
    return float(np.float32((values[row[-1]] - values[row[0]]) / (keys[row[-1]] - keys[row[0]])))

"""What `check` puts both sides through: each case is a way to reach the same logits, driven through the Runner protocol alone.

A case returns the logits of all its rows, in an order of its own, the same on both sides. Sequences are closed by the session.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..custom_ops.contract import CHUNK
from ..errors import ModelError, RequestError
from ..models.runner import Runner, RunnerSequence, RunnerSession

Rows = NDArray[np.float32]
Ids = NDArray[np.int64]

# The long cases cross one chunk edge of the attention op, and several block edges at every block size up to 256.
LONG = CHUNK + 40
SHORT = 64
SHORTEST = 8

# Text gives the peaked distributions that models are used on; uniform ids alone leave most logits nearly flat.
TEXT = """A bookbinder folds each printed sheet once, twice or three times, and the number of folds gives the book its name: a folio, a
quarto, an octavo. The folded sheets are gathered in order, pressed, and sewn through the fold on to cords or tapes. Nothing in the text
tells the reader where one sheet ends and the next begins; only the small letters at the foot of some pages do, and those were put there
for the binder. If two sheets change places the book still looks like a book, the lines still fill the page, and the error shows only to
somebody who reads. That is why a careful shop collates: one person turns the leaves, and another follows in a copy that is known to be
good. A book of 320 pages in octavo takes 20 sheets, so a shop that prints 1,000 copies folds 20,000 of them, and each can go wrong in its
own way.
def collate(sheets):
    return [page for sheet in sorted(sheets) for page in sheet.pages]
Question: how many sheets are there in a book of 160 pages? Answer:"""


@dataclass(frozen=True)
class Tokens:
    """`long` for one pass over a chunk edge, `short` for everything else, `other` of short's length for branches that differ."""

    long: Ids
    short: Ids
    other: Ids


@dataclass(frozen=True)
class Case:
    """One way to the logits. `run` gives float32 [rows, V]."""

    name: str
    run: Callable[[Runner, Tokens], Rows]


def tokens_for(folder: Path, vocab_size: int, max_context: int, *, text: str | None = None, seed: int = 0) -> Tokens:
    """Token ids for a model: `text` (ours by default) where `folder` has a tokenizer, then seeded uniform ids, all below `vocab_size`.

    RequestError: `text` was given and there is no tokenizer. ModelError: the model holds fewer than SHORTEST tokens.
    """
    if max_context < SHORTEST:
        raise ModelError(
            f"a context of {max_context} tokens is too short to check",
            hint=f"at least {SHORTEST} are needed: compile with a larger max_context",
        )
    long, short = min(LONG, max_context), min(SHORT, max_context)
    ids = np.random.default_rng(seed).integers(0, vocab_size, long + short, dtype=np.int64)
    tokenizer = folder / "tokenizer.json"
    if tokenizer.is_file():
        from .text_ids import text_ids

        known = np.array(text_ids(tokenizer, text if text is not None else TEXT), dtype=np.int64)
        known = known[known < vocab_size][: long]
        ids[: len(known)] = known
    elif text is not None:
        raise RequestError(
            "there is no tokenizer.json in the artifact to read the text with", hint="leave the text out: seeded token ids are used then"
        )
    return Tokens(long=ids[:long], short=ids[:short], other=ids[long:])


def _predict(runner: Runner, tokens: Tokens) -> Rows:
    return runner.predict(tokens.short)


def _prefill(runner: Runner, tokens: Tokens) -> Rows:
    return _in_session(runner, lambda session: [_all(session.new_sequence(), tokens.long)])


def _chunks(size: int, count: int) -> Callable[[Runner, Tokens], Rows]:
    def run(runner: Runner, tokens: Tokens) -> Rows:
        ids = tokens.short[:count]

        def body(session: RunnerSession) -> list[Rows]:
            sequence = session.new_sequence()
            return [_all(sequence, ids[start : start + size]) for start in range(0, len(ids), size)]

        return _in_session(runner, body)

    return run


def _decode(runner: Runner, tokens: Tokens) -> Rows:
    def body(session: RunnerSession) -> list[Rows]:
        sequence = session.new_sequence()
        sequence.append(tokens.long[:-5])
        return [sequence.append(tokens.long[t : t + 1]) for t in range(len(tokens.long) - 5, len(tokens.long))]

    return _in_session(runner, body)


def _mixed(runner: Runner, tokens: Tokens) -> Rows:
    """One step holds a decode row over a past, a whole prompt, and a chunk over a short past; the next decodes all three."""
    n = len(tokens.short)

    def body(session: RunnerSession) -> list[Rows]:
        a, b, c = (session.new_sequence() for _ in range(3))
        a.append(tokens.short[: n // 2])
        c.append(tokens.other[: n // 8])
        rows = session.append_batch(
            [(a, tokens.short[n // 2 : n // 2 + 1]), (b, tokens.other[: n // 3 + 1]), (c, tokens.other[n // 8 : n // 8 + 3])], rows="all"
        )
        return [*rows, *session.append_batch([(a, tokens.other[:1]), (b, tokens.other[1:2]), (c, tokens.short[:1])], rows="all")]

    return _in_session(runner, body)


def _fork(runner: Runner, tokens: Tokens) -> Rows:
    """Two branches grow apart from the middle of a block; each goes on after the other has written."""
    n = len(tokens.short)
    half, tail = n // 2 + 1, max(1, n // 8)

    def body(session: RunnerSession) -> list[Rows]:
        parent = session.new_sequence()
        parent.append(tokens.short[:half])
        child = parent.fork()
        return [
            _all(child, tokens.other[:tail]),
            _all(parent, tokens.short[half : half + tail]),
            _all(child, tokens.other[tail : tail + 1]),
            _all(parent, tokens.short[half + tail : half + tail + 1]),
        ]

    return _in_session(runner, body)


def _truncate(runner: Runner, tokens: Tokens) -> Rows:
    n = len(tokens.short)

    def body(session: RunnerSession) -> list[Rows]:
        sequence = session.new_sequence()
        sequence.append(tokens.short)
        sequence.truncate(n // 2 - 1)
        return [_all(sequence, tokens.other[: n // 4 + 1]), _all(sequence, tokens.short[:1])]

    return _in_session(runner, body)


CASES = (
    Case("predict", _predict),
    Case("prefill", _prefill),
    Case("chunks of 1", _chunks(1, 12)),
    Case("chunks of 7", _chunks(7, SHORT)),
    Case("decode over a past", _decode),
    Case("mixed batch", _mixed),
    Case("after fork", _fork),
    Case("after truncate", _truncate),
)


def _all(sequence: RunnerSequence, ids: Ids) -> Rows:
    return sequence.append(ids, rows="all")


def _in_session(runner: Runner, body: Callable[[RunnerSession], list[Rows]]) -> Rows:
    session = runner.begin_session()
    try:
        return np.concatenate(body(session))
    finally:
        session.close()

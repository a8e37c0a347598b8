"""A generation as an iterator of pieces. Dropping or closing it cancels the request and frees its blocks."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING

from .results import Piece

if TYPE_CHECKING:
    from .engine import Engine
    from .request import Generation


class PieceStream(Iterator[Piece]):
    """Runs steps while it has nothing to give. A class and not a generator, so that one that is never started is cancelled too."""

    def __init__(self, engine: Engine, generation: Generation, owner: object = None) -> None:
        self._engine, self._generation = engine, generation
        self._owner = owner     # a sequence that is streamed lives as long as its stream
        self._finalizer = weakref.finalize(self, _drop, engine, generation)
        self._finalizer.atexit = False

    @property
    def ended(self) -> bool:
        """No more tokens will come of it."""
        return self._generation.done

    @property
    def ready(self) -> bool:
        """The next piece is there, or there will be none: `next` runs no step."""
        return bool(self._generation.pieces) or self._generation.done

    def __next__(self) -> Piece:
        generation = self._generation
        if not generation.pieces and not generation.done:
            self._engine.run(generation.requests, lambda: bool(generation.pieces) or generation.done)
        if generation.pieces:
            return generation.pieces.popleft()
        raise StopIteration

    def close(self) -> None:
        """Cancels what is still to come and forgets what was not read. Closing twice is fine."""
        if self._finalizer.detach():
            self._engine.cancel_soon(self._generation.requests)
            self._generation.pieces.clear()

    def abandon(self) -> None:
        """As `close`, with the next step: waits for no step that runs at the moment."""
        if self._finalizer.detach():
            _drop(self._engine, self._generation)

    def __enter__(self) -> PieceStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _drop(engine: Engine, generation: Generation) -> None:
    """A finalizer: it may run in the middle of a step, so it only leaves a note."""
    engine.drop(lambda: engine.cancel(generation.requests))

"""A generation as an async iterator of pieces: steps run in one worker thread, and never on the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TYPE_CHECKING

from .results import Piece
from .stream import PieceStream

if TYPE_CHECKING:
    from .engine import Engine


@cache
def _worker() -> ThreadPoolExecutor:
    # One thread for all: a step computes every stream's next token, so that a second would only wait for its turn.
    return ThreadPoolExecutor(1, "octavo-astream")


class AsyncPieceStream(AsyncIterator[Piece]):
    """Runs steps while it has nothing to give. Cancelling the task that waits, closing it or dropping it ends the request."""

    def __init__(self, engine: Engine, stream: PieceStream) -> None:
        self._engine, self._stream = engine, stream

    @property
    def ended(self) -> bool:
        """No more tokens will come of it."""
        return self._stream.ended

    async def __anext__(self) -> Piece:
        loop = asyncio.get_running_loop()
        while not self._stream.ready:
            try:
                await loop.run_in_executor(_worker(), self._step)
            except asyncio.CancelledError:
                self._stream.abandon()
                raise
        try:
            return next(self._stream)
        except StopIteration:
            raise StopAsyncIteration from None

    def _step(self) -> None:
        # Another stream's step may have brought what this one waits for.
        self._engine.step_unless(lambda: self._stream.ready)

    async def aclose(self) -> None:
        """Cancels what is still to come and forgets what was not read. Closing twice is fine."""
        await asyncio.get_running_loop().run_in_executor(_worker(), self._stream.close)

    async def __aenter__(self) -> AsyncPieceStream:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

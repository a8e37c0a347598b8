"""Text that streams out character by whole character, and the stop strings in it."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from .tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"
# An incomplete character has at most three bytes, and decoders show one U+FFFD for all or for each of them.
_MAX_HELD = 3
# Tokens before the first of a completion that its text is decoded with: decoders treat the first token of a text differently.
_CONTEXT = 6


class Detokenizer:
    """Text of a growing list of tokens, handed out in whole characters. The pieces joined are the text that follows the context's."""

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = list(context[-_CONTEXT:])       # a window: what has been given out long ago is dropped
        self._given = len(_settled(tokenizer.decode(self._ids)))    # characters of the window's text that are given out, or the context's

    def feed(self, *tokens: int) -> str:
        """What `tokens` complete; "" while a character is incomplete."""
        self._ids += tokens
        text = self._tokenizer.decode(self._ids)
        new = self._give(_settled(text))
        if len(self._ids) > 4 * _CONTEXT:
            held = len(text) - self._given
            self._ids = self._ids[-2 * _CONTEXT :]
            self._given = max(0, len(self._tokenizer.decode(self._ids)) - held)
        return new

    def finish(self) -> str:
        """What is left, incomplete or not."""
        return self._give(self._tokenizer.decode(self._ids))

    def _give(self, text: str) -> str:
        new = text[self._given :]
        self._given = max(self._given, len(text))
        return new


def _settled(text: str) -> str:
    """`text` without an end that more bytes could still change: an incomplete character shows as one to three U+FFFD."""
    end = len(text)
    while end > max(0, len(text) - _MAX_HELD) and text[end - 1] == _REPLACEMENT:
        end -= 1
    return text[:end]


class StopStrings:
    """Finds the first of several texts in a stream, and holds back what may become one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def feed(self, text: str) -> str:
        """What of the text so far can be given out; after a stop, what came before it, and nothing more."""
        if self.stopped:
            return ""
        self._held += text
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            given, self._held = self._held[: min(found)], ""
            return given
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        given, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return given

    def finish(self) -> str:
        """What was held back for a stop that did not come."""
        given, self._held = self._held, ""
        return given


class TextStream:
    """A completion's text: detokenizer and stop strings in line."""

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int], stops: Sequence[str]) -> None:
        self._detokenizer = Detokenizer(tokenizer, context)
        self._stops = StopStrings(stops)

    @property
    def stopped(self) -> bool:
        return self._stops.stopped

    def feed(self, *tokens: int, stops: bool = True) -> str:
        """Text to give out. `stops` False lets stop strings pass."""
        text = self._detokenizer.feed(*tokens)
        return self._stops.feed(text) if stops else text

    def finish(self) -> str:
        return self._stops.feed(self._detokenizer.finish()) + self._stops.finish()

    def fork(self) -> TextStream:
        """A second stream in the same state."""
        twin = copy.copy(self)
        twin._detokenizer, twin._stops = copy.copy(self._detokenizer), copy.copy(self._stops)
        twin._detokenizer._ids = list(self._detokenizer._ids)
        return twin


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` with which `stop` begins."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)

"""What is asked of the engine: to append tokens, or to generate. A request holds its own state; the engine moves it."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field

import numpy as np

from ..errors import OctavoError
from .executor import Logits
from .plan import SequenceState, Slice
from .results import Completion, FinishReason, Piece, Result, TokenLogprob, Usage
from .sampler import Draw, Sampler
from .sampling import SamplingParams
from .text import TextStream


class Request:
    """One sequence's work. `first_row`: logits are wanted from this position on."""

    preemptable = True

    def __init__(self, sequence: SequenceState, first_row: int, *, deadline: float | None = None) -> None:
        self.sequence = sequence
        self.first_row = first_row
        self.priority = sequence.priority
        self.deadline = deadline        # on the engine's clock
        self.done = False
        self.arrival = self.last_turn = -1
        self.overdue = False

    @property
    def num_pending(self) -> int:
        """Tokens still to be computed."""
        return len(self.sequence.tokens) - self.sequence.num_cached

    @property
    def num_reusable(self) -> int:
        """Leading tokens whose logits nobody wants: they need not be computed if they are cached somewhere."""
        return self.first_row

    def accept(self, part: Slice, rows: Logits, sampler: Sampler) -> None:
        """Takes the logits of positions [part.first_row, part.stop), a view that lasts until the next step."""
        raise NotImplementedError

    def fail(self, error: OctavoError) -> None:
        """Ends the request for a cause."""
        raise NotImplementedError


class AppendRequest(Request):
    """Compute the tokens that the sequence has and the cache has not; keep logits. Whole or not at all."""

    preemptable = False     # its caller was promised the memory

    def __init__(self, sequence: SequenceState, first_row: int, *, length_before: int) -> None:
        super().__init__(sequence, first_row)
        self.length_before = length_before
        self.error: OctavoError | None = None
        self._rows: list[Logits] = []

    @property
    def logits(self) -> Logits:
        return self._rows[0] if len(self._rows) == 1 else np.concatenate(self._rows)

    def accept(self, part: Slice, rows: Logits, sampler: Sampler) -> None:
        if len(rows):
            self._rows.append(rows.copy())
        self.done = self.num_pending == 0

    def fail(self, error: OctavoError) -> None:
        self.error = error
        self.done = True


@dataclass(eq=False)
class Generation:
    """All completions of one prompt. `pieces` is what a stream has not yet taken; the requests after the first are its forks."""

    prompt: tuple[int, ...]
    params: SamplingParams
    stop_ids: frozenset[int]
    seed: int
    limit: int                     # most tokens a completion may get
    owns_sequence: bool            # the sequence is the request's own and closed with it
    streamed: bool                 # somebody takes pieces; else there are none, and text is made at the end
    deadline: float | None = None
    requests: list[GenerateRequest] = field(default_factory=list)
    pieces: deque[Piece] = field(default_factory=deque)
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=lambda: [None])

    @property
    def done(self) -> bool:
        return all(request.done for request in self.requests)

    def result(self) -> Result:
        completions = [request.completion() for request in self.requests]
        # Completions that a failure of the prompt kept from beginning end as the first did.
        completions += [completions[0]] * (self.params.num_completions - len(completions))
        if self.params.best_of is not None:
            scores = [request.score for request in self.requests] + [-math.inf] * (len(completions) - len(self.requests))
            completions = [completions[i] for i in sorted(range(len(completions)), key=lambda i: -scores[i])[: self.params.n]]
        return Result(
            prompt_token_ids=self.prompt, completions=tuple(completions),
            prompt_logprobs=None if self.params.prompt_logprobs is None else tuple(self.prompt_logprobs),
            usage=Usage(len(self.prompt), sum(len(request.output) for request in self.requests)),
        )


class GenerateRequest(Request):
    """Completion `index` of a generation: compute what is pending, take the token drawn, and again, until it ends."""

    def __init__(self, sequence: SequenceState, generation: Generation, index: int, text: TextStream | None) -> None:
        prompted = generation.params.prompt_logprobs is not None and index == 0
        super().__init__(sequence, 0 if prompted else len(generation.prompt) - 1, deadline=generation.deadline)
        self.generation = generation
        self.index = index
        self.draw = Draw(
            generation.params, prompt=generation.prompt, banned=tuple(generation.stop_ids), seed=generation.seed, completion=index,
        )
        self.output = self.draw.output
        self._text = text
        self._unread: list[int] = []    # tokens that text has not been made of
        self._texts: list[str] = []
        self._logprobs: list[TokenLogprob] = []
        self._finish: FinishReason = "length"
        self._error = ""

    @property
    def num_reusable(self) -> int:
        # After a preemption no row but the last is wanted again.
        known = len(self.generation.prompt_logprobs) - 1 if self.first_row == 0 else len(self.sequence.tokens)
        return min(known, len(self.sequence.tokens) - 1)

    @property
    def score(self) -> float:
        """The mean log probability of a token; what failed is behind all else."""
        if self._finish == "error" or not self._logprobs:
            return -math.inf
        return sum(logprob.logprob for logprob in self._logprobs) / len(self._logprobs)

    @property
    def forks_wanted(self) -> range:
        """Completions to fork off before the first token is drawn."""
        return range(len(self.generation.requests), self.generation.params.num_completions if self.index == 0 else 0)

    def fork(self, sequence: SequenceState, index: int) -> GenerateRequest:
        return GenerateRequest(sequence, self.generation, index, self._text.fork() if self._text else None)

    def accept(self, part: Slice, rows: Logits, sampler: Sampler) -> None:
        generation = self.generation
        k = generation.params.prompt_logprobs
        if k is None or self.index:
            return
        # The row of position p predicts token p + 1. A row seen again after a preemption is not taken twice.
        for position, row in zip(range(part.first_row, part.stop), rows):
            if len(generation.prompt_logprobs) == position + 1 < len(generation.prompt):
                generation.prompt_logprobs.append(sampler.measure(row, generation.prompt[position + 1], k))

    def take(self) -> None:
        """Takes the token that `draw` has."""
        generation, token = self.generation, self.draw.token
        logprobs = () if (logprob := self.draw.logprob) is None else (logprob,)
        self.draw.add(token)
        self.sequence.tokens.append(token)
        if token in generation.stop_ids:
            return self._end("stop", self._rest(), (token,), logprobs)
        text = self._read(token)
        if self._text and self._text.stopped:
            return self._end("stop", text, (token,), logprobs)
        if len(self.output) >= generation.limit:
            text += self._rest()
            return self._end("stop" if self._text and self._text.stopped else "length", text, (token,), logprobs)
        self._emit(text, (token,), logprobs)

    def fail(self, error: OctavoError) -> None:
        self._error = str(error)
        try:
            text = self._rest()
        except Exception:       # the tokenizer may be what failed
            text = ""
        self._end("error", text, ())
        if self.index == 0:
            for index in range(len(self.generation.requests), self.generation.params.num_completions):
                self.generation.pieces.append(Piece(index, "", (), finish_reason="error", error=self._error))

    def completion(self) -> Completion:
        logprobs = None if self.generation.params.logprobs is None else tuple(self._logprobs)
        return Completion("".join(self._texts), tuple(self.output), self._finish, logprobs, self._error)

    def _read(self, token: int) -> str:
        """What can be given out of the text with `token`; nothing before the end where nobody waits for it."""
        if self._text is None:
            return ""
        self._unread.append(token)
        if not self.generation.streamed and not self.generation.params.stop_strings:
            return ""
        text = self._text.feed(*self._unread, stops=len(self.output) > self.generation.params.min_tokens)
        self._unread.clear()
        return text

    def _rest(self) -> str:
        """All text that was not given out."""
        if self._text is None:
            return ""
        text = self._text.feed(*self._unread) if self._unread else ""
        self._unread.clear()
        return text + self._text.finish()

    def _end(self, reason: FinishReason, text: str, tokens: tuple[int, ...], logprobs: tuple[TokenLogprob, ...] = ()) -> None:
        self._finish = reason
        self.done = True
        self._emit(text, tokens, logprobs, finish=reason)

    def _emit(self, text: str, tokens: tuple[int, ...], logprobs: tuple[TokenLogprob, ...], finish: FinishReason | None = None) -> None:
        self._texts.append(text)
        self._logprobs += logprobs
        if self.generation.streamed:
            shown = None if self.generation.params.logprobs is None else logprobs
            self.generation.pieces.append(Piece(self.index, text, tokens, shown, finish, self._error))

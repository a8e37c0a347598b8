"""From the rows of a step to tokens: what each completion asks, kept from step to step, and one native call for all rows."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ..custom_ops import sampling
from ..custom_ops.native import FINE, IS_NAN, NOTHING_IS_FINITE, SampleRow, SampleRows, address_of, library_error
from .decisions import DecisionLog
from .results import TokenLogprob
from .sampling import SamplingParams

Row = NDArray[np.float32]
_CAUSES = {IS_NAN: sampling.NAN, NOTHING_IS_FINITE: sampling.NOTHING_FINITE}


class Draw:
    """What a completion asks of its next row. `token` and `logprob` are the answer of the last; `failure` says why there is none."""

    def __init__(self, params: SamplingParams, *, prompt: Sequence[int], banned: Sequence[int], seed: int, completion: int) -> None:
        """`banned` can't be drawn before `params.min_tokens` tokens."""
        self.params, self.seed, self.completion = params, seed, completion
        self.prompt, self.output = prompt, list[int]()
        self.banned = tuple(banned)
        self.row = SampleRow(
            temperature=params.temperature, top_p=params.top_p, min_p=params.min_p, top_k=max(params.top_k, 0), given=-1,
            repetition=params.repetition_penalty, frequency=params.frequency_penalty, presence=params.presence_penalty,
            seed=seed, completion=completion,
            logprobs=params.logprobs if params.logprobs is not None else -1 if params.best_of is None else 0,
        )
        bias = params.logit_bias
        self._bias_ids, self._bias = np.array(list(bias), np.int32), np.array(list(bias.values()), np.float64)
        self._banned_ids = np.array(self.banned, np.int32)
        self.row.bias_ids, self.row.bias, self.row.num_bias = self._bias_ids.ctypes.data, self._bias.ctypes.data, len(bias)
        self.row.banned = self._banned_ids.ctypes.data
        self._places: dict[int, int] = {}
        self._seen = self._counts = array("i")
        self._penalizes = params.penalizes
        if self._penalizes:
            for token in prompt:
                self._see(token)
        self._ban()

    @property
    def token(self) -> int:
        return self.row.token

    @property
    def failure(self) -> str:
        return _CAUSES.get(self.row.status, "")

    @property
    def logprob(self) -> TokenLogprob | None:
        """Where params.logprobs or best_of asks for it."""
        return None if self.row.logprobs < 0 else TokenLogprob(*self.row.measured())

    def add(self, token: int) -> None:
        """`token` is the completion's next."""
        self.output.append(token)
        self.row.index = len(self.output)
        if self._penalizes:
            place = self._see(token)    # which may make a longer array
            self._counts[place] += 1
        if self.banned:
            self._ban()

    def _ban(self) -> None:
        self.row.num_banned = len(self.banned) if len(self.output) < self.params.min_tokens else 0

    def _see(self, token: int) -> int:
        """The place of `token` among those seen."""
        place = self._places.setdefault(token, len(self._places))
        if place == len(self._seen):
            more = array("i", bytes(4 * max(64, place)))
            self._seen, self._counts = self._seen + more, self._counts + more
            self.row.seen, self.row.counts = self._seen.buffer_info()[0], self._counts.buffer_info()[0]
        self._seen[place] = token
        self.row.num_seen = len(self._places)
        return place


class Sampler(Protocol):
    """Used by one thread at a time."""

    def choose(self, work: Sequence[tuple[Draw, Row]]) -> None:
        """Answers every draw with a token of its row (V), or a failure; each by itself."""
        ...

    def measure(self, row: Row, token: int, k: int) -> TokenLogprob:
        """`token`'s log probability in `row`, and the k best."""
        ...


class NativeSampler:
    def __init__(self, vocab_size: int) -> None:
        self._rows = SampleRows(vocab_size)

    def choose(self, work: Sequence[tuple[Draw, Row]]) -> None:
        for draw, row in work:
            draw.row.logits = address_of(row)
        self._rows([draw.row for draw, _ in work])

    def measure(self, row: Row, token: int, k: int) -> TokenLogprob:
        asked = SampleRow(logits=row.ctypes.data, top_p=1.0, given=token, logprobs=k)
        self._rows([asked])
        return TokenLogprob(*asked.measured()) if asked.status == FINE else TokenLogprob(token, math.nan, 0)


class ReferenceSampler:
    """The same in NumPy, where the library can't be loaded: about 1 ms a row that is not greedy."""

    def choose(self, work: Sequence[tuple[Draw, Row]]) -> None:
        for draw, row in work:
            draw.row.status = FINE
            try:
                token = sampling.sample(
                    row, draw.params, prompt=np.array(draw.prompt, np.int64), output=np.array(draw.output, np.int64),
                    banned=draw.banned[: draw.row.num_banned], seed=draw.seed, completion=draw.completion, index=len(draw.output),
                )
            except ValueError as error:
                draw.row.status = IS_NAN if str(error) == sampling.NAN else NOTHING_IS_FINITE
                continue
            draw.row.token = token
            if draw.row.logprobs >= 0:
                draw.row.logprob, draw.row.rank, top = sampling.logprobs(row, token, draw.row.logprobs)
                draw.row.num_top = len(top)
                for place, (candidate, logprob) in enumerate(top):
                    draw.row.top_ids[place], draw.row.top_logprobs[place] = candidate, logprob

    def measure(self, row: Row, token: int, k: int) -> TokenLogprob:
        return TokenLogprob(token, *sampling.logprobs(row, token, k))


def open_sampler(vocab_size: int, log: DecisionLog) -> Sampler:
    """The library's where it can be loaded; NumPy's, recorded, where not."""
    if error := library_error():
        log.load("sampling", "NumPy", f"the native function can't be called: {error.message}")
        return ReferenceSampler()
    return NativeSampler(vocab_size)

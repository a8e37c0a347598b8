"""What to sample means: the parameters of a generation, checked. The arithmetic is custom_ops/sampling.py's."""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from ..custom_ops.native import MAX_LOGPROBS
from ..errors import OptionError, RequestError

MAX_N, MAX_STOPS, MAX_STOP_CHARACTERS, MAX_TOKENS = 128, 64, 1024, 2**31 - 1


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens and when to end. Every field is honoured or refused; the ranges are checked here.

    max_tokens: 1 …; None: until a stop or the context's end.      min_tokens: 0 … max_tokens; no stop of any kind before.
    temperature: ≥ 0; 0 takes the most likely token (the smallest id among equals).
    top_k: ≥ 1 keeps the k most likely; 0 or −1: all.               top_p: (0, 1]; keeps the fewest most likely whose sum reaches it.
    min_p: [0, 1]; keeps what is at least min_p times as likely as the most likely.
    repetition_penalty: > 0; logits of tokens in prompt or output are divided (where positive, else multiplied) by it.
    frequency_penalty, presence_penalty: [−2, 2]; subtracted per occurrence, or once, for tokens of the output.
    logit_bias: {token id: −100 … 100}, added to logits.
    stop: a text, or up to 64 of 1 … 1024 characters; the completion's text ends before the first that appears.
    stop_token_ids: end at these too (besides the model's own end tokens). ignore_eos: the model's own end tokens don't end it.
    seed: 0 … 2^64−1; None: a fresh one.                            n: 1 … 128 completions, which share the prompt's blocks.
    best_of: n … 128 completions are computed, and the n with the highest mean log probability of a token given, best first; None: just n.
    logprobs, prompt_logprobs: 0 … 20 most likely tokens beside the token itself; None: none.
    """

    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop: str | tuple[str, ...] | list[str] = ()
    stop_token_ids: tuple[int, ...] | list[int] = ()
    ignore_eos: bool = False
    seed: int | None = None
    n: int = 1
    best_of: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        _int("max_tokens", self.max_tokens, 1, MAX_TOKENS, optional=True)
        _int("min_tokens", self.min_tokens, 0, MAX_TOKENS if self.max_tokens is None else self.max_tokens)
        _number("temperature", self.temperature, 0, math.inf)
        _int("top_k", self.top_k, -1, MAX_TOKENS)
        _number("top_p", self.top_p, 0, 1, above=True)
        _number("min_p", self.min_p, 0, 1)
        _number("repetition_penalty", self.repetition_penalty, 0, math.inf, above=True)
        _number("presence_penalty", self.presence_penalty, -2, 2)
        _number("frequency_penalty", self.frequency_penalty, -2, 2)
        _int("seed", self.seed, 0, 2**64 - 1, optional=True)
        _int("n", self.n, 1, MAX_N)
        _int("best_of", self.best_of, self.n, MAX_N, optional=True)
        _int("logprobs", self.logprobs, 0, MAX_LOGPROBS, optional=True)
        _int("prompt_logprobs", self.prompt_logprobs, 0, MAX_LOGPROBS, optional=True)
        if not isinstance(self.ignore_eos, bool):
            raise OptionError(f"ignore_eos={self.ignore_eos!r} is neither True nor False")
        object.__setattr__(self, "stop", _stops(self.stop))
        object.__setattr__(self, "stop_token_ids", tuple(_token_ids("stop_token_ids", self.stop_token_ids)))
        object.__setattr__(self, "logit_bias", MappingProxyType(_bias(self.logit_bias)))

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return tuple(self.stop)

    @property
    def num_completions(self) -> int:
        """To compute."""
        return self.n if self.best_of is None else self.best_of

    @property
    def penalizes(self) -> bool:
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    def check_vocab(self, vocab_size: int) -> None:
        """Token ids of the parameters against the model's vocabulary."""
        for name, ids in (("logit_bias", self.logit_bias), ("stop_token_ids", self.stop_token_ids)):
            worst = max(ids, default=0)
            if worst >= vocab_size:
                raise RequestError(f"{name} has token id {worst}, the vocabulary ends at {vocab_size - 1}")


def _int(name: str, value: Any, low: int, high: int, *, optional: bool = False) -> None:
    if (optional and value is None) or (isinstance(value, int) and not isinstance(value, bool) and low <= value <= high):
        return
    raise OptionError(f"{name}={value!r} is not an int in {low} … {high}")


def _number(name: str, value: Any, low: float, high: float, *, above: bool = False) -> None:
    """`above` leaves `low` itself out."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    # The largest float, and not isfinite(): that overflows on an int beyond it.
    if not number or not low <= value <= min(high, sys.float_info.max) or (above and value == low):
        raise OptionError(f"{name}={value!r} is not a number in {'(' if above else '['}{low}, {high}{')' if high == math.inf else ']'}")


def _stops(stop: Any) -> tuple[str, ...]:
    stops = (stop,) if isinstance(stop, str) or not isinstance(stop, Iterable) else tuple(stop)
    if len(stops) > MAX_STOPS or not all(isinstance(text, str) and 1 <= len(text) <= MAX_STOP_CHARACTERS for text in stops):
        raise OptionError(f"stop takes up to {MAX_STOPS} texts of 1 … {MAX_STOP_CHARACTERS} characters")
    return stops


def _token_ids(name: str, ids: Any) -> list[int]:
    try:
        values = [operator.index(token) for token in ids if not isinstance(token, bool)]
    except (TypeError, ValueError):
        values = None
    if values is None or len(values) != len(ids) or any(token < 0 for token in values):
        raise OptionError(f"{name}={ids!r} is not a list of token ids ≥ 0")
    return values


def _bias(bias: Any) -> dict[int, float]:
    if not isinstance(bias, Mapping):
        raise OptionError(f"logit_bias={bias!r} is not a mapping of token ids to numbers")
    ids = _token_ids("logit_bias", list(bias))
    for value in bias.values():
        _number("logit_bias", value, -100, 100)
    return dict(zip(ids, map(float, bias.values())))

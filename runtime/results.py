"""What comes out: results, completions, pieces of a stream. All frozen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["stop", "length", "error"]


@dataclass(frozen=True)
class TokenLogprob:
    """A token's log probability (natural, of the model's own distribution: before bias, penalties and temperature).

    `rank` 1 is the most likely token. `top` holds (token id, log probability) of the k most likely, best first.
    """

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Completion:
    """One continuation. `token_ids` are all tokens sampled, the stop token included; `text` ends before a stop string or stop token.

    finish_reason: "stop" (a stop token or string), "length" (max_tokens, or the context's end), "error" (`error` says why).
    `logprobs` has one entry per token when asked for. `text` is "" where the model has no tokenizer.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprob, ...] | None = None
    error: str = ""


@dataclass(frozen=True)
class Usage:
    """Tokens of the prompt, and tokens sampled over all completions."""

    prompt_tokens: int
    completion_tokens: int

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True)
class Result:
    """One prompt's completions, in order of their index. `prompt_logprobs[0]` is None: nothing predicts the first token."""

    prompt_token_ids: tuple[int, ...]
    completions: tuple[Completion, ...]
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None
    usage: Usage

    @property
    def text(self) -> str:
        """The first completion's text."""
        return self.completions[0].text


@dataclass(frozen=True)
class Piece:
    """What one step added to completion `index`. The pieces' texts and token_ids, joined, are the completion's.

    `text` can be "" while a character is incomplete or a stop string possible. A completion's last piece has the finish_reason; after an
    error it has no token.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None = None
    finish_reason: FinishReason | None = None
    error: str = ""

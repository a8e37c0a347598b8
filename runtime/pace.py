"""How many prompt tokens may join a step in which streams decode: as many as keep their gaps within what the policy allows.

A step of n decoding rows takes some time alone, each prompt token beside them takes some more; both are seen from the steps as they run. A
step with prompt tokens may take `_STRETCH` times what it takes without, and more where prompts queue: with a share of the time that is fixed
they could come faster than they are read for good. Nothing computed depends on it: how a prompt is cut changes no bits.
"""

from __future__ import annotations

from typing import Literal

Policy = Literal["auto", "throughput", "latency"]

# How much longer a stream's gaps may get while somebody's prompt is computed; None: as long as a step can take.
_STRETCH: dict[str, float | None] = {"auto": 2.4, "throughput": None, "latency": 1.45}
# So many prompts at a time leave the stretch as it is; k times as many take k times as much of a step.
_UNHURRIED = 2
# Tokens beside streams before anything has been measured, and never fewer than: a prompt must get on.
_FIRST, _LEAST = 64, 4
_WEIGHT = 0.2   # of a new observation in the averages: steady within about ten steps


class Pace:
    def __init__(self, policy: Policy, max_tokens: int | None) -> None:
        self._stretch = _STRETCH[policy]
        self._max_tokens = max_tokens
        self._alone: dict[int, float] = {}      # seconds of a step of decoding rows, by the power of two that their number lies below
        self._token: float | None = None        # seconds of one prompt token beside them

    def prompt_tokens(self, decoding: int, prompts: int) -> int | None:
        """How many tokens of `prompts` that run or wait may join `decoding` rows; None: no bound but the step's own."""
        if self._stretch is None or not decoding:
            return self._max_tokens
        alone = self._seconds(decoding)
        if alone is None or self._token is None:
            return _FIRST
        allowed = int((self._stretch - 1) * max(1, prompts / _UNHURRIED) * alone / self._token)
        return max(_LEAST, allowed if self._max_tokens is None else min(allowed, self._max_tokens))

    def observe(self, decoding: int, prompt: int, seconds: float) -> None:
        """A step of `decoding` rows and `prompt` tokens of prompts took `seconds`."""
        if not prompt:
            key = decoding.bit_length()
            self._alone[key] = _mean(self._alone.get(key), seconds)
        elif decoding and (alone := self._seconds(decoding)) is not None:
            # A step may come out faster than one without prompts: the clock is not that steady.
            self._token = _mean(self._token, max(seconds - alone, 0.1 * seconds) / prompt)
        elif not decoding and prompt >= _FIRST and self._token is None:
            self._token = seconds / prompt

    def _seconds(self, decoding: int) -> float | None:
        """Of the nearest number of rows that has been seen alone."""
        key = decoding.bit_length()
        return self._alone[min(self._alone, key=lambda seen: (abs(seen - key), seen))] if self._alone else None


def _mean(old: float | None, new: float) -> float:
    # One step that takes far longer was held up by something else, and says little of the next.
    return new if old is None else old + _WEIGHT * (min(new, 2 * old) - old)

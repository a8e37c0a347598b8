"""How many prompt tokens may join a step in which streams decode: as many as keep their gaps within what the policy allows.

A step of n decoding rows takes some time alone, each prompt token beside them takes some more; both are seen from the steps as they run. A
step with prompt tokens may take `_STRETCH` times what it takes without, and more where prompts queue: with a share of the time that is fixed
they could come faster than they are read for good. Nothing computed depends on it: how a prompt is cut changes no bits.
"""

from __future__ import annotations

from collections import defaultdict, deque
from statistics import median
from typing import Literal

Policy = Literal["auto", "throughput", "latency"]

# How much longer a stream's gaps may get while somebody's prompt is computed; None: as long as a step can take.
_STRETCH: dict[str, float | None] = {"auto": 2.5, "throughput": None, "latency": 1.5}
# So many prompts at a time leave the stretch as it is; k times as many take k times as much of a step.
_UNHURRIED = 2
# Tokens beside streams before anything has been measured, and never fewer than: a prompt must get on.
_FIRST, _LEAST = 64, 4
# Times are medians of the last few: a step that something else held up says nothing of the next, and one that truly takes longer soon does.
_KEPT = 5
# After so many steps with prompt tokens one goes without: what streams take alone grows with their length, and would be put down to the prompt.
# What was known before is out of date then, and one step is no more than so many times as long because of it.
_ASK_AGAIN, _GROWTH = 32, 1.25


class Pace:
    def __init__(self, policy: Policy, max_tokens: int | None) -> None:
        self._stretch = _STRETCH[policy]
        self._max_tokens = max_tokens
        # Seconds of a step of decoding rows, by the power of two that their number lies below; and of one prompt token beside them.
        self._alone: defaultdict[int, deque[float]] = defaultdict(lambda: deque(maxlen=_KEPT))
        self._token: deque[float] = deque(maxlen=_KEPT)
        self._mixed = 0     # steps with both since the last without prompts

    def prompt_tokens(self, decoding: int, prompts: int) -> int | None:
        """How many tokens of `prompts` that run or wait may join `decoding` rows, now and then 0; None: no bound but the step's own."""
        if self._stretch is None or not decoding:
            return self._max_tokens
        alone = self._seconds(decoding)
        if alone is None or not self._token:
            return _FIRST
        if self._mixed >= _ASK_AGAIN:
            return 0
        allowed = int((self._stretch - 1) * max(1, prompts / _UNHURRIED) * alone / median(self._token))
        return max(_LEAST, allowed if self._max_tokens is None else min(allowed, self._max_tokens))

    def observe(self, decoding: int, prompt: int, seconds: float) -> None:
        """A step of `decoding` rows and `prompt` tokens of prompts took `seconds`."""
        if not prompt:
            known = self._alone[decoding.bit_length()]
            if known and self._mixed >= _ASK_AGAIN:
                seconds = min(seconds, _GROWTH * median(known))
                known.clear()
            known.append(seconds)
        elif decoding and (alone := self._seconds(decoding)) is not None:
            # A step may come out faster than one without prompts: the clock is not that steady.
            self._token.append(max(seconds - alone, 0.1 * seconds) / prompt)
        elif not decoding and prompt >= _FIRST and not self._token:
            self._token.append(seconds / prompt)
        self._mixed = self._mixed + 1 if prompt else 0

    def _seconds(self, decoding: int) -> float | None:
        """Of the nearest number of rows that has been seen alone."""
        key = decoding.bit_length()
        return median(self._alone[min(self._alone, key=lambda seen: (abs(seen - key), seen))]) if self._alone else None

"""What users give as prompts: text, chat messages or token ids, one or a list, checked and turned into lists of ids."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..errors import RequestError, UnsupportedError
from .tokenizer import Tokenizer

_FORMS = "a prompt is text, a list of chat messages, or a list or 1-D NumPy array of token ids"


def as_prompts(prompts: Any) -> list[Any]:
    """A list of prompts out of one or several. Text, a mapping-only list and an integer-only list are one."""
    if isinstance(prompts, np.ndarray):
        return list(prompts) if prompts.ndim == 2 and len(prompts) else [prompts]
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, list | tuple):
        raise RequestError(f"{type(prompts).__name__} is no prompt", hint=_FORMS)
    if not prompts:
        raise RequestError("the prompt is empty", hint=_FORMS)
    if all(isinstance(item, Mapping) for item in prompts) or all(_is_id(item) for item in prompts):
        return [prompts]
    return list(prompts)


def encode_prompt(prompt: Any, tokenizer: Tokenizer | None, vocab_size: int) -> list[int]:
    """Token ids of one prompt, in range and not empty."""
    is_chat = isinstance(prompt, list | tuple) and len(prompt) > 0 and all(isinstance(item, Mapping) for item in prompt)
    if isinstance(prompt, str) or is_chat:
        if tokenizer is None:
            raise UnsupportedError("the model has no tokenizer", hint="put its tokenizer.json beside it, or give token ids")
        ids = tokenizer.encode_chat([_message(item) for item in prompt]) if is_chat else tokenizer.encode(prompt)
    else:
        ids = prompt
    return check_ids(ids, vocab_size)


def check_ids(ids: Any, vocab_size: int) -> list[int]:
    """`ids` as a list of ints in [0, vocab_size), not empty; RequestError else."""
    if isinstance(ids, np.ndarray):
        if ids.ndim != 1 or (ids.dtype.kind not in "iu" and ids.size):
            raise RequestError(f"an array of type {ids.dtype} and {ids.ndim} dimensions holds no token ids", hint=_FORMS)
        values = ids.tolist()
    elif isinstance(ids, list | tuple) and all(_is_id(item) for item in ids):
        values = [int(item) for item in ids]
    else:
        raise RequestError(f"{type(ids).__name__} holds no token ids", hint=_FORMS)
    if not values:
        raise RequestError("there are no tokens: the prompt is empty", hint=_FORMS)
    low, high = min(values), max(values)
    if low < 0 or high >= vocab_size:
        raise RequestError(f"token id {low if low < 0 else high} is not in 0 … {vocab_size - 1}", hint="is it another model's tokenizer?")
    return values


def _is_id(item: Any) -> bool:
    return isinstance(item, int | np.integer) and not isinstance(item, bool)


def _message(item: Mapping[str, Any]) -> Mapping[str, Any]:
    if not isinstance(item.get("role"), str) or "content" not in item:
        raise RequestError(f"a chat message has a role and a content, this one has {sorted(map(str, item))}")
    return item

"""Between text and token ids: tokenizer, chat prompts, text that streams out character by whole character, stop strings.

All of it from files beside the model (models/artifact.py lists them); nothing is fetched and no code of a model runs outside the sandbox.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as _Tokenizer

from ..errors import ModelError, RequestError, UnsupportedError
from .chat_template import ChatTemplate

_REPLACEMENT = "\ufffd"
# An incomplete character has at most three bytes, and decoders show one U+FFFD for all or for each of them.
_MAX_HELD = 3
# Tokens before the first of a completion that its text is decoded with: decoders treat the first token of a text differently.
_CONTEXT = 6


class Tokenizer:
    """`tokenizer.json` and its companions."""

    def __init__(self, tokenizer: _Tokenizer, *, eos_ids: frozenset[int] = frozenset(), chat_template: ChatTemplate | None = None) -> None:
        self._tokenizer = tokenizer
        self.eos_ids = eos_ids
        self.chat_template = chat_template

    @staticmethod
    def open(folder: Path) -> Tokenizer | None:
        """The tokenizer in `folder`, or None where there is no tokenizer.json. ModelError where its files can't be read."""
        file = folder / "tokenizer.json"
        if not file.is_file():
            return None
        try:
            tokenizer = _Tokenizer.from_file(str(file))
        except Exception as error:  # tokenizers raises plain Exception
            raise ModelError(f"{file} can't be read: {error}", hint="copy the tokenizer files of the model again") from error
        tokenizer.no_padding()
        tokenizer.no_truncation()
        config = read_json(folder / "tokenizer_config.json")
        source = _template_source(folder, config)
        template = ChatTemplate(source, _special_tokens(config)) if source is not None else None
        return Tokenizer(tokenizer, eos_ids=_eos_ids(folder, config, tokenizer), chat_template=template)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        try:
            return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)
        except TypeError:   # of a str: it holds half a surrogate pair, as bytes that are no UTF-8 become on a command line
            raise RequestError("the text is not valid Unicode", hint="decode it as UTF-8 first") from None

    def encode_chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """The messages in the model's chat format, ready for the assistant's turn."""
        if self.chat_template is None:
            raise UnsupportedError("the model has no chat template", hint="give the prompt as text or token ids")
        return self.encode(self.chat_template.render(messages), add_special_tokens=False)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids` without special tokens; bytes that are no UTF-8 become U+FFFD."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))


class Detokenizer:
    """Text of a growing list of tokens, handed out in whole characters. The pieces joined are the text that follows the context's."""

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = list(context[-_CONTEXT:])       # a window: what has been given out long ago is dropped
        self._given = len(_settled(tokenizer.decode(self._ids)))    # characters of the window's text that are given out, or the context's

    def feed(self, token: int) -> str:
        """What `token` completes; "" while a character is incomplete."""
        self._ids.append(token)
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

    def feed(self, token: int, *, stops: bool = True) -> str:
        """Text to give out. `stops` False lets stop strings pass."""
        text = self._detokenizer.feed(token)
        return self._stops.feed(text) if stops else text

    def finish(self) -> str:
        return self._stops.feed(self._detokenizer.finish()) + self._stops.finish()

    def fork(self) -> TextStream:
        """A second stream in the same state."""
        twin = copy.copy(self)
        twin._detokenizer, twin._stops = copy.copy(self._detokenizer), copy.copy(self._stops)
        twin._detokenizer._ids = list(self._detokenizer._ids)
        return twin


def read_json(file: Path) -> dict[str, Any]:
    """The object in `file`; empty where there is no such file. ModelError where it is no JSON object."""
    if not file.is_file():
        return {}
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{file} can't be read: {error}", hint="copy the tokenizer files of the model again") from error
    if not isinstance(data, dict):
        raise ModelError(f"{file} holds no JSON object", hint="copy the tokenizer files of the model again")
    return data


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` with which `stop` begins."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


def _template_source(folder: Path, config: dict[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ModelError(f"{file} can't be read: {error}", hint="copy the tokenizer files of the model again") from error
    source = config.get("chat_template")
    if isinstance(source, list):    # several, by name
        source = next((entry.get("template") for entry in source if isinstance(entry, dict) and entry.get("name") == "default"), None)
    return source if isinstance(source, str) else None


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    """bos_token, eos_token and so on, as templates name them. A token is a text, or an object with its `content`."""
    named = {key: value.get("content") if isinstance(value, dict) else value for key, value in config.items() if key.endswith("_token")}
    return {key: value for key, value in named.items() if isinstance(value, str)}


def _eos_ids(folder: Path, config: dict[str, Any], tokenizer: _Tokenizer) -> frozenset[int]:
    """Every token that any of the model's files calls its end."""
    ids: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        value = read_json(folder / name).get("eos_token_id")
        ids.update(token for token in (value if isinstance(value, list) else [value]) if type(token) is int)
    eos = _special_tokens(config).get("eos_token")
    if eos is not None and (token := tokenizer.token_to_id(eos)) is not None:
        ids.add(token)
    return frozenset(ids)

"""Between text and token ids: `tokenizer.json`, the chat template, the tokens that end a completion.

All of it from files beside the model (models/artifact.py lists them); nothing is fetched and no code of a model runs outside the sandbox.
Files are read when they are first needed: reading a vocabulary takes longer than opening a session over its model.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ModelError, RequestError, UnsupportedError
from .heap import give_back

if TYPE_CHECKING:
    from tokenizers import Tokenizer as _Tokenizer

    from .chat_template import ChatTemplate


class Tokenizer:
    """`tokenizer.json` and its companions in a folder. Every use raises ModelError where the files that it needs can't be read."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @staticmethod
    def open(folder: Path) -> Tokenizer | None:
        """The tokenizer in `folder`, not yet read, or None where there is no tokenizer.json."""
        return Tokenizer(folder) if (folder / "tokenizer.json").is_file() else None

    @cached_property
    def eos_ids(self) -> frozenset[int]:
        """Every token that any of the model's files calls its end."""
        return _eos_ids(self._folder, self._config, self._tokenizer)

    @cached_property
    def chat_template(self) -> ChatTemplate | None:
        source = _template_source(self._folder, self._config)
        if source is None:
            return None
        from .chat_template import ChatTemplate  # jinja2 is 7 MB

        return ChatTemplate(source, _special_tokens(self._config))

    @cached_property
    def _config(self) -> dict[str, Any]:
        return read_json(self._folder / "tokenizer_config.json")

    @cached_property
    def _tokenizer(self) -> _Tokenizer:
        from tokenizers import Tokenizer

        file = self._folder / "tokenizer.json"
        try:
            tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # tokenizers raises plain Exception
            raise ModelError(f"{file} can't be read: {error}", hint="copy the tokenizer files of the model again") from error
        tokenizer.no_padding()
        tokenizer.no_truncation()
        give_back()     # the parser used as much again as the tokenizer keeps
        return tokenizer

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
    ids: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        value = read_json(folder / name).get("eos_token_id")
        ids.update(token for token in (value if isinstance(value, list) else [value]) if type(token) is int)
    eos = _special_tokens(config).get("eos_token")
    if eos is not None and (token := tokenizer.token_to_id(eos)) is not None:
        ids.add(token)
    return frozenset(ids)

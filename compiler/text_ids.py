"""A text's token ids by a tokenizer.json, all of them: a file may say to cut or pad what it reads, which is not meant for whole texts."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer

from ..errors import ModelError


def text_ids(tokenizer: Path, text: str) -> list[int]:
    """ModelError where the file can't be read."""
    try:
        found = Tokenizer.from_file(str(tokenizer))
    except Exception as error:  # tokenizers raises plain Exception
        raise ModelError(f"{tokenizer} can't be read: {error}", hint="copy the tokenizer files of the model again") from error
    found.no_padding()
    found.no_truncation()
    return list(found.encode(text).ids)

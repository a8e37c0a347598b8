"""Token ids to calibrate on: a user's text, ids from a file, or, where none was given, random ones; which it was is told."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from os import PathLike
from pathlib import Path

import numpy as np

from ..errors import OptionError
from .text_ids import text_ids

MAX_TOKENS = 16384
# Without text. Inputs of random tokens are not those of language, but far from white noise too.
_RANDOM, _RANDOM_SEED = (4, 512), 0


@dataclass(frozen=True)
class Calibration:
    """Sequences of token ids, and what they are, in words."""

    sequences: tuple[tuple[int, ...], ...]
    words: str


def read_calibration(path: str | PathLike[str] | None, folder: Path | None, vocab_size: int) -> Calibration:
    """The first 16,384 tokens of the file `path`: UTF-8 text for the tokenizer in `folder`, or (.json) a list of ids or of such lists.

    Without a file, 4 sequences of 512 random ids, the same ones each time. Raises OptionError for a file that is neither, or holds ids that
    the model doesn't have, and where there is no tokenizer for a text.
    """
    if path is None:
        ids = np.random.default_rng(_RANDOM_SEED).integers(0, vocab_size, _RANDOM)
        return Calibration(tuple(map(tuple, ids.tolist())), f"{ids.size:,} random token ids, seed {_RANDOM_SEED}: no text was given")
    file = Path(path)
    try:
        data = file.read_bytes()
    except OSError as error:
        raise OptionError(f"calibration: {file} can't be read: {error.strerror}") from error
    sequences = _from_json(data, file, vocab_size) if file.suffix == ".json" else [_from_text(data, file, folder)]
    kept, left = list[tuple[int, ...]](), MAX_TOKENS
    for sequence in sequences:
        if sequence and left:
            kept.append(tuple(sequence[:left]))
            left -= len(kept[-1])
    if not kept:
        raise OptionError(f"calibration: {file} has no tokens", hint="a few thousand tokens of plain text serve")
    return Calibration(tuple(kept), f"{MAX_TOKENS - left:,} tokens of {file.name}, sha256 {sha256(data).hexdigest()[:12]}")


def _from_json(data: bytes, file: Path, vocab_size: int) -> Sequence[Sequence[int]]:
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise OptionError(f"calibration: {file} is no JSON: {error}") from error
    sequences = found if isinstance(found, list) and found and all(isinstance(part, list) for part in found) else [found]
    for sequence in sequences:
        # type() and not isinstance: True is an int, and no token.
        if not isinstance(sequence, list) or any(type(token) is not int or not 0 <= token < vocab_size for token in sequence):
            raise OptionError(f"calibration: {file} holds something other than lists of token ids from 0 to {vocab_size - 1}")
    return sequences


def _from_text(data: bytes, file: Path, folder: Path | None) -> Sequence[int]:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise OptionError(f"calibration: {file} is not UTF-8 text: {error}", hint="token ids go in a .json file") from error
    tokenizer = None if folder is None else folder / "tokenizer.json"
    if tokenizer is None or not tokenizer.is_file():
        raise OptionError("calibration: there is no tokenizer.json beside the source", hint="give token ids: a .json file with a list of them")
    return text_ids(tokenizer, text)

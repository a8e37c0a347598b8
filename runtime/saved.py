"""A sequence in a file: its tokens, and what is cached of them. Whole or not there; verified before anything of it is used.

    "OCTAVOSQ"  uint32 header bytes  header (JSON)  arrays, one after the other  sha256 of all before

Integers are little-endian. Tokens alone are enough to compute the rest again, so a cache of another layout or block size is left aside; a
file of another model is refused.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from ..errors import OptionError, SavedSequenceError
from ..models.json_record import SchemaError, read_record

_MAGIC = b"OCTAVOSQ"
FORMAT_VERSION = 1
_DTYPES = ("float32", "float16", "float64", "uint8")
_CHECKSUM = 32
_DELETE = "delete it and compute the sequence again from its tokens"


@dataclass(frozen=True, eq=False)
class CacheState:
    """The first `length` tokens' keys and values, as their executor has them. Only one with the same `layout` can use them."""

    layout: str
    length: int
    arrays: tuple[NDArray[Any], ...]


@dataclass(frozen=True)
class _Array:
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        size = np.dtype(self.dtype).itemsize
        for dimension in self.shape:
            size *= dimension
        return size


@dataclass(frozen=True)
class _Header:
    format_version: int
    fingerprint: str
    scope: str | None
    tokens: tuple[int, ...]
    layout: str
    length: int
    arrays: tuple[_Array, ...]


@dataclass(frozen=True)
class SavedSequence:
    """What a file holds. `fingerprint` names the model's bytes, `scope` is the sequence's salt."""

    fingerprint: str
    scope: str | None
    tokens: tuple[int, ...]
    cache: CacheState


def write_sequence(path: str | os.PathLike[str], saved: SavedSequence) -> None:
    """Writes a file in the place of `path`, which is as it was where that fails (SavedSequenceError)."""
    path = Path(os.path.abspath(check_path(path)))
    if not path.name:
        raise SavedSequenceError(f"{path} can't be written: it is a folder", hint="give the name of a file")
    arrays = [np.ascontiguousarray(array) for array in saved.cache.arrays]
    import hashlib  # not before it is needed: libcrypto is 4 MB

    shapes = tuple(_Array(array.dtype.name, array.shape) for array in arrays)
    header = _Header(FORMAT_VERSION, saved.fingerprint, saved.scope, saved.tokens, saved.cache.layout, saved.cache.length, shapes)
    text = json.dumps(asdict(header), separators=(",", ":")).encode()
    written = path.with_name(f".{path.name}.{os.urandom(4).hex()}.writing")
    try:
        with written.open("xb") as file:
            digest = hashlib.sha256()
            parts: list[bytes | memoryview] = [_MAGIC, len(text).to_bytes(4, "little"), text]
            for part in (*parts, *(array.reshape(-1).view(np.uint8).data for array in arrays)):
                file.write(part)
                digest.update(part)
            file.write(digest.digest())
            file.flush()
            os.fsync(file.fileno())
        os.replace(written, path)
    except (OSError, ValueError) as error:      # a ValueError for a name with a null character
        with suppress(OSError, ValueError):
            written.unlink(missing_ok=True)
        raise SavedSequenceError(f"{path} can't be written: {getattr(error, 'strerror', error)}", hint="free some space, or choose another place") from error


def check_path(path: str | os.PathLike[str]) -> Path:
    """OptionError where it is none: a number would be taken for an open file."""
    if not isinstance(path, str | os.PathLike):
        raise OptionError(f"{path!r} is not a path")
    return Path(path)


def read_sequence(path: str | os.PathLike[str], fingerprint: str) -> SavedSequence:
    """What `path` holds. SavedSequenceError where it is missing, damaged, of another version or of another model than `fingerprint`'s."""
    path = check_path(path)
    try:
        with path.open("rb") as file:
            return _read(file, path, fingerprint)
    except (OSError, ValueError) as error:
        raise SavedSequenceError(f"{path} can't be read: {getattr(error, 'strerror', error)}", hint="give a file that Sequence.save wrote") from error


def _read(file: BinaryIO, path: Path, fingerprint: str) -> SavedSequence:
    import hashlib  # not before it is needed: libcrypto is 4 MB

    size = os.fstat(file.fileno()).st_size
    digest = hashlib.sha256()

    def take(count: int) -> bytes:
        data = file.read(count)
        digest.update(data)
        return data

    if take(len(_MAGIC)) != _MAGIC:
        raise SavedSequenceError(f"{path} is no saved sequence", hint="give a file that Sequence.save wrote")
    length = int.from_bytes(take(4), "little")
    rest = size - file.tell() - _CHECKSUM
    if length > rest:
        raise SavedSequenceError(f"{path} is truncated", hint=_DELETE)
    text = take(length)
    header = _header(path, text)
    if sum(array.nbytes for array in header.arrays) != rest - length:
        raise SavedSequenceError(f"{path} is truncated, or more follows", hint=_DELETE)
    arrays = tuple(np.frombuffer(take(array.nbytes), array.dtype).reshape(array.shape) for array in header.arrays)
    if file.read(_CHECKSUM) != digest.digest():
        raise SavedSequenceError(f"{path} is damaged: its checksum is another", hint=_DELETE)
    if header.fingerprint != fingerprint:
        raise SavedSequenceError(f"{path} was saved with another model, or another compile of it", hint="load the model it was saved with")
    return SavedSequence(header.fingerprint, header.scope, header.tokens, CacheState(header.layout, header.length, arrays))


def _header(path: Path, text: bytes) -> _Header:
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SavedSequenceError(f"{path} is damaged: {error}", hint=_DELETE) from error
    version = data.get("format_version") if isinstance(data, dict) else None
    if version != FORMAT_VERSION:
        hint = "compute the sequence again from its tokens"
        raise SavedSequenceError(f"{path} has format version {version!r}, this Octavo reads {FORMAT_VERSION}", hint=hint)
    try:
        header: _Header = read_record(_Header, data, "the header")
    except SchemaError as error:
        raise SavedSequenceError(f"{path} is damaged: {error}", hint=_DELETE) from error
    if any(array.dtype not in _DTYPES or any(size < 0 for size in array.shape) for array in header.arrays):
        raise SavedSequenceError(f"{path} is damaged: no cache has such arrays", hint=_DELETE)
    if not 0 <= header.length <= len(header.tokens):
        raise SavedSequenceError(f"{path} is damaged: more is cached than there are tokens", hint=_DELETE)
    return header

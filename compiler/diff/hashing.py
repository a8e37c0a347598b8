"""Content hashes of weights, read in chunks and never held, and remembered by where they lie and when the file last changed.

The memory is one small file per data file in `$XDG_CACHE_HOME/octavo/hashes` (`~/.cache` by default); `OCTAVO_HASH_CACHE=0` turns it off.
An entry counts only while device, inode, size and both time stamps of the data file are those it was made under; of a file that was
changed within the last two seconds nothing is kept, since another change could leave its time stamps as they are.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import time
from collections.abc import Iterable
from pathlib import Path

from ...errors import ModelError

CHUNK = 1 << 20
DIGITS = 32
_SETTLED = 2.0     # seconds


class Hasher:
    """Hashes of ranges of files. `close` writes what was learned; a cache that can't be written is no error, the hashes are made again."""

    def __init__(self) -> None:
        self._files: dict[Path, _File] = {}

    def digest(self, path: Path, offset: int, length: int) -> str:
        """`sha256:` and DIGITS hex digits of the bytes. ModelError where the file ends before."""
        return self._file(path).digest(offset, length)

    def read(self, path: Path, offset: int, length: int) -> bytes:
        """The bytes themselves, for what is small."""
        return b"".join(self._file(path).chunks(offset, length))

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()

    def _file(self, path: Path) -> _File:
        if path not in self._files:
            self._files[path] = _File(path)
        return self._files[path]


def digest_of(chunks: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    return f"sha256:{digest.hexdigest()[:DIGITS]}"


class _File:
    def __init__(self, path: Path) -> None:
        # Whoever named the path has resolved and checked it; NOFOLLOW closes the gap between check and use.
        self._path = path
        try:
            self._stream = os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb")
        except OSError as error:
            raise ModelError(f"{path} can't be read: {error}", hint="check its permissions") from error
        info = os.fstat(self._stream.fileno())
        if not stat.S_ISREG(info.st_mode):
            raise ModelError(f"{path} is not a regular file", hint="replace it by a copy of the data")
        self._stamp = [info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns]
        self._settled = time.time() - max(info.st_mtime, info.st_ctime) > _SETTLED
        self._cache = _cache_file(path)
        self._known = self._load()
        self._learned = False

    def digest(self, offset: int, length: int) -> str:
        key = f"{offset}+{length}"
        if key not in self._known:
            self._known[key] = digest_of(self.chunks(offset, length))
            self._learned = True
        return self._known[key]

    def close(self) -> None:
        self._stream.close()
        if self._cache is None or not self._learned or not self._settled:
            return
        text = json.dumps({"stamp": self._stamp, "hashes": self._known})
        temporary = self._cache.with_suffix(f".{os.getpid()}")
        try:
            self._cache.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(text)
            temporary.replace(self._cache)
        except OSError:
            temporary.unlink(missing_ok=True)

    def chunks(self, offset: int, length: int) -> Iterable[bytes]:
        end = offset + length
        while offset < end:
            chunk = os.pread(self._stream.fileno(), min(CHUNK, end - offset), offset)
            if not chunk:
                raise ModelError(f"{self._path} ends before its tensors do", hint="copy or export it again")
            offset += len(chunk)
            yield chunk

    def _load(self) -> dict[str, str]:
        if self._cache is None:
            return {}
        try:
            data = json.loads(self._cache.read_text())
            return dict(data["hashes"]) if data["stamp"] == self._stamp else {}
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return {}


def _cache_file(path: Path) -> Path | None:
    if os.environ.get("OCTAVO_HASH_CACHE") == "0":
        return None
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "octavo" / "hashes" / f"{hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:32]}.json"

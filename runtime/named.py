"""Named sessions between their uses: one folder each on disk, the longest unused deleted where all together are too large.

    FOLDER/<sha256 of the name>/name.txt, 0.seq, 1.seq, …
    FOLDER/.<sha256 of the name>.lock           while it is open

A session's folder is replaced as a whole, so that what is there is of one moment. Its lock is the system's, which lets go of it with the process.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from ..errors import OptionError, RequestError, SavedSequenceError
from ..models.staging import StagedFolder
from .saved import SavedSequence, read_sequence, write_sequence

_NAME = "name.txt"


class NamedSessions:
    """The sessions that `folder` holds, `limit` bytes of them at most (None: no limit). Safe from several threads and processes."""

    def __init__(self, folder: Path, limit: int | None) -> None:
        self._folder, self._limit = folder, limit
        self._lock = threading.Lock()
        self._open: dict[str, int] = {}     # the file of each lock
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OptionError(f"session_folder={str(folder)!r} can't be made: {error.strerror}") from error

    def claim(self, name: str) -> None:
        """Takes a name for one session. RequestError where another has it, of this process or another."""
        with self._lock:
            file = _lock(self._lock_of(name))
            if file is None:
                raise RequestError(f"the session {name!r} is open", hint="close it first, or choose another name")
            self._open[name] = file

    def release(self, name: str) -> None:
        # Not under self._lock: a finalizer calls this, in the middle of anything, which may hold it.
        if (file := self._open.pop(name, None)) is not None:
            _unlock(file, self._lock_of(name))

    def load(self, name: str, fingerprint: str) -> list[SavedSequence]:
        """The sequences of a session, in order; none where it is new. SavedSequenceError where one can't be used."""
        folder = self._of(name)
        if not folder.exists():
            # The process was ended between the two renames of `store`.
            for left in self._folder.glob(f".{folder.name}.*.old"):
                os.replace(left, folder)
                break
        files = sorted(folder.glob("*.seq"), key=lambda file: int(file.stem)) if folder.is_dir() else []
        return [read_sequence(file, fingerprint) for file in files]

    def store(self, name: str, sequences: Sequence[SavedSequence]) -> None:
        """Puts a session's sequences in the place of what was there; SavedSequenceError (and the old ones stay) where that fails."""
        with StagedFolder(self._of(name), replaceable=_is_session, error=SavedSequenceError) as staged:
            (staged.folder / _NAME).write_text(name, encoding="utf-8")
            for index, sequence in enumerate(sequences):
                write_sequence(staged.folder / f"{index}.seq", sequence)
            staged.commit()
        for left in self._folder.glob(f".{self._of(name).name}.*"):     # of a process that was ended while it wrote
            shutil.rmtree(left, ignore_errors=True)
        self._make_room(keep=self._of(name))

    def _of(self, name: str) -> Path:
        import hashlib  # not before it is needed: libcrypto is 4 MB

        # A name may be any text, and some are no file names.
        return self._folder / hashlib.sha256(name.encode()).hexdigest()

    def _lock_of(self, name: str) -> Path:
        return self._folder / f".{self._of(name).name}.lock"

    def _make_room(self, keep: Path) -> None:
        with self._lock:
            sessions = sorted((folder for folder in self._folder.glob("[!.]*") if _is_session(folder)), key=lambda folder: folder.stat().st_mtime_ns)
            sizes = {folder: sum(file.stat().st_size for file in folder.iterdir()) for folder in sessions}
            excess = 0 if self._limit is None else sum(sizes.values()) - self._limit
            for folder in sessions:
                if excess <= 0:
                    break
                lock = self._folder / f".{folder.name}.lock"
                if folder != keep and (file := _lock(lock)) is not None:
                    shutil.rmtree(folder, ignore_errors=True)
                    excess -= sizes[folder]
                    _unlock(file, lock)


def _is_session(folder: Path) -> bool:
    """Holds nothing but what `store` writes."""
    return folder.is_dir() and (folder / _NAME).is_file() and all(file.name == _NAME or file.suffix == ".seq" for file in folder.iterdir())


def _lock(path: Path) -> int | None:
    """An open file that nobody else can lock, of this process or another; None where somebody has."""
    while True:
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise SavedSequenceError(f"{path} can't be made: {error.strerror}", hint="free some space, or choose another place") from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(file), path.stat()):
                return file
        except BlockingIOError:
            os.close(file)
            return None
        except FileNotFoundError:
            pass
        except OSError as error:
            os.close(file)
            raise SavedSequenceError(f"{path} can't be locked: {error.strerror}", hint="choose another place") from error
        os.close(file)      # who had it has deleted the file since it was opened here


def _unlock(file: int, path: Path) -> None:
    with suppress(OSError):
        path.unlink()
        fcntl.flock(file, fcntl.LOCK_UN)    # a process forked off in the meantime has it open as well
    os.close(file)

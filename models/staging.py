"""Writing a folder so that it is there whole or not at all: into a sibling, renamed at the end."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from ..errors import OctavoError


class StagedFolder:
    """A folder under construction beside `target`.

        with StagedFolder(target, replaceable, error=ModelError) as staged:
            ...                     # write into staged.folder
            staged.commit()

    Leaving the block without `commit` removes what was written; an OSError that leaves it (a full disk) becomes `error`. A target that
    exists must be a folder (no link) that is empty or for which `replaceable(target)` holds; another is refused with `error` before
    anything is written.
    """

    def __init__(self, target: str | os.PathLike[str], replaceable: Callable[[Path], bool], error: type[OctavoError]) -> None:
        # The parent is resolved and the name kept, so that a link in the target's place is seen as one.
        path = Path(os.path.abspath(target))
        self.target = path.parent.resolve() / path.name
        self._replaceable = replaceable
        self._error = error
        self._folder: Path | None = None

    @property
    def folder(self) -> Path:
        """Where to write: a sibling of the target, on the same filesystem."""
        assert self._folder is not None, "a staged folder is there only inside its with block, before commit"
        return self._folder

    def __enter__(self) -> StagedFolder:
        self._check_target()
        folder = self._sibling("writing")
        try:
            self.target.parent.mkdir(parents=True, exist_ok=True)
            folder.mkdir()
        except OSError as error:
            raise self._error(f"{self.target} can't be written: {error.strerror}", hint="choose another output folder") from error
        self._folder = folder
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None
        if isinstance(error, OSError) and not isinstance(error, OctavoError):
            hint = "free some space, or choose another output folder"
            raise self._error(f"writing {self.target} failed: {error}", hint=hint) from error

    def commit(self) -> Path:
        """Puts the folder in the target's place and returns the target. An old one is moved aside first and removed after."""
        self._check_target()
        old = self._sibling("old")
        replaced = self.target.exists()
        if replaced:
            os.replace(self.target, old)
        try:
            os.replace(self.folder, self.target)
        except OSError as error:
            if replaced:
                os.replace(old, self.target)
            raise self._error(f"{self.target} can't be written: {error.strerror}", hint="choose another output folder") from error
        self._folder = None
        shutil.rmtree(old, ignore_errors=True)
        return self.target

    def _sibling(self, suffix: str) -> Path:
        return self.target.with_name(f".{self.target.name}.{os.urandom(4).hex()}.{suffix}")

    def _check_target(self) -> None:
        target = self.target
        if not target.name:
            raise self._error(f"{target} can't be replaced", hint="choose another output folder")
        if target.is_symlink() or (target.exists() and not target.is_dir()):
            raise self._error(f"{target} exists and is not a folder", hint="choose another output folder")
        if target.is_dir() and any(target.iterdir()) and not self._replaceable(target):
            message = f"{target} exists and holds other files, so it is not replaced"
            raise self._error(message, hint="choose another output folder, or empty this one")

"""What can go wrong, and what the reader can do about it.

Every error a user can mend is an `OctavoError`: one sentence on what is wrong, and a `hint` on what to do. The command line
prints both without a traceback and exits with `exit_code` (the table is in docs/reference/cli.md). A broken invariant of ours
is an `AssertionError` and never one of these.
"""

from __future__ import annotations


class OctavoError(Exception):
    """Base of every error whose cause lies in what Octavo was given. `hint` says what to do."""

    exit_code = 3

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint

    def __str__(self) -> str:
        message = super().__str__()
        return f"{message} ({self.hint})" if self.hint else message

    @property
    def message(self) -> str:
        """The message without the hint."""
        return super().__str__()


class OptionError(OctavoError, ValueError):
    """An option has a value outside its documented range, or two options contradict each other."""


class ModelError(OctavoError):
    """The input is missing, truncated, not a model, or a model of a form that Octavo can't read."""


class UnsafePathError(ModelError):
    """A model points at a file outside its own folder (absolute, `..`, symbolic or hard link)."""


class ArtifactError(OctavoError):
    """A compiled artifact is incomplete, of another format version, or its files have other sizes or contents than recorded."""


class RefusedError(OctavoError):
    """`strict=True`, or an explicitly asked feature, met a refusal. The message names the site and the nearest miss."""

    exit_code = 2


class RequestError(OctavoError, ValueError):
    """A request can't be served as asked: a token id out of range, an empty prompt, a sequence, session or model that is closed."""


class CapacityError(OctavoError):
    """The context is longer than the model or the block pool allows, or the memory budget holds no model at all."""


class QueueFullError(CapacityError):
    """So many requests wait already that another is not taken. `retry_after` is an estimate, in seconds, of when one will be."""

    def __init__(self, message: str, *, hint: str = "", retry_after: float = 1.0) -> None:
        super().__init__(message, hint=hint)
        self.retry_after = retry_after


class DeadlineError(OctavoError):
    """A request's deadline passed before it had ended; it was given up."""


class SavedSequenceError(OctavoError):
    """A saved sequence is missing, damaged, of another version or of another model, or can't be written."""


class UnsupportedError(OctavoError):
    """This kind of model has no such operation (text out of a graph without logits)."""


class LibraryError(OctavoError):
    """The op library is missing, or onnxruntime refuses to load it."""


class StepError(OctavoError):
    """A kernel or an allocation failed in the middle of a step. The step was rolled back; other sequences go on."""

    exit_code = 4

"""`octavo.snapshot` and `octavo.diff`: what users call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import OptionError
from .golden import update_golden
from .model import GraphDiff
from .policy import Policy, judge
from .source import is_snapshot, read_snapshot
from .structure import compare_snapshots
from .write import write

if TYPE_CHECKING:
    from ..check import Load


def snapshot(model: str | PathLike[str], *, weights: bool = True) -> str:
    """The canonical text of an `.onnx`, an artifact, or a snapshot: equal for graphs that compute the same in the same way.

    Reads the structure alone: weights are hashed in chunks where they lie (`weights=False`: told by type alone), nothing is run, no library
    is loaded. Raises ModelError or UnsafePathError.
    """
    return write(read_snapshot(model, weights=weights))


def diff(
    before: str | PathLike[str], after: str | PathLike[str], *, load: Load, policy: str | PathLike[str] | None = None, numeric: bool | None = None,
    update: bool = False, force: bool = False, seed: int = 0, progress: Callable[[str], None] | None = None,
) -> GraphDiff:
    """What changed from `before` to `after`, each an `.onnx`, an artifact or a snapshot; see docs/howto/diff.md.

    `numeric` None: only where the policy asks for a figure. `update` writes the new snapshot over `before`, which must be one, after the
    comparison. Raises ModelError, UnsafePathError, ArtifactError (a side can't be read), OptionError (a policy that is none, numbers of a
    snapshot), RefusedError (`update` would change too much at once).
    """
    say = progress or (lambda _: None)
    rules = Policy() if policy is None else Policy.read(policy)
    if update and not is_snapshot(before):
        raise OptionError(f"{before} is no snapshot to update", hint="octavo snapshot MODEL -o FILE writes one")
    say("reading both graphs")
    old, new = read_snapshot(before), read_snapshot(after)
    found = compare_snapshots(old, new, (str(before), str(after)))
    if numeric if numeric is not None else rules.numeric:
        from .numeric import Side, compare_numbers

        for path in (before, after):
            if is_snapshot(path):
                raise OptionError(f"{path} is a snapshot, which has no numbers", hint="compare the models themselves, or leave --numeric out")
        sides = Side.open(Path(before), old), Side.open(Path(after), new)
        found = replace(found, numbers=compare_numbers(*sides, load=load, seed=seed, progress=progress))
    found = replace(found, verdicts=judge(rules, found, new))
    if update:
        update_golden(Path(before), old, new, found, force=force)
    return found

"""Goldens: snapshots in a repository, written again on purpose and never in a mass by accident."""

from __future__ import annotations

from pathlib import Path

from ...errors import RefusedError
from .graph import Snapshot
from .model import GraphDiff
from .write import write

# Beyond this share of changed nodes an update has to be asked for twice.
MOST_CHANGED = 0.2


def update_golden(path: Path, before: Snapshot, after: Snapshot, diff: GraphDiff, *, force: bool) -> None:
    """Writes `after` over the snapshot at `path`. RefusedError where more than MOST_CHANGED of the nodes changed, and not `force`."""
    touched = len({node for edit in diff.edits if not edit.inside for node in edit.before}) + sum(
        len(edit.after) for edit in diff.edits if not edit.inside and edit.kind == "inserted")
    total = max(len(before.graph.nodes), len(after.graph.nodes), 1)
    if touched > MOST_CHANGED * total and not force:
        raise RefusedError(
            f"{touched} of {total} nodes changed: more than {MOST_CHANGED:.0%}, so {path} was left as it is", hint="look at the diff; --force writes it",
        )
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(write(after), encoding="utf-8")
    temporary.replace(path)

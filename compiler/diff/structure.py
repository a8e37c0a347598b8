"""Two snapshots compared as structure and content hashes: the stage that never runs anything."""

from __future__ import annotations

from .cost import cost_of
from .edits import graph_edits
from .graph import Snapshot
from .interface import interface_edits
from .model import Edit, GraphDiff


def compare_snapshots(before: Snapshot, after: Snapshot, names: tuple[str, str] = ("before", "after")) -> GraphDiff:
    """What changed from one snapshot to the other. Equal snapshots give no edit, others at least one."""
    edits: list[Edit] = []
    if before != after:
        # What most layers have in common first, the edges of the model last.
        edits = sorted([*graph_edits(before.graph, after.graph), *_functions(before, after)], key=lambda edit: -edit.count)
        edits += interface_edits(before, after)
        # Nothing that differs may look equal, whatever the edits can tell.
        edits = edits or [Edit("rewired", "the graphs differ in a way that no edit tells")]
    return GraphDiff(*names, tuple(edits), cost_of(before), cost_of(after))


def _functions(before: Snapshot, after: Snapshot) -> list[Edit]:
    old, new = dict(before.functions), dict(after.functions)
    edits = [Edit("removed", f"removed function {name}") for name in old if name not in new]
    edits += [Edit("inserted", f"added function {name}") for name in new if name not in old]
    for name, graph in old.items():
        if name in new and graph != new[name]:
            found = graph_edits(graph, new[name], inside=f"function {name}")
            ports = len(graph.inputs), len(graph.outputs)
            if ports != (len(new[name].inputs), len(new[name].outputs)):
                found.insert(0, Edit("interface", "takes or gives another number of values", inside=f"function {name}"))
            edits += found
    return edits

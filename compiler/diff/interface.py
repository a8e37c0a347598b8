"""What changed at the edges of a model: inputs, outputs, opsets, functions."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from .graph import Port, Snapshot
from .model import Edit

_SYMBOL = re.compile(r"s\d+")


def interface_edits(before: Snapshot, after: Snapshot) -> list[Edit]:
    """Edits of opsets, inputs and outputs. Symbols of sizes may have other numbers on the two sides, as long as equal stays equal."""
    return [*_opsets(before, after), *_ports(before, after)]


def _opsets(before: Snapshot, after: Snapshot) -> list[Edit]:
    old, new = dict(before.opsets), dict(after.opsets)
    return [
        Edit("opset", f"opset {domain} {old.get(domain, 'none')} → {new.get(domain, 'none')}")
        for domain in sorted(old.keys() | new.keys()) if old.get(domain) != new.get(domain)
    ]


def _ports(before: Snapshot, after: Snapshot) -> list[Edit]:
    edits: list[Edit] = []
    symbols: dict[str, str] = {}
    for word, old, new in (("input", before.graph.inputs, after.graph.inputs), ("output", before.graph.outputs, after.graph.outputs)):
        mine, theirs = {port.name: port for port in old}, {port.name: port for port in new}
        kept = [name for name in mine if name in theirs]
        edits += _grouped("removed", word, [mine[name] for name in mine if name not in theirs])
        edits += _grouped("added", word, [theirs[name] for name in theirs if name not in mine])
        changes: dict[str, list[str]] = {}
        for name in kept:
            p, q = mine[name].type, theirs[name].type
            if not _same_type(p, q, symbols):
                changes.setdefault(f"{word} {_template(name)}: {p or 'unknown'} → {q or 'unknown'}", []).append(name)
        edits += [Edit("interface", what, len(names), tuple(names)) for what, names in changes.items()]
        if kept != [name for name in theirs if name in mine]:
            edits.append(Edit("interface", f"{word}s stand in another order"))
    return edits


def _grouped(verb: str, word: str, ports: Sequence[Port]) -> Iterable[Edit]:
    """Ports that differ in a number alone are one line."""
    groups: dict[str, list[str]] = {}
    for port in ports:
        groups.setdefault(f"{verb} {word} {_template(port.name)} {port.type}".rstrip(), []).append(port.name)
    return [Edit("interface", what if len(names) > 1 else what.replace(_template(names[0]), names[0], 1), len(names), tuple(names))
            for what, names in groups.items()]


def _template(name: str) -> str:
    return re.sub(r"\d+", "{i}", name)


def _same_type(p: str, q: str, symbols: dict[str, str]) -> bool:
    """Equal but for the numbers of symbols, which must correspond to each other; `symbols` learns how."""
    if _SYMBOL.sub("s", p) != _SYMBOL.sub("s", q):
        return False
    pairs = list(zip(_SYMBOL.findall(p), _SYMBOL.findall(q)))
    if any(symbols.get(one, other) != other or symbols.get(f"={other}", one) != one for one, other in pairs):
        return False
    for one, other in pairs:
        symbols[one], symbols[f"={other}"] = other, one
    return True

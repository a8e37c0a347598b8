"""A snapshot as text: one line a node, one line a weight, repeated layers once with a table of what differs.

    octavo graph 1
    opset ai.onnx 23
    graph
      input input_ids int64[s0, s1]
      gather_0 = Gather(float32[320, 64]sha256:…, $input_ids)
      repeat 30 r0
        carry c0 = gather_0
        rmsnormalization_0 = RMSNormalization(c0, p0)
        …
        next c0 = add_1
        each p0 float32[64]
          sha256:…
      output logits float32[s0, s1, 320] = matmul_0

Terms: `name` or `name:1` is an output of a node, `$name` an input, `_` an input that is left out, `^0` what a subgraph captures, `/name` a node
outside of the repeat, `r0[3].name` one in iteration 3 of a repeat. Names count the nodes of an op, so that a node that is put in renames
few others.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence

from .folding import Carried, Local, Own, Repeat, Source, fold
from .graph import Given, Graph, Node, Outer, Port, Produced, Ref, Snapshot, Tensor

HEADER = "octavo graph 1"
_BARE = re.compile(r"[\w.:/\-]+", re.ASCII)


def write(snapshot: Snapshot) -> str:
    """The canonical text of a canonical snapshot. Equal snapshots give equal text, and `parse` reads it back."""
    lines = [HEADER, *(f"opset {quoted(domain)} {version}" for domain, version in snapshot.opsets)]
    lines += ["graph", *(f"  {line}" for line in _Writer(snapshot.graph).lines())]
    for name, graph in snapshot.functions:
        lines += [f"function {quoted(name)}", *(f"  {line}" for line in _Writer(graph).lines())]
    return "\n".join(lines) + "\n"


def quoted(name: str) -> str:
    """A name as it is, or as a JSON string where it has characters that mean something here."""
    return name if _BARE.fullmatch(name) else json.dumps(name)


def templated(names: Sequence[str]) -> str | None:
    """`past.{i}.key` for `past.0.key`, `past.1.key`, …; the name itself if all are one; None where no number tells them apart."""
    parts = [re.split(r"(\d+)", name) for name in names]
    if not all(_BARE.fullmatch(name) for name in names) or len({len(part) for part in parts}) != 1:
        return None
    found = []
    for column in zip(*parts):
        if len(set(column)) == 1:
            found.append(column[0])
        elif all(text == str(k) for k, text in enumerate(column)):
            found.append("{i}")
        else:
            return None
    return "".join(found)


def names_of(graph: Graph) -> list[str]:
    """What each node is called in the text: `add_3`, or `r0[3].add_1` in a repeat."""
    return _Writer(graph).names


class _Writer:
    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.items = fold(graph)
        self.names = [""] * len(graph.nodes)
        self.place: dict[int, tuple[int, int]] = {}    # node → (repeat, iteration)
        self._body: list[list[str]] = []               # names of the body nodes of each repeat
        count: Counter[str] = Counter()
        for item in self.items:
            if isinstance(item, int):
                self.names[item] = _name(graph.nodes[item], count)
                continue
            inner: Counter[str] = Counter()
            body = [_name(graph.nodes[node], inner) for node in item.rows[0]]
            for k, row in enumerate(item.rows):
                for name, node in zip(body, row):
                    self.names[node], self.place[node] = f"r{len(self._body)}[{k}].{name}", (len(self._body), k)
            self._body.append(body)

    def lines(self) -> Iterator[str]:
        yield from self._inputs()
        repeats = 0
        for item in self.items:
            if isinstance(item, int):
                node = self.graph.nodes[item]
                yield from _node_lines(node, self.names[item], [self.term(ref) for ref in node.inputs])
            else:
                yield from self._repeat(item, self._body[repeats], repeats)
                repeats += 1
        yield from self._outputs()

    def term(self, ref: Ref) -> str:
        """How a reference is spelled outside of repeats."""
        if ref is None:
            return "_"
        if isinstance(ref, Tensor):
            return ref.type + ref.content
        if isinstance(ref, Given):
            return "$" + quoted(self.graph.inputs[ref.port].name)
        if isinstance(ref, Outer):
            return f"^{ref.index}"
        return self.names[ref.node] + (f":{ref.output}" if ref.output else "")

    def _repeat(self, repeat: Repeat, body: list[str], index: int) -> Iterator[str]:
        carried: dict[Carried, str] = {}
        own: dict[Own, str] = {}

        def term(source: Source) -> str:
            if isinstance(source, Local):
                return body[source.offset] + (f":{source.output}" if source.output else "")
            if isinstance(source, Carried):
                return carried.setdefault(source, f"c{len(carried)}")
            if isinstance(source, Own):
                return own.setdefault(source, f"p{len(own)}")
            return ("/" if isinstance(source, Produced) else "") + self.term(source)

        lines: list[str] = []
        for node, name, sources in zip(repeat.rows[0], body, repeat.sources):
            lines += _node_lines(self.graph.nodes[node], name, [term(source) for source in sources])
        yield f"repeat {len(repeat.rows)} r{index}"
        yield from (f"  carry {name} = {self.term(source.first)}" for source, name in carried.items())
        yield from (f"  {line}" for line in lines)
        yield from (f"  next {name} = {term(Local(source.offset, source.output))}" for source, name in carried.items())
        for source, name in own.items():
            yield from (f"  {line}" for line in self._each(name, source.refs))

    def _each(self, name: str, refs: tuple[Ref, ...]) -> Iterator[str]:
        first = refs[0]
        if isinstance(first, Tensor):
            yield f"each {name} {first.type}"
            yield from (f"  {ref.content}" for ref in refs if isinstance(ref, Tensor))
            return
        template = templated([self.graph.inputs[ref.port].name for ref in refs if isinstance(ref, Given)])
        if template is not None:
            yield f"each {name} ${template}"
            return
        yield f"each {name}"
        yield from (f"  {self.term(ref)}" for ref in refs)

    def _inputs(self) -> Iterator[str]:
        yield from _folded([("input", port, "") for port in self.graph.inputs])

    def _outputs(self) -> Iterator[str]:
        rows = []
        for port, ref in zip(self.graph.outputs, self.graph.results):
            rows.append(("output", port, f" = {self.term(ref)}"))
        yield from _folded(rows)


def _name(node: Node, count: Counter[str]) -> str:
    stem = "".join(c for c in node.op.rpartition("::")[2].lower() if c.isascii() and c.isalnum()) or "node"
    count[stem] += 1
    return f"{stem}_{count[stem] - 1}"


def _node_lines(node: Node, name: str, terms: list[str]) -> Iterator[str]:
    plain = len(terms) - node.captures
    inputs = ", ".join(terms[:plain]) + (" | " + ", ".join(terms[plain:]) if node.captures else "")
    outputs = f"/{node.outputs}" if node.outputs != 1 else ""
    attributes = "".join(f" {quoted(key)}={value}" for key, value in node.attributes)
    yield f"{name}{outputs} = {quoted(node.op)}({inputs}){attributes}"
    for attribute, graph in node.subgraphs:
        yield f"  graph {quoted(attribute)}"
        yield from (f"    {line}" for line in _Writer(graph).lines())


def _folded(rows: list[tuple[str, Port, str]]) -> Iterator[str]:
    """Lines of ports; a group of up to eight of them that repeats with a running number is told once."""

    def line(word: str, name: str, port: Port, end: str) -> str:
        return f"{word} {name}{f' {port.type}' if port.type else ''}{end}"

    at = 0
    while at < len(rows):
        for width in range(1, 9):
            count, block = _run(rows, at, width)
            if count > 1:
                yield f"repeat {count}"
                yield from (f"  {line(rows[at][0], name, port, end)}" for name, port, end in block)
                at += count * width
                break
        else:
            word, port, end = rows[at]
            yield line(word, quoted(port.name), port, end)
            at += 1


def _run(rows: list[tuple[str, Port, str]], at: int, width: int) -> tuple[int, list[tuple[str, Port, str]]]:
    """How often the `width` rows from `at` on repeat, and their templates."""
    count = 1
    block: list[tuple[str, Port, str]] = []
    while at + (count + 1) * width <= len(rows):
        found = []
        for j in range(width):
            column = rows[at + j : at + (count + 1) * width : width]
            name, end = templated([port.name for _, port, _ in column]), _ends([end for *_, end in column])
            if name is None or "{i}" not in name or end is None or len({port.type for _, port, _ in column}) != 1:
                return count, block
            found.append((name, column[0][1], end))
        count, block = count + 1, found
    return count, block


def _ends(ends: list[str]) -> str | None:
    """` = r0[i].name` for iterations in order; what all share; else None."""
    if len(set(ends)) == 1:
        return ends[0] if not re.match(r" = r\d+\[", ends[0]) else None
    parts = [re.fullmatch(r"( = r\d+\[)(\d+)(\]\..*)", end) for end in ends]
    if not all(part and int(part[2]) == k for k, part in enumerate(parts)):
        return None
    found = {(part[1], part[3]) for part in parts if part}
    return "{}i{}".format(*found.pop()) if len(found) == 1 else None

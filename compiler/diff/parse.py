"""Reads a snapshot's text back, strictly: what `write` would not have written is a ModelError that names the line."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from ...errors import ModelError
from .canonical import canonical
from .graph import BITS, Given, Graph, Node, Outer, Port, Produced, Ref, Snapshot, Tensor
from .hashing import DIGITS
from .write import HEADER

# A hostile text could ask for any number of nodes by a few digits.
_MOST_NODES, _DEEPEST = 100_000, 32

_NAME = r'(?:"(?:[^"\\]|\\.)*"|[\w.:/\-]+)'
_TENSOR = re.compile(rf"(\w+)\[((?:\d{{1,15}}(?:, \d{{1,15}})*)?)\](\{{.*\}}|sha256:[0-9a-f]{{{DIGITS}}}|unread)")
_IN_REPEAT = re.compile(r"(r\d+)\[(\d+|i)\]\.(\w+)(?::(\d+))?")
_LOCAL = re.compile(r"(/?)(\w+)(?::(\d+))?")
_PAIRS = {"(": ")", "[": "]", "{": "}"}


def parse(text: str) -> Snapshot:
    """The snapshot that `text` spells, in canonical form. ModelError where it is none, or one of another version."""
    lines = _tree(text)
    if not lines or lines[0].text != HEADER:
        raise ModelError(f"this is no snapshot: it does not begin with {HEADER!r}", hint="octavo snapshot MODEL -o FILE writes one")
    graph, functions, opsets = None, {}, {}
    for line in lines[1:]:
        if match := re.fullmatch(rf"opset ({_NAME}) (\d{{1,9}})", line.text):
            opsets[_unquote(match[1], line)] = int(match[2])
        elif line.text == "graph" and graph is None:
            graph = _GraphParser().graph(line.children)
        elif match := re.fullmatch(rf"function ({_NAME})", line.text):
            functions[_unquote(match[1], line)] = _GraphParser().graph(line.children)
        else:
            raise line.error("is not understood")
    if graph is None:
        raise ModelError("the snapshot has no graph", hint="octavo snapshot MODEL -o FILE writes one")
    return canonical(Snapshot(graph, tuple(functions.items()), tuple(opsets.items())))


@dataclass
class _Line:
    number: int
    text: str
    children: list[_Line] = field(default_factory=list)

    def error(self, what: str) -> ModelError:
        return ModelError(f"line {self.number} of the snapshot {what}: {self.text[:120]}", hint="octavo snapshot MODEL -o FILE writes it again")


def _tree(text: str) -> list[_Line]:
    """Lines by indentation, two spaces a level. Empty lines and lines that begin with # say nothing."""
    root = _Line(0, "")
    stack = [root]
    for number, raw in enumerate(text.split("\n"), 1):
        content = raw.lstrip(" ")
        if not content.strip() or content.startswith("#"):
            continue
        depth, rest = divmod(len(raw) - len(content), 2)
        line = _Line(number, content.rstrip())
        if rest or depth >= len(stack) or depth > 3 * _DEEPEST:
            raise line.error("is not indented as the lines before it")
        del stack[depth + 1 :]
        stack[-1].children.append(line)
        stack.append(line)
    return root.children


@dataclass
class _Scope:
    """Names at one place: nodes so far, what is carried or own, and in a body the names outside."""

    nodes: dict[str, int] = field(default_factory=dict)
    terms: dict[str, Ref] = field(default_factory=dict)
    outside: _Scope | None = None


class _GraphParser:
    def __init__(self, depth: int = 0) -> None:
        self.inputs: list[Port] = []
        self.outputs: list[Port] = []
        self.results: list[Ref] = []
        self.nodes: list[Node] = []
        self.ports: dict[str, int] = {}
        self.repeats: dict[str, list[_Scope]] = {}
        self.depth = depth

    def graph(self, lines: list[_Line]) -> Graph:
        if self.depth > _DEEPEST:
            raise ModelError("the snapshot's graphs are nested too deeply", hint="octavo snapshot MODEL -o FILE writes it again")
        scope = _Scope()
        for line in lines:
            match = re.fullmatch(r"repeat (\d{1,7})(?: (r\d+))?", line.text)
            if match and int(match[1]) * max(1, len(line.children)) > _MOST_NODES:
                raise line.error("asks for more nodes than any graph has")
            if match and not match[2]:
                for i in range(int(match[1])):
                    for child in line.children:
                        self._port(child, scope, i)
            elif match:
                self._repeat(line, int(match[1]), match[2], scope)
            elif line.text.startswith(("input ", "output ")):
                self._port(line, scope, None)
            else:
                self._node(line, scope)
        return Graph(tuple(self.inputs), tuple(self.outputs), tuple(self.results), tuple(self.nodes))

    def _port(self, line: _Line, scope: _Scope, i: int | None) -> None:
        match = re.fullmatch(rf"(input|output) ({_NAME}|[\w.:/\-{{}}]+)( [^=]*?)?(?: = (.*))?", line.text)
        if not match or (match[1] == "output") != (match[4] is not None):
            raise line.error("is no input or output")
        name = match[2].replace("{i}", str(i)) if i is not None and match[2][0] != '"' else _unquote(match[2], line)
        port = Port(name, (match[3] or "").strip())
        if match[1] == "input":
            if name in self.ports:
                raise line.error("is an input that is there twice")
            self.ports[name] = len(self.inputs)
            self.inputs.append(port)
        else:
            self.outputs.append(port)
            self.results.append(self._term(match[4], scope, line, i))

    def _repeat(self, line: _Line, count: int, name: str, outside: _Scope) -> None:
        if name in self.repeats:
            raise line.error("repeats a name")
        rows = self.repeats[name] = []
        words: dict[str, list[_Line]] = {"carry": [], "next": [], "each": [], "": []}
        for child in line.children:
            word = child.text.partition(" ")[0]
            words[word if word in words else ""].append(child)
        carries = [self._assignment(child, "carry") for child in words["carry"]]
        nexts = dict(self._assignment(child, "next") for child in words["next"])
        own = {}
        for child in words["each"]:
            own.update(self._each(child, count, outside))
        for k in range(count):
            scope = _Scope(outside=outside, terms={key: refs[k] for key, refs in own.items()})
            for key, first in carries:
                if key not in nexts:
                    raise line.error(f"carries {key} and has no next for it")
                scope.terms[key] = self._term(nexts[key], rows[-1], line) if rows else self._term(first, outside, line)
            for child in words[""]:
                self._node(child, scope)
            rows.append(scope)

    def _assignment(self, line: _Line, word: str) -> tuple[str, str]:
        match = re.fullmatch(rf"{word} (c\d+) = (.*)", line.text)
        if not match:
            raise line.error("is not understood")
        return match[1], match[2]

    def _each(self, line: _Line, count: int, scope: _Scope) -> dict[str, list[Ref]]:
        match = re.fullmatch(r"each (p\d+)(?: (.*))?", line.text)
        if not match:
            raise line.error("is not understood")
        head = match[2] or ""
        if head.startswith("$"):
            return {match[1]: [self._term(head.replace("{i}", str(k)), scope, line) for k in range(count)]}
        if len(line.children) != count:
            raise line.error(f"needs {count} lines below it")
        return {match[1]: [self._term(head + child.text, scope, child) for child in line.children]}

    def _node(self, line: _Line, scope: _Scope) -> None:
        match = re.match(rf"(\w+)(?:/(\d{{1,5}}))? = ({_NAME})\(", line.text)
        if not match or match[1] in scope.nodes or len(self.nodes) >= _MOST_NODES:
            raise line.error("is no node, or gives a name twice")
        end = _closing(line, match.end() - 1)
        plain, *captured = _split(line.text[match.end() : end], " | ")
        inputs = [self._term(text, scope, line) for text in _split(plain, ", ")]
        captures = [self._term(text, scope, line) for text in _split(captured[0], ", ")] if captured else []
        attributes = []
        for text in _split(line.text[end + 1 :].strip(), " "):
            pair = re.fullmatch(rf"({_NAME})=(.+)", text)
            if not pair:
                raise line.error("has an attribute that is not understood")
            attributes.append((_unquote(pair[1], line), pair[2]))
        subgraphs = []
        for child in line.children:
            head = re.fullmatch(rf"graph ({_NAME})", child.text)
            if not head:
                raise child.error("is not understood")
            subgraphs.append((_unquote(head[1], child), _GraphParser(self.depth + 1).graph(child.children)))
        if any(index >= len(captures) for _, graph in subgraphs for index in _outer(graph)):
            raise line.error("has subgraphs that capture more than it gives them")
        scope.nodes[match[1]] = len(self.nodes)
        outputs = int(match[2]) if match[2] else 1
        self.nodes.append(
            Node(_unquote(match[3], line), (*inputs, *captures), tuple(attributes), tuple(subgraphs), outputs, len(captures))
        )

    def _term(self, text: str, scope: _Scope, line: _Line, i: int | None = None) -> Ref:
        if text == "_":
            return None
        if match := re.fullmatch(r"\^(\d{1,6})", text):
            if not self.depth:
                raise line.error("captures something, and nothing is around it")
            return Outer(int(match[1]))
        if text.startswith("$"):
            name = _unquote(text[1:], line)
            if name not in self.ports:
                raise line.error(f"reads the input {name!r}, which is not there")
            return Given(self.ports[name])
        if (match := _TENSOR.fullmatch(text)) and (match[1] in BITS or match[1] == "string"):
            return Tensor(match[1], tuple(int(size) for size in match[2].split(", ") if size), match[3])
        if match := _IN_REPEAT.fullmatch(text):
            rows, k = self.repeats.get(match[1], []), i if match[2] == "i" else int(match[2])
            node = rows[k].nodes.get(match[3]) if k is not None and k < len(rows) else None
            return self._produced(node, match[4], line, text)
        if text in scope.terms:
            return scope.terms[text]
        match = _LOCAL.fullmatch(text)
        if not match:
            raise line.error(f"reads {text!r}, which is not understood")
        place = scope.outside if match[1] else scope
        return self._produced(place.nodes.get(match[2]) if place else None, match[3], line, text)

    def _produced(self, node: int | None, output: str | None, line: _Line, text: str) -> Produced:
        index = int(output) if output else 0
        if node is None or index >= self.nodes[node].outputs:
            raise line.error(f"reads {text!r}, which is not there")
        return Produced(node, index)


def _outer(graph: Graph) -> Iterator[int]:
    for node in graph.nodes:
        yield from (ref.index for ref in node.inputs if isinstance(ref, Outer))
    yield from (ref.index for ref in graph.results if isinstance(ref, Outer))


def _unquote(name: str, line: _Line) -> str:
    if not name.startswith('"'):
        return name
    try:
        return str(json.loads(name))
    except ValueError as error:
        raise line.error("has text that is not quoted as JSON") from error


def _walk(text: str, start: int = 0) -> Iterator[tuple[int, str, int]]:
    """(place, character, depth of brackets before it) outside of quoted text."""
    stack: list[str] = []
    at = start
    while at < len(text):
        c = text[at]
        if c == '"':
            match = re.compile(r'"(?:[^"\\]|\\.)*"').match(text, at)
            at = match.end() if match else len(text)
            continue
        yield at, c, len(stack)
        if c in _PAIRS:
            stack.append(_PAIRS[c])
        elif stack and c == stack[-1]:
            stack.pop()
        at += 1


def _closing(line: _Line, opening: int) -> int:
    """Where the bracket at `opening` closes."""
    for at, c, depth in _walk(line.text, opening):
        if depth == 1 and c == ")":
            return at
    raise line.error("has a bracket that does not close")


def _split(text: str, separator: str) -> list[str]:
    """Pieces between separators that stand outside of brackets and quotes; none of empty text."""
    pieces, begin = [], 0
    for at, c, depth in _walk(text):
        if depth == 0 and c == separator[0] and text.startswith(separator, at) and at >= begin:
            pieces.append(text[begin:at])
            begin = at + len(separator)
    return [*pieces, text[begin:]] if text else []

"""The prefix index: which blocks hold the keys and values of which tokens after which others. Integers only.

A tree: each node is one full block's tokens after its parent's, so a path from a root spells a prefix, and a hit is confirmed by equality of
tokens and never by a hash alone. Roots are scopes (a salt): sequences of one scope never find another's blocks. A node knows one block for
each KV group that still holds it, and leaves the tree when it has neither blocks nor children.

The idea of keeping finished blocks addressable by what they hold: vLLM's automatic prefix caching; as a tree: SGLang's RadixAttention
(Zheng et al., 2023).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .blocks import BlockPool


class Node:
    """One block's tokens after `parent`'s; a root has no parent and its scope for a key."""

    __slots__ = ("blocks", "children", "key", "parent")

    def __init__(self, parent: Node | None, key: tuple[int, ...] | str | None, num_groups: int) -> None:
        self.parent = parent
        self.key = key
        self.children: dict[tuple[int, ...], Node] = {}
        self.blocks: list[int | None] = [None] * num_groups


@dataclass(frozen=True)
class Hit:
    """The first `length` tokens of a sequence are cached. `tables[group]` are their blocks (−1 where no later token sees them), the last
    perhaps of other tokens from `length` on; `chain` has the root and the nodes of the full blocks.
    """

    length: int
    tables: list[list[int]]
    chain: list[Node]


class PrefixIndex:
    """Over one pool per KV group. `windows[group]` is how many positions a token sees, itself included (None: all)."""

    def __init__(self, pools: Sequence[BlockPool], windows: Sequence[int | None], block_size: int) -> None:
        self._pools, self._windows, self._block_size = pools, windows, block_size
        self._roots: dict[str | None, Node] = {}
        self._nodes: list[dict[int, Node]] = [{} for _ in pools]    # by group: the node of each kept block

    def root(self, scope: str | None) -> Node:
        """Where prefixes of `scope` begin. One under which nothing is cached stays in no table: scopes come and go, one for each user perhaps."""
        return self._roots.get(scope) or Node(None, scope, len(self._pools))

    def grow(self, chain: list[Node], tokens: Sequence[int], tables: Sequence[Sequence[int]], length: int) -> None:
        """Enters the blocks that positions [0, length) have filled since the last call, and moves `chain` on."""
        size = self._block_size
        for index in range(len(chain) - 1, length // size):
            key = tuple(tokens[index * size : (index + 1) * size])
            parent = self._attached(chain[-1])
            node = parent.children.setdefault(key, Node(parent, key, len(self._pools)))
            chain.append(node)
            for group, table in enumerate(tables):
                # Else a block of the same tokens is there already, or ours lies behind the window of a restored sequence.
                if node.blocks[group] is None and table[index] >= 0:
                    node.blocks[group] = table[index]
                    self._pools[group].keep(table[index])
                    self._nodes[group][table[index]] = node

    def find(self, root: Node, tokens: Sequence[int], limit: int) -> Hit:
        """The longest cached prefix of `tokens` of at most `limit` tokens. Changes nothing."""
        size, chain = self._block_size, [root]
        gone = [[-1] for _ in self._pools]      # by group, of the first 0, 1, … nodes: the place of the last that has no block
        for start in range(0, limit - size + 1, size):
            child = chain[-1].children.get(tuple(tokens[start : start + size]))
            if child is None:
                break
            chain.append(child)
            for places, block in zip(gone, child.blocks):
                places.append(len(places) - 1 if block is None else places[-1])
        for full in range(len(chain) - 1, -1, -1):
            if any(places[full] >= first_seen(window, (full + 1) * size - 1, size) for places, window in zip(gone, self._windows)):
                continue    # however much of the next block agrees: without this, a long prefix whose window is gone takes its length squared
            path = chain[: full + 1]
            length, last = self._into(path[-1], tokens[full * size : limit])
            for extra in ([last] if last is not None else []) + [None]:
                nodes = path[1:] if extra is None else [*path[1:], extra]
                hit = full * size + (length if extra is not None else 0)
                tables = self._tables(nodes, hit)
                if tables is not None:
                    return Hit(hit, tables, path)
        raise AssertionError("the empty prefix is always cached")

    def evicted(self, group: int, block: int) -> None:
        """A kept block's contents are gone."""
        node = self._nodes[group].pop(block)
        node.blocks[group] = None
        while node.parent is not None and not node.children and all(held is None for held in node.blocks):
            parent = node.parent
            # A node that was left by all, and came again through another sequence, is another object by now.
            if parent.children.get(node.key) is node:  # type: ignore[arg-type]
                del parent.children[node.key]  # type: ignore[arg-type]
            node = parent
        if node.parent is None and not node.children and self._roots.get(node.key) is node:  # type: ignore[arg-type]
            del self._roots[node.key]  # type: ignore[arg-type]

    def kept(self, group: int) -> Iterable[int]:
        return self._nodes[group].keys()

    def check(self) -> None:
        """Every kept block's node knows it and can be reached from its root."""
        for group, nodes in enumerate(self._nodes):
            for block, node in nodes.items():
                assert node.blocks[group] == block, "a node has lost its block"
                while node.parent is not None:
                    assert node.parent.children.get(node.key) is node, "a node can't be reached"  # type: ignore[arg-type]
                    node = node.parent
                assert self._roots.get(node.key) is node, "a root is lost"  # type: ignore[arg-type]

    def _attached(self, node: Node) -> Node:
        """`node` or what stands in its place: a sequence may hold nodes that have left the tree since.

        Who leaves has no children, so a node that its parent knows is in the tree, however long the way to the root is.
        """
        left: list[Node] = []
        while node.parent is not None and node.parent.children.get(node.key) is not node:  # type: ignore[arg-type]
            left.append(node)
            node = node.parent
        if node.parent is None:
            node = self._roots.setdefault(node.key, node)  # type: ignore[arg-type]
        for child in reversed(left):
            child.parent = node
            node = node.children.setdefault(child.key, child)  # type: ignore[arg-type]
        return node

    def _into(self, node: Node, tokens: Sequence[int]) -> tuple[int, Node | None]:
        """The child whose first tokens agree longest with `tokens`, and how many they are."""
        best, found = 0, None
        for key, child in node.children.items():
            agree = next((i for i, (a, b) in enumerate(zip(key, tokens)) if a != b), min(len(key), len(tokens)))
            if agree > best:
                best, found = agree, child
        return best, found

    def _tables(self, nodes: Sequence[Node], length: int) -> list[list[int]] | None:
        """Block tables of a prefix, None where a block is missing that the next token would see."""
        tables = []
        for group, window in enumerate(self._windows):
            first = first_seen(window, length, self._block_size)
            seen = [node.blocks[group] for node in nodes[first:]]
            if any(block is None for block in seen):
                return None
            tables.append([-1] * min(first, len(nodes)) + [block for block in seen if block is not None])
        return tables


def first_seen(window: int | None, length: int, block_size: int) -> int:
    """The first block that the token at position `length` sees."""
    return 0 if window is None else max(0, length - window + 1) // block_size

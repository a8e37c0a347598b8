"""The graph as the exporter wrote it, on calibration text: what the inputs of its linears look like, and what other weights do to its logits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ...models.interface import GraphInterface
from ..extract import ConeRunner, PreparedCone, cone, ort_value, prepare
from .match import find_linears
from .pieces import Pieces

Array = NDArray[np.float32]


class Rehearsal:
    """A decoder that was normalized and dequantized, prepared before any target changes it. It isn't changed here either.

    Each sequence of token ids runs by itself with an empty cache, in pieces that don't see each other.
    Raises RequestError where there are no tokens.
    """

    def __init__(self, model: ir.Model, interface: GraphInterface, sequences: Sequence[Sequence[int]]) -> None:
        self._text = Pieces(interface, sequences)
        self._pieces = self._text.tokens
        found = find_linears(model, self._text.ids)
        self._sites = found.sites
        self._weights = {str(site.weight.name) for site in self._sites if not site.packed} | {str(table.weight.name) for table in found.embeddings}
        self._inputs = list(dict.fromkeys(site.input for site in self._sites))
        logits = interface.output("logits")
        assert logits is not None, "a decoder has logits"
        last = next(value for value in model.graph.outputs if value.name == logits.name)
        self._prepared = {name: _prepared(model, outputs) for name, outputs in (("inputs", self._inputs), ("logits", [last]))}

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self._pieces))

    def maxima(self) -> dict[str, Array]:
        """The largest magnitude [K] of each linear's inputs over all tokens, by the name of its weight. NaN where one was none.

        Linears of one weight have one array, of both inputs.
        """
        found: dict[ir.Value, Array] = {}
        for value, rows in self._rows():
            most = np.abs(rows).max(axis=0)
            found[value] = np.maximum(found[value], most) if value in found else most
        maxima: dict[str, Array] = {}
        for site in self._sites:
            name, most = str(site.weight.name), found[site.input]
            maxima[name] = np.maximum(maxima[name], most) if name in maxima else most
        return maxima

    def _rows(self) -> Iterator[tuple[ir.Value, Array]]:
        """Inputs of linears and their rows [tokens, K], piece by piece of the text."""
        runner = self._prepared["inputs"].open(threads=0)
        for tokens in self._pieces:
            for value, rows in zip(self._inputs, runner.run(self._feeds("inputs", tokens))):
                yield value, rows.reshape(-1, rows.shape[-1])

    def knows(self, name: str) -> bool:
        """Whether a linear or an embedding on the way to the logits has a weight of this name."""
        return name in self._weights and name in self._prepared["logits"].constants

    def divergence(self, weights: Mapping[str, Array]) -> float:
        """Mean KL(p ‖ q), nats, over the rows of the first piece: p with the graph's own weights, q with `weights` in place of those of their names.

        Shapes are those of the initializers.
        """
        feeds = {name: ort_value(weight) for name, weight in weights.items()}
        p, q = self._log_probabilities, _log_softmax(self._logits.run({**self._feeds("logits", self._pieces[0]), **feeds})[0])
        return float(np.einsum("rv,rv->r", np.exp(p), p - q).mean(dtype=np.float64))

    @cached_property
    def _logits(self) -> ConeRunner:
        return self._prepared["logits"].open(threads=0, fed=self._weights)

    @cached_property
    def _log_probabilities(self) -> Array:
        return _log_softmax(self._logits.run(self._feeds("logits", self._pieces[0]))[0])

    def _feeds(self, which: str, tokens: Sequence[int]) -> dict[str, NDArray[np.generic]]:
        return self._text.feeds(self._prepared[which].leaves, tokens)


def _prepared(model: ir.Model, outputs: Sequence[ir.Value]) -> PreparedCone:
    whole = cone(outputs)
    return prepare(model, whole, {leaf: (leaf.dtype or ir.DataType.FLOAT, None) for leaf in whole.leaves if leaf.is_graph_input()})


def _log_softmax(logits: Array) -> Array:
    """Of each row; float32 [rows, V]."""
    rows = logits.reshape(-1, logits.shape[-1])
    rows = rows - rows.max(axis=1, keepdims=True)
    return rows - np.log(np.exp(rows).sum(axis=1, keepdims=True))

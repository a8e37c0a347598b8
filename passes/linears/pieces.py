"""Calibration text in pieces, and what a graph is fed for one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ...errors import RequestError
from ...models.interface import GraphInterface
from ..probe import Probe, feed_of

# Tokens that a run sees at once.
PIECE = 512


class Pieces:
    """Sequences of token ids, each run by itself with an empty cache, in pieces of 512 that don't see each other. RequestError where there are none."""

    def __init__(self, interface: GraphInterface, sequences: Sequence[Sequence[int]]) -> None:
        self.tokens = [list(tokens[at : at + PIECE]) for tokens in sequences for at in range(0, len(tokens), PIECE)]
        if not self.tokens:
            raise RequestError("the calibration text has no tokens", hint="a few thousand tokens of plain text serve")
        self._ids = interface.input("input_ids")
        self._ports = {port.name: port for port in interface.inputs}
        assert self._ids is not None, "a decoder has token ids"

    @property
    def ids(self) -> str:
        """The graph input of the token ids."""
        assert self._ids is not None
        return self._ids.name

    def feeds(self, inputs: Sequence[ir.Value], tokens: Sequence[int]) -> dict[str, NDArray[np.generic]]:
        """Those of `inputs` that are the graph's own, for one piece."""
        probe = Probe(1, len(tokens), 0)
        given = {name: feed_of(self._ports[name], value, probe) for value in inputs if (name := str(value.name)) in self._ports}
        if self.ids in given:
            given[self.ids] = np.array([tokens], given[self.ids].dtype)
        return given

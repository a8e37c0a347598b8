"""What the inputs of linears look like on calibration text: XᵀX of each, gathered while the graph runs as the exporter wrote it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ...errors import RequestError
from ...models.interface import GraphInterface
from ..extract import cone, prepare
from ..probe import Probe, feed_of
from .match import find_linears

# Rows that a run keeps at once: the inputs of all linears are its outputs.
_TOKENS = 512


def calibrate(model: ir.Model, interface: GraphInterface, sequences: Sequence[Sequence[int]]) -> dict[str, NDArray[np.float32]]:
    """XᵀX [K, K] of each linear's inputs over `sequences` of token ids, by the name of its weight (linears of one input share an array).

    `model` is a decoder that was normalized and dequantized, before any target has changed it; it isn't changed here either. Each sequence runs
    by itself with an empty cache, in pieces of 512 tokens that don't see each other. Memory: 4·K² bytes for each distinct input.
    Raises RequestError where there are no tokens.
    """
    pieces = [list(tokens[at : at + _TOKENS]) for tokens in sequences for at in range(0, len(tokens), _TOKENS)]
    if not pieces:
        raise RequestError("the calibration text has no tokens", hint="a few thousand tokens of plain text serve")
    ids = interface.input("input_ids")
    assert ids is not None, "a decoder has token ids"
    sites = [site for site in find_linears(model, ids.name).sites if not site.packed]
    inputs = list(dict.fromkeys(site.input for site in sites))
    whole = cone(inputs)
    ports = {port.name: port for port in interface.inputs}
    given = [leaf for leaf in whole.leaves if leaf.is_graph_input()]
    prepared = prepare(model, whole, {leaf: (leaf.dtype or ir.DataType.FLOAT, None) for leaf in given})
    runner = prepared.open()
    sums = [np.zeros((site.K, site.K), np.float32) for site in (next(site for site in sites if site.input is value) for value in inputs)]
    for tokens in pieces:
        probe = Probe(1, len(tokens), 0)
        feeds = {str(leaf.name): feed_of(ports[str(leaf.name)], leaf, probe) for leaf in given}
        if ids.name in feeds:
            feeds[ids.name] = np.array([tokens], feeds[ids.name].dtype)
        for total, rows in zip(sums, runner.run(feeds)):
            flat = rows.reshape(-1, total.shape[0])
            total += flat.T @ flat
    by_input = dict(zip(inputs, sums))
    return {str(site.weight.name): by_input[site.input] for site in sites}

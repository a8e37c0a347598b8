"""What an attention makes of its values: the linear behind them has to get averages of its inputs right, and not the inputs themselves.

The rows of A_h, the probabilities of head h, say which tokens count. In most heads of a trained model that is the first token, of which one in
hundreds is seen: an XᵀX that counts all tokens alike lets GPTQ put its errors just there (SmolLM2's values alone in int4: mean KL 0.154, plain
rounding 0.096, with the averages 0.019). So the sum is that of the averaged inputs, Σ(A_h X)ᵀ(A_h X) over heads and sequences. (Kim, Kim, Cho, Kim
and Jeon, "BoA: Attention-aware Post-training Quantization without Backpropagation", 2024, arXiv 2406.13474, derives such a term.)

A_h is read from the graph, whatever its spelling: an attention is linear in its values, so its columns are the outputs for unit vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ..attention.site import AttentionSite
from ..extract import Cone, cone
from .site import LinearSite
from .weights import constant_of

Array = NDArray[np.float32]
Run = Callable[[Mapping[str, NDArray[np.generic]]], list[NDArray[np.generic]]]
# How far outputs may lie from what the probabilities and the values give, and values from the linear's outputs, as a share of the largest.
_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Averaged:
    """An attention whose values `linear` makes. `operands` computes value, query, key and output of `site` from what is known by then, and
    `output` the last again from the first three, which are called `names`."""

    site: AttentionSite
    linear: LinearSite
    operands: Cone
    output: Cone
    names: tuple[str, ...]

    def rows(self, inputs: Array, weight: Array, operands: Sequence[Array]) -> NDArray[np.intp] | None:
        """Which outputs of the linear are the values, by the numbers of one piece [S, K]; None where they are no such outputs."""
        values = self._tokens(operands[0], self.site.value_layout, self.site.kv_heads)
        outputs = inputs @ weight.T + (0 if self.linear.bias is None else constant_of(self.linear.bias))
        mixed = np.random.default_rng(0).standard_normal(len(values))
        near = np.abs((mixed @ values)[:, None] - mixed @ outputs).argmin(axis=1)
        same = _close(outputs[:, near], values) and len(set(near.tolist())) == values.shape[1]
        return near if same else None

    def probabilities(self, operands: Sequence[Array], output: Callable[[Array], Array]) -> Array | None:
        """A [H, S, S]; None where the output is no average of values by it. `output` computes it from values in the layout of the operand."""
        site, value = self.site, operands[0]
        size, heads = site.value_size, site.num_heads
        given = self._tokens(value, site.value_layout, site.kv_heads)
        tokens = len(given)
        found = np.zeros((heads, tokens, -(-tokens // size) * size), np.float32)
        for start in range(0, tokens, size):
            units = np.zeros((tokens, size), np.float32)
            units[start : start + size] = np.eye(min(size, tokens - start), size, dtype=np.float32)
            columns = self._tokens(output(self._as_operand(units, value.shape)), site.output_layout, heads)
            found[:, :, start : start + size] = columns.reshape(tokens, heads, size).transpose(1, 0, 2)
        found = found[:, :, :tokens]
        each = np.repeat(given.reshape(tokens, site.kv_heads, size).transpose(1, 0, 2), heads // site.kv_heads, axis=0)
        expected = (found @ each).transpose(1, 0, 2).reshape(tokens, -1)
        return found if _close(expected, self._tokens(operands[3], site.output_layout, heads)) else None

    def _as_operand(self, rows: Array, shape: tuple[int, ...]) -> Array:
        """[S, E], for every head the same, in the layout of the site's value."""
        heads = self.site.kv_heads
        every = np.broadcast_to(rows, (heads, *rows.shape))
        return np.ascontiguousarray(every if self.site.value_layout == "BHSD" else every.transpose(1, 0, 2)).reshape(shape)

    @staticmethod
    def _tokens(rows: Array, layout: str, heads: int) -> Array:
        """An operand as [S, heads·E]."""
        if layout == "BHSD":
            return rows.reshape(heads, -1, rows.shape[-1]).transpose(1, 0, 2).reshape(-1, heads * rows.shape[-1])
        return rows.reshape(rows.shape[1], -1)


def averaged(site: AttentionSite, linears: Collection[LinearSite], known: Callable[[LinearSite], Callable[[ir.Value], bool]]) -> Averaged | None:
    """The one linear that makes an attention's values, or None. `known` tells what has been computed when a linear's input has."""
    inputs, by_node = {linear.input for linear in linears}, {linear.node: linear for linear in linears}
    makers = [by_node[node] for node in cone([site.value], lambda value: value in inputs).nodes if node in by_node]
    if len(makers) != 1 or site.owner is not None or site.num_heads % site.kv_heads:
        return None
    stop, operands = known(makers[0]), (site.value, site.turned_query, site.turned_key)
    again = cone([site.output], lambda value: value in operands or stop(value))
    return Averaged(site, makers[0], cone((*operands, site.output), stop), again, tuple(str(value.name) for value in operands))


def averaged_sum(inputs: Array, probabilities: Array) -> Array:
    """Σ(A_h X)ᵀ(A_h X) [K, K] over the heads, of X [S, K] and A [H, S, S]."""
    flat = probabilities.reshape(-1, probabilities.shape[-1])
    return np.asarray(inputs.T @ (flat.T @ flat) @ inputs)


def _close(found: Array, expected: Array) -> bool:
    return bool(np.abs(found - expected).max(initial=0.0) <= _TOLERANCE * np.abs(expected).max(initial=0.0))

"""Where a site's mask is computed, and its values at one situation: what is added to the scores, −inf where an op hides by other means."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from ..observe import Probe
from .chain import MOVES, Chain
from .laboratory import Array, Laboratory

# Scores at or below this are hidden. exp of it is 0 in float32 whatever the other scores are; the smallest in use is BERT's −10000.
HIDDEN = -9000.0


@dataclass(frozen=True)
class MaskSource:
    """A `chain` from raw scores to the softmax, or an op's mask `operand` and its `is_causal`.

    `cached_in_op` says that the op itself puts the past before the keys, by which its causal triangle then shifts. With `sinks` a logit
    that the bias does not reach joins the softmax, so that a constant added to a whole row counts. `guards` are conditions [B|1, …S…] by
    which the attention's result is replaced behind the products: they must never hold for a token that is no padding.
    """

    heads: int
    chain: Chain | None = None
    operand: ir.Value | None = None
    is_causal: bool = False
    cached_in_op: bool = False
    sinks: bool = False
    guards: tuple[ir.Value, ...] = ()

    def roots(self) -> tuple[ir.Value, ...]:
        """The values whose cones decide the mask."""
        return self.chain.sides if self.chain is not None else () if self.operand is None else (self.operand,)


class MaskError(Exception):
    """The mask is none that can be told: the reason, as found at one probe."""


@dataclass(frozen=True, eq=False)
class Situation:
    """A probe of a mask: row i is of the query at position `queries[i]`, column j of the key at `keys[j]`.

    Where these have gaps, `replace` gives them to the graph in place of its own counting.
    """

    probe: Probe
    queries: Array
    keys: Array
    replace: Mapping[ir.Value, Array] = field(default_factory=dict)

    @staticmethod
    def dense(probe: Probe, keys: int) -> Situation:
        """All positions, as the graph counts them, before `keys` keys."""
        return Situation(probe, np.arange(probe.past, probe.past + probe.length), np.arange(keys))

    def __str__(self) -> str:
        return f"{self.probe}" + (f", positions {', '.join(map(str, self.queries))}" if self.replace else "")


def bias(source: MaskSource, lab: Laboratory, situation: Situation) -> Array:
    """What is added to the scores, [B|1, H|1, S, T]. Raises MaskError, ObservationError."""
    probe = situation.probe
    S, T = probe.length, len(situation.keys)
    if source.chain is not None:
        return _cells(_chain_bias(source.chain, lab, situation), probe, source.heads, T)
    added = np.zeros((1, 1, S, T), np.float32)
    if source.operand is not None:
        mask = lab.observation.evaluate([source.operand], probe, replace=situation.replace)[0]
        if mask.shape[-1] not in (1, T):
            raise MaskError(f"a mask of {mask.shape[-1]} keys for {T}")
        added = _cells(np.where(mask, np.float32(0), np.float32(-np.inf)) if mask.dtype == np.bool_ else mask, probe, source.heads, T)
    if source.is_causal:
        offset = probe.past if source.cached_in_op else 0
        added = np.where(np.tri(S, T, offset, dtype=np.bool_), added, np.float32(-np.inf))
    return added


def check_guards(source: MaskSource, lab: Laboratory, probe: Probe) -> None:
    """Raises MaskError where a guard holds for a real token."""
    for guard in source.guards:
        held = lab.observation.evaluate([guard], probe)[0]
        if held.size not in (probe.length, probe.batch * probe.length):
            raise MaskError(f"{guard.name} replaces results and has shape {held.shape} at {probe}")
        real = np.ones((probe.batch, probe.length), np.bool_) if probe.attention_mask is None else probe.attention_mask[:, probe.past:] != 0
        if np.any(held.reshape(-1, probe.length) & real):
            raise MaskError(f"{guard.name} replaces the result of a token that is no padding, at {probe}")


def _chain_bias(chain: Chain, lab: Laboratory, situation: Situation) -> Array:
    shape = lab.shape(chain.leaves[0], situation.probe)
    if shape is None:
        raise MaskError("the shape of the scores follows no formula")
    if not any(node.op_type in MOVES for node in chain.nodes):
        shape = (1,) * len(shape)  # nothing reads its sizes: the scores of a long probe need not be there
    sides = lab.observation.evaluate(list(chain.sides), situation.probe, replace=situation.replace) if chain.sides else []
    with np.errstate(all="ignore"):
        return chain.run([np.zeros(shape, np.float32)], dict(zip(chain.sides, sides)))


def _cells(added: Array, probe: Probe, heads: int, T: int) -> Array:
    lead, S = added.shape[:-2], probe.length
    count = int(np.prod(lead))
    if count == 1:
        outer = (1, 1)
    elif count == probe.batch and lead[0] == probe.batch:
        outer = (probe.batch, 1)
    elif count == probe.batch * heads:
        outer = (probe.batch, heads)
    elif count == heads:
        outer = (1, heads)
    else:
        raise MaskError(f"a mask of leading sizes {lead} for {probe.batch} sequences and {heads} heads")
    return np.broadcast_to(added.reshape(*outer, *added.shape[-2:]), (*outer, S, T))

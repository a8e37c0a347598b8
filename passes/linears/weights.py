"""The quantized weight of each linear: what the graph stores, exactly, or else what was asked for. Every choice is counted."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ...custom_ops.contract import ZeroPoint
from ...custom_ops.packing import QuantizedWeight
from ..outcome import Refusal
from ..quantize.grid import on_grid
from ..quantize.groups import Bits, GroupSize, Scheme, scheme_of
from ..quantize.methods import Quantizer
from ..quantize.stored import Stored, read_nbits, same_values
from .precision import Precision, precisions
from .site import EmbeddingSite, LinearSite

_BITS: dict[Precision, Bits] = {"int8": 8, "int4": 4}


@dataclass(frozen=True)
class WeightPlan:
    """What the linears of a graph shall be stored as.

    patterns    names → precision, read in order; what none takes stays as the graph has it
    group_size  of what is quantized here: what is stored quantized keeps its own. None: 64, or 32 where 64 doesn't divide the inputs
    int4_zero   what a group of int4 has besides its scale; int8 is symmetric
    quantize    how the others are rounded
    trial       how they are to measure what harm that does; None: likewise
    head        what the head is stored as, whatever the patterns say; None: what they say
    activation_bits  8: rows are rounded to int8 by groups; 32: they stay float32
    maxima      with int8: the largest magnitudes of each linear's inputs, float32 [K], by the name of its weight, whose groups are the scales. None:
                every row has scales of its own
    """

    patterns: Mapping[str, Precision]
    group_size: GroupSize | None
    quantize: Quantizer
    int4_zero: ZeroPoint = "none"
    head: Precision | None = None
    activation_bits: int = 8
    maxima: Mapping[str, NDArray[np.float32]] | None = None
    trial: Quantizer | None = None

    def precisions(self, names: Sequence[str]) -> dict[str, Precision]:
        """The precision of each name. Raises as `precision.precisions`."""
        found = precisions(self.patterns, names)
        if self.head is not None and "head" in found:
            found["head"] = self.head
        return found

    def scheme(self, precision: Precision, K: int) -> Scheme:
        """How a matrix of K inputs is rounded to `precision`."""
        bits, size = _BITS[precision], self.group_size or (32 if K % 64 else 64)
        return Scheme(bits, size, self.int4_zero if bits == 4 else "none")


class Weights:
    """Reads and makes weights, and keeps account of it. Nothing is cached: a weight is asked for once."""

    def __init__(self, plan: WeightPlan, precision: Mapping[str, Precision], stored: Mapping[str, Stored]) -> None:
        self._plan, self._precision, self._stored = plan, precision, stored
        self._counts: dict[str, list[str]] = {}
        self.refusals: list[Refusal] = []
        self.rounded: tuple[str, ...] = ()

    def of(self, site: LinearSite | EmbeddingSite) -> QuantizedWeight | None:
        """The weight [M, K] as it shall be stored; None where it stays in the graph as it is.

        Raises ModelError where it holds NaN or infinity, OptionError where groups don't divide K; both name the tensor.
        """
        wanted = self._precision[site.name]
        if wanted == "fp32":
            if isinstance(site, LinearSite) and site.packed:
                self.refusals.append(Refusal("stays MatMulNBits: it has no fp32 weight", site.name))
            return None
        found = self._as_stored(site)
        if isinstance(found, QuantizedWeight) and (wanted == "stored" or found.bits <= _BITS[wanted]):
            from_floats = not (isinstance(site, LinearSite) and site.packed) and str(site.weight.name) not in self._stored
            self._count(f"{scheme_of(found)}, exactly {'as its floats are' if from_floats else 'as stored'}", site)
            return found
        if isinstance(found, Refusal):
            self.refusals.append(found)
        if wanted == "stored":
            return None
        floats = self._floats(site, found if isinstance(found, QuantizedWeight) else None)
        if floats is None:
            return None
        scheme = self._plan.scheme(wanted, site.K)
        self._count(f"{scheme}{'' if found is None else ', quantized again'}", site)
        self.rounded = (*self.rounded, site.name)
        return self._plan.quantize(floats, scheme, str(site.weight.name))

    def _as_stored(self, site: LinearSite | EmbeddingSite) -> QuantizedWeight | Refusal | None:
        if isinstance(site, LinearSite) and site.packed:
            return read_nbits(site.node)
        stored = self._stored.get(str(site.weight.name))
        if stored is None:
            values = self._floats(site, None)
            assert values is not None
            return on_grid(values)
        found = stored.load(1 if isinstance(site, EmbeddingSite) or site.transposed else 0)
        floats = self._floats(site, None)
        assert floats is not None
        if isinstance(found, QuantizedWeight) and not same_values(found, floats):
            return Refusal("stored quantized, but the graph's arithmetic rounds otherwise", site.name, str(scheme_of(found)))
        return found

    def _floats(self, site: LinearSite | EmbeddingSite, packed: QuantizedWeight | None) -> NDArray[np.float32] | None:
        """The weight as float32 [M, K]; None where only MatMulNBits can tell."""
        if isinstance(site, LinearSite) and site.packed:
            return None if packed is None else packed.dequantize()
        assert site.weight.const_value is not None
        numbers = site.weight.const_value.numpy()
        return numbers if isinstance(site, EmbeddingSite) or site.transposed else np.ascontiguousarray(numbers.T)

    def _count(self, what: str, site: LinearSite | EmbeddingSite) -> None:
        self._counts.setdefault(what, []).append(site.name)

    def notes(self) -> tuple[str, ...]:
        """One line for each way of storing: how many, and which, once for all layers."""
        return tuple(f"{what}: {len(names)} ({patterns(names)})" for what, names in self._counts.items())


def patterns(names: Sequence[str]) -> str:
    """Names with the layer's number left out, each once."""
    found = Counter(re.sub(r"\.\d+\.", ".*.", name) for name in names)
    return ", ".join(found)


def constant_of(value: ir.Value) -> NDArray[np.float32]:
    """The contents of a constant vector as float32."""
    assert value.const_value is not None
    return np.asarray(value.const_value.numpy(), np.float32).reshape(-1)

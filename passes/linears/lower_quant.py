"""Linears become `ai.octavo::QuantLinear`, with what lies around them: norm before, bias, gate and residual after. Tables become QuantEmbedding.

A weight that is not quantized keeps its bits and its place. Merging changes no output's bits (its sum runs over the same numbers in the same
order); the norm and the gate are computed by the op's own rules, which the contract gives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from time import perf_counter

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from ...custom_ops.contract import DOMAIN, GATES, OPSET, QUANT_EMBEDDING, QUANT_LINEAR, OpContract, WeightFormat
from ...custom_ops.packing import QuantizedWeight, pack
from ...errors import ModelError
from ..build import Builder
from ..normalize import graph_size
from ..outcome import Outcome, PassResult
from ..quantize.stored import Stored
from .match import Linears, find_linears
from .products import Product, products, reads_norm_alone
from .rehearsal import Rehearsal
from .sensitivity import Raised, raise_harmful
from .site import LinearSite, Norm, Rows
from .split_norms import split_skip_norms
from .weights import WeightPlan, Weights, constant_of

# Inputs that never were larger have said nothing of their size.
_NOTHING = np.float32(2.0**-100)
# A packed weight in the graph.
Packed = tuple[ir.Value, WeightFormat]


class QuantizeLinears(ir.passes.InPlacePass):
    """Carries a WeightPlan out. `stored` is what `find_stored` saw before constants were folded; `ids` the input with the token ids.

    With `budget`, a number of bytes and the graph's rehearsal, what int4 harms most is raised to int8 as far as it goes.
    Afterwards `rounded` names the linears whose weights are not what the graph meant, and `raised` tells of the budget.
    Raises OptionError for patterns that name nothing, groups that don't divide and a budget that is too small, ModelError for weights that are
    not finite.
    """

    def __init__(
        self, plan: WeightPlan, stored: Mapping[str, Stored], ids: str = "input_ids", budget: tuple[int, Rehearsal] | None = None,
    ) -> None:
        super().__init__()
        self._plan, self._stored, self._ids, self._budget = plan, stored, ids, budget
        self.rounded: tuple[str, ...] = ()
        self.raised: Raised | None = None

    def call(self, model: ir.Model) -> PassResult:
        start, (nodes, size) = perf_counter(), graph_size(model)
        split = split_skip_norms(model)
        linears = find_linears(model, self._ids)
        precision = self._plan.precisions(linears.names)
        if self._budget is not None:
            size, rehearsal = self._budget
            trial = replace(self._plan, quantize=self._plan.trial or self._plan.quantize)
            precision, self.raised = raise_harmful(linears, precision, partial(Weights, trial, precision, self._stored), rehearsal, size)
        weights = Weights(self._plan, precision, self._stored)
        writer = _Writer(model, linears, self._plan)
        for sites in linears.by_input():
            writer.lower(sites, weights)
        writer.lower_embeddings(weights)
        if writer.written:
            model.opset_imports[DOMAIN] = OPSET
            common.RemoveUnusedNodesPass()(model)
            common.TopologicalSortPass()(model)
        self.rounded = weights.rounded
        count, after = len(linears.names), graph_size(model)
        notes = (*weights.notes(), f"{writer.rewritten} of {count} weights in {writer.written} nodes") if writer.written else ()
        outcome = Outcome(
            "quantize_linears", "weights", count, writer.rewritten, (*linears.refusals, *weights.refusals), notes, nodes, after[0], size, after[1],
            perf_counter() - start,
        )
        return PassResult(model, bool(split or writer.written), outcome)


class _Writer:
    """Writes nodes, and remembers which values they have replaced: what was matched names the old ones."""

    def __init__(self, model: ir.Model, linears: Linears, plan: WeightPlan) -> None:
        self._linears, self._plan = linears, plan
        self._graph, self._build = model.graph, Builder(model.graph)
        self._replaced: dict[ir.Value, ir.Value] = {}
        self._packed: dict[tuple[tuple[ir.Value, int, int], ...], Packed] = {}
        self.written = 0
        self.rewritten = 0

    def lower(self, sites: Sequence[LinearSite], weights: Weights) -> None:
        """Linears of one input."""
        found = {site.node: weight for site in sites if (weight := weights.of(site)) is not None}
        self.rewritten += len(found)
        norm = self._linears.norms.get(sites[0].input)
        if norm is not None and not reads_norm_alone(norm.output, found):
            norm = None  # somebody else needs the normed rows too
        planned = products(sites, found, self._linears)
        for product in planned:
            self._write(product, self._pack(product, found), norm, alone=len(planned) == 1)

    def lower_embeddings(self, weights: Weights) -> None:
        """Tables: rows of a packed weight that a linear has already, or of one of their own."""
        for site in self._linears.embeddings:
            key = ((site.weight, 0, site.M),)
            if key not in self._packed and site.name == "embed":
                weight = weights.of(site)
                if weight is not None:
                    self.rewritten += 1
                    self._packed[key] = self._constant(weight, site.name, gated=False)
            if key not in self._packed:
                continue  # the linear that shares it stays as it is
            packed, fmt = self._packed[key]
            with self._build.before(site.node):
                rows = self._op(QUANT_EMBEDDING, {"ids": site.node.inputs[1], "weight": packed}, fmt.attributes(), str(site.node.name))[0]
            self._replace(site.node.outputs[0], rows)

    def _pack(self, product: Product, weights: Mapping[ir.Node, QuantizedWeight]) -> Packed:
        """The product's packed weight; one initializer for products of the same rows."""
        key = tuple((rows.site.weight, rows.start, rows.stop) for rows in product.parts)
        if product.gate is not None or key not in self._packed:
            packed = self._constant(product.weight(weights), product.name, gated=product.gate is not None)
            if product.gate is not None:
                return packed
            self._packed[key] = packed
        return self._packed[key]

    def _constant(self, weight: QuantizedWeight, name: str, *, gated: bool) -> Packed:
        fmt = weight.format(gated=gated)
        label = f"{name}.packed"
        assert label not in self._graph.initializers, f"two weights {label}"
        tensor = ir.Tensor(pack(weight, gated=gated, name=name), name=label)
        value = ir.Value(name=label, shape=ir.Shape([fmt.nbytes]), type=ir.TensorType(ir.DataType.UINT8), const_value=tensor)
        self._graph.register_initializer(value)
        return value, fmt

    def _write(self, product: Product, packed: Packed, norm: Norm | None, *, alone: bool) -> None:
        weight, fmt = packed
        residual = None if product.output is None else self._linears.residuals.get(product.output)
        if residual is not None and residual.sum in self._replaced:
            residual = None  # of two products that are summed, the first has taken the sum
        given: dict[str, ir.Value | None] = {"input": self._now(product.input), "weight": weight, "bias": self._bias(product)}
        attributes: dict[str, int | float] = {**fmt.attributes(), "activation_bits": self._plan.activation_bits}
        attributes["gate"] = GATES.index(product.gate.activation) if product.gate is not None else 0
        added = None
        if norm is not None:
            given["input"], given["norm_weight"] = self._now(norm.source), norm.weight
            attributes["norm_epsilon"] = norm.epsilon
            added = self._linears.sums.get(norm.source) if alone and residual is None and norm.source not in self._replaced else None
        if added is not None:
            given["input"], given["skip"] = self._now(added[0]), self._now(added[1])
        if residual is not None:
            given["residual"] = self._now(residual.other)
        if self._plan.maxima is not None:
            given["activation_scale"] = self._activation_scale(product, fmt.group_size)
        with self._build.before(product.parts[0].site.node):
            out = self._op(QUANT_LINEAR, given, attributes, product.name, outputs=1 if added is None else 2)
            values = self._split(out[0], product.parts) if product.output is None else [out[0]]
        if added is not None:
            assert norm is not None
            self._replace(norm.source, out[1])
        olds = [rows.value for rows in product.parts] if product.output is None else [product.output if residual is None else residual.sum]
        for old, new in zip(olds, values):
            self._replace(old, new)

    def _split(self, rows: ir.Value, parts: Sequence[Rows]) -> list[ir.Value]:
        sizes = self._build.integers([part.stop - part.start for part in parts])
        values = self._build.op("Split", [rows, sizes], {"axis": -1}, outputs=len(parts))
        for value in values:
            value.type = rows.type
        return values

    def _bias(self, product: Product) -> ir.Value | None:
        """The biases of the parts in one vector, 0 for a part that has none."""
        if all(rows.site.bias is None for rows in product.parts):
            return None
        first = product.parts[0]
        if len(product.parts) == 1 and first.site.bias is not None and first.site.bias.const_value is not None:
            return first.site.bias
        parts = [
            np.zeros(rows.stop - rows.start, np.float32) if rows.site.bias is None else constant_of(rows.site.bias)[rows.start : rows.stop]
            for rows in product.parts
        ]
        return self._build.constant(np.concatenate(parts), f"{product.name}.bias")

    def _activation_scale(self, product: Product, group_size: int) -> ir.Value:
        """One scale a group, of the largest input seen; a group that was 0 throughout has that of the largest of all."""
        assert self._plan.maxima is not None
        seen = self._plan.maxima[str(product.parts[0].site.weight.name)].reshape(-1, group_size).max(axis=1)
        if not np.isfinite(seen).all():
            raise ModelError(f"the inputs of {product.name} are not finite on the calibration text", hint="check the model in fp32 first")
        most = np.where(seen >= _NOTHING, seen, seen.max() if seen.max() >= _NOTHING else np.float32(1))
        return self._build.constant((most / np.float32(127)).astype(np.float32), f"{product.name}.activation_scale")

    def _op(
        self, contract: OpContract, given: Mapping[str, ir.Value | None], attributes: Mapping[str, int | float], name: str, outputs: int = 1,
    ) -> list[ir.Value]:
        last = max(contract.input_index(port) for port, value in given.items() if value is not None)
        ordered = [given.get(port.name) for port in contract.inputs[: last + 1]]
        values = self._build.op(contract.name, ordered, attributes, domain=DOMAIN, name=name, outputs=outputs)
        for value in values:
            value.type = ir.TensorType(ir.DataType.FLOAT)
        self.written += 1
        return values

    def _replace(self, old: ir.Value, new: ir.Value) -> None:
        if old.is_graph_output():
            new.name, new.shape, new.type = old.name, old.shape, old.type
            old.name = f"{old.name}:fp32"
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        self._replaced[old] = new

    def _now(self, value: ir.Value) -> ir.Value:
        """What has taken a matched value's place."""
        while value in self._replaced:
            value = self._replaced[value]
        return value



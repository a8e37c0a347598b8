"""What is computed by one QuantLinear: which linears of one input go together."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir

from ...custom_ops.packing import QuantizedWeight
from ..quantize.groups import scheme_of, stacked
from .match import Linears
from .site import GateSite, LinearSite, Rows


@dataclass(frozen=True)
class Product:
    """One QuantLinear to be. `parts` are stacked in this order, gate before values; `output` is the value it replaces, None where a Split follows."""

    parts: tuple[Rows, ...]
    gate: GateSite | None = None

    @property
    def input(self) -> ir.Value:
        return self.parts[0].site.input

    @property
    def output(self) -> ir.Value | None:
        if self.gate is not None:
            return self.gate.output
        return self.parts[0].value if len(self.parts) == 1 else None

    @property
    def name(self) -> str:
        """`layers.0.attn.q_k_v`: what its parts have in common, then the rest of each."""
        names = list(dict.fromkeys(rows.site.name for rows in self.parts))
        scope, _, first = names[0].rpartition(".")
        if len(names) == 1 or not all(name.rpartition(".")[0] == scope for name in names):
            return "_".join(names)
        return f"{scope}.{'_'.join([first, *(name.rpartition('.')[2] for name in names[1:])])}".lstrip(".")

    def weight(self, weights: Mapping[ir.Node, QuantizedWeight]) -> QuantizedWeight:
        """The rows of its parts, out of the weights of the whole linears."""
        return stacked([_rows(weights[rows.site.node], rows) for rows in self.parts])


def _rows(weight: QuantizedWeight, rows: Rows) -> QuantizedWeight:
    if (rows.start, rows.stop) == (0, weight.q.shape[0]):
        return weight
    some = slice(rows.start, rows.stop)
    zero_points = None if weight.zero_points is None else weight.zero_points[some]
    minimums = None if weight.minimums is None else weight.minimums[some]
    return replace(weight, q=weight.q[some], scales=weight.scales[some], zero_points=zero_points, minimums=minimums)


def products(sites: Sequence[LinearSite], weights: Mapping[ir.Node, QuantizedWeight], linears: Linears) -> list[Product]:
    """The products of some linears of one input that have a weight: a gate with its values, and all others of one scheme together.

    One that a residual is added to stays by itself: the sum then needs no node. Merged or not, every output has the same bits.
    """
    found: list[Product] = []
    taken: set[ir.Node] = set()
    for gate in linears.gates:
        pair = (gate.gate.site.node, gate.up.site.node)
        if gate.gate.site in sites and all(node in weights for node in pair) and scheme_of(weights[pair[0]]) == scheme_of(weights[pair[1]]):
            found.append(Product((gate.gate, gate.up), gate))
            taken.update(pair)
    rest = [site for site in sites if site.node in weights and site.node not in taken]
    alone = [site for site in rest if site.output in linears.residuals]
    found += [Product((_whole(site),)) for site in alone]
    together: dict[object, list[Rows]] = {}
    for site in rest:
        if site not in alone:
            together.setdefault(scheme_of(weights[site.node]), []).append(_whole(site))
    return found + [Product(tuple(parts)) for parts in together.values()]


def _whole(site: LinearSite) -> Rows:
    return Rows(site, 0, site.M, site.output)


def reads_norm_alone(value: ir.Value, nodes: Collection[ir.Node]) -> bool:
    """Whether nothing but `nodes` reads `value`."""
    return not value.is_graph_output() and all(use.node in nodes for use in value.uses())

"""Which linears int4 harms most, measured at the logits, and which of them are raised to int8 within a budget of bytes.

Cai, Yao, Dong, Gholami, Mahoney and Keutzer, "ZeroQ: A Novel Zero Shot Quantization Framework", CVPR 2020 (arXiv 2001.00281): a layer's
sensitivity is the mean KL between the model's outputs and those with this layer alone quantized, and sensitivities add up. Under a budget,
the greedy order of the knapsack problem then applies: most KL a byte first. What int8 itself costs is left out: it is a hundredth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ...errors import OptionError
from .match import Linears
from .precision import Precision
from .rehearsal import Rehearsal
from .site import EmbeddingSite, LinearSite
from .weights import Weights

Site = LinearSite | EmbeddingSite


@dataclass(frozen=True)
class Unit:
    """Linears of one input, which are stored alike so that they stay one product: what int4 costs, and how many bytes int8 would add."""

    names: tuple[str, ...]
    harm: float
    extra: int


@dataclass(frozen=True)
class Raised:
    """`bytes` of `budget` are taken with `units` in int8, most harmful a byte first; `measured` is how many there were to choose from."""

    units: tuple[Unit, ...]
    measured: int
    bytes: int
    budget: int

    def __str__(self) -> str:
        listed = ", ".join(f"{' '.join(unit.names)} (KL {unit.harm:.2g}, {unit.extra:,} bytes)" for unit in self.units)
        return f"{len(self.units)} of {self.measured} products raised to int8, {self.bytes:,} of {self.budget:,} bytes taken{': ' if listed else ''}{listed}"


def raise_harmful(
    linears: Linears, precision: Mapping[str, Precision], weights: Callable[[], Weights], rehearsal: Rehearsal, budget: int,
) -> tuple[dict[str, Precision], Raised]:
    """`precision` with the most harmful int4 as int8, as long as all quantized weights together take no more than `budget` bytes.

    `weights` makes a fresh account of weights; nothing is left in the graph. Raises OptionError where int4 alone takes more, or nothing is
    rounded to int4.
    """
    taken, units = 0, list[Unit]()
    for sites in _units(linears):
        account = weights()
        found = {site: weight for site in sites if (weight := account.of(site)) is not None}
        taken += sum(weight.format().nbytes for weight in found.values())
        rounded = {site: weight for site, weight in found.items() if site.name in account.rounded and precision[site.name] == "int4"}
        given = {str(site.weight.name): _as_stored(site, weight.dequantize()) for site, weight in rounded.items() if rehearsal.knows(str(site.weight.name))}
        if given:
            extra = sum(replace(weight.format(), bits=8, zero_point="none").nbytes - weight.format().nbytes for weight in rounded.values())
            units.append(Unit(tuple(site.name for site in rounded), rehearsal.divergence(given), extra))
    if not units:
        raise OptionError("weight_budget: no linear is rounded to int4, so that none can be raised", hint='weights="int4" rounds those of fp32')
    if taken > budget:
        raise OptionError(f"weight_budget: the weights take {taken:,} bytes before any is raised, the budget is {budget:,}", hint="give more, or nothing")
    measured, raised = len(units), list[Unit]()
    for unit in sorted(units, key=lambda unit: -unit.harm / unit.extra):    # stable: of equals, the first in execution order
        if taken + unit.extra <= budget:
            raised.append(unit)
            taken += unit.extra
    names = {name for unit in raised for name in unit.names}
    return {name: "int8" if name in names else value for name, value in precision.items()}, Raised(tuple(raised), measured, taken, budget)


def _units(linears: Linears) -> Iterator[Sequence[Site]]:
    by_input: dict[object, list[Site]] = {}
    for site in linears.sites:
        by_input.setdefault(site.input, []).append(site)
    yield from by_input.values()
    yield from ([table] for table in linears.embeddings if table.name == "embed")


def _as_stored(site: Site, values: NDArray[np.float32]) -> NDArray[np.float32]:
    """[M, K] in the layout of the site's initializer."""
    return values if isinstance(site, EmbeddingSite) or site.transposed else np.ascontiguousarray(values.T)

"""The quantizers by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol, get_args

import numpy as np
from numpy.typing import NDArray

from ...custom_ops.packing import QuantizedWeight
from ...errors import OptionError
from .gptq import gptq
from .groups import Scheme, stacked, taken
from .hqq import hqq
from .rtn import rtn
from .search import search

Method = Literal["rtn", "search", "hqq", "gptq"]

# A weight [M, K], its scheme, and the tensor's name.
Quantizer = Callable[[NDArray[Any], Scheme, str], QuantizedWeight]


@dataclass(frozen=True)
class Seen:
    """XᵀX [K, K] of what the outputs `rows` of a weight are computed from."""

    rows: NDArray[np.intp]
    hessian: NDArray[np.float32]


class Inputs(Protocol):
    """What linears read, in the order in which they are rounded."""

    def seen(self, name: str) -> Sequence[Seen] | None:
        """All rows of the weight `name`, in one or several parts; None for a table of embeddings, which reads nothing."""

    def rounded(self, name: str, values: NDArray[np.float32]) -> None:
        """The weight `name` is `values` [M, K] from now on."""


def quantizer(method: Method, inputs: Inputs | None = None) -> Quantizer:
    """The quantizer called `method`. "gptq" takes what the linears read; the others take nothing.

    "hqq" is for int4: eight bits have so fine steps that zero points bring nothing, and are searched.
    """
    if method not in get_args(Method):
        raise OptionError(f"method={method!r} is not one of {', '.join(map(repr, get_args(Method)))}")
    if (method == "gptq") != (inputs is not None):
        raise OptionError(f"method={method!r} {'needs' if method == 'gptq' else 'takes no'} calibration text")
    if inputs is not None:
        return partial(_calibrated, inputs)
    return {"rtn": rtn, "search": search, "hqq": _half_quadratic}[method]


def _half_quadratic(weight: NDArray[Any], scheme: Scheme, name: str) -> QuantizedWeight:
    return hqq(weight, scheme, name) if scheme.bits == 4 else search(weight, scheme, name)


def _calibrated(inputs: Inputs, weight: NDArray[Any], scheme: Scheme, name: str) -> QuantizedWeight:
    """GPTQ where the inputs were seen. A table of embeddings has none: its scales are searched."""
    seen = inputs.seen(name)
    if seen is None:
        return search(weight, scheme, name)
    parts = [gptq(weight[part.rows], scheme, part.hessian, name) for part in seen]
    found = taken(stacked(parts), np.argsort(np.concatenate([part.rows for part in seen])))
    inputs.rounded(name, found.dequantize())
    return found

"""The quantizers by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from ...custom_ops.packing import QuantizedWeight
from ...errors import OptionError
from .gptq import gptq
from .groups import Scheme
from .hqq import hqq
from .rtn import rtn
from .search import search

Method = Literal["rtn", "search", "hqq", "gptq"]

# A weight [M, K], its scheme, and the tensor's name.
Quantizer = Callable[[NDArray[Any], Scheme, str], QuantizedWeight]


def quantizer(method: Method, hessians: Mapping[str, NDArray[np.float32]] | None = None) -> Quantizer:
    """The quantizer called `method`. "gptq" takes XᵀX of each linear's inputs by the name of its weight; the others take none.

    "hqq" is for int4: eight bits have so fine steps that zero points bring nothing, and are searched.
    """
    if method not in get_args(Method):
        raise OptionError(f"method={method!r} is not one of {', '.join(map(repr, get_args(Method)))}")
    if (method == "gptq") != (hessians is not None):
        raise OptionError(f"method={method!r} {'needs' if method == 'gptq' else 'takes no'} calibration text")
    if hessians is not None:
        return partial(_calibrated, hessians)
    return {"rtn": rtn, "search": search, "hqq": _half_quadratic}[method]


def _half_quadratic(weight: NDArray[Any], scheme: Scheme, name: str) -> QuantizedWeight:
    return hqq(weight, scheme, name) if scheme.bits == 4 else search(weight, scheme, name)


def _calibrated(hessians: Mapping[str, NDArray[np.float32]], weight: NDArray[Any], scheme: Scheme, name: str) -> QuantizedWeight:
    """GPTQ where the inputs were seen. A table of embeddings has none: its scales are searched."""
    return gptq(weight, scheme, hessians[name], name) if name in hessians else search(weight, scheme, name)

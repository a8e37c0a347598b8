"""Which linear is stored how: a map of name patterns to precisions, read in order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Literal, get_args

from ...errors import OptionError

# "stored": as the graph has it, quantized or not.
Precision = Literal["stored", "fp32", "int8", "int4"]


def precisions(patterns: Mapping[str, Precision], names: Sequence[str]) -> dict[str, Precision]:
    """The precision of each name: of the first pattern (`*` and `?` as in file names) that takes it, else "stored".

    Raises OptionError for an unknown precision, for a pattern that no name fits, and for one whose names earlier patterns all take.
    """
    found: dict[str, Precision] = {}
    for pattern, precision in patterns.items():
        if precision not in get_args(Precision):
            raise OptionError(f"weights: {precision!r} for {pattern!r} is not one of {', '.join(map(repr, get_args(Precision)))}")
        fitting = [name for name in names if fnmatchcase(name, pattern)]
        if not fitting:
            near = get_close_matches(pattern, names, 4, 0.4) or [*names[:3], *names[-1:]]
            raise OptionError(f"weights: no linear is called {pattern!r}", hint=f"near it: {', '.join(dict.fromkeys(near))}")
        if all(name in found for name in fitting):
            earlier = ", ".join(repr(other) for other in patterns if other != pattern and any(fnmatchcase(name, other) for name in fitting))
            raise OptionError(f"weights: {pattern!r} decides nothing, {earlier} come first", hint="patterns are read in order: put the general one last")
        for name in fitting:
            found.setdefault(name, precision)
    return {name: found.get(name, "stored") for name in names}

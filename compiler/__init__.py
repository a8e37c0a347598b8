"""The pipeline: options in, artifact and report out.

Names are imported when they are first used: comparing graphs needs nothing that compiles or runs them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

_HOME = {
    "CheckReport": ".check", "CompileOptions": ".options", "CompileReport": ".report", "compile": ".entry", "import_model": ".entry",
    "inspect": ".entry",
}

__all__ = ["CheckReport", "CompileOptions", "CompileReport", "compile", "import_model", "inspect"]

if TYPE_CHECKING:
    from .check import CheckReport as CheckReport
    from .entry import compile as compile
    from .entry import import_model as import_model
    from .entry import inspect as inspect
    from .options import CompileOptions as CompileOptions
    from .report import CompileReport as CompileReport


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOME[name], __name__), name)
    globals()[name] = value
    return value

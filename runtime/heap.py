"""Memory that the C library holds on to after it was freed."""

from __future__ import annotations

import ctypes
import sys


def give_back() -> None:
    """Returns free pages of the C heap to the system. Does something on glibc, which keeps what was freed below a page in use."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)

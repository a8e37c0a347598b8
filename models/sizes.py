"""Sizes in bytes, as people write them."""

from __future__ import annotations

import re

from ..errors import OptionError

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")


def parse_size(value: int | str, name: str) -> int:
    """Bytes of `value`: a positive int, or a number with a unit (B, kB, MB, GB, TB: powers of 1000; KiB, MiB, GiB, TiB: of 1024).

    Raises OptionError, naming the option `name`, for anything else.
    """
    hint = 'write bytes as an int, or text such as "2GiB" or "800 MB"'
    if isinstance(value, int) and not isinstance(value, bool):
        size = value
    elif isinstance(value, str) and (match := _SIZE.fullmatch(value)) and match[2].upper() in _UNITS:
        size = int(float(match[1]) * _UNITS[match[2].upper()])
    else:
        raise OptionError(f"{name}={value!r} is not a size", hint=hint)
    if size <= 0 or size >= 2**60:
        raise OptionError(f"{name}={value!r} is not a positive size below 2^60 bytes", hint=hint)
    return size

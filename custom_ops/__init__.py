"""The op library: where it is, how a session gets it, which instruction set it runs. Light: onnx and onnxruntime are not imported."""

from __future__ import annotations

import ctypes
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from ..errors import LibraryError

__all__ = ["active_isa", "available_isas", "library_path", "register"]

_FILE = "liboctavo_ops.so"


def library_path() -> Path:
    """The shared library with every op of the domain `ai.octavo`, for `SessionOptions.register_custom_ops_library`.

    Raises LibraryError where it was not built or not installed.
    """
    path = Path(str(files(__package__).joinpath(_FILE)))
    if not path.is_file():
        raise LibraryError(f"{path} does not exist", hint="install octavo with `pip install .`, which compiles it")
    return path


def register(session_options: Any) -> None:
    """Give an `onnxruntime.SessionOptions` the ops of the library.

    Raises LibraryError where the library is missing, onnxruntime is too old, or OCTAVO_ISA names an instruction set that can't run here.
    """
    path = library_path()
    try:
        session_options.register_custom_ops_library(str(path))
    except Exception as error:  # onnxruntime raises its own types, which are not importable from a light module
        hint = "octavo needs onnxruntime 1.24 or newer, and OCTAVO_ISA unset or one of `octavo.custom_ops.available_isas()`"
        raise LibraryError(f"onnxruntime does not load {path}: {error}", hint=hint) from error


@cache
def open_library() -> ctypes.CDLL:
    """The library for its C functions outside onnxruntime. LibraryError where it can't be loaded."""
    path = library_path()
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise LibraryError(f"{path} can't be loaded: {error}", hint="install octavo with `pip install .` on this machine") from error
    library.octavo_active_isa.restype = ctypes.c_char_p
    library.octavo_available_isa.restype = ctypes.c_char_p
    return library


def active_isa() -> str:
    """The instruction set whose kernels run in this process: the best one, or the one that the environment variable OCTAVO_ISA named.

    Decided at the first use of the library and kept. Raises LibraryError where OCTAVO_ISA can't be met.
    """
    name: bytes | None = open_library().octavo_active_isa()
    if name is None:
        raise LibraryError("OCTAVO_ISA names no instruction set that can run here", hint=f"this machine runs {', '.join(available_isas())}")
    return name.decode()


def available_isas() -> tuple[str, ...]:
    """The instruction sets that this machine can run, best first."""
    names: list[str] = []
    while (name := open_library().octavo_available_isa(len(names))) is not None:
        names.append(name.decode())
    return tuple(names)

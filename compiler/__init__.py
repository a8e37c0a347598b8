"""THE PIPELINE: an exported graph in, an artifact and the account of its making out."""

from .check import CheckReport
from .entry import compile, import_model, inspect
from .options import CompileOptions
from .report import CompileReport

__all__ = ["CheckReport", "CompileOptions", "CompileReport", "compile", "import_model", "inspect"]

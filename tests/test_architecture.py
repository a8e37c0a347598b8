"""The shape of the project, held by tests: import direction, one home per public name, a light facade."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import octavo
import pytest

ROOT = Path(octavo.__file__).parent
ROOT_FILES = (
    "__init__.py", "__main__.py", "console.py", "diff_commands.py", "doctor_command.py", "errors.py", "measure_commands.py", "plan_command.py",
)
ROOMS = ("models", "custom_ops", "passes", "compiler", "runtime")

# A room imports only from these (and itself, and errors).
MAY_IMPORT = {
    "models": {"custom_ops"},   # the artifact checks the cache layout tag of the op contract
    "custom_ops": set(),
    "passes": {"models", "custom_ops"},
    "compiler": {"models", "custom_ops", "passes"},
    "runtime": {"models", "custom_ops"},
}
HEAVY = ("onnx", "onnx_ir", "onnxscript", "onnxruntime", "gguf", "torch", "transformers", "tokenizers", "jinja2", "numpy", "typer", "rich")


def _modules() -> list[Path]:
    return [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))] + [ROOT / name for name in ROOT_FILES]


def _imports(path: Path) -> list[tuple[str, int]]:
    """Dotted names that a file imports: relative ones resolved from the package root as `octavo.…`."""
    package = ("octavo", *path.relative_to(ROOT).parent.parts)
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            assert base, f"{path}:{node.lineno} reaches outside the package"
            stem = ".".join([*base, *([node.module] if node.module else [])])
            names += [(f"{stem}.{alias.name}", node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names.append((node.module or "", node.lineno))
    return names


@pytest.mark.parametrize("path", _modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_one_way_and_are_relative(path: Path) -> None:
    room = path.relative_to(ROOT).parts[0]
    for name, line in _imports(path):
        head, *rest = name.split(".")
        assert head not in ROOMS, f"{path}:{line}: bare import of {name}"
        if room in MAY_IMPORT and head == "octavo":
            target = rest[0] if rest else ""
            allowed = MAY_IMPORT[room] | {room, "errors", "__version__"}
            assert target in allowed, f"{path}:{line}: {room} may not import {name}"


def test_only_export_imports_torch() -> None:
    for path in _modules():
        for name, line in _imports(path):
            if name.split(".")[0] in ("torch", "transformers"):
                assert path.relative_to(ROOT) == Path("models/export.py"), f"{path}:{line} imports {name}"


def test_policy_knows_no_tensors() -> None:
    """Scheduler, block pool and prefix index work on integers only."""
    for name in ("runtime/scheduler.py", "runtime/kv/blocks.py", "runtime/kv/prefix.py"):
        heavy = [imported for imported, _ in _imports(ROOT / name) if imported.split(".")[0] in HEAVY]
        assert not heavy, f"{name} imports {heavy}"


def test_every_public_name_has_one_home() -> None:
    for name in octavo.__all__:
        assert getattr(octavo, name) is not None
    for name, home in octavo._HOME.items():
        assert name in importlib.import_module(home, "octavo").__dict__ or hasattr(importlib.import_module(home, "octavo"), name)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'LLM'"):
        octavo.LLM  # noqa: B018


def test_import_is_light() -> None:
    """`import octavo` loads nothing heavy; the names it offers do when first used."""
    code = f"import sys, octavo; print([m for m in {HEAVY!r} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"

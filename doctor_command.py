"""`octavo doctor`: what this machine offers, told with runtime dependencies alone."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version

import typer

from . import __version__
from .console import CHECK_FAILED, Json, print_result
from .errors import OctavoError

app = typer.Typer()

# An ONNX model of one Identity from x to y, float32[1], at opset 18: written out, so that the onnx package is not needed here.
IDENTITY = bytes.fromhex(
    "080a3a3c0a100a017812017922084964656e746974791206646f63746f725a0f0a0178120a0a08080112040a020801620f0a0179120a0a0808011204"
    "0a02080142040a001012"
)


@app.command(epilog="Example: octavo doctor")
def doctor(as_json: Json = False) -> None:
    """Show what this machine offers.

    Versions, instruction sets, cores, memory, and whether onnxruntime loads the op library: exit code 2 if it doesn't.
    """
    facts = {"octavo": __version__, "python": platform.python_version(), "platform": platform.platform()}
    facts |= _versions() | _machine() | _library()
    width = max(map(len, facts))
    print_result(as_json, facts, "\n".join(f"{name:<{width}}  {value}" for name, value in facts.items()))
    if facts["op library loads"] != "yes":
        raise typer.Exit(CHECK_FAILED)


def _versions() -> dict[str, str]:
    def installed(name: str) -> str:
        try:
            return installed_version(name)
        except PackageNotFoundError:
            return "not installed"

    packages = ("onnxruntime", "onnx", "onnx-ir", "onnxscript", "numpy", "tokenizers", "gguf", "torch", "transformers")
    return {name: installed(name) for name in packages}


def _machine() -> dict[str, str]:
    pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return {"cores for this process": str(len(os.sched_getaffinity(0))), "memory": f"{pages * size / 2**30:.1f} GiB"}


def _library() -> dict[str, str]:
    """The op library, asked as `load` asks it: a session that registers it, around a graph of one Identity."""
    import onnxruntime as ort

    from . import custom_ops

    facts = {"OCTAVO_ISA": os.environ.get("OCTAVO_ISA", "")}
    try:
        session = ort.SessionOptions()
        facts["op library"] = str(custom_ops.library_path())
        custom_ops.register(session)
        ort.InferenceSession(IDENTITY, session, providers=["CPUExecutionProvider"])
        facts |= {"instruction sets": ", ".join(custom_ops.available_isas()), "instruction set in use": custom_ops.active_isa()}
        return {**facts, "op library loads": "yes"}
    except OctavoError as error:
        return {**facts, "op library loads": f"no: {error}"}

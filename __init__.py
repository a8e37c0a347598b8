"""Octavo compiles an exported ONNX language model into one that serves, and serves it, on a stock onnxruntime wheel.

    report = octavo.compile("model.onnx", "out/")
    model = octavo.load("out/")
    for piece in model.stream("Once upon a time"):
        print(piece.text, end="")

Names are imported when they are first used, so that `import octavo` is light and an artifact runs where the compiler's
dependencies are not installed.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Where each public name lives. The facade has no logic: tests hold that this is all there is.
_HOME = {
    "compile": ".compiler",
    "import_model": ".compiler",
    "inspect": ".compiler",
    "snapshot": ".compiler.diff",
    "GraphDiff": ".compiler.diff",
    "CompileOptions": ".compiler",
    "CompileReport": ".compiler",
    "CheckReport": ".compiler",
    "EvalReport": ".compiler.evaluate",
    "load": ".runtime",
    "Model": ".runtime",
    "Session": ".runtime",
    "Sequence": ".runtime",
    "RuntimeOptions": ".runtime",
    "SamplingParams": ".runtime",
    "Result": ".runtime",
    "Completion": ".runtime",
    "Piece": ".runtime",
    "Usage": ".runtime",
    "bench": ".runtime.bench",
    "BenchResult": ".runtime.bench",
    "Workload": ".runtime.workloads",
    "Decision": ".models.decision",
    "library_path": ".custom_ops",
    "OctavoError": ".errors",
}

__all__ = [
    "BenchResult",
    "CheckReport",
    "CompileOptions",
    "CompileReport",
    "Completion",
    "Decision",
    "EvalReport",
    "GraphDiff",
    "Model",
    "OctavoError",
    "Piece",
    "Result",
    "RuntimeOptions",
    "SamplingParams",
    "Sequence",
    "Session",
    "Usage",
    "Workload",
    "__version__",
    "bench",
    "check",
    "compile",
    "diff",
    "evaluate",
    "import_model",
    "inspect",
    "library_path",
    "load",
    "snapshot",
]

if TYPE_CHECKING:
    from collections.abc import Callable
    from os import PathLike

    from .compiler import CheckReport as CheckReport
    from .compiler import CompileOptions as CompileOptions
    from .compiler import CompileReport as CompileReport
    from .compiler import compile as compile
    from .compiler import import_model as import_model
    from .compiler import inspect as inspect
    from .compiler.diff import GraphDiff as GraphDiff
    from .compiler.diff import snapshot as snapshot
    from .compiler.evaluate import EvalReport as EvalReport
    from .custom_ops import library_path as library_path
    from .errors import OctavoError as OctavoError
    from .models.decision import Decision as Decision
    from .runtime import Completion as Completion
    from .runtime import Model as Model
    from .runtime import Piece as Piece
    from .runtime import Result as Result
    from .runtime import RuntimeOptions as RuntimeOptions
    from .runtime import SamplingParams as SamplingParams
    from .runtime import Sequence as Sequence
    from .runtime import Session as Session
    from .runtime import Usage as Usage
    from .runtime import load as load
    from .runtime.bench import BenchResult as BenchResult
    from .runtime.bench import bench as bench
    from .runtime.workloads import Workload as Workload


def check(
    artifact: str | PathLike[str], against: str | PathLike[str], *, text: str | None = None, seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> CheckReport:
    """Runs an artifact and its source through the same cases and compares their logits: see docs/howto/check.md.

    Here and not in a room, because the compiler does not know the runtime: the facade hands it `load`.
    """
    from .compiler.check import check as run

    return run(artifact, against, load=_open_model, text=text, seed=seed, progress=progress)


def evaluate(
    model: str | PathLike[str], text: str | PathLike[str], *, against: str | PathLike[str] | None = None, context: int = 512,
    tokens: int | None = None, progress: Callable[[str], None] | None = None,
) -> EvalReport:
    """Perplexity of a model on a file of text, and how far its distributions lie from another's: see docs/howto/evaluate.md."""
    from .compiler.evaluate import evaluate as run

    return run(model, text, load=_open_model, against=against, context=context, tokens=tokens, progress=progress)


def diff(
    before: str | PathLike[str], after: str | PathLike[str], *, policy: str | PathLike[str] | None = None, numeric: bool | None = None,
    update: bool = False, force: bool = False, seed: int = 0, progress: Callable[[str], None] | None = None,
) -> GraphDiff:
    """What changed from one graph to another, each an `.onnx`, an artifact or a snapshot: see docs/howto/diff.md.

    Structure and content hashes alone, unless `numeric` or the policy asks for figures. Here because, as in `check`, the facade hands the
    compiler `load`.
    """
    from .compiler.diff import diff as run

    return run(
        before, after, load=_open_model, policy=policy, numeric=numeric, update=update, force=force, seed=seed, progress=progress,
    )


def _open_model(path: PathLike[str], fusions: bool) -> Model:
    from .runtime import RuntimeOptions, load

    return load(path, options=RuntimeOptions(optimize_graph=fusions))


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'octavo' has no attribute {name!r}")
    value = getattr(import_module(home, __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__

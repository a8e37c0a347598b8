"""The commands that measure: eval (how good), bench (how fast)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .console import Json, Memory, ModelPath, Threads, print_result, say
from .errors import OptionError

app = typer.Typer()


@app.command("eval", epilog="Example: octavo eval art/ --text book.txt --against plain/model.onnx")
def eval_(
    path: ModelPath,
    *,
    text: Annotated[Path, typer.Option(metavar="FILE", help="UTF-8 text to read.")],
    against: Annotated[Path | None, typer.Option(metavar="ONNX", help="The graph to compare with, in fp32; or another artifact.")] = None,
    context: Annotated[int, typer.Option(help="Tokens of a window; each window is read from nothing.")] = 512,
    tokens: Annotated[int | None, typer.Option(help="Read only this many tokens of the text.")] = None,
    as_json: Json = False,
) -> None:
    """Measure how good a model is on text.

    Perplexity, and KL divergence and top-1 agreement with the graph that it was compiled from.
    """
    from . import evaluate

    report = evaluate(path, text, against=against, context=context, tokens=tokens, progress=say)
    print_result(as_json, report.to_json(), report.to_text())


@app.command(epilog="Example: octavo bench art/ --only batch-16")
def bench(
    path: ModelPath,
    *,
    workloads: Annotated[Path | None, typer.Option(metavar="FILE", help="JSON list of workloads (default: five, of one and of 16 sequences).")] = None,
    only: Annotated[list[str] | None, typer.Option(metavar="NAME", help="Run this workload alone; may be given several times.")] = None,
    profile: Annotated[bool, typer.Option("--profile", help="Show the time by op, out of a further, shortened run.")] = False,
    block_size: Annotated[int, typer.Option(help="Token slots of a cache block: 16, 32, 64, 128, 256.")] = 32,
    policy: Annotated[str, typer.Option(help="auto, throughput, latency: as RuntimeOptions has it.")] = "throughput",
    threads: Threads = None, memory: Memory = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a workload, each on a line.")] = False,
) -> None:
    """Measure how fast a model runs here.

    Tokens a second in prefill and decode, load time and memory, beside what this machine can read and multiply.
    """
    from . import bench as run_bench
    from .runtime import RuntimeOptions
    from .runtime.bench import to_text
    from .runtime.workloads import WORKLOADS, read_workloads

    chosen = read_workloads(workloads) if workloads else WORKLOADS
    if unknown := set(only or ()) - {load.name for load in chosen}:
        raise OptionError(f"there is no workload {min(unknown)!r}", hint=f"there are {', '.join(load.name for load in chosen)}")
    chosen = tuple(load for load in chosen if not only or load.name in only)
    options = RuntimeOptions(threads=threads, memory=memory, block_size=block_size, policy=policy)  # type: ignore[arg-type]
    results = run_bench(path, chosen, options=options, profile=profile, progress=say)
    for line in [json.dumps(result.to_json()) for result in results] if as_json else to_text(results):
        print(line, flush=True)

"""How fast a model runs here, through the same engine as everything else, and how far that is from what the machine can give.

Prefill: prompt tokens of all sequences ÷ the time until each has its first token. Decode: tokens that all sequences generate after that ÷ the
time it takes. Greedy, no early stop, no prefix cache, token ids in and out.
"""

from __future__ import annotations

import gc
import os
import resource
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..custom_ops import active_isa
from ..errors import CapacityError
from ..models.artifact import GRAPH, MANIFEST, Manifest, read_manifest
from ..models.cost import StepCost, cache_bytes, step_cost
from .config import RuntimeOptions
from .load import load
from .model import Model
from .profile import OpTimes, read_profile
from .sampling import SamplingParams
from .stream import PieceStream
from .workloads import WARM_UP, WORKLOADS, Workload

# Of a profiled run: enough steps that one that was interrupted does not show.
_PROFILED_TOKENS = 16
_CONFIGURATION = ("weights", "group_size", "activations", "kv_cache")


@dataclass(frozen=True)
class BenchResult:
    """One workload. The first six fields are those that the runners of other engines print too; rates are tokens a second.

    load_s: seconds of the load call alone. peak_rss_mb: most memory of this process so far, in MiB, mapped files included.
    step_bytes: weights and cache that a decode step reads, at the mean length. decode_gb_s: that ÷ the time of a step; read_gb_s: what
    this process reached in reading as many bytes, bandwidth_share the one over the other. prefill_gop_s: operations of the prompts' products
    and attentions (a multiply-add is two) ÷ their time, int8_gop_s and operations_share likewise. None where it can't be told.
    time_by_op: of a separate, profiled run: milliseconds of each op type in "prefill" and "decode".
    skipped: why the workload was not run; all figures are None then.
    """

    engine: str
    workload: str
    prefill_tok_s: float | None = None
    decode_tok_s: float | None = None
    load_s: float | None = None
    peak_rss_mb: int | None = None
    kind: str = ""
    isa: str = ""
    threads: int = 0
    configuration: dict[str, Any] | None = None
    weight_bytes: int | None = None
    cache_bytes: int | None = None
    step_bytes: int | None = None
    decode_gb_s: float | None = None
    read_gb_s: float | None = None
    bandwidth_share: float | None = None
    prefill_gop_s: float | None = None
    int8_gop_s: float | None = None
    operations_share: float | None = None
    time_by_op: dict[str, OpTimes] | None = None
    skipped: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Without what is not known."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class _Run:
    """Seconds, steps and tokens of one workload's two phases. `decoded`: tokens computed after every sequence had its first."""

    prefill_s: float
    decode_s: float
    prefill_steps: int
    decode_steps: int
    decoded: int
    peak_rss_mb: int


def bench(
    path: str | os.PathLike[str], workloads: Iterable[Workload] = WORKLOADS, *, options: RuntimeOptions | None = None, profile: bool = False,
    progress: Callable[[str], None] | None = None,
) -> list[BenchResult]:
    """Loads `path` (an artifact, or an `.onnx` as it stands) and runs the workloads one after the other, after a short one to warm up.

    `profile` runs each once more, shortened, under onnxruntime's profiler. A workload that is longer than the model's context or its cache
    is skipped; CapacityError where all are. Other errors are those of `load`.
    """
    say = progress or (lambda _: None)
    options = replace(options or RuntimeOptions(), prefix_cache=False)
    start = time.perf_counter()
    model = load(path, options=options)
    load_s = time.perf_counter() - start
    runs: list[_Run | CapacityError] = []
    workloads = tuple(workloads)
    with model:
        _run(model, WARM_UP)
        for workload in workloads:
            say(f"{workload.name}: {workload.sequences} × {workload.prompt} tokens, then {workload.generate} more of each")
            runs.append(_tried(model, workload))
        if runs and all(isinstance(run, CapacityError) for run in runs):
            raise next(run for run in runs if isinstance(run, CapacityError))
        kind = model.kind
    # What follows costs memory of its own: nothing of it may happen before the last run.
    manifest = read_manifest(Path(path) / MANIFEST) if Path(path).is_dir() else None
    cost = step_cost(Path(path) / GRAPH if manifest else Path(path))
    machine = _Machine(options.num_threads)
    common = BenchResult(
        "octavo", "", load_s=round(load_s, 3), kind=kind, isa=active_isa(), threads=options.num_threads,
        configuration={name: manifest.options[name] for name in _CONFIGURATION if name in manifest.options} if manifest else None,
    )
    results = []
    for workload, run in zip(workloads, runs):
        result = replace(common, workload=workload.name)
        if isinstance(run, CapacityError):
            results.append(BenchResult("octavo", workload.name, skipped=run.message))
            continue
        result = _figures(result, workload, run, cost, manifest, machine)
        if profile:
            say(f"{workload.name}: time by op")
            result = replace(result, time_by_op=_time_by_op(path, workload, options))
        results.append(result)
    return results


def _tried(model: Model, workload: Workload) -> _Run | CapacityError:
    try:
        return _run(model, workload)
    except CapacityError as error:
        return error


def _run(model: Model, workload: Workload) -> _Run:
    """All prompts are handed in at once. Tokens that come while other prompts are still being read belong to the first phase."""
    prompts = workload.prompts(model.engine.executor.vocab_size)
    params = SamplingParams(max_tokens=workload.generate + 1, temperature=0, ignore_eos=True)
    before, streams = model.stats(), list[PieceStream]()
    tokenizer, model.tokenizer = model.tokenizer, None      # text would be made of every token
    try:
        start = time.perf_counter()
        streams += [model.stream(ids, params) for ids in prompts]
        for stream in streams:
            next(stream)
        first, between = time.perf_counter(), model.stats()
        for stream in streams:
            for _ in stream:
                pass
        end, after = time.perf_counter(), model.stats()
    finally:
        model.tokenizer = tokenizer
        for stream in streams:
            stream.close()
    return _Run(
        first - start, end - first, between["steps"] - before["steps"], after["steps"] - between["steps"], after["tokens"] - between["tokens"],
        _peak_rss_mb(),
    )


def _figures(
    result: BenchResult, workload: Workload, run: _Run, cost: StepCost, manifest: Manifest | None, machine: _Machine,
) -> BenchResult:
    result = replace(
        result, prefill_tok_s=round(workload.sequences * workload.prompt / run.prefill_s, 1), decode_tok_s=round(run.decoded / run.decode_s, 1),
        peak_rss_mb=run.peak_rss_mb,
    )
    spec = manifest.spec if manifest else None
    operations = 2 * workload.sequences * cost.prefill(workload.prompt, spec) / run.prefill_s
    result = replace(result, weight_bytes=cost.weight_bytes, prefill_gop_s=round(operations / 1e9, 1))
    if (peak := machine.int8_operations()) is not None:
        result = replace(result, int8_gop_s=round(peak / 1e9, 1), operations_share=round(operations / peak, 3))
    if spec is None or manifest is None or manifest.kind != "paged":
        return result
    cached = cache_bytes(spec, workload.prompt + workload.generate / 2)
    moved = run.decode_steps * cost.weight_bytes + run.decoded * cached
    step_bytes = round(moved / run.decode_steps)
    speed, limit = moved / run.decode_s, machine.read_bandwidth(step_bytes)
    return replace(
        result, cache_bytes=step_bytes - cost.weight_bytes, step_bytes=step_bytes, decode_gb_s=round(speed / 1e9, 2),
        read_gb_s=round(limit / 1e9, 2), bandwidth_share=round(speed / limit, 3),
    )


class _Machine:
    """The machine's limits for `threads` threads. Operations are measured once, reading for each number of bytes."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._operations: list[float | None] = []

    def int8_operations(self) -> float | None:
        from ..custom_ops import machine

        if not self._operations:
            self._operations.append(machine.int8_operations(self._threads))
        return self._operations[0]

    def read_bandwidth(self, nbytes: int) -> float:
        from ..custom_ops import machine

        return machine.read_bandwidth(nbytes, self._threads)


def _time_by_op(path: str | os.PathLike[str], workload: Workload, options: RuntimeOptions) -> dict[str, OpTimes]:
    """In a session of its own, since the profiler slows every node down."""
    with tempfile.TemporaryDirectory(prefix="octavo-bench-") as folder:
        with load(path, options=replace(options, profile=str(Path(folder) / "run"))) as model:
            warm = _run(model, WARM_UP)
            run = _run(model, replace(workload, generate=min(workload.generate, _PROFILED_TOKENS)))
        del model
        gc.collect()    # onnxruntime writes the file when the session goes
        (written,) = Path(folder).iterdir()
        skip = warm.prefill_steps + warm.decode_steps
        return read_profile(written, {"prefill": (skip, run.prefill_steps), "decode": (skip + run.prefill_steps, run.decode_steps)})


def _peak_rss_mb() -> int:
    """Of this program alone: what getrusage says can be that of the process that started it."""
    try:
        with open("/proc/self/status", encoding="ascii") as status:
            return round(next(int(line.split()[1]) for line in status if line.startswith("VmHWM:")) / 1024)
    except OSError:
        return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def to_text(results: Iterable[BenchResult]) -> Iterator[str]:
    """Lines of a table, and of the times by op below it."""
    results = list(results)
    yield f"{'workload':15} {'prefill tok/s':>13} {'decode tok/s':>12} {'MB a step':>10} {'GB/s':>6} {'of read':>7} {'Gop/s':>7} {'of int8':>7} {'peak MB':>8}"
    for r in results:
        if r.skipped is not None:
            yield f"{r.workload:15} skipped: {r.skipped}"
            continue
        yield (
            f"{r.workload:15} {r.prefill_tok_s:13,.1f} {r.decode_tok_s:12,.1f} {_cell(r.step_bytes, 10, 1e6)} {_cell(r.decode_gb_s, 6)} "
            f"{_share(r.bandwidth_share)} {_cell(r.prefill_gop_s, 7)} {_share(r.operations_share)} {r.peak_rss_mb:8}"
        )
    ran = [r for r in results if r.skipped is None]
    yield f"loaded in {ran[0].load_s} s; kind {ran[0].kind}, {ran[0].threads} threads, {ran[0].isa}; {ran[0].configuration or 'as it stands'}"
    for r in ran:
        for phase, times in (r.time_by_op or {}).items():
            total = sum(times.values())
            parts = [f"{op} {ms / total:.0%}" for op, ms in sorted(times.items(), key=lambda item: -item[1]) if ms >= total / 200]
            yield f"{r.workload}, {phase}: {', '.join(parts)} of {total:.1f} ms"


def _cell(value: float | None, width: int, unit: float = 1) -> str:
    return f"{'–':>{width}}" if value is None else f"{value / unit:{width}.1f}"


def _share(value: float | None) -> str:
    return f"{'–':>7}" if value is None else f"{value:7.0%}"

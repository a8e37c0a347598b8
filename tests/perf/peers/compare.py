"""Octavo beside llama.cpp, onnxruntime-genai and OpenVINO GenAI on the same work, in turns, and how many times the best of them it is.

    python tests/perf/peers/compare.py --octavo art/ [--rounds 3] [--log runs.jsonl] [--threads 2] [--only decode-512] [--markdown]

Each round starts every engine once, in a process of its own; the next round begins with another one. A machine is faster in one minute than in the
next: medians of one call are compared, never a figure with one of another day. `--log` keeps the lines and takes those that are there already, so
that long runs can be split into calls. `--octavo NAME=ART` may be given several times; `--llama MODEL.gguf` puts another model in llama.cpp's place.
`setup.py` makes the other engines' environments and models.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable
from datetime import date
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
HOME = Path(os.environ.get("PEERS_HOME", Path.home() / ".cache" / "octavo-peers"))
# Engine → its environment, its runner, its model, under HOME.
PEERS = {
    "llama.cpp": ("llama_cpp", "peer_llama_cpp.py", "models/q4_0.gguf"),
    "ort-genai": ("ort_genai", "peer_ort_genai.py", "models/genai"),
    "openvino": ("openvino", "peer_openvino.py", "models/ov"),
}
# Figure → its title, and whether more is better.
FIGURES = {"prefill_tok_s": ("prefill, tokens/s", True), "decode_tok_s": ("decode, tokens/s", True), "load_s": ("load, s", False),
           "peak_rss_mb": ("peak memory, MB", False)}
Row = dict[str, Any]


def commands(args: argparse.Namespace) -> dict[str, list[str]]:
    found = {}
    for given in args.octavo:
        name, _, art = given.rpartition("=")
        found[name or "octavo"] = [args.python, "-m", "octavo", "bench", art, "--json"]
    for engine in filter(None, args.engines.split(",")):
        environment, runner, model = PEERS[engine]
        path = args.llama if engine == "llama.cpp" and args.llama else HOME / model
        found[engine] = [str(HOME / environment / "bin" / "python"), str(HERE / runner), str(path)]
    shared = ["--workloads", str(args.workloads), "--threads", str(args.threads), *(word for name in args.only for word in ("--only", name))]
    return {name: command + shared for name, command in found.items()}


def measure(engine: str, command: list[str]) -> list[Row]:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{engine} ended with {done.returncode}\n{done.stderr[-2000:]}")
    return [{**json.loads(line), "engine": engine} for line in done.stdout.splitlines() if line.startswith("{")]


def medians(rows: Iterable[Row]) -> dict[tuple[str, str], dict[str, list[float]]]:
    """(workload, figure) → engine → its median, least and largest."""
    seen: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        for figure in FIGURES:
            if row.get(figure) is not None:
                seen[row["workload"], figure][row["engine"]].append(row[figure])
    return {key: {name: [statistics.median(v), min(v), max(v)] for name, v in by.items()} for key, by in seen.items()}


def ratio(figure: str, by: dict[str, list[float]], ours: str) -> tuple[str, float] | None:
    """The best peer, and how many times as good `ours` is: above 1 is better, of times and memory too."""
    more = FIGURES[figure][1]
    peers = {name: value[0] for name, value in by.items() if name in PEERS}
    if not peers or ours not in by:
        return None
    best = (max if more else min)(peers, key=lambda name: peers[name])
    mine = by[ours][0]
    return best, (mine / peers[best] if more else peers[best] / max(mine, 1e-9))


def table(rows: list[Row], markdown: bool) -> str:
    found = medians(rows)
    engines = list(dict.fromkeys(row["engine"] for row in rows))
    ours = [name for name in engines if name not in PEERS]
    head = ["workload", "figure", *engines, *(f"{name} ÷ best peer" for name in ours)]
    lines = []
    for (workload, figure), by in found.items():
        digits = 3 if figure == "load_s" else 0 if figure == "peak_rss_mb" else 1
        cells = [f"{by[e][0]:,.{digits}f} ({by[e][1]:,.{digits}f}–{by[e][2]:,.{digits}f})" if e in by else "–" for e in engines]
        against = [ratio(figure, by, name) for name in ours]
        lines.append([workload, FIGURES[figure][0], *cells, *(f"{r[1]:.2f} ({r[0]})" if r else "–" for r in against)])
    if markdown:
        return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *lines])
    widths = [max(len(line[i]) for line in [head, *lines]) for i in range(len(head))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)) for line in [head, *lines])


def limits(rows: list[Row]) -> list[str]:
    """What octavo says of itself beside the rates: medians of the shares, and the configuration that was measured."""
    lines = []
    by: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        if row["engine"] not in PEERS and "skipped" not in row:
            by[row["engine"], row["workload"]].append(row)
    for (engine, workload), runs in by.items():
        def middle(name: str, runs: list[Row] = runs) -> float:
            return statistics.median(run.get(name) or float("nan") for run in runs)

        lines.append(
            f"{engine}, {workload}: {middle('step_bytes') / 1e6:.1f} MB a step ({middle('weight_bytes') / 1e6:.1f} of weights), {middle('decode_gb_s'):.1f} of "
            f"{middle('read_gb_s'):.1f} GB/s ({middle('bandwidth_share'):.0%}); prefill {middle('prefill_gop_s'):.0f} of {middle('int8_gop_s'):.0f} "
            f"Gop/s ({middle('operations_share'):.0%}); {runs[0].get('isa')}, {runs[0].get('threads')} threads, {runs[0].get('configuration')}"
        )
    return lines


def circumstances(python: str) -> str:
    """The date, the processor and the versions."""
    fields = dict(line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines() if ":" in line)
    cpu = {name.strip(): value.strip() for name, value in fields.items()}
    environments = {python: ["octavo", "onnxruntime"], str(HOME / "llama_cpp/bin/python"): ["llama-cpp-python"],
                    str(HOME / "ort_genai/bin/python"): ["onnxruntime-genai"], str(HOME / "openvino/bin/python"): ["openvino-genai"]}
    code = "import sys; from importlib.metadata import version as v; print(', '.join(f'{n} {v(n)}' for n in sys.argv[1:]))"
    versions = [subprocess.run([p, "-c", code, *names], capture_output=True, text=True, check=False).stdout.strip()
                for p, names in environments.items() if Path(p).exists()]
    model = f"{cpu.get('model name', platform.machine())} (family {cpu.get('cpu family')}, model {cpu.get('model')}), {os.cpu_count()} CPUs"
    return f"{date.today()}; {model}; {', '.join(filter(None, versions))}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--octavo", action="append", default=[], metavar="[NAME=]ART")
    parser.add_argument("--python", default=sys.executable, help="the interpreter that has octavo")
    parser.add_argument("--llama", metavar="MODEL.gguf")
    parser.add_argument("--engines", default=",".join(PEERS), help="peers to run, with commas between; empty: none")
    parser.add_argument("--workloads", type=Path, default=HERE / "workloads.json")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="a workload to run; may be given several times")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3, help="0: only show what the log holds")
    parser.add_argument("--log", type=Path, help="JSON lines: read if it is there, and added to")
    parser.add_argument("--markdown", action="store_true")
    args = parser.parse_args()
    rows = [json.loads(line) for line in args.log.read_text().splitlines()] if args.log and args.log.exists() else []
    done = max((row["round"] + 1 for row in rows), default=0)
    turns = list(commands(args).items())
    for turn in range(done, done + args.rounds):
        for engine, command in turns[turn % len(turns) :] + turns[: turn % len(turns)]:
            new = [{**row, "round": turn} for row in measure(engine, command)]
            rows += new
            if args.log:
                with args.log.open("a") as log:
                    log.writelines(json.dumps(row) + "\n" for row in new)
            print(f"round {turn + 1}: {engine}", file=sys.stderr, flush=True)
    if rows:
        print(circumstances(args.python), f"{len({row['round'] for row in rows})} rounds, median (least–largest)\n", sep="\n")
        print(table(rows, args.markdown), "", *limits(rows), sep="\n")


if __name__ == "__main__":
    main()

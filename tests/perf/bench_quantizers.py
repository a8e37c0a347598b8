"""The table of quantizers in docs/performance.md: what each costs in bytes and at the logits, against the fp32 values of one graph.

    python tests/perf/bench_quantizers.py plain/model.onnx --text book.txt --calibration other.txt [--rows GLOB …] [--tokens 4000] [--context 500]

The graph's weights are turned into floats first, which are what is rounded; rows that say "stored" take the graph as it is. Figures are those of
`octavo eval`: mean KL with its standard error, share of rows with the same top-1 token, perplexity. Seconds are the compile's, of processor time.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from contextlib import closing
from fnmatch import fnmatchcase
from pathlib import Path
from time import process_time
from typing import Any

import octavo
from octavo.compiler.check import dequantized
from octavo.compiler.evaluate import evaluate_runners, token_ids, windows_of
from peers.quality import Kept

HEAD8, DOWN = {"head": "int8", "*": "int4"}, {"layers.*.mlp.down": "int4", "*": "fp32"}
_PLAIN = {"group_size": 64, "zero_point": "none"}
_METHODS = ("rtn", "search", "gptq")
# Name → options beside kv_cache="int8".
ROWS: dict[str, dict[str, Any]] = {
    "stored fp32": {"weights": "stored", "activations": "fp32", "kv_cache": "fp32"},
    "stored": {"weights": "stored"},
    "fp32": {"weights": "fp32"},
    "int8 g32 search": {"weights": "int8", "group_size": 32},
    "int8 g64 search": {"weights": "int8", "group_size": 64},
    "int8 g64 static activations": {"weights": "int8", "group_size": 64, "activations": "int8-static"},
    **{f"int4 minimums g64 budget {size}": {"weights": "int4", "weight_budget": size} for size in ("89MB", "100MB")},
    **{f"int4 minimums g64 head8 {method}": {"weights": HEAD8, "quantizer": method} for method in ("rtn", "search", "hqq", "gptq")},
    "int4 minimums g64 search": {"weights": {"*": "int4"}},
    "int4 zero points g64 head8 search": {"weights": HEAD8, "zero_point": "uint8"},
    **{f"int4 symmetric g32 head8 {method}": {"weights": HEAD8, "group_size": 32, "zero_point": "none", "quantizer": method} for method in _METHODS},
    "int4 symmetric g32 search": {"weights": {"*": "int4"}, "group_size": 32, "zero_point": "none"},
    **{f"int4 symmetric g64 head8 {method}": {"weights": HEAD8, **_PLAIN, "quantizer": method} for method in _METHODS},
    **{f"int4 symmetric g64 {method}": {"weights": {"*": "int4"}, **_PLAIN, "quantizer": method} for method in _METHODS},
    **{
        f"down symmetric g{size} {method}": {"weights": DOWN, "group_size": size, "zero_point": "none", "quantizer": method}
        for size in (64, 128) for method in _METHODS
    },
}  # fmt: skip


def calibrated(options: dict[str, Any]) -> bool:
    """Whether a row takes the calibration text."""
    return options.get("quantizer") == "gptq" or "weight_budget" in options or options.get("activations") == "int8-static"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", required=True, type=Path)
    parser.add_argument("--calibration", required=True, type=Path)
    parser.add_argument("--rows", nargs="+", default=["*"], metavar="GLOB", help=f"of: {', '.join(ROWS)}")
    parser.add_argument("--tokens", type=int, default=4000)
    parser.add_argument("--context", type=int, default=500)
    args = parser.parse_args()
    windows = list(windows_of(token_ids(args.model, args.text)[: args.tokens], args.context))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        floats = dequantized(args.model, folder)
        for beside in args.model.parent.glob("*.json"):
            shutil.copy(beside, folder)
        with closing(octavo.load(floats, options=octavo.RuntimeOptions(optimize_graph=False))) as model:
            reference = Kept(folder)
            reference.keep(model, windows)
        print("| row | MB | mean KL | top-1 | perplexity | compile, CPU s |\n|---|---|---|---|---|---|")
        for name, given in ROWS.items():
            if not any(fnmatchcase(name, pattern) for pattern in args.rows):
                continue
            options: dict[str, Any] = {"kv_cache": "int8", **given}
            if calibrated(options):
                options["calibration"] = args.calibration
            start = process_time()
            octavo.compile(args.model if "stored" in name else floats, folder / "art", options=octavo.CompileOptions(**options))
            seconds = process_time() - start
            with closing(octavo.load(folder / "art")) as model:
                figures = evaluate_runners(model, reference, windows)
            far, size = figures["divergence"], (folder / "art" / "model.onnx.data").stat().st_size / 1e6
            kl = f"{far.mean_kl:.3g} ± {far.mean_kl_error:.1g}"
            print(f"| {name} | {size:.1f} | {kl} | {far.top1:.1%} | {figures['perplexity']:.1f} | {seconds:.0f} |", flush=True)
            shutil.rmtree(folder / "art")


if __name__ == "__main__":
    main()

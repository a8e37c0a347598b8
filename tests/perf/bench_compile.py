"""What a compile costs: seconds on one core and the most memory, by stage; and how long a graph of 3,000 nodes takes to be matched.

    taskset -c 0 python tests/perf/bench_compile.py [model.onnx …]

Each model is compiled in a process of its own with `weights="fp32"` and without the closing check. Memory is the process's peak, and the
peak less what an idle `import octavo` takes; both are set against the bytes of the weights as float32. Without arguments only the synthetic
graph is measured: a decoder of TINY sizes with as many layers as give 3,000 nodes, normalized, observed, matched and planned.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter, process_time

NODES = 3000


def _peak() -> float:
    """Bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def compile_one(path: str) -> None:
    import octavo

    before = _peak()
    with tempfile.TemporaryDirectory() as folder:
        start, used = perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
        report = octavo.compile(path, Path(folder) / "out", options=octavo.CompileOptions(weights="fp32"))
        seconds, usage = perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
        cpu = usage.ru_utime + usage.ru_stime - used.ru_utime - used.ru_stime
        weights = sum(file.stat().st_size for file in (Path(folder) / "out").glob("*.data"))
    peak = _peak()
    print(f"{path}: {report.kind}, {len(report.sites)} sites, {report.sizes.nodes_before} → {report.sizes.nodes_after} nodes")
    print(f"  {seconds:.2f} s ({cpu:.2f} s of CPU), peak {peak / 1e6:.0f} MB = {peak / weights:.2f} × {weights / 1e6:.0f} MB of weights,"
          f" {(peak - before) / weights:.2f} × beyond the import")
    stages: dict[str, float] = {}
    for outcome in report.outcomes:
        stages[outcome.stage] = stages.get(outcome.stage, 0.0) + outcome.seconds
    print("  " + ", ".join(f"{name} {value:.2f}" for name, value in sorted(stages.items(), key=lambda item: -item[1]) if value >= 0.01))


def match_synthetic() -> None:
    """A decoder in TorchScript's and dynamo's manner: attention in products and masks by hand, sizes asked of shapes."""
    import onnx_ir as ir
    from octavo.models.onnx_reader import graph_interface
    from octavo.models.tiny import build_llama, tiny_config, tiny_weights
    from octavo.passes.attention.match import match_attention, sites_of
    from octavo.passes.cache_interface import plan_token_flat
    from octavo.passes.normalize import Normalize
    from octavo.passes.observe import observe

    def decoder(layers: int) -> ir.Model:
        config = tiny_config("llama", num_hidden_layers=layers)
        return build_llama(config, tiny_weights(config, 0))

    layers = 1 + (NODES - len(decoder(1).graph)) // (len(decoder(2).graph) - len(decoder(1).graph)) + 1
    model = decoder(layers)
    times = [process_time()]
    Normalize()(model)
    times.append(process_time())
    observation = observe(model, graph_interface(model))
    times.append(process_time())
    found = match_attention(model, observation, max_context=4096)
    times.append(process_time())
    plan_token_flat(observation, sites_of(found), max_context=4096)
    times.append(process_time())
    spans = ", ".join(f"{name} {b - a:.2f} s" for name, a, b in zip(("normalize", "observe", "match", "plan"), times, times[1:]))
    print(f"{len(model.graph)} nodes, {layers} layers, {len(sites_of(found))} sites, CPU: {spans}")


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[1] == "--one":
        compile_one(sys.argv[2])
    else:
        match_synthetic()
        for model_path in sys.argv[1:]:
            subprocess.run([sys.executable, __file__, "--one", model_path], check=True)

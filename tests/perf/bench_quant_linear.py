"""QuantLinear on the linears of whole models, beside what the machine can give (roofline.cc): prints, asserts nothing about time.

    python tests/perf/bench_quant_linear.py [--model smollm2] [--rows 1,2,4,8,16,32,512] [--threads 1,2] [--formats 4:32:none,8:32:none] [--by-shape]

A format is bits:group:zero point. A configuration runs one graph a shape, of many nodes with weights of their own: as many bytes as the model has (300 MB at
most), so that they come from where they come from in a model. Rounds go over all configurations in turn, and the shortest time of each shape
counts; the time of a token is the sum over the model's nodes. GB/s counts packed weight bytes, `of read` is its share of the bandwidth of a plain
read of as many bytes on as many threads; Gop/s counts a multiply-add as two, `of peak` is its share of byte products without memory.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort
from octavo import custom_ops
from octavo.custom_ops.contract import DOMAIN, OPSET, WeightFormat
from octavo.custom_ops.packing import QuantizedWeight, pack
from onnx import TensorProto, helper

_MOST_BYTES = 3e8


@dataclass(frozen=True)
class Shape:
    name: str
    K: int
    M: int
    gate: int
    per_token: int  # nodes of this shape in the model

    def copies(self, nbytes: int, total: int, rows: int) -> int:
        """Nodes of one graph: `total` bytes of weights, or fewer where many rows make the arithmetic long anyway."""
        return max(1, round((min(total, _MOST_BYTES) if rows <= 32 else 2e6) / nbytes))


def _llama(layers: int, hidden: int, kv: int, ffn: int, vocabulary: int) -> tuple[Shape, ...]:
    return (
        Shape("qkv", hidden, hidden + 2 * kv, 0, layers),
        Shape("out", hidden, hidden, 0, layers),
        Shape("gate_up", hidden, ffn, 1, layers),
        Shape("down", ffn, hidden, 0, layers),
        Shape("head", hidden, vocabulary, 0, 1),
    )


MODELS = {
    "smollm2": _llama(30, 576, 192, 1536, 49152),
    "0.5b": _llama(24, 896, 128, 4864, 151936),
    "1b": _llama(16, 2048, 512, 8192, 128256),
}


def best_time(run: Callable[[], object], seconds: float) -> float:
    """Of at least three runs, the shortest."""
    run()
    best, until, count = float("inf"), time.perf_counter() + seconds, 0
    while count < 3 or time.perf_counter() < until:
        start = time.perf_counter()
        run()
        best, count = min(best, time.perf_counter() - start), count + 1
    return best


def limits(megabytes: int) -> dict[tuple[str, int], float]:
    """("read", threads) in GB/s over so many megabytes, and ("dot", threads) in Gop/s."""
    with tempfile.TemporaryDirectory() as folder:
        program = f"{folder}/roofline"
        source = str(Path(__file__).with_name("roofline.cc"))
        subprocess.run(["c++", "-O3", "-march=native", "-pthread", source, "-o", program], check=True)
        lines = subprocess.run([program, str(megabytes)], check=True, capture_output=True, text=True).stdout.split("\n")
    words = [line.split() for line in lines if line]
    return {(w[0], int(w[-2])): float(w[-1]) for w in words}


@dataclass(frozen=True)
class Format:
    bits: int
    group: int
    zero: str

    def __str__(self) -> str:
        return f"{self.bits} bits, g{self.group}" + ("" if self.zero == "none" else f", {self.zero} zero")


def weight_of(shape: Shape, fmt: Format) -> tuple[np.ndarray, WeightFormat]:
    rng = np.random.default_rng(0)
    N, G = shape.M * (2 if shape.gate else 1), shape.K // fmt.group
    weight = QuantizedWeight(
        rng.integers(0, 1 << fmt.bits, (N, shape.K), dtype=np.uint8),
        (rng.random((N, G)) * 0.01).astype(np.float16),
        fmt.bits,
        fmt.group,
        rng.integers(0, 1 << fmt.bits, (N, G), dtype=np.uint8) if fmt.zero == "uint8" else None,
        rng.random((N, G)).astype(np.float16) if fmt.zero == "float" else None,
    )
    return pack(weight, gated=bool(shape.gate)), weight.format(gated=bool(shape.gate))


def run_of(shape: Shape, packed: np.ndarray, fmt: WeightFormat, total: int, rows: int, threads: int, activation_bits: int) -> tuple[Callable[[], object], int]:
    """A call that runs all copies once, and their number."""
    copies = shape.copies(fmt.nbytes, total, rows)
    attributes = {**fmt.attributes(), "gate": shape.gate, "activation_bits": activation_bits}
    nodes = [helper.make_node("QuantLinear", ["x", f"w{i}"], [f"y{i}"], domain=DOMAIN, **attributes) for i in range(copies)]
    graph = helper.make_graph(
        nodes,
        "bench",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [rows, shape.K])],
        [helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, [rows, shape.M]) for i in range(copies)],
        initializer=[helper.make_tensor(f"w{i}", TensorProto.UINT8, [fmt.nbytes], packed.tobytes(), raw=True) for i in range(copies)],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid(DOMAIN, OPSET)]
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    custom_ops.register(options)
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString()
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    x = np.random.default_rng(1).standard_normal((rows, shape.K)).astype(np.float32)
    y = np.empty((rows, shape.M), np.float32)  # one buffer for all: nobody reads it
    binding.bind_ortvalue_input("x", ort.OrtValue.ortvalue_from_numpy(x))
    for i in range(copies):
        binding.bind_output(f"y{i}", "cpu", 0, np.float32, y.shape, y.ctypes.data)
    return lambda: (session.run_with_iobinding(binding), y), copies


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="smollm2", choices=MODELS)
    parser.add_argument("--rows", default="1,2,4,8,16,32,512")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--formats", default="4:32:none")
    parser.add_argument("--activation-bits", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=0.1, help="how long each shape is measured in a round")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--by-shape", action="store_true")
    args = parser.parse_args()
    shapes, rows_of, threads_of = MODELS[args.model], [*map(int, args.rows.split(","))], [*map(int, args.threads.split(","))]
    formats = [Format(int(bits), int(group), zero) for bits, group, zero in (f.split(":") for f in args.formats.split(","))]
    print(f"{custom_ops.active_isa()}, {args.model}, activations of {args.activation_bits} bits")
    print("| weights | threads | rows | tokens/s | GB/s | of read | Gop/s | of peak |\n|---|---|---|---|---|---|---|---|")
    for form in formats:
        weights = {s.name: weight_of(s, form) for s in shapes}
        total = sum(weights[s.name][1].nbytes * s.per_token for s in shapes)
        operations = sum(2.0 * s.K * weights[s.name][1].outputs * s.per_token for s in shapes)
        best: dict[tuple[int, int, str], float] = {}
        reached: dict[tuple[str, int], float] = {}
        for _ in range(args.rounds):
            for limit, value in limits(round(total / 1e6)).items():
                reached[limit] = max(value, reached.get(limit, 0.0))
            for threads in threads_of:
                for rows in rows_of:
                    for shape in shapes:
                        run, copies = run_of(shape, *weights[shape.name], total, rows, threads, args.activation_bits)
                        key = (threads, rows, shape.name)
                        best[key] = min(best_time(run, args.seconds) / copies, best.get(key, float("inf")))
        for threads in threads_of:
            for rows in rows_of:
                token = sum(best[threads, rows, s.name] * s.per_token for s in shapes)
                read, dots = total / token / 1e9, rows * operations / token / 1e9
                of_read, of_peak = read / reached["read", threads], dots / reached["dot", threads]
                print(f"| {form} ({total / 1e6:.0f} MB) | {threads} | {rows} | {rows / token:.0f} | {read:.1f} | {of_read:.0%} | {dots:.0f} | {of_peak:.0%} |")
                for shape in shapes if args.by_shape else ():
                    seconds, fmt = best[threads, rows, shape.name], weights[shape.name][1]
                    rate = 2e-9 * rows * shape.K * fmt.outputs / seconds
                    print(f"    {shape.name:8s} {seconds * 1e6:9.1f} µs {fmt.nbytes / seconds / 1e9:7.1f} GB/s {rate:7.0f} Gop/s")


if __name__ == "__main__":
    main()

"""QuantLinear on the shapes of SmolLM2-135M beside what the machine can read: prints, asserts nothing about time.

    python tests/perf/bench_quant_linear.py [--rows 1,2,4,8,16,32,512] [--threads 1,2] [--group 32] [--bits 4] [--zero none] [--shapes qkv,head]

Each figure is the best of a few runs of a graph of many nodes, each with a weight of its own: as many bytes as the whole model, so that weights come
from where they come from in a model. GB/s counts packed weight bytes; `read` is the bandwidth of reading as many bytes with memchr on as many
threads; Gop/s counts a multiply-add as two. `all` is the sum over 30 layers and the head.
"""

from __future__ import annotations

import argparse
import ctypes
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import onnxruntime as ort
from octavo import custom_ops
from octavo.custom_ops.contract import DOMAIN, OPSET, WeightFormat
from octavo.custom_ops.packing import QuantizedWeight, pack
from onnx import TensorProto, helper

_MEMCHR = ctypes.CDLL(None).memchr
_MEMCHR.restype, _MEMCHR.argtypes = ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]


@dataclass(frozen=True)
class Shape:
    name: str
    K: int
    M: int
    gate: int
    per_token: int  # nodes of this shape in the model

    def copies(self, nbytes: int, total: int, rows: int) -> int:
        """Nodes of one graph: `total` bytes of weights, or fewer where many rows make the arithmetic long anyway."""
        return max(1, round((total if rows <= 32 else 2e6) / nbytes))


SHAPES = (
    Shape("qkv", 576, 960, 0, 30),
    Shape("out", 576, 576, 0, 30),
    Shape("gate_up", 576, 1536, 1, 30),
    Shape("down", 1536, 576, 0, 30),
    Shape("head", 576, 49152, 0, 1),
)


def best_time(run: Callable[[], object], seconds: float) -> float:
    """Of at least three runs, the shortest."""
    run()
    best, until, count = float("inf"), time.perf_counter() + seconds, 0
    while count < 3 or time.perf_counter() < until:
        start = time.perf_counter()
        run()
        best, count = min(best, time.perf_counter() - start), count + 1
    return best


def read_bandwidth(nbytes: int, threads: int, seconds: float) -> float:
    """Bytes a second of reading `nbytes` that no write touched since the last pass."""
    data = np.ones(nbytes, np.uint8)
    part = nbytes // threads
    starts = [data.ctypes.data + i * part for i in range(threads)]
    with ThreadPoolExecutor(threads) as pool:
        return part * threads / best_time(lambda: list(pool.map(lambda at: _MEMCHR(at, 0, part), starts)), seconds)


def weight_of(shape: Shape, args: argparse.Namespace) -> tuple[np.ndarray, WeightFormat]:
    rng = np.random.default_rng(0)
    N, G = shape.M * (2 if shape.gate else 1), shape.K // args.group
    weight = QuantizedWeight(
        rng.integers(0, 1 << args.bits, (N, shape.K), dtype=np.uint8),
        (rng.random((N, G)) * 0.01).astype(np.float16),
        args.bits,
        args.group,
        rng.integers(0, 1 << args.bits, (N, G), dtype=np.uint8) if args.zero == "uint8" else None,
        rng.random((N, G)).astype(np.float16) if args.zero == "float" else None,
    )
    return pack(weight, gated=bool(shape.gate)), weight.format(gated=bool(shape.gate))


def run_of(
    shape: Shape, packed: np.ndarray, fmt: WeightFormat, total: int, rows: int, threads: int, args: argparse.Namespace
) -> tuple[Callable[[], object], int]:
    """A call that runs all copies once, and their number."""
    copies = shape.copies(fmt.nbytes, total, rows)
    attributes = {**fmt.attributes(), "gate": shape.gate, "activation_bits": args.activation_bits}
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
    parser.add_argument("--rows", default="1,2,4,8,16,32,512")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--shapes", default=",".join(s.name for s in SHAPES))
    parser.add_argument("--group", type=int, default=32)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--zero", default="none", choices=("none", "uint8", "float"))
    parser.add_argument("--activation-bits", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=0.3, help="how long each figure is measured")
    args = parser.parse_args()
    shapes = [s for s in SHAPES if s.name in args.shapes.split(",")]
    weights = {s.name: weight_of(s, args) for s in shapes}
    total = sum(weights[s.name][1].nbytes * s.per_token for s in shapes)
    print(f"{custom_ops.active_isa()}, {args.bits} bits, groups of {args.group}, zero point {args.zero}, {total / 1e6:.0f} MB of weights a token")
    for threads in map(int, args.threads.split(",")):
        print(f"\n{threads} thread(s), read {read_bandwidth(total, threads, args.seconds) / 1e9:.1f} GB/s over {total / 1e6:.0f} MB")
        for rows in map(int, args.rows.split(",")):
            token = 0.0
            for shape in shapes:
                packed, fmt = weights[shape.name]
                run, copies = run_of(shape, packed, fmt, total, rows, threads, args)
                seconds = best_time(run, args.seconds) / copies
                token += seconds * shape.per_token
                operations = 2.0 * rows * shape.K * fmt.outputs
                rates = f"{fmt.nbytes / seconds / 1e9:7.1f} GB/s {operations / seconds / 1e9:7.0f} Gop/s"
                print(f"  rows {rows:4d} {shape.name:8s} {seconds * 1e6:9.1f} µs {rates}")
            print(f"  rows {rows:4d} all      {token * 1e6:9.1f} µs {total / token / 1e9:7.1f} GB/s  {rows / token:9.0f} tokens/s")


if __name__ == "__main__":
    main()

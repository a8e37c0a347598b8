"""PagedAttention on the shapes of SmolLM2-135M: prints, asserts nothing about time.

    python tests/perf/bench_paged_attention.py [--caches fp16,int8] [--threads 1,2] [--decode 512,4096] [--batch 16x512] [--prefill 2048]
        [--heads 9,3,64] [--layers 30] [--features window,softcap,sink,alibi,tree]

Each figure is the best of a few runs of a graph of many nodes in a row, each with a cache of its own, so that keys and values come from where they come
from in a model. GB/s counts the bytes of the keys and values that a step reads; Gop/s a multiply-add as two, causal keys alone.
`--features` measures one more thing each, at the first of `--decode` and `--prefill`: what it costs over plain attention. `window` is a
quarter of the context, `tree` a draft of 16 rows beside the chain of the same rows.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np
import onnxruntime as ort
from bench_quant_linear import best_time
from octavo import custom_ops
from octavo.custom_ops.contract import CACHE_FORMATS, DOMAIN, OPSET
from onnx import TensorProto, helper

P = 32
_TYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "uint8": TensorProto.UINT8}


def aligned(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """Zeros that start at a multiple of 64 bytes, as the runtime allocates caches."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.zeros(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


class Layers:
    """`count` nodes with caches for B sequences of S tokens, filled by a prefill. `feature` is one beside plain attention."""

    def __init__(self, cache: str, heads: tuple[int, int, int], count: int, B: int, S: int, threads: int, feature: str = "") -> None:
        self.H, self.G, self.D = heads
        self.B, self.S, self.count = B, S, count
        fmt = CACHE_FORMATS[cache]  # type: ignore[index]
        blocks = -(-S // P)
        self.table = np.random.default_rng(0).permutation(B * blocks).reshape(B, blocks).astype(np.int32)
        shapes = {"key_cache": fmt.key_shape(B * blocks, self.G, self.D, P), "value_cache": fmt.value_shape(B * blocks, self.G, self.D, P)}
        self.caches = {f"{name}{i}": aligned(shape, fmt.dtype) for name, shape in shapes.items() for i in range(count)}
        nodes, wide = [], (self.H + 2 * self.G) * self.D
        names = ["query", "", "", "key_cache{}", "value_cache{}", "cumulative_sequence_length", "past_seqlens", "block_table", "cos_cache", "sin_cache",
                 "slot_mapping", "sink" if feature == "sink" else "", "", "", "", "", "", "parent", "slopes" if feature == "alibi" else ""]  # fmt: skip
        attributes = {"softcap": {"softcap": 30.0}, "window": {"local_window_size": S // 4}}.get(feature, {})
        for i in range(count):
            node = helper.make_node("PagedAttention", [n.format(i) for n in names], [f"y{i}"], domain=DOMAIN, num_heads=self.H, kv_num_heads=self.G)
            node.attribute.extend(helper.make_attribute(name, value) for name, value in attributes.items())
            nodes.append(node)
        given = [("query", TensorProto.FLOAT, ["T", wide]), *((n, TensorProto.INT32, None) for n in (*names[5:8], "slot_mapping", "parent"))]
        given += [(n, TensorProto.FLOAT, ["C", self.D // 2]) for n in ("cos_cache", "sin_cache")]
        given += [(n, TensorProto.FLOAT, [self.H]) for n in ("sink", "slopes") if n in names]
        given += [(n, _TYPES[fmt.dtype], list(a.shape)) for n, a in self.caches.items()]
        graph = helper.make_graph(
            nodes,
            "bench",
            [helper.make_tensor_value_info(*g) for g in given],
            [helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, None) for i in range(count)],
        )
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        custom_ops.register(options)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18), helper.make_opsetid(DOMAIN, OPSET)], ir_version=9)
        self.session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        angle = np.arange(S)[:, None] / 10000.0 ** (np.arange(self.D // 2) / (self.D // 2))
        self.tables = {n: (2.0 ** -np.arange(1, self.H + 1)).astype(np.float32) for n in ("sink", "slopes") if n in names}
        self.tables |= {"cos_cache": np.cos(angle).astype(np.float32), "sin_cache": np.sin(angle).astype(np.float32)}

    def bytes_read(self, cache: str) -> int:
        return self.count * self.B * self.S * CACHE_FORMATS[cache].bytes_per_token(self.G, self.D, self.D)  # type: ignore[index]

    def step(self, past: int, new: int, *, tree: bool = False) -> Callable[[], object]:
        """A call that appends `new` tokens to each sequence after `past` ones, in every layer. `tree`: as two branches of one root."""
        T, positions = self.B * new, np.tile(np.arange(past, past + new), self.B)
        rows = np.repeat(np.arange(self.B), new)
        parent = np.arange(-1, T - 1, dtype=np.int32)
        parent[::new] = -1
        if tree:
            parent = np.arange(-2, T - 2, dtype=np.int32)
            parent[:2] = -1
        feeds = {
            "query": np.random.default_rng(1).standard_normal((T, (self.H + 2 * self.G) * self.D)).astype(np.float32),
            "cumulative_sequence_length": np.arange(self.B + 1, dtype=np.int32) * new,
            "past_seqlens": np.full(self.B, past, np.int32),
            "block_table": self.table,
            "slot_mapping": (self.table[rows, positions // P] * P + positions % P).astype(np.int32),
            "parent": parent,
            **self.tables,
            **self.caches,
        }
        binding = self.session.io_binding()
        for name, array in feeds.items():
            binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))
        y = np.empty((T, self.H * self.D), np.float32)  # one buffer for all: nobody reads it
        for i in range(self.count):
            binding.bind_output(f"y{i}", "cpu", 0, np.float32, y.shape, y.ctypes.data)
        return lambda: (self.session.run_with_iobinding(binding), y, feeds)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--caches", default="fp16,int8")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--decode", default="512,4096")
    parser.add_argument("--batch", default="16x512")
    parser.add_argument("--prefill", default="2048")
    parser.add_argument("--heads", default="9,3,64")
    parser.add_argument("--features", default="")
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=0.5, help="how long each figure is measured")
    args = parser.parse_args()
    heads = tuple(map(int, args.heads.split(",")))
    assert len(heads) == 3
    features = [f for f in args.features.split(",") if f]
    decodes = [(1, int(S)) for S in args.decode.split(",") if S] + [tuple(map(int, b.split("x"))) for b in args.batch.split(",") if b]
    print(f"{custom_ops.active_isa()}, H G D {heads}, blocks of {P}")
    for threads in map(int, args.threads.split(",")):
        for cache in args.caches.split(","):
            for B, S in decodes:
                layers = Layers(cache, heads, args.layers, B, S, threads)
                layers.step(0, S - 1)()
                seconds = best_time(layers.step(S - 1, 1), args.seconds)
                rate = layers.bytes_read(cache) / seconds / 1e9
                print(f"{threads} thread(s) {cache} decode {B:2d} x {S:5d}: {seconds / args.layers * 1e6:8.1f} µs a layer {rate:6.1f} GB/s")
            for S in map(int, args.prefill.split(",") if args.prefill else ()):
                count = 3
                seconds = best_time(Layers(cache, heads, count, 1, S, threads).step(0, S), args.seconds) / count
                rate = 2.0 * S * (S + 1) * heads[0] * heads[2] / seconds / 1e9
                print(f"{threads} thread(s) {cache} prefill {S}: {seconds * 1e3:8.2f} ms a layer {rate:6.0f} Gop/s, 30 layers {S / seconds / 30:6.0f} tokens/s")
            for feature in features:
                S = decodes[0][1]
                layers = Layers(cache, heads, args.layers, 1, S, threads, feature)
                layers.step(0, S - 1)()
                new = 16 if feature == "tree" else 1
                runs = [layers.step(S - new, new, tree=tree) for tree in ([False, True] if feature == "tree" else [False])]
                spent = " chain, ".join(f"{best_time(run, args.seconds) / args.layers * 1e6:8.1f} µs a layer" for run in runs)
                print(f"{threads} thread(s) {cache} {feature:8s} decode {S}: {spent}")
            if features and args.prefill:
                S = int(args.prefill.split(",")[0])
                for feature in features:
                    if feature != "tree":
                        seconds = best_time(Layers(cache, heads, 3, 1, S, threads, feature).step(0, S), args.seconds) / 3
                        print(f"{threads} thread(s) {cache} {feature:8s} prefill {S}: {seconds * 1e3:8.2f} ms a layer")


if __name__ == "__main__":
    main()

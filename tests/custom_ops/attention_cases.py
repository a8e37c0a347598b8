"""The declared cases of both ops. Contract, NumPy reference, onnxscript function and C++ kernels all run over this one list.

A case is a frozen description; `build()` turns it into inputs, always the same ones. Memory that no row may see is filled with NaN.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from typing import Any

import numpy as np
from octavo.custom_ops.contract import CACHE_FORMATS
from octavo.custom_ops.reference import Heads, Int8Pages, Pages, normalize

Array = np.ndarray
EPS = float(np.finfo(np.float32).eps)


@dataclass(frozen=True)
class Features:
    """What both ops can do beside plain attention. Every value other than the default is a feature in use."""

    scale: float = 0.0
    softcap: float = 0.0
    window: int = -1
    sink: bool = False
    slopes: bool = False

    def attributes(self, H: int, G: int) -> dict[str, Any]:
        return {"num_heads": H, "kv_num_heads": G, "scale": self.scale, "softcap": self.softcap, "local_window_size": self.window}


@dataclass(frozen=True)
class PagedCase:
    """`sequences` are (tokens cached before, tokens of this step). `trees` gives the parents of a sequence, relative to its first row."""

    name: str
    H: int = 4
    G: int = 2
    D: int = 16
    E: int = 16
    P: int = 16
    cache: str = "fp32"
    sequences: tuple[tuple[int, int], ...] = ((0, 5),)
    features: Features = Features()
    rotary: int = 0
    interleaved: int = 0
    chunk: int = -1
    qk_norm: bool = False
    packed: bool = False  # query holds key and value too
    rewritten: tuple[int, ...] = ()  # rows whose slot is −1: the cache holds their key and value already
    trees: dict[int, tuple[int, ...]] = dataclass_field(default_factory=dict)

    @property
    def attributes(self) -> dict[str, Any]:
        return {**self.features.attributes(self.H, self.G), "rotary_interleaved": self.interleaved, "chunk_size": self.chunk}

    @property
    def heads(self) -> Heads:
        return Heads(self.H, self.G, self.features.scale, self.features.softcap, self.features.window)

    def build(self, nothing: int = 255) -> dict[str, Array]:
        """All inputs by the contract's names. Blocks lie shuffled in the pool; three of them belong to nobody. `nothing` fills what an int8
        cache does not hold; a scale of bytes 255 is NaN."""
        rng = np.random.default_rng(zlib.crc32(self.name.encode()))
        dtype = np.dtype(CACHE_FORMATS[self.cache].dtype)  # type: ignore[index]
        P, T = self.P, sum(new for _, new in self.sequences)
        parents, positions = self._forest()
        spare = {b: sum(p != i - 1 for i, p in enumerate(tree)) for b, tree in self.trees.items()}
        needs = [-(-(past + new) // P) if new else 0 for past, new in self.sequences]
        N = sum(needs) + sum(-(-n // P) for n in spare.values()) + 3
        free = list(rng.permutation(N))
        table = np.full((len(self.sequences), max([*needs, 0]) + 2), -1, np.int32)
        for b, need in enumerate(needs):
            table[b, :need] = [free.pop() for _ in range(need)]

        poison = nothing if self.cache == "int8" else np.nan
        key_cache = np.full(CACHE_FORMATS[self.cache].key_shape(N, self.G, self.D, P), poison, dtype)  # type: ignore[index]
        value_cache = np.full(CACHE_FORMATS[self.cache].value_shape(N, self.G, self.E, P), poison, dtype)  # type: ignore[index]
        pages = Int8Pages(key_cache, value_cache, self.D, self.E) if self.cache == "int8" else Pages(key_cache, value_cache)

        def put(slot: int) -> None:
            k, v = (rng.standard_normal((self.G, width)).astype(np.float32) for width in (self.D, self.E))
            pages.append(*divmod(slot, P), k, v)

        slots, row = np.zeros(T, np.int32), 0
        for b, (past, new) in enumerate(self.sequences):
            if new == 0:
                continue
            first_seen = 0 if self.features.window < 0 else max(0, past - self.features.window + 1)
            for position in range(first_seen, past):
                put(int(table[b, position // P]) * P + position % P)
            table[b, : first_seen // P] = -1  # what a window has released may be unmapped
            taken: set[int] = set()
            extra: list[int] = []
            for t in range(row, row + new):
                position = int(positions[t])
                if position in taken:  # a sibling in a draft tree: any slot of the sequence's own
                    if not extra:
                        block = free.pop()
                        extra = list(range(block * P, block * P + P))
                    slots[t] = extra.pop(0)
                else:
                    slots[t] = table[b, position // P] * P + position % P
                taken.add(position)
                if t in self.rewritten:
                    put(int(slots[t]))
                    slots[t] = -1
            row += new

        inputs: dict[str, Array] = {
            "query": rng.standard_normal((T, self.H * self.D)).astype(np.float32),
            "key": rng.standard_normal((T, self.G * self.D)).astype(np.float32),
            "value": rng.standard_normal((T, self.G * self.E)).astype(np.float32),
            "key_cache": key_cache,
            "value_cache": value_cache,
            "cumulative_sequence_length": np.cumsum([0, *(new for _, new in self.sequences)]).astype(np.int32),
            "past_seqlens": np.array([past for past, _ in self.sequences], np.int32),
            "block_table": table,
            "slot_mapping": slots,
            "parent": parents,
        }
        if self.rotary:
            C = max((past + new for past, new in self.sequences), default=1)
            angle = np.arange(C)[:, None] / 100.0 ** (np.arange(self.rotary // 2) / (self.rotary // 2))
            inputs["cos_cache"] = np.cos(angle).astype(np.float32)
            inputs["sin_cache"] = np.sin(angle).astype(np.float32)
        if self.qk_norm:
            inputs |= {name: rng.standard_normal(self.D).astype(np.float32) + 2 for name in ("q_norm_weight", "k_norm_weight")}
        _add_head_inputs(inputs, self.features, self.H, rng)
        if self.packed:
            inputs["query"] = np.concatenate([inputs["query"], inputs.pop("key"), inputs.pop("value")], axis=1)
        return inputs

    def _forest(self) -> tuple[Array, Array]:
        parents: list[int] = []
        positions: list[int] = []
        for b, (past, new) in enumerate(self.sequences):
            row = len(parents)
            for p in self.trees.get(b, tuple(range(-1, new - 1))):
                parents.append(-1 if p < 0 else row + p)
                positions.append(past if p < 0 else positions[row + p] + 1)
            assert len(parents) == row + new
        return np.array(parents, np.int32), np.array(positions, np.int32)

    def tolerance(self, inputs: dict[str, Array]) -> float:
        longest = max((past + new for past, new in self.sequences), default=0)
        H, G, D = self.H, self.G, self.D
        q, k, v = np.split(inputs["query"], [H * D, (H + G) * D], axis=1) if self.packed else (inputs[n] for n in ("query", "key", "value"))
        if self.qk_norm:
            q, k = (normalize(x.reshape(len(x), -1, D), inputs[f"{n}_norm_weight"], 1e-6) for n, x in (("q", q), ("k", k)))
        if self.cache != "int8":  # elements of the int8 cache were drawn as those of the step
            k, v = (np.concatenate([x.ravel(), inputs[n][np.isfinite(inputs[n])].astype(np.float32)]) for x, n in ((k, "key_cache"), (v, "value_cache")))
        exact = tolerance(self.heads, self.D, keys_seen=longest, q=q, k=k, v=v)
        return exact + 3e-6 * float(np.abs(v).max(initial=0)) if self.cache == "int8" else exact  # the short exp

    def assert_agrees(self, got: Array, expected: Array, inputs: dict[str, Array]) -> None:
        """Within the tolerance. With an int8 cache, a probability that lies near the middle between two of its 255 steps may take the other one:
        that happens to few heads of few rows, and is worth 1/255 of the largest value at most, two of them twice that."""
        allowed = self.tolerance(inputs)
        if self.cache != "int8":
            np.testing.assert_allclose(got, expected, rtol=0, atol=allowed)
            return
        error = np.abs(got - expected).reshape(-1, self.E).max(axis=1, initial=0)
        value = inputs["query"] if self.packed else inputs["value"]
        assert (error <= allowed + 2 / 255 * max(4.0, float(np.abs(value).max(initial=0)))).all(), error.max()
        assert (error > allowed).sum() <= 2 + 0.05 * error.size, np.sort(error)[::-1][:20]


@dataclass(frozen=True)
class FlashCase:
    """`bias` is the shape of a float bias, `mask` that of a bool one; `padding` is the number of keys hidden at the end of sequence b."""

    name: str
    B: int = 1
    S: int = 7
    T: int = 7
    H: int = 4
    G: int = 2
    D: int = 16
    E: int = 16
    features: Features = Features()
    causal: int = 0
    bias: tuple[int, int, int] | None = None
    mask: tuple[int, int, int] | None = None
    padding: tuple[int, ...] | None = None

    @property
    def attributes(self) -> dict[str, Any]:
        return {**self.features.attributes(self.H, self.G), "is_causal": self.causal}

    @property
    def heads(self) -> Heads:
        return Heads(self.H, self.G, self.features.scale, self.features.softcap, self.features.window)

    def build(self) -> dict[str, Array]:
        """All inputs by the contract's names. Keys that padding hides are NaN; the first query row of a bool mask sees nothing."""
        rng = np.random.default_rng(zlib.crc32(self.name.encode()))
        inputs: dict[str, Array] = {
            "query": rng.standard_normal((self.B, self.S, self.H * self.D)).astype(np.float32),
            "key": rng.standard_normal((self.B, self.T, self.G * self.D)).astype(np.float32),
            "value": rng.standard_normal((self.B, self.T, self.G * self.E)).astype(np.float32),
        }
        if self.bias is not None:
            bias = rng.standard_normal((*self.bias, self.T)).astype(np.float32)
            bias[rng.random(bias.shape) < 0.2] = -np.inf
            inputs["attention_bias"] = bias
        if self.mask is not None:
            mask = rng.random((*self.mask, self.T)) < 0.7
            mask[:, :, 0, :] = False
            inputs["attention_bias"] = mask
        if self.padding is not None:
            inputs["key_mask"] = np.arange(self.T)[None, :] < self.T - np.array(self.padding)[:, None]
            inputs["key"][~inputs["key_mask"]] = np.nan
            inputs["value"][~inputs["key_mask"]] = np.nan
        _add_head_inputs(inputs, self.features, self.H, rng)
        return inputs

    def tolerance(self, inputs: dict[str, Array]) -> float:
        keys, values = inputs["key"][np.isfinite(inputs["key"])], inputs["value"][np.isfinite(inputs["value"])]
        return tolerance(self.heads, self.D, keys_seen=self.T, q=inputs["query"], k=keys, v=values)


def _add_head_inputs(inputs: dict[str, Array], features: Features, H: int, rng: np.random.Generator) -> None:
    if features.sink:
        inputs["head_sink"] = rng.standard_normal(H).astype(np.float32) + 1
    if features.slopes:
        inputs["alibi_slopes"] = (2.0 ** -np.arange(1, H + 1)).astype(np.float32)


def tolerance(heads: Heads, D: int, *, keys_seen: int, q: Array, k: Array, v: Array) -> float:
    """Epsilon × magnitude × length, roundings taken as independent and at four standard deviations.

    A score is a dot of D random terms: its size is factor·√D·rms(q)·rms(k), each of its D roundings is of that size. A score's error passes
    through exp twice (numerator and total); the sums over keys add √keys roundings, exp and the merge eight. All of it times max |v|.
    """
    if not q.size or not k.size:
        return 0.0
    size = 4 * heads.factor(D) * np.sqrt(D) * float(np.sqrt(np.square(q).mean()) * np.sqrt(np.square(k).mean())) + heads.softcap
    return EPS * (2 * np.sqrt(D) * size + np.sqrt(keys_seen) + 8) * float(np.abs(v).max())


_ALL = Features(scale=0.3, softcap=5.0, window=40, sink=True, slopes=True)
_HEADS = ((8, 8), (24, 24), (40, 40), (64, 64), (80, 80), (96, 96), (112, 112), (128, 128), (256, 256), (64, 24), (8, 72), (17, 3))
_GROUPS = ((1, 1), (2, 2), (2, 1), (3, 1), (6, 2), (4, 1), (5, 1), (7, 1), (8, 1), (33, 1))
_WINDOWS = (1, 2, 16, 17, 256, 257, 4096)
_TREE = (-1, 0, 0, 1, 1, 2, -1)
_EDGES = (15, 16, 17, 31, 32, 33, 255, 256, 257, 513)

PAGED_CASES: tuple[PagedCase, ...] = (
    *(PagedCase(f"head_{D}x{E}_{c}", D=D, E=E, cache=c, sequences=((20, 3), (0, 19))) for D, E in _HEADS for c in ("fp32", "fp16", "int8")),
    *(PagedCase(f"group_{H}_{G}", H=H, G=G, sequences=((9, 2), (0, 6))) for H, G in _GROUPS),
    *(PagedCase(f"prefill_{n}", H=2, G=1, cache="fp16" if n % 2 else "fp32", sequences=((0, n),)) for n in _EDGES),
    *(PagedCase(f"decode_{n}", H=2, G=1, cache="fp32" if n % 2 else "fp16", sequences=((n, 1),)) for n in _EDGES),
    *(PagedCase(f"block_{P}", P=P, sequences=((250, 9), (0, 40), (511, 1))) for P in (16, 32, 64, 128, 256)),
    PagedCase(
        "ragged", H=6, G=2, D=32, E=32, P=32, cache="fp16", sequences=((0, 33), (300, 1), (0, 0), (17, 5), (0, 1), (256, 16), (0, 0))
    ),
    PagedCase("no_tokens", sequences=((5, 0), (0, 0))),
    PagedCase("no_sequences", sequences=()),
    PagedCase("rotary_half", D=32, rotary=32, sequences=((30, 4), (0, 18))),
    PagedCase("rotary_partial_fp16", D=40, rotary=24, cache="fp16", sequences=((30, 4), (0, 18))),
    PagedCase("rotary_interleaved", D=24, rotary=16, interleaved=1, sequences=((30, 4), (0, 18))),
    *(PagedCase(f"window_{w}", features=Features(window=w), sequences=((300, 3), (0, 50), (14, 1))) for w in _WINDOWS),
    *(PagedCase(f"chunk_{c}", chunk=c, sequences=((300, 3), (0, 50), (14, 1), (255, 3))) for c in (1, 7, 16, 64, 256, 400)),
    PagedCase("chunk_in_a_window", chunk=40, features=Features(window=17), sequences=((300, 3), (0, 50), (79, 4)), trees={2: (-1, 0, 0, 2)}),
    PagedCase("softcap", features=Features(softcap=2.0), sequences=((20, 3), (0, 9))),
    PagedCase("sink", features=Features(sink=True), sequences=((300, 3), (0, 9))),
    PagedCase("slopes", H=8, G=2, features=Features(slopes=True), sequences=((300, 3), (0, 9))),
    PagedCase("scale", features=Features(scale=1.7), sequences=((20, 3), (0, 9))),
    PagedCase(
        "everything", H=6, G=2, D=48, E=40, P=32, cache="fp16", features=_ALL, rotary=32, sequences=((300, 3), (0, 50), (14, 1))
    ),
    *(PagedCase(f"group_{H}_{G}_int8", H=H, G=G, cache="int8", sequences=((9, 2), (0, 6))) for H, G in _GROUPS),
    *(PagedCase(f"prefill_{n}_int8", H=2, G=1, cache="int8", sequences=((0, n),)) for n in _EDGES),
    *(PagedCase(f"decode_{n}_int8", H=2, G=1, cache="int8", sequences=((n, 1),)) for n in _EDGES),
    *(PagedCase(f"block_{P}_int8", P=P, cache="int8", sequences=((250, 9), (0, 40), (511, 1))) for P in (16, 32, 64, 128, 256)),
    *(PagedCase(f"window_{w}_int8", cache="int8", features=Features(window=w), sequences=((300, 3), (0, 50), (14, 1))) for w in _WINDOWS),
    PagedCase("everything_int8", H=6, G=2, D=48, E=40, P=32, cache="int8", features=_ALL, rotary=32, sequences=((300, 3), (0, 50), (14, 1))),
    PagedCase("sink_slopes_int8", D=64, E=64, cache="int8", features=Features(sink=True, slopes=True), sequences=((300, 3), (0, 9))),
    PagedCase("softcap_int8", D=64, E=64, cache="int8", features=Features(softcap=2.0), sequences=((20, 3), (0, 9))),
    PagedCase("rewritten_rows_int8", cache="int8", sequences=((20, 6), (0, 3)), rewritten=(0, 1, 2, 7)),
    PagedCase("tree_int8", D=32, cache="int8", sequences=((20, 7), (0, 4), (254, 6)), trees={0: _TREE, 2: (-1, -1, 0, 1, 2, 3)}, rotary=32),
    PagedCase("tree_window_int8", E=17, cache="int8", features=_ALL, sequences=((40, 7), (255, 6)), trees={0: _TREE, 1: (-1, 0, 0, 1, 2, 4)}),
    *(PagedCase(f"qk_norm_{c}", D=24, cache=c, qk_norm=True, rotary=16, sequences=((20, 3), (0, 9))) for c in ("fp32", "fp16", "int8")),
    *(PagedCase(f"packed_{c}", H=6, D=32, E=32, cache=c, packed=True, rotary=32, sequences=((20, 3), (0, 9))) for c in ("fp32", "int8")),
    PagedCase("packed_qk_norm", H=3, G=1, D=64, E=64, cache="fp16", packed=True, qk_norm=True, rotary=64, sequences=((20, 3), (0, 9))),
    PagedCase("rewritten_rows", sequences=((20, 6), (0, 3)), rewritten=(0, 1, 2, 7)),
    PagedCase("tree", D=32, sequences=((20, 7), (0, 4), (254, 6)), trees={0: _TREE, 2: (-1, -1, 0, 1, 2, 3)}, rotary=32),
    PagedCase("tree_window_fp16", cache="fp16", features=_ALL, sequences=((40, 7), (255, 6)), trees={0: _TREE, 1: (-1, 0, 0, 1, 2, 4)}),
)

FLASH_CASES: tuple[FlashCase, ...] = (
    *(FlashCase(f"head_{D}x{E}", D=D, E=E, S=5, T=19) for D, E in _HEADS),
    *(FlashCase(f"group_{H}_{G}", H=H, G=G) for H, G in _GROUPS),
    *(FlashCase(f"length_{n}", H=2, G=1, S=3, T=n) for n in _EDGES),
    *(FlashCase(f"causal_{n}", H=2, G=1, S=n, T=n, causal=1) for n in (1, 16, 33, 257)),
    FlashCase("causal_more_keys", S=5, T=40, causal=1),
    FlashCase("causal_fewer_keys", S=9, T=4, causal=1),
    FlashCase("one_query", B=2, S=1, T=513),
    FlashCase("empty_keys", T=0),
    FlashCase("empty_queries", S=0),
    FlashCase("empty_batch", B=0),
    FlashCase("padding", B=3, S=9, T=33, padding=(0, 16, 33)),
    FlashCase("bias_full", B=2, S=6, T=20, bias=(2, 4, 6)),
    FlashCase("bias_broadcast", B=2, S=6, T=300, bias=(1, 1, 1)),
    FlashCase("bias_heads", B=2, S=6, T=20, bias=(1, 4, 1), causal=1),
    FlashCase("mask", B=2, S=6, T=270, mask=(2, 1, 6)),
    FlashCase("mask_padding", B=2, S=6, T=33, mask=(1, 4, 6), padding=(3, 20)),
    FlashCase("window", S=50, T=60, causal=1, features=Features(window=17)),
    FlashCase("softcap", features=Features(softcap=2.0), T=300),
    FlashCase("sink", features=Features(sink=True), causal=1, S=9, T=6),
    FlashCase("slopes", features=Features(slopes=True), S=5, T=20),
    FlashCase("everything", B=2, S=60, T=70, H=6, G=2, D=24, E=40, causal=1, features=_ALL, bias=(2, 1, 60), padding=(0, 9)),
)

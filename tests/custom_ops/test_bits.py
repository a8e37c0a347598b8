"""A row's bits depend on its query and on the keys that it sees: not on company, chunking, blocks, threads, or what hidden memory holds."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from attention_cases import FLASH_CASES, PAGED_CASES, FlashCase, PagedCase
from attention_run import run_flash, run_op, run_paged, same_bits
from octavo.custom_ops import reference
from octavo.custom_ops.contract import CACHE_FORMATS

Array = np.ndarray


class Stream:
    """One sequence of `n` tokens with a cache of its own, fed in steps of any size: H 6, G 2, D 24, E 40, and every feature in use."""

    def __init__(self, n: int, cache: str = "fp16", P: int = 32, seed: int = 5) -> None:
        rng = np.random.default_rng(seed)
        self.n, self.P, blocks = n, P, -(-n // P) + 2
        self.query, self.key, self.value = (rng.standard_normal((n, w)).astype(np.float32) for w in (6 * 24, 2 * 24, 2 * 40))
        self.table = np.random.default_rng(P).permutation(blocks).astype(np.int32)[None, :-1].copy()
        angle = np.arange(n + 8)[:, None] / 10.0 ** np.arange(8)
        self.heads = {
            "cos_cache": np.cos(angle).astype(np.float32),
            "sin_cache": np.sin(angle).astype(np.float32),
            "head_sink": rng.standard_normal(6).astype(np.float32),
            "alibi_slopes": (2.0 ** -np.arange(1, 7)).astype(np.float32),
        }
        self.attributes: dict[str, Any] = {"num_heads": 6, "kv_num_heads": 2, "softcap": 5.0, "local_window_size": 280, "scale": 0.2}
        fmt = CACHE_FORMATS[cache]  # type: ignore[index]
        nothing, dtype = (255 if cache == "int8" else np.nan), np.dtype(fmt.dtype)
        self.caches = {
            "key_cache": np.full(fmt.key_shape(blocks, 2, 24, P), nothing, dtype),
            "value_cache": np.full(fmt.value_shape(blocks, 2, 40, P), nothing, dtype),
        }

    def slots(self, positions: Array) -> Array:
        return (self.table[0, positions // self.P] * self.P + positions % self.P).astype(np.int32)

    def step(self, begin: int, end: int, threads: int = 1) -> Array:
        """Append and attend tokens [begin, end)."""
        rows = np.arange(begin, end)
        return run_op("PagedAttention", self.inputs(rows, self.slots(rows), np.arange(-1, len(rows) - 1), begin), self.attributes, threads)

    def inputs(self, rows: Array, slots: Array, parent: Array, past: int) -> dict[str, Array]:
        return {
            "query": self.query[rows],
            "key": self.key[rows],
            "value": self.value[rows],
            **self.caches,
            "cumulative_sequence_length": np.array([0, len(rows)], np.int32),
            "past_seqlens": np.array([past], np.int32),
            "block_table": self.table,
            "slot_mapping": slots.astype(np.int32),
            "parent": parent.astype(np.int32),
            **self.heads,
        }

    def whole(self) -> Array:
        return self.step(0, self.n)


@pytest.mark.parametrize("cache", CACHE_FORMATS)
@pytest.mark.parametrize("chunk", [1, 7, 64, 256])
def test_prefill_in_chunks_equals_prefill_at_once(chunk: int, cache: str) -> None:
    whole, pieces = Stream(530, cache), Stream(530, cache)
    expected = whole.whole()
    got = np.concatenate([pieces.step(at, min(at + chunk, 530)) for at in range(0, 530, chunk)])
    assert same_bits(got, expected)
    assert all(same_bits(pieces.caches[name], whole.caches[name]) for name in whole.caches)


@pytest.mark.parametrize("cache", CACHE_FORMATS)
def test_a_recomputed_row_equals_the_first_one(cache: str) -> None:
    """A row that is not written (slot −1) reads what an earlier step wrote."""
    stream = Stream(300, cache)
    expected = stream.whole()
    rows = np.arange(290, 300)
    again = run_op("PagedAttention", stream.inputs(rows, np.full(10, -1), np.arange(-1, 9), 290), stream.attributes)
    assert same_bits(again, expected[290:])


@pytest.mark.parametrize("cache", CACHE_FORMATS)
@pytest.mark.parametrize("P", [16, 64, 128, 256])
def test_block_size_does_not_show(P: int, cache: str) -> None:
    assert same_bits(Stream(530, cache, P=P).whole(), Stream(530, cache, P=32).whole())


@pytest.mark.parametrize("case", PAGED_CASES, ids=lambda c: c.name)
def test_two_threads_equal_one(case: PagedCase) -> None:
    inputs = case.build()
    one, two = run_paged(inputs, case, threads=1), run_paged(inputs, case, threads=2)
    assert same_bits(one.output, two.output) and same_bits(one.key_cache, two.key_cache) and same_bits(one.value_cache, two.value_cache)


@pytest.mark.parametrize("case", FLASH_CASES, ids=lambda c: c.name)
def test_flash_two_threads_equal_one(case: FlashCase) -> None:
    inputs = case.build()
    assert same_bits(run_flash(inputs, case, threads=1), run_flash(inputs, case, threads=2))


@pytest.mark.parametrize("name", ["ragged", "everything", "tree", "tree_window_fp16", "block_32", "everything_int8", "tree_window_int8", "block_32_int8"])
def test_a_sequence_alone_equals_the_same_in_company(name: str) -> None:
    case = next(c for c in PAGED_CASES if c.name == name)
    inputs = case.build()
    together = run_paged(inputs, case).output
    for b in range(len(case.sequences)):
        begin, end = inputs["cumulative_sequence_length"][b : b + 2]
        alone = dict(inputs)
        for rows in ("query", "key", "value", "slot_mapping"):
            alone[rows] = inputs[rows][begin:end]
        alone["parent"] = np.where(inputs["parent"][begin:end] < 0, -1, inputs["parent"][begin:end] - begin).astype(np.int32)
        alone["cumulative_sequence_length"] = np.array([0, end - begin], np.int32)
        alone["past_seqlens"] = inputs["past_seqlens"][b : b + 1]
        alone["block_table"] = inputs["block_table"][b : b + 1]
        assert same_bits(run_paged(alone, case).output, together[begin:end])


@pytest.mark.parametrize("poison", [0.0, np.inf, -np.inf, 3.5])
@pytest.mark.parametrize("name", ["ragged", "everything", "tree_window_fp16", "decode_257", "window_17"])
def test_memory_that_no_row_sees_does_not_show(name: str, poison: float) -> None:
    """The cases fill it with NaN; anything else there gives the same bits, and stays as it is."""
    case = next(c for c in PAGED_CASES if c.name == name)
    inputs = case.build()
    expected = run_paged(inputs, case)
    other = dict(inputs)
    for cache in ("key_cache", "value_cache"):
        other[cache] = np.where(np.isnan(inputs[cache]), np.array(poison, inputs[cache].dtype), inputs[cache])
    got = run_paged(other, case)
    assert same_bits(got.output, expected.output)
    untouched = np.isnan(expected.key_cache)
    assert untouched.any() and (got.key_cache[untouched] == np.array(poison, got.key_cache.dtype)).all()


@pytest.mark.parametrize("name", ["everything_int8", "tree_window_int8", "decode_257_int8", "window_17_int8"])
def test_bytes_that_no_row_sees_do_not_show(name: str) -> None:
    """Bytes 255 make scales NaN, 127 enormous."""
    case = next(c for c in PAGED_CASES if c.name == name)
    expected = run_paged(case.build(), case)
    for poison in (0, 127, 128):
        inputs = case.build(poison)
        got = run_paged(inputs, case)
        assert same_bits(got.output, expected.output)
        assert (got.key_cache != expected.key_cache).any()


@pytest.mark.parametrize("name", ["packed_fp32", "packed_int8", "packed_qk_norm"])
def test_a_packed_query_equals_three_inputs(name: str) -> None:
    case = next(c for c in PAGED_CASES if c.name == name)
    inputs = case.build()
    widths = [case.H * case.D, (case.H + case.G) * case.D]
    apart = inputs | {n: x.copy() for n, x in zip(("query", "key", "value"), np.split(inputs["query"], widths, axis=1))}
    together, separate = run_paged(inputs, case), run_paged(apart, case)
    assert all(same_bits(getattr(together, part), getattr(separate, part)) for part in ("output", "key_cache", "value_cache"))


@pytest.mark.parametrize("leading", [(1, -1), (-1, 1, 1), (4, -1)])
@pytest.mark.parametrize("name", ["packed_int8", "packed_qk_norm", "ragged_rows"])
def test_leading_dimensions_only_count_tokens(name: str, leading: tuple[int, ...]) -> None:
    case = next((c for c in PAGED_CASES if c.name == name), PagedCase("ragged_rows", sequences=((0, 9), (20, 3))))
    inputs = case.build()
    assert len(inputs["query"]) % 4 == 0
    shaped = inputs | {n: inputs[n].reshape(*leading, inputs[n].shape[-1]) for n in ("query", "key", "value") if n in inputs}
    flat, got = run_paged(inputs, case), run_paged(shaped, case)
    assert got.output.shape[:-1] == shaped["query"].shape[:-1]
    assert same_bits(got.output.reshape(flat.output.shape), flat.output) and same_bits(got.key_cache, flat.key_cache)
    meant = reference.paged_attention(case.heads, rotary_interleaved=case.interleaved, **shaped)
    assert meant.output.shape == got.output.shape


@pytest.mark.parametrize("name", ["prefill_33", "prefill_257", "tree", "everything", "prefill_257_int8", "tree_int8", "everything_int8"])
def test_a_later_token_does_not_show_in_an_earlier_row(name: str) -> None:
    """Not even an infinite one: a hidden key is left out of the sums, not multiplied by 0. Its row is the last of the first sequence."""
    case = next(c for c in PAGED_CASES if c.name == name)
    inputs = case.build()
    last = case.sequences[0][1] - 1
    other = inputs | {rows: inputs[rows].copy() for rows in ("query", "key", "value")}
    for rows in ("query", "key", "value"):
        other[rows][last] = np.inf
    expected, got = run_paged(inputs, case).output, run_paged(other, case).output
    assert np.isnan(got[last]).any()
    assert same_bits(np.delete(got, last, 0), np.delete(expected, last, 0))


@pytest.mark.parametrize("hidden", [np.nan, np.inf, 7.0])
def test_a_masked_value_does_not_show(hidden: float) -> None:
    """A bool mask and a bias of −inf hide whatever the key and value are."""
    case = FlashCase("masked", B=1, S=9, T=300, mask=(1, 1, 1))
    inputs = case.build()
    inputs["attention_bias"] = np.arange(300)[None, None, None, :] % 7 != 3
    expected = run_flash(inputs, case)
    for name in ("key", "value"):
        inputs[name] = inputs[name].copy()
        inputs[name][:, 3::7] = hidden
    assert same_bits(run_flash(inputs, case), expected)
    inputs["attention_bias"] = np.where(inputs["attention_bias"], np.float32(0), np.float32(-np.inf))
    if hidden == 7.0:  # a score that is NaN stays NaN when −inf is added
        assert same_bits(run_flash(inputs, case), expected)


def test_untouched_slots_keep_every_bit() -> None:
    """NaN payloads included: a slot that the step does not name is not even rewritten with its own value."""
    case = next(c for c in PAGED_CASES if c.name == "ragged")
    inputs = case.build()
    marks = np.random.default_rng(1).integers(0x7C01, 0x7FFF, inputs["key_cache"].shape, np.uint16).view(np.float16)
    inputs["key_cache"] = np.where(np.isnan(inputs["key_cache"]), marks, inputs["key_cache"])
    after = run_paged(inputs, case).key_cache
    written = np.zeros(after.shape, bool)
    for slot in inputs["slot_mapping"]:
        written[slot // case.P, :, :, slot % case.P] = True
    assert same_bits(after.view(np.uint16)[~written], inputs["key_cache"].view(np.uint16)[~written])


@pytest.mark.parametrize("cache", ["fp16", "int8"])
@pytest.mark.parametrize("past", [20, 250, 270])
def test_every_row_of_a_draft_tree_equals_the_row_of_its_chain(past: int, cache: str) -> None:
    parents = np.array([-1, 0, 0, 1, 2, -1, 4, 5, 3])
    stream = Stream(past + len(parents), cache)
    stream.step(0, past)
    rows = np.arange(past, past + len(parents))
    depth = np.zeros(len(parents), int)
    for t, parent in enumerate(parents):
        depth[t] = 0 if parent < 0 else depth[parent] + 1
    # Siblings lie beyond the deepest position, in slots that later positions would have.
    slots, spare = np.zeros(len(parents), int), iter(range(past + depth.max() + 1, past + len(parents)))
    for t in range(len(parents)):
        first = depth[t] not in depth[:t]
        slots[t] = stream.slots(np.array([past + depth[t] if first else next(spare)]))[0]
    before = {name: cache.copy() for name, cache in stream.caches.items()}
    tree = run_op("PagedAttention", stream.inputs(rows, slots, parents, past), stream.attributes, threads=2)
    for t in range(len(parents)):
        chain, at = [], t
        while at >= 0:
            chain.insert(0, at)
            at = parents[at]
        for name, was in before.items():
            stream.caches[name][...] = was
        positions = stream.slots(past + np.arange(len(chain)))
        straight = stream.inputs(rows[chain], positions, np.arange(-1, len(chain) - 1), past)
        assert same_bits(tree[t], run_op("PagedAttention", straight, stream.attributes)[-1]), t


@pytest.mark.parametrize("n", [1, 17, 257, 513])
def test_causal_flash_attention_equals_paged_attention(n: int) -> None:
    """Rows of a stateless op and of a float32 cache: the same chunks, the same order."""
    rng = np.random.default_rng(n)
    paged = PagedCase(f"flash_twin_{n}", H=6, G=2, D=24, E=40, sequences=((0, n),))
    attributes = paged.attributes | {"softcap": 3.0, "local_window_size": 300}
    inputs = paged.build() | {"head_sink": rng.standard_normal(6).astype(np.float32), "alibi_slopes": rng.random(6).astype(np.float32)}
    expected = run_op("PagedAttention", inputs, attributes)
    del attributes["rotary_interleaved"]
    flash = {name: inputs[name][None] for name in ("query", "key", "value")}
    flash |= {name: inputs[name] for name in ("head_sink", "alibi_slopes")}
    assert same_bits(run_op("FlashAttention", flash, attributes | {"is_causal": 1})[0], expected)
    last = flash | {"query": flash["query"][:, -1:]}  # one query against all keys: the decode path
    assert same_bits(run_op("FlashAttention", last, attributes | {"is_causal": 1})[0], expected[-1:])


def test_hidden_keys_equal_absent_keys() -> None:
    """Padding at the end, whatever it holds, is as if the keys were not there."""
    case = FlashCase("padded", B=1, S=5, T=300, padding=(40,))
    inputs = case.build()
    short = {"query": inputs["query"], "key": inputs["key"][:, :260], "value": inputs["value"][:, :260]}
    assert same_bits(run_flash(inputs, case), run_flash(short, replace(case, padding=None)))


def test_overlapping_runs_of_one_session() -> None:
    """Kernel state is read-only: two threads in one session get what one gets."""
    case = next(c for c in PAGED_CASES if c.name == "ragged")
    inputs = case.build()
    expected = run_paged(inputs, case, threads=2).output
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(10):
            if not same_bits(run_paged(inputs, case, threads=2).output, expected):
                wrong.append(i)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == []

"""What `bench` counts, against counts of our own; a time is never asserted."""

from __future__ import annotations

import json

import numpy as np
import octavo
import pytest
from octavo.custom_ops import active_isa, available_isas, machine, open_library
from octavo.errors import CapacityError
from octavo.models.tiny import TINY
from octavo.runtime import RuntimeOptions, load
from octavo.runtime.bench import _peak_rss_mb, _run, bench, to_text
from octavo.runtime.profile import OUTSIDE, read_profile
from octavo.runtime.workloads import Workload

OPTIONS = RuntimeOptions(threads=1, memory="64MiB", policy="throughput")
ALL = ("paged", "contiguous", "stateless", "baseline")


@pytest.mark.parametrize("name", ALL)
def test_every_kind_gets_the_figures_that_other_engines_print(op_library, paths, name):
    (result,) = bench(getattr(paths, name), [Workload("x", prompt=20, generate=5, sequences=2)], options=OPTIONS)
    data = result.to_json()
    assert {"engine", "workload", "prefill_tok_s", "decode_tok_s", "load_s", "peak_rss_mb"} <= set(data)
    assert data["engine"] == "octavo" and data["workload"] == "x" and data["kind"] == name
    assert all(data[figure] > 0 for figure in ("prefill_tok_s", "decode_tok_s", "load_s", "peak_rss_mb"))
    assert ("step_bytes" in data) == (name == "paged"), "only a paged cache tells what a step reads of it"


@pytest.mark.parametrize("sequences", [1, 3])
def test_tokens_that_come_while_prompts_are_read_are_not_decoded_ones(op_library, paths, sequences):
    """Prompts longer than a step: the first sequences go on before the last one has its first token."""
    load_of = Workload("x", prompt=400, generate=7, sequences=sequences)
    with load(paths.paged, options=OPTIONS) as model:
        before = model.stats()
        run = _run(model, load_of)
        after = model.stats()
    computed = after["tokens"] - before["tokens"]
    assert computed == sequences * (400 + 7), "each sequence computes its prompt, and all that it generates but the last"
    assert run.prefill_steps + run.decode_steps == after["steps"] - before["steps"]
    early = computed - sequences * 400 - run.decoded
    assert run.prefill_steps == -(-sequences * 400 // 512) and (early > 0) == (sequences > 1)
    if sequences == 1:
        assert run.decode_steps == run.decoded == 7


def test_it_runs_what_generate_generates_and_no_prefix_is_reused(op_library, paths):
    load_of = Workload("x", prompt=40, generate=6, sequences=2)
    with load(paths.paged, options=OPTIONS) as model:
        first = [_run(model, load_of).decoded for _ in range(2)]
        assert model.stats()["prefix_hits"] > 0, "a second run would hit, were the cache on"
    assert first[0] == first[1]
    with load(paths.paged, options=RuntimeOptions(threads=1, memory="64MiB", prefix_cache=False)) as model:
        _run(model, load_of)
        _run(model, load_of)
        assert model.stats()["prefix_hits"] == 0 and model.tokenizer is not None, "the tokenizer is back"


@pytest.mark.parametrize("name", ["paged", "paged_int8", "paged_hybrid"])
def test_bytes_of_a_step(op_library, paths, name):
    """The weights once, and what lies in the cache for each sequence at the mean length."""
    (result,) = bench(getattr(paths, name), [Workload("x", prompt=40, generate=8, sequences=1)], options=OPTIONS)
    c = TINY["llama"]
    K, M, V, L = c["hidden_size"], c["intermediate_size"], c["vocab_size"], c["num_hidden_layers"]
    G, D = c["num_key_value_heads"], c["head_dim"]
    layer = K * (K + 2 * G * D) + K * K + 3 * K * M + 2 * K
    assert abs(result.weight_bytes - 4 * (L * layer + K + K * V)) <= 64, "the table of embeddings is read by rows, its transpose whole"
    element = {"paged": 4 * 2 * D, "paged_int8": 2 * (D + 4), "paged_hybrid": 4 * 2 * D}[name]
    tokens = 44 * L if name != "paged_hybrid" else 44 + 24
    assert result.cache_bytes == tokens * G * element and result.step_bytes == result.weight_bytes + result.cache_bytes
    assert result.bandwidth_share == pytest.approx(result.decode_gb_s / result.read_gb_s, abs=0.02)


def test_a_workload_that_does_not_fit_is_skipped_and_said(op_library, paths):
    long, short = Workload("long", prompt=4000, generate=4, sequences=1), Workload("short", prompt=8, generate=4, sequences=1)
    skipped, ran = bench(paths.paged, [long, short], options=OPTIONS)
    assert skipped.to_json().keys() >= {"engine", "workload", "skipped"} and "prefill_tok_s" not in skipped.to_json()
    assert "512" in skipped.skipped and ran.decode_tok_s > 0
    assert any("skipped" in line for line in to_text([skipped, ran]))
    with pytest.raises(CapacityError):
        bench(paths.paged, [long], options=OPTIONS)


def test_time_by_op(op_library, paths):
    (result,) = bench(paths.paged, [Workload("x", prompt=20, generate=4, sequences=2)], options=OPTIONS, profile=True)
    for phase in ("prefill", "decode"):
        times = result.time_by_op[phase]
        assert times["PagedAttention"] > 0 and times["MatMul"] > 0 and OUTSIDE in times
    assert any("PagedAttention" in line for line in to_text([result]))


def test_a_profile_is_cut_into_phases(tmp_path):
    def node(ts: int, op: str, dur: int) -> dict:
        return {"cat": "Node", "name": f"{op}_kernel_time", "ts": ts, "dur": dur, "args": {"op_name": op}}

    def run(ts: int, dur: int) -> dict:
        return {"cat": "Session", "name": "model_run", "ts": ts, "dur": dur, "args": {}}

    events = [
        {"cat": "Session", "name": "session_initialization", "ts": 0, "dur": 99, "args": {}},
        node(101, "A", 2), run(100, 10), node(111, "A", 5), node(116, "B", 3), run(110, 10), node(121, "A", 4), run(120, 5), run(130, 7),
        {"cat": "Node", "name": "A_fence_before", "ts": 112, "dur": 50, "args": {"op_name": "A"}},
    ]
    (tmp_path / "p.json").write_text(json.dumps(events))
    found = read_profile(tmp_path / "p.json", {"prefill": (1, 1), "decode": (2, 2), "nothing": (4, 0)})
    assert found["prefill"] == pytest.approx({"A": 0.005, "B": 0.003, OUTSIDE: 0.002})
    assert found["decode"] == pytest.approx({"A": 0.004, OUTSIDE: 0.008})
    assert found["nothing"] == {OUTSIDE: 0}


def test_peak_memory_is_this_process_and_only_grows():
    before = _peak_rss_mb()
    array = np.ones(96 << 20, np.uint8)
    grown = _peak_rss_mb()
    assert len(array) and grown >= before
    with open("/proc/self/status") as status:
        now = next(int(line.split()[1]) for line in status if line.startswith("VmRSS:")) // 1024
    del array
    assert now - 1 <= grown <= _peak_rss_mb()


def test_what_the_machine_can_do_is_measured():
    assert machine.read_bandwidth(1 << 20, 1) > 1e8 and machine.read_bandwidth(1, 2) > 0
    done = open_library().octavo_multiply(10)
    width = {"avx512vnni": 64, "avx512bw": 64, "avxvnni": 32, "avx2": 32}.get(active_isa(), 0)
    assert done == 10 * 12 * width * 2 and active_isa() in available_isas()
    peak = machine.int8_operations(1)
    assert peak is None if width == 0 else peak > 1e9


def test_the_facade_has_it(op_library, paths):
    (result,) = octavo.bench(paths.paged, [octavo.Workload("x", prompt=4, generate=1, sequences=1)], options=OPTIONS)
    assert isinstance(result, octavo.BenchResult)

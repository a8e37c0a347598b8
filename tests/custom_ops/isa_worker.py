"""Runs every case and a conversion sweep in a process started with OCTAVO_ISA set; all bits go to the .npz that its argument names."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from attention_cases import FLASH_CASES, PAGED_CASES
from attention_run import run_flash, run_op, run_paged
from octavo import custom_ops
from octavo.custom_ops.native import SampleRow, SampleRows
from quant_cases import QUANT_CASES, run_embedding, run_quant

Array = np.ndarray


def rounded_to_half(values: Array) -> Array:
    """What the append writes for float32 `values` (a multiple of 256 of them), in their order."""
    return _store_values(values, np.full((values.size // 256, 1, 16, 256), np.nan, np.float16), True)[0]


def widened_from_half(halves: Array) -> Array:
    """What attention reads for float16 `halves`: a row that sees one key returns its value."""
    cache = np.zeros((halves.size // 256, 1, 16, 256), np.float16)
    cache[:, 0, 0, :] = halves.reshape(-1, 256)
    return _store_values(np.zeros(halves.size, np.float32), cache, False)[1]


def _store_values(values: Array, value_cache: Array, write: bool) -> tuple[Array, Array]:
    n = values.size // 256
    inputs = {
        "query": np.zeros((n, 8), np.float32),
        "key": np.zeros((n, 8), np.float32),
        "value": values.reshape(n, 256),
        "key_cache": np.zeros((n, 1, 8, 16), np.float16),
        "value_cache": value_cache,
        "cumulative_sequence_length": np.arange(n + 1, dtype=np.int32),
        "past_seqlens": np.zeros(n, np.int32),
        "block_table": np.arange(n, dtype=np.int32)[:, None].copy(),
        "slot_mapping": np.arange(n, dtype=np.int32) * 16 if write else np.full(n, -1, np.int32),
        "parent": np.full(n, -1, np.int32),
    }
    output = run_op("PagedAttention", inputs, {"num_heads": 1, "kv_num_heads": 1})
    return value_cache[:, 0, 0, :].ravel(), output.ravel()


def awkward_floats() -> Array:
    """Every float16, the halfway points between neighbours and the floats beside those, overflow and underflow, infinities and NaNs."""
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    finite = np.sort(halves[np.isfinite(halves)].astype(np.float32))
    halfway = ((finite[1:].astype(np.float64) + finite[:-1]) / 2).astype(np.float32)
    around = [np.nextafter(halfway, np.float32(side)) for side in (-np.inf, np.inf)]
    extra = np.array([65519.99, 65520, 65536, 1e6, 3.4e38, np.inf, np.nan, 2.0**-25, 2.0**-26, 1e-40, 1e-45], np.float32)
    patterns = np.random.default_rng(0).integers(0, 1 << 32, 1 << 16, dtype=np.uint64).astype(np.uint32).view(np.float32)
    with np.errstate(invalid="ignore"):
        everything = np.concatenate([halves.astype(np.float32), halfway, *around, extra, -extra, patterns])
    return np.resize(everything, -(-everything.size // 256) * 256)


def sampled() -> Array:
    """Tokens, ranks and log probabilities of drawn rows: peaked and flat, of whole runs and parts, of every kind of cut."""
    rng, answers = np.random.default_rng(3), []
    cuts = [{}, {"top_p": 0.9}, {"top_p": 0.5, "min_p": 0.001}, {"min_p": 0.05}, {"top_k": 40, "top_p": 0.8}, {"top_p": 0.9, "temperature": 0.7}]
    for V in (129, 5003, 49152):
        call = SampleRows(V)
        for number in range(48):
            logits = rng.normal(0, 0.5 + number % 5, V).astype(np.float32)
            fields = {"temperature": 1.0, "top_p": 1.0, "given": -1, "logprobs": 5, "seed": number, **cuts[number % len(cuts)]}
            row = SampleRow(logits=logits.ctypes.data, **fields)
            call([row])
            answers.append([row.token, row.rank, row.logprob, *row.top_ids[:5], *row.top_logprobs[:5]])
    return np.array(answers)


def main() -> None:
    bits: dict[str, Array] = {}
    for case in PAGED_CASES:
        got = run_paged(case.build(), case)
        for part in ("output", "key_cache", "value_cache"):
            bits[f"paged.{case.name}.{part}"] = getattr(got, part)
    for flash in FLASH_CASES:
        bits[f"flash.{flash.name}"] = run_flash(flash.build(), flash)
    for quant in QUANT_CASES:
        result = run_quant(quant, quant.build())
        bits[f"quant.{quant.name}.output"], bits[f"quant.{quant.name}.sum"] = result.output, result.sum
        if quant.gate == "none":
            bits[f"embedding.{quant.name}"] = run_embedding(quant.weight(), np.arange(quant.M))
    bits["to_half"] = rounded_to_half(awkward_floats())
    bits["from_half"] = widened_from_half(np.arange(1 << 16, dtype=np.uint16).view(np.float16))
    bits["sampled"] = sampled()
    bits["isa"] = np.array(custom_ops.active_isa())
    np.savez(sys.argv[1], **bits)  # type: ignore[arg-type]


if __name__ == "__main__":
    main()

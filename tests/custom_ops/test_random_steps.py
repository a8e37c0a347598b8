"""Seeded random steps: every feature in any combination, against the reference, one thread against two."""

from __future__ import annotations

import numpy as np
import pytest
from attention_cases import Features, PagedCase
from attention_run import run_paged, same_bits
from octavo.custom_ops import reference


def random_case(seed: int) -> PagedCase:
    """A small step: up to four sequences near block and chunk edges, prefill, decode and draft trees mixed."""
    rng = np.random.default_rng(seed)
    G = int(rng.integers(1, 4))
    D = int(rng.choice([8, 20, 32, 48, 64]))
    sequences, trees = [], {}
    for b in range(int(rng.integers(1, 5))):
        past = int(rng.choice([0, 1, 15, 31, 250, 256, 500]))
        new = int(rng.choice([0, 1, 2, 5, 9, 40]))
        sequences.append((past, new))
        if 1 < new < 10 and rng.random() < 0.5:
            trees[b] = tuple(int(rng.integers(-1, i)) for i in range(new))
    total = sum(new for _, new in sequences)
    return PagedCase(
        f"random_{seed}",
        H=G * int(rng.integers(1, 9)),
        G=G,
        D=D,
        E=int(rng.choice([8, 24, 32, 50, D])),
        P=int(rng.choice([16, 32, 64, 128, 256])),
        cache=str(rng.choice(["fp32", "fp16", "int8"])),
        sequences=tuple(sequences),
        features=Features(
            softcap=float(rng.choice([0.0, 4.0])),
            window=int(rng.choice([-1, 3, 30, 256, 300])),
            sink=bool(rng.random() < 0.5),
            slopes=bool(rng.random() < 0.5),
        ),
        qk_norm=bool(rng.random() < 0.2),
        rotary=int(rng.choice([0, 4, D])),
        interleaved=int(rng.integers(2)),
        rewritten=() if trees else tuple(int(t) for t in rng.permutation(total)[: total // 4]),
        trees=trees,
    )


@pytest.mark.parametrize("seed", range(60))
def test_random_step(seed: int) -> None:
    case = random_case(seed)
    inputs = case.build()
    expected = reference.paged_attention(case.heads, rotary_interleaved=case.interleaved, chunk_size=case.chunk, **inputs)
    got = run_paged(inputs, case, threads=2)
    case.assert_agrees(got.output, expected.output, inputs)
    assert same_bits(got.key_cache, expected.key_cache) and same_bits(got.value_cache, expected.value_cache)
    assert same_bits(got.output, run_paged(inputs, case, threads=1).output)

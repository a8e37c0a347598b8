"""Every instruction set that this machine has gives the same bits, and OCTAVO_ISA decides which one runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from attention_run import same_bits
from isa_worker import awkward_floats
from octavo import custom_ops

WORKER = Path(__file__).parent / "isa_worker.py"


@pytest.fixture(scope="module")
def bits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, np.ndarray]]:
    """All results by instruction set, each from a process of its own."""
    folder = tmp_path_factory.mktemp("isa")
    found = {}
    for isa in custom_ops.available_isas():
        path = folder / f"{isa}.npz"
        subprocess.run([sys.executable, str(WORKER), str(path)], env={**os.environ, "OCTAVO_ISA": isa}, check=True, timeout=300)
        found[isa] = dict(np.load(path))
    return found


def test_forcing_works(bits: dict[str, dict[str, np.ndarray]]) -> None:
    assert {isa: str(results["isa"]) for isa, results in bits.items()} == {isa: isa for isa in bits}
    assert "scalar" in bits


def test_all_isas_agree_bit_for_bit(bits: dict[str, dict[str, np.ndarray]]) -> None:
    oracle = bits["scalar"]
    assert len(oracle) > 200
    for isa, results in bits.items():
        assert results.keys() == oracle.keys()
        different = [name for name in oracle if name != "isa" and not same_bits(results[name], oracle[name])]
        assert different == [], isa


def test_half_is_rounded_to_nearest_even(bits: dict[str, dict[str, np.ndarray]]) -> None:
    values = awkward_floats()
    with np.errstate(over="ignore", invalid="ignore"):
        expected = values.astype(np.float16)
    number = ~np.isnan(values)
    for results in bits.values():
        assert same_bits(results["to_half"][number], expected[number])
        assert np.isnan(results["to_half"][~number]).all()


def test_every_finite_half_is_read_exactly(bits: dict[str, dict[str, np.ndarray]]) -> None:
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    finite = np.isfinite(halves) & (halves != 0)  # the sum starts at +0, so a lone −0 becomes +0
    for results in bits.values():
        assert same_bits(results["from_half"][finite], halves[finite].astype(np.float32))


_REGISTER = """
import onnxruntime, octavo.custom_ops as ops
from octavo.errors import LibraryError
for step in (lambda: ops.register(onnxruntime.SessionOptions()), ops.active_isa):
    try:
        step()
    except LibraryError as error:
        print(error)
    else:
        raise SystemExit("nothing was raised")
"""


def test_avx512_is_the_best_of_its_family() -> None:
    family = [isa for isa in custom_ops.available_isas() if isa.startswith("avx512")]
    if not family:
        pytest.skip("this machine has no AVX-512")
    code = "import octavo.custom_ops as ops; print(ops.active_isa())"
    environment = {**os.environ, "OCTAVO_ISA": "avx512"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == family[0]


def test_an_unknown_isa_fails_by_name() -> None:
    environment = {**os.environ, "OCTAVO_ISA": "avx1024"}
    done = subprocess.run([sys.executable, "-c", _REGISTER], env=environment, capture_output=True, text=True, timeout=60, check=True)
    registering, asking = done.stdout.splitlines()
    assert "OCTAVO_ISA is 'avx1024'" in registering and "scalar" in registering
    assert "scalar" in asking


def test_the_default_is_the_best() -> None:
    if os.environ.get("OCTAVO_ISA"):
        pytest.skip("OCTAVO_ISA is set for this run")
    assert custom_ops.active_isa() == custom_ops.available_isas()[0]

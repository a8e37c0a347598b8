"""The AArch64 library under qemu: every declared case, bit for bit what this machine's kernels give. Skipped where cross compiler or qemu is missing."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attention_cases import FLASH_CASES, PAGED_CASES
from attention_run import run_flash, run_paged
from octavo.custom_ops.contract import OPS
from octavo.custom_ops.packing import pack
from onnx import helper
from quant_cases import QUANT_CASES, run_embedding, run_quant

Array = np.ndarray
ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "custom_ops" / "src"
COMPILER = shutil.which("aarch64-linux-gnu-g++")
QEMU = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
CMAKE = shutil.which("cmake", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))

pytestmark = pytest.mark.skipif(not (COMPILER and QEMU and CMAKE), reason="needs aarch64-linux-gnu-g++, qemu-aarch64 and cmake")


def _bytes(data: bytes) -> bytes:
    return struct.pack("<q", len(data)) + data + bytes(-len(data) % 8)


def _value(array: Array | None) -> bytes:
    if array is None:
        return struct.pack("<q", 0)
    return struct.pack(f"<qq{array.ndim}q", helper.np_dtype_to_tensor_dtype(array.dtype), array.ndim, *array.shape) + _bytes(array.tobytes())


def _case(name: str, op: str, attributes: Mapping[str, Any], inputs: Mapping[str, Array], outputs: list[Array], updated: Mapping[str, Array]) -> bytes:
    """One case as neon/host.cc reads it."""
    ports = [port.name for port in OPS[op].inputs]
    while ports[-1] not in inputs:
        ports.pop()
    parts = [_bytes(name.encode()), _bytes(op.encode()), struct.pack("<q", len(attributes))]
    for key, value in attributes.items():
        real = isinstance(value, float)
        parts += [_bytes(key.encode()), struct.pack("<qf4x", 1, value) if real else struct.pack("<qq", 0, value)]
    parts += [struct.pack("<q", len(ports)), *(_value(inputs.get(port)) for port in ports)]
    parts += [struct.pack("<q", len(outputs)), *map(_value, outputs), struct.pack("<q", len(updated))]
    for port, array in updated.items():
        parts += [struct.pack("<q", ports.index(port)), _bytes(array.tobytes())]
    return b"".join(parts)


def _cases() -> Iterator[bytes]:
    for quant in QUANT_CASES:
        weight, gated, inputs = quant.weight(), quant.gate != "none", quant.build()
        packed, attributes = pack(weight, gated=gated), weight.format(gated=gated).attributes()
        result = run_quant(quant, inputs)
        yield _case(quant.name, "QuantLinear", attributes | quant.attributes, inputs | {"weight": packed}, [result.output, result.sum], {})
        if not gated:
            ids = np.arange(quant.M)
            yield _case(f"{quant.name}_embedding", "QuantEmbedding", attributes, {"ids": ids, "weight": packed}, [run_embedding(weight, ids)], {})
    for paged in PAGED_CASES:
        inputs = paged.build()
        got = run_paged(inputs, paged)
        yield _case(paged.name, "PagedAttention", paged.attributes, inputs, [got.output], {"key_cache": got.key_cache, "value_cache": got.value_cache})
    for flash in FLASH_CASES:
        inputs = flash.build()
        yield _case(flash.name, "FlashAttention", flash.attributes, inputs, [run_flash(inputs, flash)], {})


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `host`, `liboctavo_ops.so` and `cases`. The library is kept in build/, so that a second run compiles what changed."""
    folder, library, host = tmp_path_factory.mktemp("neon"), ROOT / "build" / "aarch64", Path(__file__).parent / "neon" / "host.cc"
    configure = ["-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64", f"-DCMAKE_CXX_COMPILER={COMPILER}"]
    for command in (
        [CMAKE, "-S", str(ROOT), "-B", str(library), *configure],
        [CMAKE, "--build", str(library), "--parallel", "2"],
        [COMPILER, "-std=c++20", "-O1", "-Wall", "-Werror", f"-I{SOURCES}", str(host), "-o", str(folder / "host"), "-ldl"],
    ):
        done = subprocess.run([str(word) for word in command], check=False, capture_output=True, text=True, timeout=1800)
        assert done.returncode == 0, done.stdout + done.stderr
    shutil.copy(library / "custom_ops" / "liboctavo_ops.so", folder)
    (folder / "cases").write_bytes(b"".join(_cases()))
    return folder


def _run(built: Path, cases: Path, isa: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OCTAVO_ISA": isa}
    command = [str(QEMU), "-cpu", "max", "-L", "/usr/aarch64-linux-gnu", str(built / "host"), str(built / "liboctavo_ops.so"), str(cases)]
    return subprocess.run(command, check=False, env=environment, capture_output=True, text=True, timeout=300)


def test_every_case_has_the_same_bits(built: Path) -> None:
    done = _run(built, built / "cases", "neon")
    assert done.returncode == 0, done.stdout + done.stderr
    isa, counts = done.stdout.strip().split(": ")
    assert isa == "neon" and int(counts.split()[0]) > 200


def test_the_host_sees_a_wrong_bit(built: Path, tmp_path: Path) -> None:
    """A case of its own, with one bit of the expected output turned."""
    case = QUANT_CASES[0]
    weight, inputs = case.weight(), case.build()
    result = run_quant(case, inputs)
    wrong = result.output.copy()
    wrong.view(np.uint32)[-1, -1] ^= 1
    attributes = weight.format().attributes() | case.attributes
    (tmp_path / "cases").write_bytes(_case("wrong", "QuantLinear", attributes, inputs | {"weight": pack(weight)}, [wrong, result.sum], {}))
    done = _run(built, tmp_path / "cases", "neon")
    assert done.returncode == 1 and "an output differs" in done.stdout

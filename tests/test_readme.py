"""README and docs run: commands and Python blocks, page by page, in a folder of their own; their tables name all that there is.

`make demo` itself makes an environment and downloads, which is too heavy here: what runs is `octavo demo`, the whole of its recipe after
the installation, and the Makefile is held to that. `make test` is what runs this file.
"""

from __future__ import annotations

import dataclasses
import re
import shlex
import subprocess
import sys
from pathlib import Path

import octavo
import pytest
from octavo import __main__ as cli
from octavo import errors
from octavo.custom_ops.contract import OPS, OpContract
from octavo.models.tiny import tiny_llama_onnx
from typer.main import get_command

ROOT = Path(octavo.__file__).parent
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[str]:
    return [text for found, text in BLOCK.findall(page.read_text()) if found == language]


def commands(page: Path) -> list[list[str]]:
    """The command lines of a page's `sh` blocks, without their comments."""
    lines = [line for block in blocks(page, "sh") for line in block.splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def _id(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Where a page runs: a small model with its tokenizer, and a text."""
    tiny_llama_onnx(tmp_path)
    (tmp_path / "book.txt").write_text("Once upon a time there was a bookbinder who folded every sheet three times. " * 20)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_blocks_are_of_kinds_that_are_run():
    kinds = {kind for page in PAGES for kind, _ in BLOCK.findall(page.read_text())}
    assert kinds <= {"sh", "python", "text"}


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=_id)
def test_python_blocks_run_in_order(page, folder):
    program = "\n".join(blocks(page, "python"))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def _runs(words: list[str]) -> bool:
    """What is left out: `make test` (it runs this), `make demo` (below), and a chat without an end."""
    return words[0] == "octavo" and not (words[1] == "chat" and "--once" not in words)


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if any(_runs(words) for words in commands(page))], ids=_id)
def test_commands_run_in_order(page, folder, request):
    lines = [words for words in commands(page) if _runs(words)]
    if any("model.gguf" in words for words in lines):
        (folder / "model.gguf").symlink_to(request.getfixturevalue("smollm2_gguf"))
    for words in lines:
        done = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


@pytest.mark.slow
def test_the_demo_runs(folder, smollm2_gguf):
    command = [sys.executable, "-m", "octavo", "demo", "--gguf", str(smollm2_gguf), "--max-tokens", "24"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "The check passed." in done.stdout and "Where to go next" in done.stdout and ": paged," in done.stdout
    assert re.search(r"then \d+ a second", done.stdout)
    assert (folder / "demo" / "artifact" / "octavo.json").is_file() and (folder / "demo" / "plain" / "model.onnx").is_file()


def test_make_demo_ends_in_the_command_that_is_tested():
    makefile = (ROOT / "Makefile").read_text()
    recipe = re.search(r"^demo:.*\n\t(.*)$", makefile, re.MULTILINE)
    assert recipe and recipe[1] == "$(BIN)/octavo demo"
    assert "torch" not in re.search(r"^demo:(.*)$", makefile, re.MULTILINE)[1] and ".export" not in recipe[0]


def test_readme_names_the_two_make_targets_and_nothing_else_of_make():
    assert {tuple(words) for words in commands(README) if words[0] != "octavo"} == {("make", "demo"), ("make", "test")}


# Tables name all that there is, and nothing else.


def _first_cells(page: str, heading: str) -> set[str]:
    """The names in the first column of the tables under a heading."""
    text = (ROOT / "docs" / page).read_text().split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
    rows = re.findall(r"^\| (`[^|]+) \|", text, re.MULTILINE)
    return {name for row in rows for name in re.findall(r"`([^`]+)`", row)}


@pytest.mark.parametrize("cls", [octavo.CompileOptions, octavo.RuntimeOptions, octavo.SamplingParams], ids=lambda cls: cls.__name__)
def test_options_page(cls):
    assert _first_cells("reference/options.md", cls.__name__) == {field.name for field in dataclasses.fields(cls)}


def test_errors_page():
    rows = dict(re.findall(r"^\| `(\w+)` \| (\d) \|", (ROOT / "docs/reference/errors.md").read_text(), re.MULTILINE))
    classes = {cls for cls in vars(errors).values() if isinstance(cls, type) and issubclass(cls, errors.OctavoError)}
    assert rows == {cls.__name__: str(cls.exit_code) for cls in classes - {errors.OctavoError}}


def _tables(op: OpContract) -> str:
    """An op's section of docs/reference/ops.md, less its title and prose."""
    lines = ["| # | input | type | shape | |", "|---|---|---|---|---|"]
    for number, port in enumerate(op.inputs):
        reserved = port.shape == "RESERVED"
        name = f"`{port.name}`" + (" (optional)" if port.optional and not reserved else "")
        shape, meaning = ("", "reserved: must be absent") if reserved else (port.shape.replace("|", " or "), port.meaning)
        lines.append(f"| {number} | {name} | {' or '.join(port.dtypes)} | {shape} | {meaning} |")
    lines += ["", "| output | type | shape | |", "|---|---|---|---|"]
    for port in op.outputs:
        lines.append(f"| `{port.name}`{' (optional)' if port.optional else ''} | {' or '.join(port.dtypes)} | {port.shape} | {port.meaning} |")
    lines += ["", "| attribute | type | default | |", "|---|---|---|---|"]
    lines += [f"| `{a.name}` | {a.type} | {'required' if a.default is None else a.default} | {a.meaning} |" for a in op.attributes]
    return "\n".join(lines)


@pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.name)
def test_ops_page(op):
    text = (ROOT / "docs/reference/ops.md").read_text()
    assert f"\n## {op.name}\n" in text
    assert _tables(op) in text, f"the contract says:\n{_tables(op)}"


def test_graph_interface_page(folder):
    """What a paged artifact's graph takes and gives is what the page says."""
    octavo.compile(folder / "model.onnx", folder / "art")
    import json

    interface = json.loads((folder / "art" / "octavo.json").read_text())["interface"]
    names = {re.sub(r"\d+", "#", port["name"]) for port in (*interface["inputs"], *interface["outputs"])}
    page = re.findall(r"^\| `([\w.{}]+)` \|", (ROOT / "docs/reference/graph-interface.md").read_text(), re.MULTILINE)
    assert names <= {re.sub(r"{\w}", "#", name) for name in page}
    assert {re.sub(r"{\w}", "#", name) for name in page} - names <= {"position_ids"}


def test_command_page():
    text = (ROOT / "docs/reference/cli.md").read_text()
    for name, command in get_command(cli.app).commands.items():
        assert f"`octavo {name}" in text
        for parameter in command.params:
            for option in (o for o in (*parameter.opts, *parameter.secondary_opts) if o.startswith("--") and o != "--help"):
                given = option if parameter.secondary_opts == [] or option in parameter.secondary_opts else None
                assert given is None or given in text, f"{name} {option}"


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{_id(page)} links to {target}"


def test_every_page_can_be_reached():
    seen, todo = set(), [README, ROOT / "docs" / "index.md"]
    while todo:
        page = todo.pop().resolve()
        if page in seen:
            continue
        seen.add(page)
        todo += [page.parent / target for target in re.findall(r"\]\((?!http)([^)#]+\.md)", page.read_text())]
    assert {page.resolve() for page in PAGES} <= seen



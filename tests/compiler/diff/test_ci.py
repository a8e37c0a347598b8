"""The GitHub Action and the pre-commit hook, run as their hosts run them: the shell of each step, its inputs in the environment, its exit code."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import octavo
import pytest

yaml = pytest.importorskip("yaml")
ROOT = Path(octavo.__file__).parent


@pytest.fixture
def workspace(models, tmp_path) -> Path:
    """A repository with a golden snapshot of the first model, in a folder whose name a shell could misread."""
    folder = tmp_path / "a repo; $(touch pwned)"
    folder.mkdir()
    for name, path in zip(("base.onnx", "head.onnx"), models):
        shutil.copy(path, folder / name)
    (folder / "model.graph.txt").write_text(octavo.snapshot(models[0]))
    return folder


@pytest.fixture
def tools(tmp_path) -> dict[str, str]:
    """An environment in which `octavo` is this one, and `python` writes down what it is asked to do."""
    binaries = tmp_path / "bin"
    binaries.mkdir()
    for name, line in (("octavo", f'exec {shlex.quote(sys.executable)} -m octavo "$@"'), ("python", f'echo "$@" >> {shlex.quote(str(tmp_path / "asked"))}')):
        (binaries / name).write_text(f"#!/bin/bash\n{line}\n")
        (binaries / name).chmod(0o755)
    return {**os.environ, "PATH": f"{binaries}:{os.environ['PATH']}"}


def run_action(workspace: Path, tools: dict[str, str], scratch: Path, **given: str) -> tuple[int, str, str, str]:
    """(exit status of the first step that fails or 0, standard output, step outputs, job summary), as GitHub runs a composite action."""
    action = yaml.safe_load((ROOT / "action.yml").read_text())
    assert not given.keys() - action["inputs"].keys()
    inputs = {name: given.get(name, str(entry.get("default", ""))) for name, entry in action["inputs"].items()}
    assert all(inputs[name] for name, entry in action["inputs"].items() if entry["required"])
    files = {name: scratch / name.lower() for name in ("GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY")}
    for file in files.values():
        file.write_text("")
    out, status = "", 0
    for step in action["runs"]["steps"]:
        assert step["shell"] == "bash" and "${{" not in step["run"], "what a user gives never stands in the script itself"
        env = {name: re.sub(r"\$\{\{ inputs\.([\w-]+) \}\}", lambda match: inputs[match[1]], value) for name, value in step.get("env", {}).items()}
        script = scratch / "step.sh"
        script.write_text(step["run"])
        done = subprocess.run(
            ["bash", "--noprofile", "--norc", "-eo", "pipefail", str(script)], cwd=workspace, capture_output=True, text=True, check=False,
            env={**tools, **{name: str(file) for name, file in files.items()}, "GITHUB_ACTION_PATH": str(ROOT), **env},
        )
        out, status = out + done.stdout, done.returncode
        if status:
            break
    return status, out, *(file.read_text() for file in files.values())


def test_the_action_passes_at_0_and_1_and_fails_by_policy(workspace, tools, tmp_path):
    status, out, outputs, summary = run_action(workspace, tools, tmp_path, before="model.graph.txt", after="base.onnx")
    assert (status, outputs) == (0, "code=0\n") and "Nothing changed." in summary and "::notice" in out
    status, out, outputs, summary = run_action(workspace, tools, tmp_path, before="model.graph.txt", after="head.onnx")
    assert (status, outputs) == (0, "code=1\n") and "inserted Cast(to=1)" in summary and "::notice file=head.onnx" in out
    (workspace / "octavo.diff.toml").write_text('rules = ["max_new Cast 0"]')
    status, out, outputs, summary = run_action(workspace, tools, tmp_path, before="model.graph.txt", after="head.onnx")
    assert status != 0 and outputs == "code=2\n" and "::error file=head.onnx" in out and "❌" in summary
    assert {path.name for path in workspace.iterdir()} >= {"octavo-diff.md", "octavo-diff.sarif", "octavo-diff.xml"}
    assert (tmp_path / "asked").read_text() == f"-m pip install --quiet {ROOT}\n" * 3
    action = yaml.safe_load((ROOT / "action.yml").read_text())
    assert action["outputs"]["markdown"]["value"] == "octavo-diff.md" and "steps.diff.outputs.code" in action["outputs"]["exit-code"]["value"]


def test_the_action_compares_numbers_where_it_is_told_to(workspace, tools, tmp_path):
    status, _, outputs, summary = run_action(workspace, tools, tmp_path, before="base.onnx", after="head.onnx", numeric="true")
    assert (status, outputs) == (0, "code=1\n") and "int8 cache, after truncate" in summary and "the numbers agree" in summary


@pytest.mark.parametrize("after", ["missing.onnx", "$(touch pwned)", "`touch pwned`", "--update"])
def test_the_action_runs_nothing_that_an_input_says(workspace, tools, tmp_path, after):
    status, _, outputs, summary = run_action(workspace, tools, tmp_path, before="model.graph.txt", after=after)
    assert status != 0 and outputs == "code=3\n" and summary == ""
    assert not list(tmp_path.rglob("pwned"))


def test_the_hook_passes_at_0_and_1_and_fails_by_policy(workspace, tools):
    """As pre-commit runs it: the words of `entry`, then `args`."""
    (hook,) = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text())
    assert hook["language"] == "python" and hook["pass_filenames"] is False
    assert all(re.search(hook["files"], name) for name in ("m/model.onnx", "model.graph.txt", "octavo.diff.toml"))

    def run(*arguments: str) -> tuple[int, str]:
        done = subprocess.run([*shlex.split(hook["entry"]), *arguments], cwd=workspace, env=tools, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout

    assert run("model.graph.txt", "base.onnx")[0] == 0
    code, out = run("model.graph.txt", "head.onnx")
    assert code == 0 and "inserted Cast(to=1)" in out
    (workspace / "octavo.diff.toml").write_text('rules = ["forbid Cast"]')
    code, out = run("model.graph.txt", "head.onnx")
    assert code == 1 and "✗ forbid Cast" in out
    assert run("model.graph.txt", "missing.onnx")[0] == 1

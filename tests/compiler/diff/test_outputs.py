"""Policy, goldens, and every form in which a diff is told."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from xml.etree import ElementTree

import octavo
import pytest
from octavo import __main__ as cli
from octavo.compiler.diff.model import Cost, Edit, GraphDiff, Verdict
from octavo.compiler.diff.numbers import CaseNumbers, FirstDivergent, Numbers
from octavo.compiler.diff.policy import parse_rule
from octavo.compiler.diff.render_ci import to_github, to_junit, to_sarif
from octavo.compiler.diff.render_markdown import to_markdown
from octavo.compiler.diff.schema import as_json, json_schema
from octavo.errors import OptionError, RefusedError
from octavo.models.tiny import tiny_llama_onnx

COST = Cost(3, {"Add": 3}, 100, 12, 40, 8, 40)
NUMBERS = Numbers(
    (CaseNumbers("as they run", "prefill", 8, math.inf, math.inf, 0.5, 0.25, 0.1, 1e-6, 1e-4),), FirstDivergent("a", "b", "Add", 1.0, 0.0), ("a note",),
)
DIFF = GraphDiff(
    "old.onnx", "new|%.onnx",
    (Edit("inserted", "inserted Cast(to=1)", 30, tuple(f"r0[{i}].cast_0 (n|{i})" for i in range(30)), (), tuple(range(30))),
     Edit("weight", "MatMul input 1: contents of float32[4] changed", inside="If then_branch", places=("matmul_0",))),
    COST, replace(COST, nodes=33, ops={"Add": 3, "Cast": 30}), NUMBERS,
    (Verdict("max_new Cast 0", False, "0 → 30", "inserted <Cast>"), Verdict("forbid X", True, "0 X")),
)


def judged(models, tmp_path, *rules: str, extra: str = "") -> GraphDiff:
    policy = tmp_path / "octavo.diff.toml"
    policy.write_text(f"rules = {json.dumps(list(rules))}\n{extra}")
    return octavo.diff(*models, policy=policy)


@pytest.mark.parametrize("rule, ok", [
    ("expect Attention == layers", True), ("expect Attention == 3", False), ("expect Attention <= before", True), ("expect MatMul > 100", False),
    ("expect com.example::Attention == layers", False), ("forbid Softmax", True), ("forbid Cast", False), ("max_new Cast 4", True),
    ("max_new Cast 3", False), ("max_edits 2", True), ("max_edits 1", False), ("max_growth nodes 0.1", True), ("max_growth nodes 0.01", False),
    ("max_growth flops 0", True), ("interface frozen", True), ("opset frozen", False), ("weights frozen", True),
])
def test_rules(models, tmp_path, rule, ok):
    found = judged(models, tmp_path, rule)
    assert [(verdict.rule, verdict.ok) for verdict in found.verdicts] == [(rule, ok)]
    assert found.exit_code == (1 if ok else 2)


def test_a_rule_that_fails_says_what_is_nearest(models, tmp_path):
    (verdict,) = judged(models, tmp_path, "expect com.example::Attention == layers").verdicts
    assert verdict.found == "0 com.example::Attention, layers = 4" and verdict.nearest == "nearest: 4 Attention"
    (verdict,) = judged(models, tmp_path, "max_new Cast 0").verdicts
    assert verdict.nearest.startswith("inserted Cast(to=1)") and verdict.nearest.endswith("×4")
    assert judged(models, tmp_path, "expect Attention == layers", extra="layers = 9").exit_code == 2


@pytest.mark.parametrize("text", ["rules = 3", "rules = [3]", "x = 1", "not toml", "layers = true", 'rules = ["expect Softmax"]', 'rules = ["forbit X"]'])
def test_a_policy_that_is_none_is_a_typed_error(models, tmp_path, text):
    (tmp_path / "p.toml").write_text(text)
    with pytest.raises(OptionError):
        octavo.diff(*models, policy=tmp_path / "p.toml")
    with pytest.raises(OptionError):
        octavo.diff(*models, policy=tmp_path / "missing.toml")


def test_a_misspelt_rule_names_the_one_that_was_meant():
    with pytest.raises(OptionError, match="'max_new'"):
        parse_rule("maxnew Cast 0")


def test_goldens_are_updated_on_purpose_and_not_in_a_mass(models, tmp_path):
    golden = tmp_path / "model.graph.txt"
    golden.write_text(octavo.snapshot(models[0]))
    assert octavo.diff(golden, models[0]).same
    assert octavo.diff(golden, models[1], update=True).exit_code == 1 and golden.read_text() == octavo.snapshot(models[1])
    other = tiny_llama_onnx(tmp_path / "other", layers=1)
    with pytest.raises(RefusedError, match="more than 20%"):
        octavo.diff(golden, other, update=True)
    assert golden.read_text() == octavo.snapshot(models[1])
    octavo.diff(golden, other, update=True, force=True)
    assert octavo.diff(golden, other).same
    with pytest.raises(OptionError, match="no snapshot"):
        octavo.diff(models[0], models[1], update=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.graph.txt", "other"]


def test_text_tells_all():
    text = DIFF.to_text()
    for part in ("2 kinds of change at 31 places", "MOVED", "VIOLATED (1 of 2 rules)", "inserted Cast(to=1) ×30", "27 more",
                 "in If then_branch:", "nodes 3 → 33", "Cast 0 → 30",
                 "first divergent node", "a note", "✗ max_new Cast 0: 0 → 30 [inserted <Cast>]", "✓ forbid X"):
        assert part in text, part


def test_markdown_fits_a_comment_whatever_the_names_are():
    text = to_markdown(DIFF)
    assert text.startswith("### 🔴") and "×30" in text and "n\\|0" in text and "inserted &lt;Cast>" in text
    many = replace(DIFF, edits=tuple(Edit("inserted", f"inserted Op{i} {'x' * 200}") for i in range(2000)))
    assert len(to_markdown(many)) < 65_536 and "more kinds of change" in to_markdown(many)
    assert "Nothing changed." in to_markdown(replace(DIFF, edits=(), numbers=None, verdicts=()))


def test_junit_is_xml_and_fails_with_the_policy():
    suite = ElementTree.fromstring(to_junit(replace(DIFF, before="a\x00<b>")))
    assert suite.get("tests") == "3" and suite.get("failures") == "1"
    assert [case.get("name") for case in suite.iter("testcase") if case.find("failure") is not None] == ["max_new Cast 0"]


def test_sarif_and_annotations():
    run = json.loads(to_sarif(DIFF, "1.0"))["runs"][0]
    assert [result["level"] for result in run["results"]] == ["error", "note", "note"]
    assert {result["ruleId"] for result in run["results"]} == {rule["id"] for rule in run["tool"]["driver"]["rules"]}
    place = run["results"][0]["locations"][0]["physicalLocation"]["artifactLocation"]["uri"]
    assert place == "new%7C%25.onnx", "a URI, whatever a path has in it"
    lines = to_github(DIFF).splitlines()
    assert lines[0].startswith("::error file=new|%25.onnx,title=octavo diff::max_new Cast 0") and len(lines) == 3
    assert to_github(replace(DIFF, edits=(), verdicts=())).startswith("::notice")


def _fits(value: object, schema: dict) -> bool:
    """As much of JSON Schema as ours uses."""
    if "anyOf" in schema:
        return any(_fits(value, option) for option in schema["anyOf"])
    if "enum" in schema:
        return value in schema["enum"]
    kind = {"object": dict, "array": list, "string": str, "boolean": bool, "integer": int, "null": type(None), "number": (int, float)}[schema["type"]]
    if not isinstance(value, kind) or (isinstance(value, bool) and schema["type"] != "boolean"):
        return False
    if isinstance(value, list):
        return all(_fits(item, schema["items"]) for item in value)
    if isinstance(value, dict) and "properties" in schema:
        return set(value) == set(schema["required"]) and all(_fits(item, schema["properties"][key]) for key, item in value.items())
    return all(_fits(item, schema["additionalProperties"]) for item in value.values()) if isinstance(value, dict) else True


def test_json_fits_its_schema(models):
    for diff in (DIFF, octavo.diff(*models), replace(DIFF, numbers=None)):
        data = json.loads(json.dumps(diff.to_json(), allow_nan=False))
        assert _fits(data, json_schema())
    assert not _fits({**as_json(DIFF), "edits": [{"kind": "new"}]}, json_schema()), "the check itself can fail"


# The command line.


@pytest.fixture
def run(models, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> tuple[int, str, str]:
        code = cli.run([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_exit_codes(run, models, tmp_path):
    a, b = models
    assert run("diff", a, a)[0] == 0
    code, out, _ = run("diff", a, b)
    assert code == 1 and "inserted Cast(to=1) after RotaryEmbedding before Attention input 0 ×4" in out
    (tmp_path / "octavo.diff.toml").write_text('rules = ["forbid Cast"]')
    assert run("diff", a, b)[0] == 2 and run("diff", a, b, "--no-policy")[0] == 1
    assert run("diff", a, tmp_path / "missing.onnx")[0] == 3
    assert run("diff", a, b, "--format", "nonsense")[0] == 3 and run("diff", a, b, "--write", "junit")[0] == 3
    (tmp_path / "octavo.diff.toml").write_text('rules = ["nonsense"]')
    assert run("diff", a, b)[0] == 3


@pytest.mark.parametrize("form, begins", [("markdown", "### 🔵"), ("json", "{"), ("junit", "<?xml"), ("sarif", "{"), ("github", "::notice"), ("text", "")])
def test_every_format_on_standard_output_and_in_a_file(run, models, tmp_path, form, begins):
    code, out, _ = run("diff", *models, "--format", form, "--write", f"{form}={tmp_path / 'out'}")
    assert code == 1 and out.startswith(begins) and "Cast" in out
    assert (tmp_path / "out").read_text().startswith(begins) and "Cast" in (tmp_path / "out").read_text()


def test_snapshots_on_the_command_line(run, models, tmp_path):
    a, b = models
    golden = tmp_path / "m.graph.txt"
    code, out, _ = run("snapshot", a)
    assert code == 0 and out == octavo.snapshot(a)
    assert run("snapshot", a, "-o", golden)[0] == 0 and golden.read_text() == out
    assert run("diff", golden, b, "--update")[0] == 0 and golden.read_text() == octavo.snapshot(b)
    assert "unread" in run("snapshot", a, "--no-weights")[1] and "sha256" not in run("snapshot", a, "--no-weights")[1]
    assert json.loads(run("snapshot", a, "--json")[1])["snapshot"] == out


def test_git_shows_graphs_with_the_two_lines(run, models, tmp_path):
    import shutil
    import subprocess
    import sys

    code, out, _ = run("git-setup")
    config, attributes = out.splitlines()
    assert code == 0
    if shutil.which("git") is None:
        pytest.skip("needs git")
    config = config.replace("octavo snapshot", f"{sys.executable} -m octavo snapshot")
    identity = ("-c", "user.name=a", "-c", "user.email=a@b")
    subprocess.run(f"git init -q . && {config} && {attributes}", shell=True, check=True, cwd=tmp_path)
    shutil.copy(models[0], tmp_path / "m.onnx")
    subprocess.run(["git", *identity, "add", "-A"], check=True, cwd=tmp_path)
    subprocess.run(["git", *identity, "commit", "-qm", "a"], check=True, cwd=tmp_path)
    shutil.copy(models[1], tmp_path / "m.onnx")
    shown = subprocess.run(["git", "diff"], capture_output=True, text=True, check=True, cwd=tmp_path).stdout
    added = [line for line in shown.splitlines() if line.startswith("+ ")]
    assert any("cast_0 = Cast(rotaryembedding_0) to=1" in line for line in added) and len(added) == 2, shown

"""The page: complete in itself, safe with hostile names, and drawn by a real browser."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import octavo
import onnx
import pytest
from octavo.compiler.diff.html import page
from octavo.compiler.diff.source import read_snapshot
from octavo.compiler.diff.structure import compare_snapshots
from onnx import TensorProto, helper

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")


def written(models: tuple[Path, Path]) -> str:
    before, after = map(read_snapshot, models)
    return page(compare_snapshots(before, after, ("a.onnx", "b.onnx")), before, after)


def dom(text: str, folder: Path, fragment: str = "") -> str:
    """What a browser makes of the page."""
    if BROWSER is None:
        pytest.skip("needs Chromium (Debian: apt install chromium)")
    (folder / "page.html").write_text(text)
    flags = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-dev-shm-usage", "--window-size=1400,900")
    done = subprocess.run(
        [BROWSER, *flags, f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=10000", "--dump-dom", (folder / "page.html").as_uri() + fragment],
        capture_output=True, text=True, check=True, timeout=180,
    )
    return done.stdout


def test_the_page_needs_nothing_from_elsewhere(models):
    text = written(models)
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//""", text) and "@import" not in text and "url(http" not in text
    assert "default-src 'none'" in text and "Chris Pettitt" in text, "the layout library's licence goes with it"


def test_the_page_shows_both_graphs_with_layers_folded(models, tmp_path):
    found = dom(written(models), tmp_path)
    assert found.count("<svg") == 2 and found.count(">×4  ▾<") == 2
    assert len(re.findall(r'class="node inserted"', found)) == 1 and len(re.findall(r'class="node removed"', found)) == 0
    assert 'class="inserted"' in found and ">×4<" in found and "opset ai.onnx 23 → 24" in found
    drawn = int(re.search(r'data-drawn="(\d+)"', found)[1])
    assert 60 < drawn < 120, "one layer of four, on both sides"
    same = page(compare_snapshots(*[read_snapshot(models[0])] * 2), *[read_snapshot(models[0])] * 2)
    assert len(re.findall(r"\d nodes, click to open", dom(same, tmp_path))) == 2, "layers without a change are closed"


def test_a_picked_change_and_a_search_are_shown(models, tmp_path):
    found = dom(written(models), tmp_path, "#edit=0")
    assert re.search(r'data-hits="1"', found) and 'class="node inserted hit"' in found and "dimmed" in found
    hits = int(re.search(r'data-hits="(\d+)"', dom(written(models), tmp_path, "#search=RotaryEmbedding"))[1])
    assert hits == 4, "of each graph's four layers one is drawn"


def test_a_value_that_everything_reads_does_not_draw_everything(tmp_path):
    def write(name: str, odd: str) -> Path:
        nodes = [helper.make_node("Relu", ["x"], ["h"]), *(helper.make_node(odd if i == 9 else "Neg", ["h"], [f"y{i}"]) for i in range(3000))]
        nodes.append(helper.make_node("Concat", [f"y{i}" for i in range(3000)], ["z"], axis=0))
        ports = [helper.make_tensor_value_info(value, TensorProto.FLOAT, ["n"]) for value in ("x", "z")]
        onnx.save(helper.make_model(helper.make_graph(nodes, "g", ports[:1], ports[1:]), opset_imports=[helper.make_opsetid("", 21)]), tmp_path / name)
        return tmp_path / name

    found = dom(written((write("a.onnx", "Neg"), write("b.onnx", "Abs"))), tmp_path)
    assert 0 < int(re.search(r'data-drawn="(\d+)"', found)[1]) < 600


def test_names_that_are_markup_stay_text(tmp_path):
    evil = "</script><img src=x onerror=alert(1)>"
    graph = helper.make_graph(
        [helper.make_node("Relu", [evil], ["y"], name=evil, domain="<b>")], "g", [helper.make_tensor_value_info(evil, TensorProto.FLOAT, [1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])],
    )
    (tmp_path / "m.onnx").write_bytes(helper.make_model(graph, opset_imports=[helper.make_opsetid("<b>", 1)]).SerializeToString())
    snapshot = read_snapshot(tmp_path / "m.onnx")
    text = page(compare_snapshots(snapshot, snapshot, (evil, "/*JS*/")), snapshot, snapshot)
    assert evil not in text and text.count("<script") == 3
    found = dom(text, tmp_path)
    assert "<img" not in found.split('id="data"')[0] and 'data-drawn="' in found


def compiled(source: Path, folder: Path, **options: object) -> tuple[str, octavo.CompileReport]:
    report = octavo.compile(source, folder / "art", options=octavo.CompileOptions(**options), html=folder / "compile.html")
    return (folder / "compile.html").read_text(), report


def test_the_page_of_a_compile_shows_it_as_a_whole_and_pass_by_pass(models, tmp_path):
    text, report = compiled(models[0], tmp_path, weights="int4")
    assert len(text) < 600_000, "what nodes say stands in it once"
    found = dom(text, tmp_path)
    assert 'data-step="all passes"' in found and ">PagedAttention<" in found and ">Attention<" in found and 'class="refusal"' not in found
    passes = [outcome.stage for outcome in report.outcomes if outcome.stage not in ("observe", "match_attention")]     # those change nothing
    shown = re.findall(r"<option[^>]*>(?:\d+\. )?([^<]*)</option>", found)
    assert [name.split(" ")[0] for name in shown] == ["all", *passes]
    lowered = 1 + passes.index("lower_paged")
    assert re.search(r"lower_paged \(\d+\)", shown[lowered]) and shown[-1] == "cleanup –"
    step = dom(text, tmp_path, f"#step={lowered}")
    assert 'data-step="lower_paged"' in step and f"after {passes[lowered - 2]}" in step and "after lower_paged" in step
    assert len(re.findall(r'class="node inserted', step)) >= 1 and "rewritten 4 of 4 sites" in step
    quantized = dom(text, tmp_path, "#step=quantize_linears")
    assert ">QuantLinear<" in quantized and ">PagedAttention<" in quantized and 'class="node replaced' in quantized
    assert "Nothing changed." in dom(text, tmp_path, f"#step={len(passes)}")


def test_the_last_pass_leaves_what_the_artifact_holds(models, tmp_path):
    from octavo.compiler.diff.trace import Trace
    from octavo.compiler.ledger import Ledger
    from octavo.compiler.options import CompileOptions
    from octavo.compiler.pipeline import rewrite
    from octavo.models.onnx_reader import read_onnx

    options = CompileOptions(weights="int8", kv_cache="int8")
    octavo.compile(models[0], tmp_path / "art", options=options)
    trace = Trace()
    trace.start(read_onnx(models[0]))
    rewrite(lambda: read_onnx(models[0]), models[0].parent, options, Ledger(False, trace))
    trace.close()
    assert trace.source == read_snapshot(models[0]) and trace.steps[-1].snapshot == read_snapshot(tmp_path / "art")
    trace.begin()
    trace.after(trace.steps[0].outcome, read_onnx(models[0]))
    count = len(trace.steps)
    trace.undone()
    assert len(trace.steps) == count - 1, "what a failed target did is not shown"


def test_refusals_are_red_with_what_came_nearest(unknown_attention, tmp_path):
    """The graph stays as it is."""
    text, report = compiled(unknown_attention, tmp_path)
    assert report.kind == "baseline" and any(refusal.nearest for refusal in report.refusals)
    found = dom(text, tmp_path)
    assert found.count('class="refusal"') == len(report.refusals) and "nearest: " in found and 'id="summary" class="bad"' in found
    assert "Nothing changed." in found


def test_a_model_from_memory_has_a_page_too(models, tmp_path):
    octavo.compile(onnx.load(models[0]), tmp_path / "art", html=tmp_path / "p.html")
    assert "lower_paged" in (tmp_path / "p.html").read_text()

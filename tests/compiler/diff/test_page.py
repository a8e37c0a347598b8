"""The page: complete in itself, safe with hostile names, and drawn by a real browser."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import octavo
import pytest
from octavo.compiler.diff.html import compile_page, page
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


def test_the_page_of_a_compile_tells_its_stages_and_refusals(models, tmp_path):
    report = octavo.compile(models[0], tmp_path / "art")
    text = compile_page(models[0], tmp_path / "art", report)
    found = dom(text, tmp_path)
    assert "PagedAttention" in found and "match_attention" in found and 'class="refusal"' not in found
    refusal = type(report)(**{**report.__dict__, "refusals": (_refusal(),)})
    found = dom(compile_page(models[0], tmp_path / "art", refusal), tmp_path)
    assert 'class="refusal"' in found and "nearest: softmax over 3 axes" in found


def _refusal():
    from octavo.passes.outcome import Refusal

    return Refusal("the mask is unknown", "layers.0.attention", "softmax over 3 axes")

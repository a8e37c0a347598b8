"""An artifact is whole or refused; writing one leaves the target whole or as it was."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from octavo.custom_ops.contract import CACHE_LAYOUT
from octavo.errors import ArtifactError
from octavo.models import artifact as on_disk
from octavo.models.artifact import GRAPH, MANIFEST, REPORT, WEIGHTS, Artifact, ArtifactWriter, Manifest, SourceRecord
from octavo.models.decision import Decision
from octavo.models.interface import GraphInterface, GraphPort
from octavo.models.spec import CacheGroup, CacheLayer, ModelSpec

MANIFEST_OF_ALL = Manifest(
    kind="paged",
    interface=GraphInterface(
        inputs=(GraphPort("input_ids", "int64", (1, "T"), "input_ids"), GraphPort("x", "float32", None, "other", layer=3)),
        outputs=(GraphPort("logits", "float32", ("R", None, 7), "logits"),),
    ),
    spec=ModelSpec(7, 64, (CacheLayer(0, 2, 16, 16, "fp16"), CacheLayer(1, 2, 16, 16, "fp32")), (CacheGroup(None), CacheGroup(8))),
    source=SourceRecord("model.onnx", "0" * 64),
    options={"weights": "fp32", "paged": True, "nested": [1, {"a": None}]},
    decisions=(Decision("paged", "on", "every site pages"), Decision("kv_cache", "fp16", "auto", stage="load", where="layer 3")),
    files={},
    cache_layout=CACHE_LAYOUT,
    octavo_version="0.1.0",
    thresholds={"kl": 1e-5},
)


def graph_bytes(location: str | None = WEIGHTS) -> bytes:
    from onnx import TensorProto, helper

    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4])
    if location is None:
        tensor.raw_data = bytes(16)
    else:
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=location)
    return helper.make_model(helper.make_graph([], "g", [], [], [tensor])).SerializeToString()


def write(target: Path, manifest: Manifest = MANIFEST_OF_ALL, graph: bytes | None = None) -> Artifact:
    with ArtifactWriter(target) as writer:
        (writer.folder / GRAPH).write_bytes(graph_bytes() if graph is None else graph)
        (writer.folder / WEIGHTS).write_bytes(bytes(range(16)))
        (writer.folder / REPORT).write_text("{}")
        return writer.finish(manifest)


def edit(artifact: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Rewrites the manifest after `change` has been at its JSON."""
    data = json.loads((artifact / MANIFEST).read_text())
    change(data)
    (artifact / MANIFEST).write_text(json.dumps(data))


def test_what_is_written_is_read_and_verified(tmp_path: Path) -> None:
    artifact = write(tmp_path / "deep" / "out")
    assert artifact == Artifact.open(tmp_path / "deep" / "out")
    assert artifact.folder == tmp_path / "deep" / "out"
    assert artifact.graph == artifact.folder / GRAPH
    assert set(artifact.manifest.files) == {GRAPH, WEIGHTS, REPORT}
    assert artifact.manifest.files[WEIGHTS].size == 16
    assert replace(artifact.manifest, files={}) == MANIFEST_OF_ALL
    artifact.verify_contents()
    assert sorted(path.name for path in (tmp_path / "deep").iterdir()) == ["out"]


def test_a_manifest_survives_the_round_trip(tmp_path: Path) -> None:
    for manifest in (MANIFEST_OF_ALL, replace(MANIFEST_OF_ALL, spec=None, kind="stateless", cache_layout=None, decisions=())):
        on_disk.write_manifest(manifest, tmp_path / MANIFEST)
        assert on_disk.read_manifest(tmp_path / MANIFEST) == manifest


EDITS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "version": (lambda m: m.update(format_version=2), "format version 2"),
    "no version": (lambda m: m.pop("format_version"), "format version None"),
    "bool version": (lambda m: m.update(format_version=True), "format version True"),
    "layout": (lambda m: m.update(cache_layout="k-pd.0"), "'k-pd.0'"),
    "weight layout": (lambda m: m.update(weight_layout="o8.0"), "'o8.0'"),
    "no layout": (lambda m: m.update(cache_layout=None), "cache layout None"),
    "unknown key": (lambda m: m.update(library="/tmp/x.so"), "unknown key 'library'"),
    "missing key": (lambda m: m.pop("interface"), "no key 'interface'"),
    "wrong type": (lambda m: m.update(octavo_version=1), "octavo_version"),
    "kind": (lambda m: m.update(kind="magic"), "kind"),
    "nested key": (lambda m: m["interface"]["inputs"][0].update(path="x"), r"inputs\[0\]"),
    "nested type": (lambda m: m["spec"].update(vocab_size="7"), "vocab_size"),
    "bool size": (lambda m: m["files"][GRAPH].update(size=True), "size"),
    "role": (lambda m: m["interface"]["inputs"][0].update(role="guess"), "role"),
    "size": (lambda m: m["files"][WEIGHTS].update(size=17), "records 17"),
    "no graph": (lambda m: m["files"].pop(GRAPH), "records no model.onnx"),
    "unrecorded weights": (lambda m: m["files"].pop(WEIGHTS), "does not record"),
    "path": (lambda m: m["files"].update({"../x": {"size": 0, "sha256": ""}}), "not a plain name"),
    "absolute path": (lambda m: m["files"].update({"/etc/passwd": {"size": 0, "sha256": ""}}), "not a plain name"),
    "no spec": (lambda m: m.update(spec=None), "without a spec"),
    "no cache": (lambda m: m["spec"].update(cache_layers=[]), "without a cache"),
    "negative size": (lambda m: m["spec"]["cache_layers"][0].update(head_size=-1), "not in 1"),
    "huge context": (lambda m: m["spec"].update(max_context=2**40), "not in 1"),
    "group of its own": (lambda m: m["spec"]["cache_layers"][0].update(group=2), "in a group"),
    "extra file": (lambda m: m["files"].update({"gone.json": {"size": 0, "sha256": ""}}), "gone.json is missing"),
}


@pytest.mark.parametrize("name", EDITS)
def test_an_edited_manifest_is_refused(name: str, tmp_path: Path) -> None:
    change, message = EDITS[name]
    write(tmp_path / "out")
    edit(tmp_path / "out", change)
    with pytest.raises(ArtifactError, match=message) as caught:
        Artifact.open(tmp_path / "out")
    assert caught.value.hint


MALFORMED = ["", "{", "[]", "null", '{"format_version": 1, "format_version": 1}', '{"format_version": NaN}', "[" * 100000]


@pytest.mark.parametrize("content", MALFORMED, ids=range(len(MALFORMED)))
def test_malformed_json_is_refused(content: str, tmp_path: Path) -> None:
    write(tmp_path / "out")
    (tmp_path / "out" / MANIFEST).write_text(content)
    with pytest.raises(ArtifactError) as caught:
        Artifact.open(tmp_path / "out")
    assert caught.value.hint


def drop(name: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).unlink()


def grow(folder: Path) -> None:
    with (folder / WEIGHTS).open("ab") as stream:
        stream.write(b"x")


def link_weights(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder.parent / "elsewhere")
    (folder / WEIGHTS).symlink_to(folder.parent / "elsewhere")


@pytest.mark.parametrize("harm", [drop(GRAPH), drop(WEIGHTS), drop(REPORT), drop(MANIFEST), grow, link_weights])
def test_a_file_missing_changed_or_linked_is_refused_at_open(harm: Callable[[Path], Any], tmp_path: Path) -> None:
    write(tmp_path / "out")
    harm(tmp_path / "out")
    with pytest.raises(ArtifactError) as caught:
        Artifact.open(tmp_path / "out")
    assert caught.value.hint


@pytest.mark.parametrize("name", [GRAPH, WEIGHTS, REPORT])
def test_changed_contents_of_the_same_size_show_when_verified(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / "out").folder / name
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=name):
        Artifact.open(tmp_path / "out").verify_contents()


@pytest.mark.parametrize("location", ["../secret", "/etc/passwd", "absent.data"])
def test_a_graph_that_reads_elsewhere_is_never_put_in_place(location: str, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(bytes(16))
    with pytest.raises(ArtifactError):
        write(tmp_path / "out", graph=graph_bytes(location))
    assert [path.name for path in tmp_path.iterdir()] == ["secret"]


def test_a_layout_concerns_paged_artifacts_only(tmp_path: Path) -> None:
    assert write(tmp_path / "out", replace(MANIFEST_OF_ALL, kind="contiguous", cache_layout=None)).manifest.cache_layout is None


@pytest.mark.parametrize("path", ["missing", "file"])
def test_what_is_no_folder_is_refused(path: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ArtifactError, match=r"not a folder|does not exist"):
        Artifact.open(tmp_path / path)


def test_an_interrupted_write_leaves_the_old_artifact(tmp_path: Path) -> None:
    write(tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(KeyboardInterrupt), ArtifactWriter(tmp_path / "out") as writer:
        (writer.folder / GRAPH).write_bytes(b"half")
        raise KeyboardInterrupt
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    write(tmp_path / "out", graph=graph_bytes(None))
    assert (tmp_path / "out" / GRAPH).read_bytes() != before[GRAPH]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_artifact_with_files_of_others_in_it_is_not_replaced(tmp_path: Path) -> None:
    write(tmp_path / "out")
    (tmp_path / "out" / "my model.onnx").write_bytes(b"mine")
    with pytest.raises(ArtifactError, match="other files"):
        write(tmp_path / "out")
    assert (tmp_path / "out" / "my model.onnx").read_bytes() == b"mine"


def test_a_full_disk_is_an_artifact_error_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="No space left") as caught, ArtifactWriter(tmp_path / "out") as writer:
        (writer.folder / GRAPH).write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert caught.value.hint and not list(tmp_path.iterdir())


def test_tokenizer_files_are_copied_as_files(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "tokenizer.json").write_text("{}")
    (source / "vocab.txt").write_text("no")
    (tmp_path / "secret").write_text("secret")
    (source / "config.json").symlink_to(tmp_path / "secret")
    (source / "chat_template.jinja").mkdir()
    with ArtifactWriter(tmp_path / "out") as writer:
        assert writer.copy_tokenizer(source) == ("tokenizer.json",)
        (writer.folder / GRAPH).write_bytes(graph_bytes(None))
        artifact = writer.finish(MANIFEST_OF_ALL)
    assert set(artifact.manifest.files) == {GRAPH, "tokenizer.json"}


def test_an_artifact_opens_without_onnx_or_numpy(tmp_path: Path) -> None:
    write(tmp_path / "out")
    code = (
        "import sys\n"
        "for name in ('onnx', 'onnx_ir', 'onnxscript', 'gguf', 'torch'): sys.modules[name] = None\n"
        "from octavo.models.artifact import Artifact\n"
        f"Artifact.open({str(tmp_path / 'out')!r}).verify_contents()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

"""Loading: options, bad input, what an artifact needs installed, and what is recorded."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import numpy as np
import octavo
import onnx
import pytest
from octavo.errors import (
    ArtifactError,
    CapacityError,
    LibraryError,
    ModelError,
    OptionError,
    RequestError,
    UnsafePathError,
    UnsupportedError,
)
from octavo.models.sizes import parse_size
from octavo.runtime.config import RuntimeOptions
from octavo.runtime.kv.budget import Budget, plan_blocks
from onnx import TensorProto, helper


def test_sizes():
    for text, size in (("2GiB", 2**31), (" 1.5 kB ", 1500), (7, 7), ("12", 12), ("1tib", 2**40), ("3 MB", 3_000_000)):
        assert parse_size(text, "memory") == size
    for bad in ("", "GiB", "-1", "2 XB", "1e3", 0, -5, 1.5, True, None, "0", 2**60, "nan"):
        with pytest.raises(OptionError):
            parse_size(bad, "memory")


@pytest.mark.parametrize("bad", [
    {"threads": 0}, {"threads": 1025}, {"threads": True}, {"threads": "2"}, {"block_size": 0}, {"block_size": 24}, {"block_size": 32.0},
    {"memory": "lots"}, {"batching": 1}, {"optimize_graph": None},
])
def test_options_out_of_range(bad):
    with pytest.raises(OptionError, match=next(iter(bad))):
        RuntimeOptions(**bad)


def test_options_are_frozen_and_typed(source):
    with pytest.raises(AttributeError):
        RuntimeOptions().threads = 3
    with pytest.raises(OptionError, match="not RuntimeOptions"):
        octavo.load(source, options={"threads": 1})


def test_the_pool_by_arithmetic(paths):
    from octavo.models.artifact import Artifact

    spec = Artifact.open(paths.contiguous).manifest.spec
    size = 32 * 2 * 2 * (16 + 16) * 4
    plan = {"memory": None, "model_bytes": 1000, "free_memory": 10**9}
    assert plan_blocks(spec, 32, **plan).num_blocks == 4 * 512 // 32
    assert plan_blocks(spec, 32, **{**plan, "free_memory": 7 * size}).num_blocks == 3
    assert plan_blocks(spec, 32, **{**plan, "memory": 1000 + 5 * size + size - 1}) == Budget(5, size, plan_blocks(
        spec, 32, **{**plan, "memory": 1000 + 5 * size + size - 1}).reason)
    for short in ({"memory": 1000 + size - 1}, {"memory": 1}, {"free_memory": size}):
        with pytest.raises(CapacityError, match=f"{size:,} bytes a block"):
            plan_blocks(spec, 32, **{**plan, **short})


def test_memory_that_holds_nothing_is_refused_at_load(paths, op_library):
    with pytest.raises(CapacityError, match="no block of the cache fits"):
        octavo.load(paths.paged, options=RuntimeOptions(memory="4 kB"))


def test_decisions_of_load(paths, op_library):
    with octavo.load(paths.paged, options=RuntimeOptions(threads=1)) as model:
        features = {d.feature: d.value for d in model.decisions if d.stage == "load"}
        assert features["threads"] == "1" and features["batching"] == "on" and "blocks" in features["memory"]
    with octavo.load(paths.baseline, options=RuntimeOptions(memory="1GiB")) as model:
        features = {d.feature: d.value for d in model.decisions}
        assert features["kind"] == "baseline" and features["memory"] == "no pool" and features["max_context"] == "512"


def test_without_fusions_the_numbers_stay(source):
    with octavo.load(source) as fused, octavo.load(source, options=RuntimeOptions(optimize_graph=False)) as plain:
        np.testing.assert_allclose(fused.predict([4, 5, 6]), plain.predict([4, 5, 6]), atol=2e-5)


# --- bad files ----------------------------------------------------------------------------------------------------------------


def copied(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def test_paths_that_are_no_model(tmp_path, source):
    (tmp_path / "empty.onnx").touch()
    (tmp_path / "text.onnx").write_text("hello")
    data = onnx.load(source).SerializeToString()
    (tmp_path / "cut.onnx").write_bytes(data[: len(data) // 2])
    for name in ("none", "."):
        with pytest.raises(ArtifactError):
            octavo.load(tmp_path / name)
    for name in ("empty.onnx", "text.onnx", "cut.onnx", "x" * 5000):
        with pytest.raises(ModelError):
            octavo.load(tmp_path / name)


def test_the_graph_of_an_artifact_is_no_model_of_its_own(paths, op_library):
    with pytest.raises(LibraryError, match="loaded by its folder"):
        octavo.load(paths.paged / "model.onnx")


def test_a_broken_artifact(paths, tmp_path):
    folder = copied(paths.contiguous, tmp_path)
    manifest = folder / "octavo.json"
    text = manifest.read_text()
    for old, new in (('"format_version": 1', '"format_version": 2'), ('"kind"', '"kinds"'), ("{", "")):
        manifest.write_text(text.replace(old, new, 1))
        with pytest.raises(ArtifactError):
            octavo.load(folder)
    manifest.write_text(text)
    with (folder / "model.onnx.data").open("ab") as stream:
        stream.write(b"x")
    with pytest.raises(ArtifactError, match="bytes"):
        octavo.load(folder)


def test_an_artifact_of_another_cache_layout(paths, tmp_path):
    folder = copied(paths.paged, tmp_path)
    manifest = json.loads((folder / "octavo.json").read_text())
    (folder / "octavo.json").write_text(json.dumps({**manifest, "cache_layout": "other.9"}))
    with pytest.raises(ArtifactError, match=r"other\.9"):
        octavo.load(folder)


def test_external_data_outside_the_folder(source, tmp_path):
    folder = copied(source.parent, tmp_path)
    (folder / "model.onnx.data").rename(tmp_path / "elsewhere")
    (folder / "model.onnx.data").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UnsafePathError, match="symbolic link"):
        octavo.load(folder / "model.onnx")


def test_an_op_that_nobody_has(tmp_path):
    graph = helper.make_graph(
        [helper.make_node("Mystery", ["x"], ["y"], domain="ai.octavo")], "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])], [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23), helper.make_opsetid("ai.octavo", 1)], ir_version=11)
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(LibraryError, match="Mystery"):
        octavo.load(tmp_path / "m.onnx")


# --- no op library ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_library(monkeypatch):
    from octavo.runtime import ort_session

    def register(_):
        raise LibraryError("the library is not there")

    monkeypatch.setattr(ort_session, "register", register)


def test_without_the_op_library(no_library, paths, source, tmp_path):
    with pytest.raises(LibraryError, match="source="):
        octavo.load(paths.paged)
    with octavo.load(paths.paged, source=source) as model:
        assert model.kind == "baseline"
        assert any(d.feature == "op library" and "not there" in d.reason for d in model.decisions)
        assert model.predict([3, 4]).shape == (2, 320)
    other = copied(source.parent, tmp_path) / "model.onnx"
    changed = onnx.load(other)
    changed.producer_name = "else"
    onnx.save(changed, other)
    with pytest.raises(ModelError, match="sha256 differs"):
        octavo.load(paths.paged, source=other)


def test_a_stateless_graph_may_do_without_it(no_library, paths):
    with octavo.load(paths.stateless) as model:
        assert model.kind == "stateless" and any(d.feature == "op library" for d in model.decisions)


def test_source_goes_with_an_artifact(source):
    with pytest.raises(OptionError, match="artifact"):
        octavo.load(source, source=source)


def test_source_is_not_looked_at_where_the_library_loads(paths, op_library, tmp_path):
    with octavo.load(paths.paged, source=tmp_path / "missing.onnx") as model:
        assert model.kind == "paged"


# --- bad requests -------------------------------------------------------------------------------------------------------------


def test_bad_prompts(model):
    params = octavo.SamplingParams(max_tokens=2)
    sequence = model.begin_session().new_sequence()
    bad = [
        [], "", [320], [-1], [[1], []], [1.5], [True], None, 7, {"role": "user"}, [{"role": "user"}], [{"role": 1, "content": ""}],
        np.zeros((1, 0), int), np.zeros((0, 3), int), np.array([1.0]), np.array([[320]]), [[[1]]], b"bytes", [None],
        "\ud800", [{"role": "user", "content": "\ud800"}],
    ]
    for prompt in bad:
        with pytest.raises(octavo.OctavoError):
            model.generate(prompt, params)
        with pytest.raises(octavo.OctavoError):
            model.stream(prompt, params)
    for ids in ([], [320], [-1], np.zeros(0, np.int64), np.zeros((1, 2), np.int64), [1.0], "text", 3, None, [2**70]):
        for use in (model.predict, sequence.append):
            with pytest.raises(RequestError):
                use(ids)
    for use in (lambda: sequence.append([1], rows="first"), lambda: sequence.truncate(1), lambda: sequence.truncate(-1), sequence.generate,
                lambda: model.stream(["a", "b"]), lambda: model.generate("a", octavo.SamplingParams(stop_token_ids=[320]))):
        with pytest.raises(RequestError):
            use()
    with pytest.raises(OptionError, match="SamplingParams"):
        model.generate("a", {"max_tokens": 3})
    sequence.append([1])
    for use in (sequence.generate, sequence.stream):
        with pytest.raises(OptionError, match="SamplingParams"):
            use({"max_tokens": 3})
    for params in (octavo.SamplingParams(n=2), octavo.SamplingParams(prompt_logprobs=1)):
        with pytest.raises(RequestError):
            sequence.generate(params)
    with pytest.raises(CapacityError):
        model.generate([[1] * 512])
    with pytest.raises(RequestError, match="twice"):
        model.begin_session().append_batch([(sequence, [1]), (sequence, [2])])
    assert len(sequence) == 1


def test_prompts_of_every_form(model):
    params = octavo.SamplingParams(temperature=0, max_tokens=2)
    chat = [{"role": "user", "content": "hi"}]
    ids = model.tokenizer.encode_chat(chat)
    forms = [chat, ids, tuple(ids), np.array(ids), np.array(ids, np.uint16), [np.int32(i) for i in ids]]
    assert len({model.generate(form, params)[0].completions for form in forms}) == 1
    assert len(model.generate([*forms, "text"], params)) == 7
    assert len(model.generate(np.array([ids, ids]), params)) == 2


def test_another_models_sequence_is_refused(model, kind, paths):
    """Its blocks would be looked up, written and counted in this model's pool."""
    with octavo.load(getattr(paths, kind), options=octavo.RuntimeOptions(threads=1)) as other:
        sequence = other.begin_session().new_sequence()
        expected = sequence.append([5] * 40)
        for stranger in (sequence, None):
            with pytest.raises(RequestError, match="its own model"):
                model.begin_session().append_batch([(model.begin_session().new_sequence(), [1]), (stranger, [1])])
        sequence.truncate(39)
        np.testing.assert_allclose(sequence.append([5]), expected, rtol=0, atol=1e-4)


def test_end_tokens_beyond_the_vocabulary_are_none(source, tmp_path):
    folder = copied(source.parent, tmp_path)
    (folder / "generation_config.json").write_text('{"eos_token_id": [5000, -1]}')
    last = octavo.SamplingParams(temperature=0, max_tokens=3, min_tokens=2, logit_bias={319: 100})
    with octavo.load(folder / "model.onnx") as model:
        assert model.generate([[5, 6]], last)[0].completions[0].token_ids == (319, 319, 319), "-1 is not the last token"


def test_stops(model):
    def complete(**fields):
        params = octavo.SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, **fields)
        return model.generate([[5, 6, 7]], params)[0].completions[0]

    whole = complete()
    third = whole.token_ids[2]
    first = whole.token_ids.index(third)
    stopped = complete(stop_token_ids=[third])
    assert (stopped.token_ids, stopped.finish_reason) == (whole.token_ids[: first + 1], "stop")
    text = whole.text[3:5]
    stopped = complete(stop=text)
    assert (stopped.text, stopped.finish_reason) == (whole.text[: whole.text.find(text)], "stop")
    assert third not in complete(stop_token_ids=[third], min_tokens=8).token_ids[:8]


def test_defaults_from_generation_config(source, tmp_path):
    folder = copied(source.parent, tmp_path)
    (folder / "generation_config.json").write_text('{"temperature": 0.5, "top_k": 7, "do_sample": true, "max_new_tokens": 3}')
    with octavo.load(folder / "model.onnx") as model:
        assert model.default_params == octavo.SamplingParams(temperature=0.5, top_k=7, max_tokens=3)
        assert any(d.feature == "sampling defaults" for d in model.decisions)
        assert len(model.generate("x")[0].completions[0].token_ids) <= 3
    (folder / "generation_config.json").write_text('{"temperature": -3}')
    with octavo.load(folder / "model.onnx") as model:
        assert model.default_params == octavo.SamplingParams()
        assert any("out of range" in d.reason for d in model.decisions)


def test_a_broken_tokenizer_fails_what_needs_it(source, tmp_path):
    for name in ("model.onnx", "model.onnx.data"):
        shutil.copy(source.parent / name, tmp_path / name)
    (tmp_path / "tokenizer.json").write_text("{}")
    with octavo.load(tmp_path / "model.onnx") as model:
        assert model.predict([1, 2]).shape[0] == 2
        for use in (lambda: model.generate("x"), lambda: model.generate([[1]], octavo.SamplingParams(max_tokens=2, ignore_eos=True))):
            with pytest.raises(ModelError, match=r"tokenizer\.json"):
                use()
        assert model.stats()["sequences"] == 0


def test_loading_reads_no_vocabulary(source):
    """What only text needs is imported and read when text is needed."""
    code = f"""
import sys, octavo
model = octavo.load({str(source.parent / "model.onnx")!r})
print([name for name in ("tokenizers", "jinja2", "onnx", "onnxscript", "asyncio", "hashlib") if name in sys.modules])
model.tokenizer.encode("x")
print("tokenizers" in sys.modules)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split("\n")[:2] == ["[]", "True"]


def test_no_tokenizer_and_no_context(source, tmp_path):
    for name in ("model.onnx", "model.onnx.data"):
        shutil.copy(source.parent / name, tmp_path / name)
    with octavo.load(tmp_path / "model.onnx") as model:
        assert model.tokenizer is None
        for use in (lambda: model.generate("x"), lambda: model.generate([[1]], octavo.SamplingParams(max_tokens=2, stop="x"))):
            with pytest.raises(UnsupportedError, match="tokenizer"):
                use()
        with pytest.raises(RequestError, match="give max_tokens"):
            model.generate([[1]])
        (result,) = model.generate([[1]], octavo.SamplingParams(max_tokens=2))
        assert len(result.completions[0].token_ids) == 2 and result.text == ""


def test_a_graph_without_logits_runs_and_does_not_generate(tmp_path):
    graph = helper.make_graph(
        [helper.make_node("Gather", ["table", "input_ids"], ["last_hidden_state"])], "encoder",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["B", "S"])],
        [helper.make_tensor_value_info("last_hidden_state", TensorProto.FLOAT, ["B", "S", 4])],
        [onnx.numpy_helper.from_array(np.eye(4, dtype=np.float32), "table")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), tmp_path / "m.onnx")
    with octavo.load(tmp_path / "m.onnx") as model:
        np.testing.assert_array_equal(model.run({"input_ids": np.array([[2]])})["last_hidden_state"], np.eye(4)[None, 2:3])
        for use in (lambda: model.generate([[1]]), model.begin_session, lambda: model.predict([1]), lambda: model.stream([1])):
            with pytest.raises(UnsupportedError, match="no logits"):
                use()
        assert any(d.feature == "decoder" and d.value == "off" for d in model.decisions)
        assert model.stats()["model_bytes"] > 0


def test_logits_of_a_type_that_numpy_lacks_are_named_at_load(tmp_path):
    graph = helper.make_graph(
        [helper.make_node("Gather", ["table", "input_ids"], ["wide"]), helper.make_node("Cast", ["wide"], ["logits"], to=TensorProto.BFLOAT16)],
        "decoder", [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["B", "S"])],
        [helper.make_tensor_value_info("logits", TensorProto.BFLOAT16, ["B", "S", 4])],
        [onnx.numpy_helper.from_array(np.eye(4, dtype=np.float32), "table")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), tmp_path / "m.onnx")
    with octavo.load(tmp_path / "m.onnx") as model, pytest.raises(UnsupportedError, match="bfloat16, which NumPy lacks"):
        model.predict([1])


def test_a_closed_model(source):
    model = octavo.load(source)
    sequence = model.begin_session().new_sequence()
    stream = model.stream([3, 4], octavo.SamplingParams(max_tokens=5))
    model.close()
    model.close()
    for use in (lambda: model.predict([1]), lambda: model.run({}), model.begin_session, model.stats, lambda: sequence.append([1]),
                lambda: model.generate([[1]])):
        with pytest.raises(RequestError, match="closed"):
            use()
    sequence.close()
    stream.close()


def test_an_artifact_runs_without_the_compilers_dependencies(paths, op_library):
    """In a process where onnx, onnx_ir, onnxscript, gguf, torch and transformers can't be imported."""
    code = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("onnx", "onnx_ir", "onnxscript", "gguf", "torch", "transformers"):
            raise ImportError(f"blocked: {name}")
sys.meta_path.insert(0, Block())
import octavo
for path in sys.argv[1:]:
    with octavo.load(path) as model:
        model.predict([3, 4])
        print(model.kind, model.generate("the", octavo.SamplingParams(max_tokens=3, ignore_eos=True))[0].usage.completion_tokens)
"""
    args = [str(p) for p in (paths.paged, paths.contiguous, paths.stateless, paths.baseline)]
    out = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, check=False)
    assert out.stdout.split() == ["paged", "3", "contiguous", "3", "stateless", "3", "baseline", "3"], out.stderr

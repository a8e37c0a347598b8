"""Running a graph as its exporter wrote it, and as octavo lowered it, on the same tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray
from octavo import custom_ops
from octavo.models.interface import GraphInterface
from octavo.passes.attention.lower_contiguous import ContiguousPlan, LowerContiguous
from octavo.passes.attention.lower_flash import FlashPlan, LowerFlash
from octavo.passes.attention.lower_paged import LowerPaged
from octavo.passes.attention.match import match_attention
from octavo.passes.attention.site import AttentionSite
from octavo.passes.cache_interface import CacheInterface, TokenFlatPlan
from octavo.passes.logits import LogitRows
from octavo.passes.normalize import Normalize
from octavo.passes.observe import Observation, observe
from octavo.passes.outcome import Refusal

MAX_CONTEXT = 64
P = 16


def seen(model: ir.Model, interface: GraphInterface, max_context: int = MAX_CONTEXT) -> tuple[Observation, tuple[AttentionSite | Refusal, ...]]:
    """The observation of a normalized model and what is matched in it."""
    Normalize()(model)
    observation = observe(model, interface)
    return observation, match_attention(model, observation, max_context=max_context)


def open_model(model: ir.Model | Path, folder: Path | None = None, *, fused: bool = True) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    if not fused:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    custom_ops.register(options)
    if isinstance(model, Path):
        return ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    if folder is not None:
        ir.save(model, folder / "lowered.onnx", external_data="lowered.onnx.data")
        return ort.InferenceSession(str(folder / "lowered.onnx"), options, providers=["CPUExecutionProvider"])
    return ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])


class Original:
    """The exporter's graph: whole sequences from position 0, any batch."""

    def __init__(self, model: ir.Model | Path, interface: GraphInterface) -> None:
        self.session, self.interface = open_model(model, fused=False), interface

    def run(self, ids: NDArray[np.int64], mask: NDArray[np.int64] | None = None) -> NDArray[np.float32]:
        """Logits [B, S, V]."""
        feeds = {}
        for port in self.interface.inputs:
            if port.role == "input_ids":
                array = ids
            elif port.role == "attention_mask":
                array = np.ones_like(ids) if mask is None else mask
                if port.shape is not None and isinstance(port.shape[1], int):
                    array = np.pad(array, ((0, 0), (0, port.shape[1] - array.shape[1])))
            elif port.role == "position_ids":
                array = np.tile(np.arange(ids.shape[1]), (len(ids), 1))
            elif port.role in ("cache_position", "write_indices"):
                array = np.arange(ids.shape[1]) if port.role == "cache_position" else np.zeros(len(ids))
            else:
                assert port.shape is not None
                array = np.zeros((len(ids), port.shape[1], port.shape[2] if isinstance(port.shape[2], int) else 0, port.shape[3]))
            feeds[port.name] = array.astype(port.dtype)
        logits = next(port.name for port in self.interface.outputs if port.role == "logits")
        return self.session.run([logits], feeds)[0]


class Paged:
    """The token-flat graph over `count` sequences, blocks handed out in no order, caches full of NaN where nothing was written."""

    def __init__(self, model: ir.Model, plan: TokenFlatPlan, folder: Path | None = None, count: int = 2) -> None:
        for step in (LowerPaged(plan), LogitRows(plan), CacheInterface(plan)):
            step(model)
        self.plan, self.session = plan, open_model(model, folder)
        blocks = count * MAX_CONTEXT // P
        self.table = np.random.default_rng(0).permutation(blocks).reshape(count, -1).astype(np.int32)
        self.lengths = [0] * count
        self.caches = {}
        for i, layer in enumerate(plan.spec.cache_layers):
            dtype = {"fp32": np.float32, "fp16": np.float16}[layer.cache]
            self.caches[f"kv.{i}.key"] = np.full((blocks, layer.kv_heads, layer.head_size, P), np.nan, dtype)
            self.caches[f"kv.{i}.value"] = np.full((blocks, layer.kv_heads, P, layer.value_size), np.nan, dtype)

    def step(self, work: Sequence[tuple[int, Sequence[int]]], rows: Sequence[int] | None = None) -> NDArray[np.float32]:
        """Appends to sequences and gives the logits of `rows` (default: all)."""
        ids, positions, ends, past, slots, parents = [], [], [0], [], [], []
        for b, tokens in work:
            for j, token in enumerate(tokens):
                at = self.lengths[b] + j
                parents.append(len(ids) - 1 if j else -1)
                ids.append(token)
                positions.append(at)
                slots.append(self.table[b, at // P] * P + at % P)
            ends.append(len(ids))
            past.append(self.lengths[b])
            self.lengths[b] += len(tokens)
        feeds = {
            "input_ids": np.array([ids], np.int64), "position_ids": np.array([positions], np.int64), "parent": np.array(parents, np.int32),
            "cumulative_sequence_length": np.array(ends, np.int32), "past_seqlens": np.array(past, np.int32),
            "logit_rows": np.arange(len(ids)) if rows is None else np.array(rows, np.int64),
        }
        for group in range(len(self.plan.spec.cache_groups)):
            feeds[f"block_table.{group}"] = self.table[[b for b, _ in work]]
            feeds[f"slot_mapping.{group}"] = np.array(slots, np.int32)
        values = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in {**feeds, **self.caches}.items()}
        return self.session.run_with_ort_values(None, values)[0].numpy()


def paged_error(original: Original, paged: Paged, vocab: int) -> float:
    """The largest difference over the largest logit: a prefill, a mixed step, chunks, single tokens, gathered rows, two sequences throughout."""
    draw = np.random.default_rng(1)
    a, b = draw.integers(0, vocab, 37), draw.integers(0, vocab, 29)
    left, right = original.run(a[None])[0], original.run(b[None])[0]
    pairs = [
        (paged.step([(0, a[:20])]), left[:20]),
        (paged.step([(0, a[20:21]), (1, b[:7])]), np.concatenate([left[20:21], right[:7]])),
        (paged.step([(1, b[7:20]), (0, a[21:33])]), np.concatenate([right[7:20], left[21:33]])),
        (paged.step([(0, a[33:34])], rows=[0]), left[33:34]),
        (paged.step([(0, a[34:35])]), left[34:35]),
        (paged.step([(1, b[20:]), (0, a[35:])], rows=[8, 10]), np.stack([right[28], left[36]])),
    ]
    largest = max(np.abs(left).max(), np.abs(right).max())
    assert all(np.isfinite(got).all() for got, _ in pairs)
    return max(float(np.abs(got - want).max()) for got, want in pairs) / largest


def contiguous_error(original: Original, model: ir.Model, plan: ContiguousPlan, vocab: int, folder: Path | None = None) -> float:
    """As above for one sequence with past and present."""
    LowerContiguous(plan)(model)
    session = open_model(model, folder)
    ids = np.random.default_rng(0).integers(0, vocab, 30)
    want, at, worst = original.run(ids[None])[0], 0, 0.0
    past = {p.name: np.zeros((1, p.shape[1], 0, p.shape[3]), np.float32) for p in plan.interface.inputs if p.role in ("past_key", "past_value") and p.shape}
    outputs = [port.name for port in plan.interface.outputs]
    for count in (1, 10, 7, 1, 1, 10):
        feeds = {"input_ids": ids[None, at:at + count], "position_ids": np.arange(at, at + count)[None], "attention_mask": np.ones((1, at + count), np.int64)}
        got = dict(zip(outputs, session.run(outputs, {**{p.name: feeds[p.role] for p in plan.interface.inputs if p.role in feeds}, **past})))
        worst = max(worst, float(np.abs(got["logits"][0] - want[at:at + count]).max()))
        at += count
        for port in plan.interface.outputs:
            if port.role in ("present_key", "present_value"):
                source = plan.interface.input("past_key" if port.role == "present_key" else "past_value", port.layer)
                assert source is not None
                past[source.name] = got[port.name]
    return worst / float(np.abs(want).max())


def flash_error(original: Original, model: ir.Model, plan: FlashPlan, vocab: int, batch: int, folder: Path | None = None) -> float:
    """As above for a stateless run of `batch` sequences, the last one padded on the right where the graph takes an attention_mask."""
    LowerFlash(plan)(model)
    session = open_model(model, folder)
    ids, mask = np.random.default_rng(0).integers(0, vocab, (batch, 11)), np.ones((batch, 11), np.int64)
    roles = {port.role: port.name for port in plan.interface.inputs}
    if "attention_mask" in roles:
        mask[-1, 8:] = 0
    feeds = {"input_ids": ids, "attention_mask": mask, "position_ids": np.tile(np.arange(11), (batch, 1))}
    logits = next(port.name for port in plan.interface.outputs if port.role == "logits")
    got = session.run([logits], {name: feeds[role] for role, name in roles.items()})[0]
    want, real = original.run(ids, mask), mask.astype(bool)
    return float(np.abs(got - want)[real].max() / np.abs(want[real]).max())

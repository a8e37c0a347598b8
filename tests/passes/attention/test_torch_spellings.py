"""Attention as torch code in unusual hands, exported: paged and right, or refused where one of them is changed to mean something else."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
from drivers import MAX_CONTEXT, Original, Paged, paged_error, seen
from octavo.models.onnx_reader import graph_interface, read_onnx
from octavo.passes.attention.mask_candidates import meaning
from octavo.passes.attention.match import sites_of
from octavo.passes.cache_interface import TokenFlatPlan, plan_token_flat
from octavo.passes.observe import Observation
from octavo.passes.outcome import Refusal
from octavo.passes.scatter_cache import scatter_interface

pytest.importorskip("torch", reason='needs torch: pip install "octavo[export]"')
import torch
from torch_spellings import MEANINGS, VOCAB, Decoder, FoldedGroups, Places, WrittenOut


def exported(kind: type[Decoder], folder: Path) -> tuple[Path, Observation, tuple]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = kind().export(folder / "model.onnx")
    model = read_onnx(path)
    return path, *seen(model, scatter_interface(model, graph_interface(model)))


@pytest.mark.parametrize("kind", MEANINGS, ids=lambda kind: kind.__name__)
def test_the_logits_are_torchs(kind: type[Decoder], tmp_path: Path) -> None:
    path, observation, found = exported(kind, tmp_path)
    assert len(sites_of(found)) == 1, found
    assert meaning(found[0].mask) == MEANINGS[kind]
    plan = plan_token_flat(observation, found, max_context=MAX_CONTEXT)
    assert isinstance(plan, TokenFlatPlan), str(plan)
    assert paged_error(Original(path, observation.interface), Paged(observation.model, plan), VOCAB) < 1e-4


class ByValues(FoldedGroups):
    """Probabilities of other heads than their values'."""

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return super().attend(q, k, v.flip(1), mask)


class OverQueries(WrittenOut):
    """A softmax over the queries: exp over its sum along the wrong axis."""

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        scores = torch.einsum("bshd,bgtd->bhst", q, k)
        weights = (scores - scores.amax(-2, keepdim=True)).exp()
        return torch.einsum("bhst,bgtd->bshd", weights / weights.sum(-2, keepdim=True), v)


class Late(Places):
    offset = 1


@pytest.mark.parametrize("kind", [ByValues, OverQueries, Late], ids=lambda kind: kind.__name__)
def test_near_misses_do_not_page(kind: type[Decoder], tmp_path: Path) -> None:
    _, observation, found = exported(kind, tmp_path)
    sites = sites_of(found)
    assert not sites or isinstance(plan_token_flat(observation, sites, max_context=MAX_CONTEXT), Refusal)
    assert len(found) <= 1

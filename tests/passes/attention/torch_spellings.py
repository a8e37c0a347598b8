"""One-layer decoders whose attention is written as some programmer might write it, and nobody here has: what they mean is plain causal,
windowed, chunked or ALiBi attention with grouped heads.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor, nn

VOCAB, HIDDEN, H, G, D, PLACES = 50, 48, 4, 2, 12, 64


class Decoder(nn.Module):
    """`attend` takes q [B, S, H, D], keys and values [B, G, T, D] and a mask [B, T], and gives [B, S, H, D]."""

    rotary = True

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.embedding, self.head = nn.Embedding(VOCAB, HIDDEN), nn.Linear(HIDDEN, VOCAB)
            self.q, self.kv, self.o = nn.Linear(HIDDEN, H * D), nn.Linear(HIDDEN, 2 * G * D), nn.Linear(H * D, HIDDEN)
            for parameter in self.parameters():
                parameter.data.mul_(2)

    def turned(self, x: Tensor, positions: Tensor) -> Tensor:
        if not self.rotary:
            return x
        angle = (positions[..., None].float() * 10000.0 ** (-torch.arange(0, D, 2) / D))[:, :, None]
        first, second = x[..., : D // 2], x[..., D // 2 :]
        return torch.cat([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], -1)

    def project(self, ids: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The hidden states, q [B, S, H, D], and k and v [B, G, S, D], which one product gives in turns."""
        x = self.embedding(ids)
        k, v = self.kv(x).view(*ids.shape, G, 2, D).unbind(3)
        q = self.turned(self.q(x).view(*ids.shape, H, D), positions)
        return x, q, self.turned(k, positions).transpose(1, 2), v.transpose(1, 2)

    def logits(self, x: Tensor, attended: Tensor) -> Tensor:
        return self.head(x + self.o(attended.reshape(*x.shape[:2], H * D)))

    def forward(self, ids: Tensor, mask: Tensor, positions: Tensor, past_key: Tensor, past_value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, q, k, v = self.project(ids, positions)
        keys, values = torch.cat([past_key, k], 2), torch.cat([past_value, v], 2)
        return self.logits(x, self.attend(q, keys, values, mask)), keys, values

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        raise NotImplementedError

    def export(self, path: Path) -> Path:
        """TorchScript at opset 17."""
        example = (
            torch.ones(2, 3, dtype=torch.long), torch.ones(2, 8, dtype=torch.long), torch.arange(5, 8).repeat(2, 1), torch.randn(2, G, 5, D),
            torch.randn(2, G, 5, D),
        )
        rows, cache = {0: "batch", 1: "sequence"}, {0: "batch", 2: "past"}
        return _export(self, path, example, {
            "input_ids": rows, "attention_mask": {0: "batch", 1: "total"}, "position_ids": rows, "past_key_values.0.key": cache,
            "past_key_values.0.value": cache,
        })


def _export(module: nn.Module, path: Path, example: tuple[Tensor, ...], axes: dict[str, dict[int, str]]) -> Path:
    torch.onnx.export(
        module.eval(), example, str(path), dynamo=False, opset_version=17, input_names=list(axes), dynamic_axes=axes,
        output_names=["logits", "present.0.key", "present.0.value"],
    )
    return path


def causal(q: Tensor, k: Tensor) -> Tensor:
    """[S, T]."""
    S, T = q.shape[1], k.shape[2]
    return torch.arange(T)[None, :] <= torch.arange(S)[:, None] + (T - S)


def spread(x: Tensor) -> Tensor:
    return x.repeat_interleave(H // G, 1)


class FoldedGroups(Decoder):
    """Einsum with the group as an index of its own; `masked_fill` by a boolean."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        grouped = q.view(*q.shape[:2], G, H // G, D)
        seen = causal(q, k)[None, None, None] & mask[:, None, None, None, :].bool()
        weights = (torch.einsum("bsgrd,bgtd->bgrst", grouped, k) / math.sqrt(D)).masked_fill(~seen, float("-inf")).softmax(-1)
        return torch.einsum("bgrst,bgtd->bsgrd", weights, v)


class FourthRoot(Decoder):
    """q and k each scaled by the fourth root of D; a mask of −10000."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        scores = (q * D**-0.25).permute(0, 2, 1, 3) @ spread(k * D**-0.25).transpose(-1, -2)
        hidden = (1.0 - causal(q, k)[None, None].float() * mask[:, None, None, :].float()) * -10000.0
        return (torch.softmax(scores + hidden, -1) @ spread(v)).transpose(1, 2)


class IntegerTriangle(Decoder):
    """An integer triangle, padding added as the smallest float, heads by expand and reshape."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        B, S, T = q.shape[0], q.shape[1], k.shape[2]
        k, v = (x[:, :, None].expand(B, G, H // G, T, D).reshape(B, H, T, D) for x in (k, v))
        scores = torch.matmul(q.transpose(1, 2), k.transpose(2, 3)) * D**-0.5
        triangle = torch.triu(torch.ones(S, T, dtype=torch.int32), diagonal=1 + T - S)
        lowest = torch.finfo(torch.float32).min
        scores = torch.where((triangle == 1)[None, None], torch.tensor(lowest), scores) + (1 - mask[:, None, None, :].float()) * lowest
        return (scores.softmax(-1) @ v).transpose(1, 2)


class HeadsLast(Decoder):
    """Scores [B, S, T, H], and a softmax over their third axis."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        k, v = (spread(x).permute(0, 2, 1, 3) for x in (k, v))
        seen = (causal(q, k.transpose(1, 2))[None] & mask[:, None, :].bool())[..., None]
        weights = (torch.einsum("bshd,bthd->bsth", q, k) * 0.3).masked_fill(~seen, -1e9).softmax(2)
        return torch.einsum("bsth,bthd->bshd", weights, v)


class WrittenOut(Decoder):
    """A softmax written as exp over its sum; a window of 7 by distances."""

    window = 7

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        S, T = q.shape[1], k.shape[2]
        far = torch.arange(S)[:, None] + (T - S) - torch.arange(T)[None, :]
        seen = ((far >= 0) & (far < self.window))[None, None] & mask[:, None, None].bool()
        scores = (torch.einsum("bshd,bhtd->bhst", q, spread(k)) * 0.3).masked_fill(~seen, -1e30)
        weights = (scores - scores.amax(-1, keepdim=True)).exp()
        return torch.einsum("bhst,bhtd->bshd", weights / weights.sum(-1, keepdim=True), spread(v))


class Distances(Decoder):
    """ALiBi by absolute distances, padding as the logarithm of the mask, no rotary."""

    rotary = False

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        S, T = q.shape[1], k.shape[2]
        far = (torch.arange(T)[None, :] - (torch.arange(S)[:, None] + (T - S))).float()
        slopes = torch.tensor([4.0 ** -(h + 1) for h in range(H)])
        scores = torch.einsum("bshd,bhtd->bhst", q, spread(k)) / math.sqrt(D) - slopes[None, :, None, None] * far.abs()[None, None]
        scores = scores.masked_fill((far > 0)[None, None], float("-inf")) + torch.log(mask[:, None, None, :].float())
        return torch.einsum("bhst,bhtd->bshd", scores.softmax(-1), spread(v))


class CountedPositions(Decoder):
    """Positions counted from the mask, for keys and queries alike."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        places = mask.long().cumsum(-1) - 1
        seen = (places[:, None, :] <= places[:, k.shape[2] - q.shape[1] :][:, :, None]) & mask[:, None, :].bool()
        scores = torch.einsum("bshd,bhtd->bhst", q, spread(k)) * 0.3
        return torch.einsum("bhst,bhtd->bshd", scores.masked_fill(~seen[:, None], -1e30).softmax(-1), spread(v))


class Chunks(Decoder):
    """Chunks of 6 by division, in one call of torch's own attention."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        S, T = q.shape[1], k.shape[2]
        chunk = torch.div(torch.arange(T), 6, rounding_mode="floor")
        seen = (causal(q, k) & (chunk[None] == chunk[T - S :][:, None]))[None, None] & mask[:, None, None].bool()
        return nn.functional.scaled_dot_product_attention(q.transpose(1, 2), spread(k), spread(v), attn_mask=seen).transpose(1, 2)


class Places(Decoder):
    """A cache of PLACES places, written where `cache_position` says, by assignment (`offset` places late: another model)."""

    offset = 0

    def forward(self, ids: Tensor, at: Tensor, past_key: Tensor, past_value: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        x, q, k, v = self.project(ids, at[None].expand(*ids.shape))
        keys, values = past_key.clone(), past_value.clone()
        keys[:, :, at + self.offset], values[:, :, at + self.offset] = k, v
        seen = (torch.arange(PLACES)[None] <= at[:, None])[None, None]
        attended = nn.functional.scaled_dot_product_attention(q.transpose(1, 2), spread(keys), spread(values), attn_mask=seen)
        return self.logits(x, attended.transpose(1, 2)), keys, values

    def export(self, path: Path) -> Path:
        cache = torch.randn(2, G, PLACES, D)
        return _export(self, path, (torch.ones(2, 3, dtype=torch.long), torch.arange(5, 8), cache, cache), {
            "input_ids": {0: "batch", 1: "sequence"}, "cache_position": {0: "sequence"}, "past_key_values.0.key": {0: "batch"},
            "past_key_values.0.value": {0: "batch"},
        })


MEANINGS = {
    FoldedGroups: "causal", FourthRoot: "causal", IntegerTriangle: "causal", HeadsLast: "causal", WrittenOut: "window 7", Distances: "causal",
    CountedPositions: "causal", Chunks: "chunked 6", Places: "causal",
}

"""torch.nn.Transformer with what it leaves out around it: embeddings, positions and a head."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.configs import Size

Array = np.ndarray


class TorchTransformer(nn.Module):
    """src (B, S)   tgt (B, T)   ids, with pads at the end   ->   logits (B, T, V)

    masks   hide the source's pads, as torchformer does; else there must be none
    """

    causal_mask: Tensor
    positions: Tensor

    def __init__(self, size: Size, dropout: float = 0.0, masks: bool = False):
        super().__init__()
        self.masks = masks
        C, T = size.d_model, size.length
        self.src_embedding = nn.Embedding(size.vocab_size, C, padding_idx=0)
        self.tgt_embedding = nn.Embedding(size.vocab_size, C, padding_idx=0)
        self.dropout = nn.Dropout(dropout)
        self.transformer = nn.Transformer(
            C,
            size.n_heads,
            size.n_layers,
            size.n_layers,
            size.d_ff,
            dropout,
            batch_first=True,
        )
        self.head = nn.Linear(C, size.vocab_size)
        angle = torch.arange(T)[:, None] * torch.exp(-math.log(1e4) / C * torch.arange(0, C, 2))
        positions = torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)  # interleaved
        self.register_buffer("positions", positions, persistent=False)  # (T, C)
        mask = nn.Transformer.generate_square_subsequent_mask(T)
        self.register_buffer("causal_mask", mask, persistent=False)  # (T, T)

    def forward(self, src: Tensor, tgt: Tensor) -> Tensor:
        x = self.embed(self.src_embedding, src)
        y = self.embed(self.tgt_embedding, tgt)
        is_pad = src == 0 if self.masks else None  # (B, S); the target's come after every token
        y = self.transformer(
            x,
            y,
            tgt_mask=self.causal_mask,
            tgt_is_causal=True,
            src_key_padding_mask=is_pad,
            memory_key_padding_mask=is_pad,
        )
        return self.head(y)

    def embed(self, embedding: nn.Embedding, ids: Tensor) -> Tensor:
        return self.dropout(embedding(ids) * math.sqrt(embedding.embedding_dim) + self.positions)


RENAMED = (  # npformer's name, torch.nn.Transformer's
    ("encoder.layers", "transformer.encoder.layers"),
    ("decoder.layers", "transformer.decoder.layers"),
    ("encoder.norm", "transformer.encoder.norm"),
    ("decoder.norm", "transformer.decoder.norm"),
    ("cross_attn", "multihead_attn"),
    ("feed_forward.", ""),
)


def to_reference(weights: dict[str, Array]) -> dict[str, Array]:
    """npformer's weights by the names of TorchTransformer, which stacks q, k and v in one."""
    renamed: dict[str, Any] = {}
    for name, w in weights.items():
        for ours, theirs in RENAMED:
            name = name.replace(ours, theirs)
        stacked = name.replace("q_proj.", "in_proj_")
        if stacked != name:
            parts = [name.replace("q_proj", f"{letter}_proj") for letter in "qkv"]
            renamed[stacked] = parts
        renamed[name] = w
    for name, parts in list(renamed.items()):
        if isinstance(parts, list):
            renamed[name] = np.concatenate([renamed.pop(part) for part in parts])
    return renamed


def from_reference(weights: dict[str, Array]) -> dict[str, Array]:
    """The inverse of to_reference."""
    renamed = {}
    for name, w in weights.items():
        name = name.replace("multihead_attn", "cross_attn").removeprefix("transformer.")
        for linear in ("linear1", "linear2"):
            name = name.replace(linear, f"feed_forward.{linear}")
        if "in_proj_" in name:
            parts = zip("qkv", np.split(w, 3), strict=True)
            renamed |= {name.replace("in_proj_", f"{letter}_proj."): part for letter, part in parts}
        else:
            renamed[name] = w
    return renamed

"""The decoder: one layer, then the stack   [Vaswani et al. 2017, § 3.1, figure 1 right].

An encoder layer with one sublayer more, in the middle: cross-attention, where the decoder asks and
`memory`, the encoder's output, answers.  (A decoder-only model has no memory, and its layers are
encoder layers under a causal mask: see transformer.py.)
"""

from collections.abc import Iterable

import numpy as np
from numpy.typing import DTypeLike

from npformer.attention import MultiHeadAttention
from npformer.cache import KeyValues, LayerCache, around
from npformer.feedforward import FeedForward
from npformer.layers import LayerNorm
from npformer.module import Module
from npformer.ops import Array, Forward, Mask, Rng, dropout
from npformer.options import flag, probability


class DecoderLayer(Module):
    """Self-attention, cross-attention, feed-forward; a residual and a LayerNorm around each.

    x (B, T, C)   memory (B, S, C)   ->   y (B, T, C)
    mask -> (B, H, T, T) is the self-attention's, memory_mask -> (B, H, T, S) the cross-attention's.

    `backward` returns dx, dmemory.
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        d_ff: int,
        *,
        activation: str = "relu",
        norm_first: bool = False,
        attention_dropout: float = 0.0,
        activation_dropout: float = 0.0,
        sublayer_dropout: float = 0.0,
        eps: float = 1e-5,
        rng: Rng,
        dtype: DTypeLike = np.float32,
    ):
        self.norm_first = flag("norm_first", norm_first)
        self.dropout = probability("sublayer_dropout", sublayer_dropout)
        self.self_attn = MultiHeadAttention(
            d_model, n_heads, attention_dropout, rng=rng, dtype=dtype
        )
        self.cross_attn = MultiHeadAttention(
            d_model, n_heads, attention_dropout, rng=rng, dtype=dtype
        )
        self.feed_forward = FeedForward(
            d_model, d_ff, activation, activation_dropout, rng=rng, dtype=dtype
        )
        self.norm1 = LayerNorm(d_model, eps, dtype=dtype)
        self.norm2 = LayerNorm(d_model, eps, dtype=dtype)
        self.norm3 = LayerNorm(d_model, eps, dtype=dtype)

    def forward(
        self,
        x: Array,
        memory: Array,
        mask: Mask = None,
        memory_mask: Mask = None,
        rng: Rng | None = None,
    ) -> Forward:
        forward = self.pre_norm if self.norm_first else self.post_norm
        return forward(x, memory, mask, memory_mask, rng)

    def post_norm(
        self, x: Array, memory: Array, mask: Mask, memory_mask: Mask, rng: Rng | None
    ) -> Forward:
        """g = norm1(x + self_attn(x)),   h = norm2(g + cross_attn(g, memory)),
        y = norm3(h + feed_forward(h))   [§ 5.4].
        """
        a, backward_attn = self.self_attn(x, x, x, mask, rng)  # (B, T, C)
        kept_a, backward_drop1 = dropout(a, self.dropout, rng)
        g, backward_norm1 = self.norm1(x + kept_a)

        c, backward_cross = self.cross_attn(g, memory, memory, memory_mask, rng)  # (B, T, C)
        kept_c, backward_drop2 = dropout(c, self.dropout, rng)
        h, backward_norm2 = self.norm2(g + kept_c)

        f, backward_ff = self.feed_forward(h, rng)  # (B, T, C)
        kept_f, backward_drop3 = dropout(f, self.dropout, rng)
        y, backward_norm3 = self.norm3(h + kept_f)

        def backward(dy):
            # With J the Jacobian of a part:   dsum3 = J_norm3ᵀ dy,   dh = dsum3 + J_ffᵀ dsum3,
            # dsum2 = J_norm2ᵀ dh,   dg = dsum2 + J_crossᵀ dsum2,   dk_memory + dv_memory = dmemory,
            # dsum1 = J_norm1ᵀ dg,   dx = dsum1 + J_attnᵀ dsum1.
            dsum3 = backward_norm3(dy)
            dh = dsum3 + backward_ff(backward_drop3(dsum3))

            dsum2 = backward_norm2(dh)
            dquery, dk_memory, dv_memory = backward_cross(backward_drop2(dsum2))
            dg = dsum2 + dquery

            dsum1 = backward_norm1(dg)
            dq, dk, dv = backward_attn(backward_drop1(dsum1))
            return dsum1 + dq + dk + dv, dk_memory + dv_memory

        return y, backward

    def pre_norm(
        self, x: Array, memory: Array, mask: Mask, memory_mask: Mask, rng: Rng | None
    ) -> Forward:
        """g = x + self_attn(norm1(x)),   h = g + cross_attn(norm2(g), memory),
        y = h + feed_forward(norm3(h)).
        """
        n1, backward_norm1 = self.norm1(x)
        a, backward_attn = self.self_attn(n1, n1, n1, mask, rng)  # (B, T, C)
        kept_a, backward_drop1 = dropout(a, self.dropout, rng)
        g = x + kept_a

        n2, backward_norm2 = self.norm2(g)
        c, backward_cross = self.cross_attn(n2, memory, memory, memory_mask, rng)  # (B, T, C)
        kept_c, backward_drop2 = dropout(c, self.dropout, rng)
        h = g + kept_c

        n3, backward_norm3 = self.norm3(h)
        f, backward_ff = self.feed_forward(n3, rng)  # (B, T, C)
        kept_f, backward_drop3 = dropout(f, self.dropout, rng)
        y = h + kept_f

        def backward(dy):
            # With J the Jacobian of a part:   dn3 = J_ffᵀ dy,   dh = dy + J_norm3ᵀ dn3,
            # dn2 = J_crossᵀ dh,   dg = dh + J_norm2ᵀ dn2,   dk_memory + dv_memory = dmemory,
            # dq + dk + dv = J_attnᵀ dg,   dx = dg + J_norm1ᵀ (dq + dk + dv).
            dn3 = backward_ff(backward_drop3(dy))
            dh = dy + backward_norm3(dn3)

            dn2, dk_memory, dv_memory = backward_cross(backward_drop2(dh))
            dg = dh + backward_norm2(dn2)

            dq, dk, dv = backward_attn(backward_drop1(dg))
            return dg + backward_norm1(dq + dk + dv), dk_memory + dv_memory

        return y, backward

    def start(self, memory: Array) -> LayerCache:
        """No position yet, but the memory's keys and values, once and for all."""
        return LayerCache(None, KeyValues.of(*self.cross_attn.keys_values(memory)))

    def step(
        self, x: Array, cache: LayerCache, mask: Mask = None, memory_mask: Mask = None
    ) -> tuple[Array, LayerCache]:
        """The T positions that come after those in the cache, without dropout or backward.

        x (B, T, C)   mask -> (B, H, T, S + T)   ->   y (B, T, C), and the cache of all S + T
        """

        def look_back(x):
            nonlocal cache
            cache = cache.append(*self.self_attn.keys_values(x))
            return self.self_attn.ask(x, cache.own, mask)

        def ask_memory(x):
            return self.cross_attn.ask(x, cache.memory, memory_mask)

        def feed(x):
            return self.feed_forward(x)[0]

        g = around(look_back, x, self.norm1, self.norm_first)
        h = around(ask_memory, g, self.norm2, self.norm_first)
        y = around(feed, h, self.norm3, self.norm_first)
        return y, cache


class Decoder(Module):
    """A stack of DecoderLayers, all asking the same memory, and maybe a final LayerNorm.

    x (B, T, C)   memory (B, S, C)   ->   y (B, T, C)
    mask -> (B, H, T, T) is the self-attention's, memory_mask -> (B, H, T, S) the cross-attention's.

    `backward` returns dx, dmemory.
    """

    def __init__(self, layers: Iterable[DecoderLayer], norm: LayerNorm | None = None):
        self.layers = list(layers)
        self.norm = norm

    def forward(
        self,
        x: Array,
        memory: Array,
        mask: Mask = None,
        memory_mask: Mask = None,
        rng: Rng | None = None,
    ) -> Forward:
        """x ← layer(x, memory) for each layer;   y = norm(x), or x where there is no final norm."""
        backwards = []
        for layer in self.layers:
            x, backward_layer = layer(x, memory, mask, memory_mask, rng)
            backwards.append(backward_layer)
        y, backward_norm = self.norm(x) if self.norm else (x, lambda dy: dy)

        def backward(dy):
            # dx = J_normᵀ dy,   then dx ← J_layerᵀ dx, the last layer first;
            # dmemory = Σ dmemory_layer.
            dx, dmemory = backward_norm(dy), 0
            for backward_layer in reversed(backwards):
                dx, dmemory_layer = backward_layer(dx)
                dmemory = dmemory + dmemory_layer  # every layer asked the same memory
            return dx, dmemory

        return y, backward

    def start(self, memory: Array) -> list[LayerCache]:
        return [layer.start(memory) for layer in self.layers]

    def step(
        self,
        x: Array,
        caches: list[LayerCache],
        mask: Mask = None,
        memory_mask: Mask = None,
    ) -> tuple[Array, list[LayerCache]]:
        """The T positions that come after those in the caches, one of which each layer has."""
        after = []
        for layer, cache in zip(self.layers, caches, strict=True):
            x, cache = layer.step(x, cache, mask, memory_mask)
            after.append(cache)
        return (self.norm(x)[0] if self.norm else x), after
